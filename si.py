"""python si.py: which principles does the reasoning carry? Measure, select and create them.

    python si.py --principles principles/reasoning.txt                      # best principle first
    python si.py --principles FILE --propose 4 --select 4 --out best.jsonl  # create some, keep four

For use before training. The model writes a chain of thought (CoT) to each question under each
principle, and each is scored under all of these; metrics.py has the estimators. Of a pool of more
than 16 principles every question draws 16, as training draws its K: SI and MI are then those of 16
principles, and MI is a lower bound of that of the whole pool.

In order: settings, the measurement, its figures, selection, the command. support/chains.py samples
and scores, support/propose.py writes new principles.
"""

import support  # isort: skip  # noqa: F401  (before torch: see there)

import itertools
import math
import random
import sys
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F

import metrics
from grpo import format_reward
from support.answers import answer_is_right
from support.chains import sample_chains, score_chains
from support.command import check_written_files, exit_status, load_named, parse
from support.data import make_template, pick_questions
from support.errors import InputError
from support.files import load_principles, save_principles
from support.prompts import prompt_limit
from support.propose import propose
from support.report import heat_map, print_si, write_plot
from support.settings import MAX_SEED, DatasetConfig, check_bounds, option
from support.writing import write_json

PER_QUESTION = 16  # the most principles that a question is measured under


@dataclass
class SiConfig(DatasetConfig):
    """Measure, select and create principles, before training."""

    principles: str = field(metadata={"help": "file of principles, .txt (one a line) or .jsonl"})
    model: str = option("tiny", "tiny (the embedded model), a folder, or a Hugging Face hub id")
    num_questions: int = option(128, "questions to measure with; all of --dataset if it has fewer", at_least=2)
    select: int | None = option(None, "choose so many principles: the set with the highest SI", at_least=2)
    propose: int | None = option(None, "create so many new principles, and measure them with the others", at_least=1)
    out: str | None = option(None, "write the selected principles to this .jsonl file (default: all, best first)")
    json: str | None = option(None, "write all numbers to this .json file, and a heat map beside it, as .png")
    max_completion_length: int = option(64, "tokens in a completion; longer ones are cut and earn nothing", at_least=1)
    temperature: float = option(1.0, "of sampling and log-probabilities; take that of the training to come", above=0)
    seed: int = option(0, "seed of everything random", at_least=0, at_most=MAX_SEED)

    def check(self) -> None:
        """Raises InputError for the first value that cannot be used."""
        check_bounds(self)
        check_written_files(self, out=".jsonl", json=".json")


def check_pool(config, num_principles: int, num_questions: int) -> None:
    """Raises InputError where a pool of this size is too small for --select, or the questions too few."""
    if config.select and config.select > num_principles:
        raise InputError(f"--select: got {config.select}, of {num_principles} principles; 2 to {num_principles} is "
                         "accepted")
    needed = math.ceil(2 * num_principles / min(num_principles, PER_QUESTION))  # two for each principle
    if num_questions < needed:
        source = "--num-questions" if num_questions == config.num_questions else f"--dataset {config.dataset}"
        raise InputError(f"{source}: got {num_questions} questions for {num_principles} principles; {needed} or more "
                         "are accepted")


# --------------------------------------------------------------------------------------------------
# The measurement


def draw_principles(num_principles: int, num_questions: int, seed: int):
    """The principles that each question is measured under: indices [N, C], sorted in each row.

    C is PER_QUESTION, or all of a smaller pool. Each question takes those that were drawn least
    often so far, in random order among equals, so any two counts differ by at most one.
    """
    generator = torch.Generator().manual_seed(seed)
    times, rows = torch.zeros(num_principles), []  # [K]
    for _ in range(num_questions):
        order = (times + torch.rand(num_principles, generator=generator)).argsort()  # [K]
        rows.append(order[:PER_QUESTION].sort().values)  # [C]
        times[rows[-1]] += 1
    return torch.stack(rows)  # [N, C]


def measure(model, tokenizer, template, principles, questions, drawn, config, name="chain"):
    """A CoT to each question under each principle drawn for it, scored under all of these.

    drawn: see draw_principles; name: of the random numbers. Returns N lists of C chains, and scores
    [N, C, C].
    """
    limit = prompt_limit(model, config.max_completion_length)
    pairs = [(question.text, principles[i].text) for question, row in zip(questions, drawn.tolist()) for i in row]
    prompts = template.encode(tokenizer, pairs, limit)  # N·C
    rows, per_question = drawn.numel(), drawn.shape[1]
    print(f"{len(questions)} questions x {per_question} principles: {rows} chains of thought to sample, "
          f"{rows * per_question} sequences to score; through the model go 2 x {sum(map(len, prompts))} tokens of "
          f"prompts and at most {rows * (per_question + 1) * config.max_completion_length} of completions", flush=True)
    options = config.max_completion_length, config.temperature, template.prefill
    chains = sample_chains(model, tokenizer, prompts, f"{config.seed} {name}", *options)  # N·C
    prompts, chains = ([flat[i : i + per_question] for i in range(0, rows, per_question)] for flat in (prompts, chains))
    return chains, score_chains(model, prompts, chains, config.temperature)


# --------------------------------------------------------------------------------------------------
# Figures


def estimate_si(model, tokenizer, template, principles, sources, questions, config) -> tuple[dict, torch.Tensor]:
    """(all numbers of the report but the selection, scores [N, C, C])."""
    drawn = draw_principles(len(principles), len(questions), config.seed)  # [N, C]
    opposed = [(n, c) for n, row in enumerate(drawn.tolist()) for c, i in enumerate(row) if principles[i].negative]
    limit = prompt_limit(model, config.max_completion_length)  # an opposite that is too long is refused at once
    opposites = template.encode(
        tokenizer, [(questions[n].text, principles[drawn[n, c]].negative) for n, c in opposed], limit
    )
    chains, scores = measure(model, tokenizer, template, principles, questions, drawn, config)  # scores [N, C, C]
    summary = summarise_si(principles, sources, questions, drawn, chains, scores)
    if opposed:
        alone = [[prompt] for prompt in opposites], [[chains[n][c]] for n, c in opposed]
        under = score_chains(model, *alone, config.temperature, "opposites").flatten()  # [M]
        own = torch.stack([scores[n, c, c] for n, c in opposed])  # [M]
        owners = torch.stack([drawn[n, c] for n, c in opposed])  # [M]
        summary["negatives"] = compare_negatives(principles, owners, own, under)
    return summary, scores


def summarise_si(principles, sources, questions, drawn, chains, scores) -> dict:
    """All figures of the report, best principle first; intervals are 95%, over questions."""
    tables, per_question = make_tables(questions, chains, scores), drawn.shape[1]
    mistaken = mean_by_pair(scores.softmax(-1), drawn, len(principles))  # [K, K] mean posterior of j given CoT i
    others = mistaken.nan_to_num(-1).fill_diagonal_(-1).max(-1)  # [K] both
    rows = [
        {
            "id": principle.id, "text": principle.text, "source": sources[i], "index": i,
            **summarise_tables({name: table[drawn == i] for name, table in tables.items()}, per_question),
            "mistaken_for": principles[others.indices[i]].id, "mistaken_share": others.values[i].item(),
        }
        for i, principle in enumerate(principles)
    ]
    rows.sort(key=lambda row: -row["mi"]["mean"])
    for row, following in itertools.pairwise(rows):
        row["overlaps_next"] = row["si"]["low"] <= following["si"]["high"]
    lengths = tables["cot_length"]  # [N, C]
    return {
        "questions": len(questions), "chains": lengths.numel(), "cot_tokens": int(lengths.sum()),
        "truncated": sum(c.truncated for row in chains for c in row) / lengths.numel(),
        "per_question": per_question, "ceiling": math.log(per_question), "chance": 1 / per_question,
        "set": summarise_tables({name: table.mean(1) for name, table in tables.items()}, per_question),
        "principles": rows, "ids": [p.id for p in principles], "confusion": mistaken.tolist(),
        "drawn": drawn.tolist(), "row_information": tables["mi_row"].tolist(),
    }


def make_tables(questions, chains, scores) -> dict:
    """Figures of each chain, [N, C]; accuracy, NaN without an answer, only where one is known."""
    def table(value_of):
        return torch.tensor([[value_of(chain) for chain in row] for row in chains], dtype=torch.double)  # [N, C]

    tables = {
        "information": metrics.information(scores, "posterior"),
        "mi_row": metrics.information(scores, "row"),
        "mi_column": metrics.information(scores, "column"),
        "retrieval": metrics.retrieval(scores).double(),
        "format": table(lambda chain: 0.0 if chain.truncated else format_reward(chain.text)),  # as training rewards
        "closed": table(lambda chain: chain.closed),
        "cot_length": table(lambda chain: chain.cot_length),
    }
    if any(question.answer is not None for question in questions):
        right = [
            [math.nan if question.answer is None else answer_is_right(chain.text, question.answer) for chain in row]
            for question, row in zip(questions, chains)
        ]
        tables["accuracy"] = torch.tensor(right, dtype=torch.double)  # [N, C]
    return tables


def summarise_tables(values: dict, per_question: int) -> dict:
    """The figures of one principle, or of the set, from the values [n] of its questions."""
    nats = values["information"]  # [n]
    figures = {"si": metrics.si_interval(nats, per_question), "mi": metrics.interval(nats)}
    return figures | {name: value.nanmean().item() for name, value in values.items() if name != "information"}


def mean_by_pair(values, drawn, num_principles: int):
    """Mean of values [N, C, C] over the questions that drew i and j: [K, K], NaN where none did."""
    pairs = (drawn[:, :, None] * num_principles + drawn[:, None, :]).flatten()  # [N·C·C]
    sums = torch.zeros(num_principles**2, dtype=torch.double).index_add_(0, pairs, values.double().flatten())  # [K·K]
    counts = torch.bincount(pairs, minlength=num_principles**2)  # [K·K]
    return (sums / counts).reshape(num_principles, num_principles)  # [K, K]


def compare_negatives(principles, owners, own, under_negative) -> list[dict]:
    """How far each principle c is from its opposite, from log-probabilities [M] of CoTs under both.

    owners [M]: the principle that each CoT was written under. The figure is
    KL(p(. | c) || half p(. | c) + half p(. | opposite)), at most log 2, and no bound on any mutual
    information: all CoTs were written under c, none under the opposite.
    """
    nats = math.log(2) - F.softplus(under_negative - own)  # [M]
    return [
        {"id": principles[i].id, "negative": principles[i].negative, "nats": metrics.interval(nats[owners == i]),
         "si_opposite": metrics.si_interval(nats[owners == i], 2),
         "retrieval": (own > under_negative)[owners == i].double().mean().item()}
        for i in owners.unique().tolist()
    ]


# --------------------------------------------------------------------------------------------------
# Selection


def select_principles(model, tokenizer, template, principles, questions, summary, scores, config) -> dict:
    """The best --select of the pool, from scores [N, C, C]; of a large pool the best are measured again.

    A choice needs every principle beside every other, which a pool of more than PER_QUESTION has not.
    """
    pool = list(range(len(principles)))
    if len(pool) > PER_QUESTION:
        ranked = [row["index"] for row in summary["principles"]]
        pool = sorted(ranked[: max(PER_QUESTION, 2 * config.select)])
        print(f"to select, the best {len(pool)} are measured again, now under each other")
        together = torch.arange(len(pool)).expand(len(questions), -1)  # [N, K']
        best = [principles[i] for i in pool]
        _, scores = measure(model, tokenizer, template, best, questions, together, config, "best")  # [N, K', K']
    return {"pool": pool, **summarise_selection(scores, pool, principles, config.select)}


def summarise_selection(scores, pool, principles, size: int) -> dict:
    """The best subset of the pool, its SI, and two figures to compare that with.

    On the questions it was chosen on, the SI of the best of many subsets is too high. Not so
    `si_other_half`: chosen on one half of the questions, measured on the other, mean of both ways.
    """
    def si_of(some_scores, subsets):
        nats = metrics.subset_information(some_scores, torch.tensor(subsets))  # [N, B]
        return metrics.share_of_ceiling(nats.mean().item(), size)

    chosen, halves = metrics.select_subset(scores, size), (scores[::2], scores[1::2])
    other_half = [si_of(halves[1 - n], [metrics.select_subset(half, size)]) for n, half in enumerate(halves)]
    nats = metrics.subset_information(scores, torch.tensor([chosen]))[:, 0]  # [N]
    rng = random.Random(0)
    return {
        "ids": [principles[pool[i]].id for i in chosen],
        "indices": [pool[i] for i in chosen],
        "si": metrics.si_interval(nats, size),
        "si_other_half": sum(other_half) / 2,
        "si_random_subset": si_of(scores, [rng.sample(range(len(pool)), size) for _ in range(200)]),
    }


# --------------------------------------------------------------------------------------------------
# The command


def run_si(config: SiConfig) -> None:
    """Everything that `python si.py` does, the files first, then the report, then the plot."""
    principles, template = load_principles(config.principles), make_template(config)
    model, tokenizer = load_named("--model", config.model)
    texts = [text for p in principles for text in (p.text, p.negative) if text]
    questions = pick_questions(model, tokenizer, texts, template, config)
    check_pool(config, len(principles) + (config.propose or 0), len(questions))
    print(template.describe(), flush=True)
    sources = [config.principles] * len(principles)
    if config.propose:
        found = propose(model, tokenizer, principles, config.propose, config)
        print(f"{len(found)} of {config.propose} new principles were found")
        for principle, source in found:
            principles, sources = [*principles, principle], [*sources, source]
            print(f"proposed {principle.id}: {principle.text} ({source})")
        check_pool(config, len(principles), len(questions))
    summary, scores = estimate_si(model, tokenizer, template, principles, sources, questions, config)
    chosen = [row["index"] for row in summary["principles"]]
    if config.select:
        arguments = template, principles, questions, summary, scores, config
        summary["selection"] = select_principles(model, tokenizer, *arguments)
        chosen = summary["selection"]["indices"]
    if config.json:
        write_json(config.json, {"command": "si", "settings": asdict(config), **summary})
    if config.out:
        save_principles(config.out, [principles[i] for i in chosen])
    print_si(summary, config)
    if config.json:
        print(f"{config.json}: all numbers")
    if config.out:
        print(f"{config.out}: {len(chosen)} principles, for `python train.py --principles {config.out}`")
    if config.json and (plot := write_plot(config.json, lambda plt: heat_map(plt, summary))):
        print(f"{plot}: the plot")


def main(argv=None) -> int:
    return exit_status(lambda: run_si(parse(argv, SiConfig)))


if __name__ == "__main__":
    sys.exit(main())
