"""python geometry.py: what training did to the hidden states and to the next-token distribution.

    python geometry.py --base tiny --trained runs/<time>/final --principles FILE

The trained model writes completions; both models read them, and are compared at the same tokens,
layer by layer: how far the hidden states have moved (Sinkhorn divergence, Bures-Wasserstein, CKA,
mean shift), whether they moved along the principles' directions, and how much the next-token
distributions differ (Fisher-Rao, KL). metrics.py and sinkhorn.py have the estimators.
"""

import support  # isort: skip  # noqa: F401  (before torch: see there)

import math
import random
import sys
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm

import metrics
from sinkhorn import relative_eps, sinkhorn_divergence
from support.chains import sample_chains
from support.command import check_written_files, exit_status, load_named, parse
from support.data import make_template, pick_questions
from support.errors import InputError
from support.files import load_principles
from support.logits import logits_of
from support.prompts import prompt_limit
from support.report import layer_plot, print_geometry, write_plot
from support.scoring import block_side, layer_states
from support.settings import MAX_SEED, DatasetConfig, check_bounds, option
from support.writing import write_json

CLOUD = 512  # points of a Sinkhorn divergence


@dataclass
class GeometryConfig(DatasetConfig):
    """What training did to the hidden states and next-token distributions, on the same tokens."""

    base: str = field(metadata={"help": "the model before training: tiny (the embedded model), a folder, or a hub id"})
    trained: str = field(metadata={"help": "the model after training, of the same shape; it writes the completions"})
    principles: str = field(metadata={"help": "file of principles, .txt (one a line) or .jsonl"})
    num_questions: int = option(32, "questions to write to; all of --dataset if it has fewer", at_least=1)
    num_tokens: int = option(
        2048, "tokens to compare: each completion gives as many, drawn at random, and at least one", at_least=2
    )
    json: str | None = option(None, "write all numbers to this .json file, and a plot over layers beside it, as .png")
    max_completion_length: int = option(64, "tokens in a completion; longer ones are cut", at_least=1)
    seed: int = option(0, "seed of everything random", at_least=0, at_most=MAX_SEED)

    def check(self) -> None:
        """Raises InputError for the first value that cannot be used."""
        check_bounds(self)
        check_written_files(self, json=".json")


def compare_layer(base, trained, labels, num_principles: int, seed: int = 0) -> dict:
    """The figures of a layer: base and trained [n, d], the same tokens; labels [n], principles.

    The Sinkhorn divergence is of CLOUD points drawn at random, in each layer the same; all other
    figures are of all n.
    """
    order = torch.randperm(len(base), generator=torch.Generator().manual_seed(seed))  # [n]
    cloud = order[:CLOUD].sort().values  # [m]
    x, y = base[cloud].double(), trained[cloud].double()  # [m, d] float64: the divergence is often a small difference
    divergence, info = sinkhorn_divergence(x, y, relative_eps(x, y, 0.1))
    shift = trained.double() - base.double()  # [n, d]
    means = [metrics.principle_means(states, labels, num_principles) for states in (base, trained)]  # [K, d] each
    directions = [metrics.centred(m) for m in means]  # [K, d] each
    share, rank = metrics.share_in_span(shift, directions[0])
    row = {
        "scale": metrics.centred(base).square().sum(-1).mean().sqrt(),
        "sinkhorn": divergence, "sinkhorn_error": info.marginal_error,
        "bures_wasserstein": metrics.bures_wasserstein(base, trained),
        "linear_cka": metrics.linear_cka(base, trained, debiased=True) if len(base) > 3 else math.nan,
        "rank_before": metrics.effective_rank(base), "rank_after": metrics.effective_rank(trained),
        "mean_shift": shift.mean(0).norm(),
        "shift_in_span": share, "random_span": rank / base.shape[1],
        "angle_before": metrics.mean_angle(directions[0]), "angle_after": metrics.mean_angle(directions[1]),
        "between_within_before": metrics.between_to_within(base, labels, num_principles),
        "between_within_after": metrics.between_to_within(trained, labels, num_principles),
    }
    return {name: float(value) for name, value in row.items()}


@torch.no_grad()
def compare_outputs(models, hidden, hidden_elsewhere) -> dict:
    """Distances [n] of next-token distributions, from last hidden states [n, d] of (base, trained).

    `hidden_elsewhere` are those of the same tokens after the prompt of another principle.
    """
    size = max(1, block_side(models[0].device) ** 2 // len(models[0].get_output_embeddings().weight))  # positions
    parts = []
    for start in range(0, len(hidden[0]), size):
        part = slice(start, start + size)
        base, trained = (logits_of(m, h[part].to(m.device)) for m, h in zip(models, hidden))  # [c, V] both
        elsewhere = (logits_of(m, h[part].to(m.device)) for m, h in zip(models, hidden_elsewhere))  # [c, V] both
        base_other, trained_other = elsewhere
        logp, logq = trained.log_softmax(-1), base.log_softmax(-1)  # [c, V] both
        before, after = metrics.fisher_rao(base, base_other), metrics.fisher_rao(trained, trained_other)  # [c] both
        distances = {
            "fisher_rao": metrics.fisher_rao(base, trained), "kl": (logp.exp() * (logp - logq)).sum(-1),
            "principle_before": before, "principle_after": after, "principle_change": after - before,
        }  # [c] each
        parts.append(torch.stack([*distances.values()]).cpu())  # [5, c]
    return dict(zip(distances, torch.cat(parts, 1)))  # [n] each


def load_pair(config):
    """(base, trained, tokenizer, tokenizer of the trained); raises InputError where the shapes differ."""
    (base, tokenizer), (trained, other) = load_named("--base", config.base), load_named("--trained", config.trained)
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (base, trained)]
    if shapes[0] != shapes[1]:
        raise InputError(f"--trained: {config.trained} has another shape than {config.base}; a model that was trained "
                         "from --base is accepted")
    return base, trained, tokenizer, other


def compare_models(config) -> dict:
    """All numbers of the report."""
    principles, template = load_principles(config.principles), make_template(config, config.trained, config.base)
    base, trained, tokenizer, other = load_pair(config)
    limit = prompt_limit(trained, config.max_completion_length)
    questions = pick_questions(trained, tokenizer, [p.text for p in principles], template, config)
    print(template.describe(), flush=True)
    pairs = [(question.text, principle.text) for question in questions for principle in principles]
    prompts = template.encode(tokenizer, pairs, limit)  # R
    if prompts != template.encode(other, pairs, limit):
        raise InputError(f"--trained: {config.trained} has another tokenizer than {config.base}; a model that was "
                         "trained from --base is accepted")
    num_principles = len(principles)
    print(f"{len(questions)} questions x {num_principles} principles: {len(prompts)} completions to sample from "
          f"{config.trained}; each goes through both models twice, under its own principle and another", flush=True)
    options = f"{config.seed} chain", config.max_completion_length, 1.0  # the temperature
    completions = [chain.tokens for chain in sample_chains(trained, tokenizer, prompts, *options)]  # R
    picked, elsewhere = pick_tokens(completions, num_principles, config)
    owners, labels = torch.tensor([divmod(row, num_principles) for row, _ in picked]).T  # [n] question and principle
    elsewhere = [prompts[row] for row in elsewhere]  # R

    models, hidden, hidden_elsewhere = (base, trained), [], []
    for model in tqdm(models, desc="hidden states", dynamic_ncols=True):
        hidden.append(layer_states(model, prompts, completions, picked))  # [L + 1, n, d]
        hidden_elsewhere.append(layer_states(model, elsewhere, completions, picked)[-1])  # [n, d]
    layers = tqdm(list(zip(*hidden)), desc="layers", dynamic_ncols=True)
    outputs = compare_outputs(models, [h[-1] for h in hidden], hidden_elsewhere)
    return {
        "questions": len(questions), "principles": num_principles, "completions": len(prompts), "tokens": len(picked),
        "cloud": min(CLOUD, len(picked)),
        "layers": [compare_layer(x, y, labels, num_principles, config.seed) for x, y in layers],
        "outputs": {name: interval_over_questions(values, owners) for name, values in outputs.items()},
    }


def pick_tokens(completions, num_principles: int, config):
    """(the compared tokens as sorted pairs (row, t), for each row a row of another principle).

    Every completion gives as many tokens, drawn at random, or all it has.
    """
    rng, rows = random.Random(f"{config.seed} geometry"), range(len(completions))
    most = max(1, config.num_tokens // len(completions))  # of one completion
    some = [rng.sample(range(len(tokens)), min(most, len(tokens))) for tokens in completions]  # R lists of t
    picked = [(r, t) for r in rows for t in sorted(some[r])]
    elsewhere = [r - r % num_principles + (r + rng.randrange(1, num_principles)) % num_principles for r in rows]
    return picked, elsewhere


def interval_over_questions(values, owners) -> dict:
    """{mean, low, high} of values [n] of tokens, of question owners [n]; the mean of each question counts once."""
    sums = torch.zeros(int(owners.max()) + 1).index_add_(0, owners, values)  # [Q]
    return metrics.interval(sums / torch.bincount(owners))


def run_geometry(config: GeometryConfig) -> None:
    """Everything that `python geometry.py` does: the file first, then the report, then the plot."""
    summary = compare_models(config)
    if config.json:
        write_json(config.json, {"command": "geometry", "settings": asdict(config), **summary})
    print_geometry(summary, config)
    if config.json:
        print(f"{config.json}: all numbers")
        if plot := write_plot(config.json, lambda plt: layer_plot(plt, summary)):
            print(f"{plot}: the plot")


def main(argv=None) -> int:
    return exit_status(lambda: run_geometry(parse(argv, GeometryConfig)))


if __name__ == "__main__":
    sys.exit(main())
