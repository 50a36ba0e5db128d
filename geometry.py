"""python geometry.py: what training did to the hidden states and to the next-token distribution.

    python geometry.py --base tiny --trained runs/<time>/final --principles FILE

The trained model writes completions; both models read them, and are compared layer by layer at the
same tokens: by the drift of the hidden states (Sinkhorn divergence, Bures-Wasserstein, CKA, mean
shift), by where the drift lies (in the span of the principles' directions or beside it), and by
next-token distributions (Fisher-Rao, KL).
"""

import math
import random
import sys
from dataclasses import asdict, dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import metrics
from si import sample_chains
from sinkhorn import relative_eps, sinkhorn_divergence
from support.command import check_written_files, load_named, run_command
from support.data import pick_questions
from support.errors import InputError
from support.files import load_principles, write_numbers
from support.logits import logits_of
from support.prompts import prompt_limit
from support.report import _layer_plot, print_geometry, write_plot
from support.scoring import block_side
from support.settings import MAX_SEED, DatasetConfig, check_bounds, option

CLOUD = 512  # points of a Sinkhorn divergence
HIDDEN_ROWS = 2**26  # elements of the hidden states of all layers that one forward makes: 256 MB


@dataclass
class GeometryConfig(DatasetConfig):
    """What training did to the hidden states and next-token distributions, on the same tokens."""

    base: str = field(metadata={"help": "the model before: tiny (the embedded one), a folder, or a hub id"})
    trained: str = field(metadata={"help": "the model after, of the same shape; it writes the completions"})
    principles: str = field(metadata={"help": "file of principles: .txt (one a line) or .jsonl"})
    num_questions: int = option(
        32, "questions, each under every principle; all of --dataset where it has fewer", at_least=1
    )
    num_tokens: int = option(2048, "positions in completions that are compared, drawn from all", at_least=2)
    json: str | None = option(None, "file of all numbers; the plot over layers goes beside it, as .png")
    max_completion_length: int = option(64, "tokens; longer completions are cut", at_least=1)
    seed: int = option(0, "of everything random", at_least=0, at_most=MAX_SEED)
    temperature = 1.0  # of sampling; no flag
    model = property(lambda self: self.base)  # whose prompts these are

    def check(self) -> None:
        """Raises InputError for the first value that cannot be used."""
        check_bounds(self)
        check_written_files(self, json=".json")


@torch.no_grad()
def layer_states(model, prompts, completions, picked):
    """Hidden states [L + 1, n, d] of all layers at n positions; 0: embeddings, L: after the norm.

    prompts and completions: R lists of token ids; picked: n pairs (row, t), sorted, some of every
    row: the position that predicts token t of that row's completion. The result is on the CPU.
    """
    rows = [p + c[:-1] for p, c in zip(prompts, completions)]
    longest = max(map(len, rows))
    layers, width = model.config.get_text_config().num_hidden_layers + 1, model.get_output_embeddings().weight.shape[1]
    size = max(1, HIDDEN_ROWS // (longest * layers * width))
    parts = []
    for start in range(0, len(rows), size):
        block = [torch.tensor(row) for row in rows[start : start + size]]
        ids = pad_sequence(block, batch_first=True).to(model.device)  # [r, T] padded on the right, where no token looks
        mask = pad_sequence([torch.ones_like(row) for row in block], batch_first=True).to(ids.device)  # [r, T]
        out = model.get_decoder()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        here = [(r - start, len(prompts[r]) - 1 + t) for r, t in picked if start <= r < start + size]
        row, position = torch.tensor(here, device=ids.device).T  # [n'], [n']
        states = torch.stack([layer[row, position] for layer in out.hidden_states])  # [L + 1, n', d]
        parts.append(states.float().cpu())
    return torch.cat(parts, 1)  # [L + 1, n, d]


def compare_layer(base, trained, labels, num: int) -> dict:
    """The figures of a layer: base and trained [n, d], the same tokens; labels [n], principles."""
    ends = labels.new_tensor(range(0, len(base), max(1, len(base) // CLOUD)))[:CLOUD]  # spread over all rows
    x, y = base[ends].double(), trained[ends].double()  # [m, d] float64: the divergence is often a small difference
    divergence, info = sinkhorn_divergence(x, y, relative_eps(x, y, 0.1))
    drift = trained.double() - base.double()  # [n, d]
    means = [metrics.principle_means(states, labels, num) for states in (base, trained)]  # [K, d] each
    directions = [metrics.centred(m) for m in means]  # [K, d] each
    share, rank = metrics.share_in_span(drift, directions[0])
    row = {
        "scale": metrics.centred(base).square().sum(-1).mean().sqrt(),
        "sinkhorn": divergence, "sinkhorn_error": info.marginal_error,
        "bures_wasserstein": metrics.bures_wasserstein(base, trained),
        "linear_cka": metrics.linear_cka(base, trained, debiased=True) if len(base) > 3 else math.nan,
        "rank_before": metrics.effective_rank(base), "rank_after": metrics.effective_rank(trained),
        "mean_shift": drift.mean(0).norm(),
        "drift_in_span": share, "random_span": rank / base.shape[1],
        "angle_before": metrics.mean_angle(directions[0]), "angle_after": metrics.mean_angle(directions[1]),
        "between_within_before": metrics.between_to_within(base, labels, num),
        "between_within_after": metrics.between_to_within(trained, labels, num),
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
        distances = (
            metrics.fisher_rao(base, trained), (logp.exp() * (logp - logq)).sum(-1),
            metrics.fisher_rao(base, base_other), metrics.fisher_rao(trained, trained_other),
        )
        parts.append(torch.stack(distances).cpu())  # [4, c]
    return dict(zip(("fisher_rao", "kl", "principle_before", "principle_after"), torch.cat(parts, 1)))  # [n] each


def load_pair(config, pairs):
    """(base, trained, tokenizer, prompts); raises InputError where the models do not match."""
    (base, tokenizer), (trained, other) = load_named("--base", config.base), load_named("--trained", config.trained)
    limit = prompt_limit(trained, config.max_completion_length)
    prompts = config.form.encode(tokenizer, pairs, limit)
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (base, trained)]
    if shapes[0] != shapes[1] or prompts != config.form.encode(other, pairs, limit):
        raise InputError(
            f"--trained: {config.trained} has another shape or tokenizer than {config.base}; a model that was trained "
            "from --base is accepted"
        )
    return base, trained, tokenizer, prompts


def compare_models(config, principles, questions) -> dict:
    """All numbers of the report."""
    pairs = [(q.text, p.text) for q in questions for p in principles]
    base, trained, tokenizer, prompts = load_pair(config, pairs)
    num, rng = len(principles), random.Random(f"{config.seed} geometry")
    print(f"{len(questions)} questions x {num} principles: {len(prompts)} completions to sample from {config.trained}; "
          "each goes through both models twice, under its own principle and under another", flush=True)
    completions = [chain.whole for chain in sample_chains(trained, tokenizer, [prompts], config)[0]]
    most = max(1, config.num_tokens // len(prompts))  # positions of one completion
    picked = [(r, t) for r, c in enumerate(completions) for t in sorted(rng.sample(range(len(c)), min(most, len(c))))]
    elsewhere = [prompts[r - r % num + (r + rng.randrange(1, num)) % num] for r in range(len(prompts))]
    owners, labels = torch.tensor([divmod(r, num) for r, _ in picked]).T  # [n] the question, [n] the principle

    models, hidden, hidden_elsewhere = (base, trained), [], []
    for model in tqdm(models, desc="hidden states", dynamic_ncols=True):
        hidden.append(layer_states(model, prompts, completions, picked))  # [L + 1, n, d]
        hidden_elsewhere.append(layer_states(model, elsewhere, completions, picked)[-1])  # [n, d]
    counts = torch.bincount(owners, minlength=len(questions))  # [Q]
    pairs = tqdm(list(zip(*hidden)), desc="layers", dynamic_ncols=True)
    layers = [compare_layer(x, y, labels, num) for x, y in pairs]
    outputs = {}
    for name, values in compare_outputs(models, [h[-1] for h in hidden], hidden_elsewhere).items():
        by_question = torch.zeros(len(questions)).index_add_(0, owners, values) / counts  # [Q] bootstrap: by question
        outputs[name] = metrics.interval(by_question)
    return {
        "questions": len(questions), "principles": num, "completions": len(prompts), "tokens": len(picked),
        "cloud": min(CLOUD, len(picked)), "layers": layers, "outputs": outputs,
    }


def run_geometry(config: GeometryConfig) -> None:
    """Everything that `python geometry.py` does: the file first, then the report, then the plot."""
    summary = compare_models(config, load_principles(config.principles), pick_questions(config))
    if config.json:
        write_numbers(config.json, {"command": "geometry", "settings": asdict(config), **summary})
    print_geometry(summary, config)
    if config.json:
        print(f"{config.json}: all numbers")
        if plot := write_plot(config.json, lambda plt: _layer_plot(plt, summary)):
            print(f"{plot}: the plot")


def main(argv=None) -> int:
    return run_command(GeometryConfig, run_geometry, __doc__.partition("\n")[0], argv)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII only
    sys.exit(main())
