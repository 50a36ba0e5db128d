"""Would another term in the same place do as well? Anchors, information as a reward, opposites.

    python experiments/variants.py                       # all rows x 5 seeds; hours on two cores
    python experiments/variants.py --variants squared kl --seeds 3 --jobs 1
    python experiments/variants.py --train squared --lambda-ot 1e-3 --principles FILE   # one run

Every run is train.py with its default settings on the embedded model, and one part exchanged by a
function of this file. Each variant is trained with each of its weights on seed 100 and evaluated on
sums that are not reported; the weight with the highest accuracy among those whose SI is at least that
of the start is taken for seeds 0, 1, ...

    sinkhorn     ENIGMA as it is: the Sinkhorn divergence of paired tokens, weight --lambda-ot
    sharp        the same at --ot-eps 0.01
    squared      instead of the Sinkhorn term the mean squared distance of the same tokens' hidden states
    kl           instead of it the KL to the start, weight --beta
    unpaired     instead of it the Sinkhorn divergence of the policy's completions, read by the policy,
                 from the start's own completions to the same prompts, read by the start
    no loss      without the InfoNCE loss
    beside       information as a reward beside the InfoNCE loss, weight --mi-reward
    in place     information as a reward in place of the InfoNCE loss
    per token    scores averaged over tokens in the InfoNCE loss, as SAMI's authors do
    opposites    the K principles of a question are K/2 and their opposites

Finished runs in --output-dir are not repeated. Writes variants.json; prints the table, and that of
the differences from "sinkhorn" in the same seed. experiments/gradients.py goes on from here.
"""

import functools
import json
import random
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402

import train  # noqa: E402
from experiments.ablation import measure_follows  # noqa: E402
from experiments.common import (  # noqa: E402
    after,
    interval_cell,
    make_parser,
    read_lines,
    run_script,
    run_training,
    side_by_side,
)
from infonce import symmetric_info_nce  # noqa: E402
from support import tiny  # noqa: E402
from support.files import Principle, save_principles  # noqa: E402

VARIANTS = {  # name -> (the flag of the weight, the weights tried, other flags)
    "sinkhorn": ("--lambda-ot", (0.001, 0.002, 0.004), ()),
    "sharp": ("--lambda-ot", (0.001, 0.002, 0.004), ("--ot-eps", 0.01)),
    "squared": ("--lambda-ot", (0.0005, 0.001, 0.002), ()),
    "kl": ("--beta", (0.02, 0.1, 0.3, 1), ("--lambda-ot", 0)),
    "unpaired": ("--lambda-ot", (0.001, 0.002, 0.004, 0.008, 0.016), ()),
    "no loss": ("--lambda-mi", (0,), ()),
    "beside": ("--mi-reward", (0.1, 0.2, 0.5), ()),
    "in place": ("--mi-reward", (0.5, 1, 2), ("--lambda-mi", 0)),
    "per token": ("--lambda-mi", (0.012, 0.05, 0.1, 0.2), ()),
    "opposites": ("--lambda-mi", (0.012,), ()),
}
GRID_COLUMNS = ("format", "accuracy", "si", "sinkhorn")
MEASURED_AFTER = ("follows", "si_opposite", "grad_norm")
COLUMNS = (*GRID_COLUMNS, *MEASURED_AFTER)
SELECTION_SEED = 100
REPORTED = 256  # held-out questions

# --------------------------------------------------------------------------------------------------
# What is exchanged: a function of train.py


def squared_terms(states, reference_states, weights, config) -> dict:
    """Each token's state is pulled to the state of the same token by the start."""
    return {"loss_ot": squared_distance(states, reference_states, weights).mean()}


def squared_distance(states, reference_states, weights):
    """The mean over the cloud of |state - state of the same token by the start|^2: [Q]."""
    return ((states - reference_states).square().sum(-1) * weights).sum(1)  # [Q]


def per_token_terms(scores, config, batch) -> dict:
    """The InfoNCE loss of scores divided by the number of tokens of their chain of thought."""
    lengths = batch.cot.sum(-1)[..., : scores.shape[1]].mT  # [Q, N, K]
    loss = symmetric_info_nce(scores / lengths.clamp(min=1)[..., None])  # []
    return original_information(scores.detach(), config) | {"loss_mi": loss}  # what is logged stays


def draw_with_opposites(questions, principles, config, step) -> list:
    """As train.draw, but the K of a question are K/2 principles and their opposites."""
    tasks = original_draw(questions, principles, config, step)
    for task in tasks:
        rng = random.Random(f"{task.key} opposites")
        some = rng.sample(principles, config.num_principles // 2)
        task.principles = some + [Principle(f"not {p.id}", p.negative) for p in some]
    return tasks


original_draw, original_information, original_sample = train.draw, train.information_terms, train.sample
original_targets = train.make_targets


def exchange(name: str) -> None:
    """Put the variant in its place in train.py."""
    if name == "squared":
        train.drift_terms = squared_terms
    elif name == "opposites":
        train.draw = draw_with_opposites
    elif name == "per token":
        losses = train.losses

        def losses_of(outputs, batch, targets, config):
            train.information_terms = functools.partial(per_token_terms, batch=batch)
            return losses(outputs, batch, targets, config)

        train.losses = losses_of
    elif name == "unpaired":
        found = {}

        def sample(model, tokenizer, template, tasks, num_generations, config):
            found.update(tokenizer=tokenizer, template=template)
            return original_sample(model, tokenizer, template, tasks, num_generations, config)

        def make_targets(model, reference, batch, rewards, config):  # evaluations report the paired drift
            targets = original_targets(model, reference, batch, rewards, config)
            tasks = [train.Task(task.question, task.principles, f"{task.key} start") for task in batch.tasks]
            sampler = reference, found["tokenizer"], found["template"]
            own = original_sample(*sampler, tasks, config.num_generations, config)
            tokens, weights = train.choose_ot_tokens(own, config)  # [Q, n] both
            if not torch.equal(weights, targets.ot_weights):
                raise SystemExit("unpaired: fewer completion tokens than --ot-tokens")
            _, targets.reference_states = train.read_reference(model, reference, own, tokens, config)  # [Q, n, d]
            return targets

        train.sample, train.make_targets = sample, make_targets


# --------------------------------------------------------------------------------------------------
# The study


@functools.cache  # the start is one model for all runs
def measure_opposites(model: Path, principles: Path, report: Path) -> float:
    """SI of each principle against its opposite, by si.py; the mean over principles."""
    run_script(
        "si.py", "--principles", principles, "--model", model, "--num-questions", 64, "--json", report,
        "--examples", "none", "--prefill", "False",  # as the embedded model is trained: this is a folder
    )
    return statistics.mean(row["si_opposite"]["mean"] for row in json.loads(report.read_text())["negatives"])


def folder(output_dir: Path, name: str, weight, seed) -> Path:
    """Where a training is kept; `seed` is "grid" where it is one of those that the weight is chosen by."""
    return output_dir / f"{name.replace(' ', '-')}-{weight}-{seed}"


def run(name, weight, seed, args, extra) -> dict:
    """One training: its eval.json, with `follows`, `si_opposite`, `grad_norm`."""
    output_dir = args.output_dir.resolve()
    part, place = ("--grid", "grid") if seed == SELECTION_SEED else ("--train", seed)
    directory, principles = folder(output_dir, name, weight, place), output_dir / "principles.jsonl"
    result = directory / "result.json"
    if not result.exists():
        flag, _, others = VARIANTS[name]
        evals = run_training(
            directory, "--principles", principles, "--eval-questions", REPORTED, "--eval-steps", 0, "--seed", seed,
            *others, flag, weight, *extra, script=(__file__, part, name),
        )
        if seed != SELECTION_SEED:  # the choice of a weight needs none of these
            norms = [step["grad_norm"] for step in read_lines(directory / "metrics.jsonl")]
            for when, model, report, norm in (
                ("start", ROOT / "tiny-model", output_dir / "si-start.json", norms[0]),
                ("end", directory / "final", directory / "si-end.json", statistics.mean(norms)),
            ):
                found = measure_follows(model), measure_opposites(model, principles, report), norm
                evals[when] |= {key: {"mean": value} for key, value in zip(MEASURED_AFTER, found)}
        result.write_text(json.dumps(evals))
    return json.loads(result.read_text())


def best_weight(name: str, runs: dict):
    """The weight with the highest accuracy whose SI is at least that of the start."""
    def order(weight):
        found = runs[name, weight, SELECTION_SEED]
        end, start = ({c: found[when][c]["mean"] for c in GRID_COLUMNS} for when in ("end", "start"))
        return end["si"] >= start["si"], end["accuracy"]

    return max(VARIANTS[name][1], key=order)


def table(rows: dict, columns=COLUMNS) -> str:
    """Markdown; rows: name -> (weight, list over seeds of {column: value})."""
    lines = ["| | weight | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, (weight, found) in rows.items():
        cells = [interval_cell([row[column]["mean"] for row in found]) for column in columns]
        lines.append(f"| {name} | {weight} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def minus(rows: list, base: list) -> list:
    """The differences of two variants, seed by seed: they share questions, principles and lots."""
    return [{c: {"mean": row[c]["mean"] - of[c]["mean"]} for c in COLUMNS} for row, of in zip(rows, base, strict=True)]


def main() -> None:
    if sys.argv[1:2] in (["--train"], ["--grid"]):
        exchange(sys.argv[2])
        if sys.argv[1] == "--grid":  # evaluated on other sums than are reported
            tiny.make_questions = after(REPORTED, tiny.make_questions)
        sys.exit(train.main(sys.argv[3:]))
    parser = make_parser(__doc__, "variants", 5)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_principles(args.output_dir / "principles.jsonl", tiny.principles())  # with their opposites

    def run_all(jobs):
        return side_by_side(lambda *job: run(*job, args, extra), jobs, args.jobs)

    several = [name for name in args.variants if len(VARIANTS[name][1]) > 1]
    grid = run_all([(name, weight, SELECTION_SEED) for name in several for weight in VARIANTS[name][1]])
    tried = {f"{name}, {weight}": (weight, [found["end"]]) for (name, weight, _), found in grid.items()}
    print(table(tried, GRID_COLUMNS), "\n", flush=True)
    best = {name: best_weight(name, grid) if name in several else VARIANTS[name][1][0] for name in args.variants}
    runs = run_all([(name, best[name], seed) for seed in range(args.seeds) for name in args.variants])
    seeds = {name: [runs[name, best[name], seed] for seed in range(args.seeds)] for name in args.variants}
    rows = {"start": ("", [found["start"] for found in next(iter(seeds.values()))])}
    rows |= {name: (best[name], [found["end"] for found in seeds[name]]) for name in args.variants}
    (args.output_dir / "variants.json").write_text(json.dumps({"grid": list(grid.items()), "rows": rows}, indent=1))
    print(table(rows), "\n")
    if "sinkhorn" in best and len(best) > 1:
        base = rows["sinkhorn"][1]
        differences = {name: (best[name], minus(rows[name][1], base)) for name in best if name != "sinkhorn"}
        print("Minus sinkhorn, seed by seed:\n", table(differences), sep="\n")


if __name__ == "__main__":
    main()
