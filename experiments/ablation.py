"""What each term does: GRPO alone, with SAMI, with OT, with both, over seeds.

    python experiments/ablation.py                       # 4 variants x 5 seeds, 512 held-out questions each
    python experiments/ablation.py --seeds 3 --jobs 1

Every run is `python train.py` as a user starts it, with its default settings and the two weights of
its variant; flags not listed here go to train.py. Runs go side by side, one thread each. Finished
runs are kept in --output-dir and not repeated. Writes ablation.json and ablation.png there and
prints the table. `follows` is the share of completions that visibly follow their principle
(tiny.follows): no loss and no metric of the training sees it.
"""

import functools
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.common import interval, interval_cell, make_parser, run_script, run_training, side_by_side  # noqa: E402
from support.report import write_plot  # noqa: E402

VARIANTS = {
    "GRPO": ["--lambda-mi", "0", "--lambda-ot", "0"],
    "GRPO + SAMI": ["--lambda-ot", "0"],
    "GRPO + OT": ["--lambda-mi", "0"],
    "ENIGMA": [],
}
COLUMNS = ("format", "accuracy", "si", "follows", "sinkhorn", "completion_length")
MEASURE = """
import json, sys, torch
from support.model import load_model
sys.path.insert(0, "tiny-model")
import build
print(json.dumps(build.measure(*load_model(sys.argv[1], torch.device("cpu")), 128)["follows"]))
"""


@functools.cache  # the start is one model for all runs
def measure_follows(model: Path) -> float:
    """Share of completions that visibly follow their principle, mean over principles."""
    printed = run_script("-c", MEASURE, model)
    return statistics.mean(json.loads(printed.splitlines()[-1]).values())


def run(name, seed, args, extra) -> dict:
    """One training, in a process of its own; its eval.json with `follows` added."""
    directory = args.output_dir / f"{name.replace(' ', '').replace('+', '_')}-{seed}"
    result = directory / "result.json"
    if not result.exists():
        evals = run_training(
            directory, "--principles", "principles/reasoning.txt", "--eval-questions", 512, "--eval-steps", 0,
            "--seed", seed, *VARIANTS[name], *extra,
        )
        for when, model in (("start", ROOT / "tiny-model"), ("end", directory.resolve() / "final")):
            evals[when]["follows"] = {"mean": measure_follows(model)}
        result.write_text(json.dumps(evals))
    return json.loads(result.read_text())


def table(results) -> str:
    starts = [r["start"] for runs in results.values() for r in runs]
    rows = {"start": starts[: len(next(iter(results.values())))]}
    rows |= {name: [r["end"] for r in runs] for name, runs in results.items()}
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in rows.items():
        cells = [interval_cell([r[c]["mean"] for r in runs]) for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims(results) -> str:
    """The figures that the README's claims rest on, per seed."""
    lines = []
    for name, runs in results.items():
        gains = [r["end"]["accuracy"]["mean"] - r["start"]["accuracy"]["mean"] for r in runs]
        below = [r["end"]["accuracy"]["high"] < r["start"]["accuracy"]["low"] for r in runs]
        ratio = [r["end"]["si"]["mean"] / r["start"]["si"]["mean"] for r in runs]
        lines.append(
            f"{name}: accuracy {' '.join(f'{g:+.2f}' for g in gains)}, significantly below its start in "
            f"{sum(below)} seeds; SI x {' '.join(f'{x:.1f}' for x in ratio)}; "
            f"format {' '.join('{:.2f}'.format(r['end']['format']['mean']) for r in runs)}"
        )
    return "\n".join(lines)


def plot(plt, results):
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    for axis, column in zip(axes, ("format", "accuracy", "si", "follows"), strict=True):
        starts = [r["start"][column]["mean"] for r in next(iter(results.values()))]
        axis.axhline(statistics.mean(starts), color="0.5", ls="--", lw=1, label="start")
        for x, runs in enumerate(results.values()):
            values = [r["end"][column]["mean"] for r in runs]
            mean, half = interval(values)
            axis.bar(x, mean, 0.7, yerr=half, color=f"C{x}", alpha=0.5, capsize=4)
            axis.plot([x] * len(values), values, "k.", ms=4)
        axis.set_xticks(range(len(results)), [name.replace(" + ", "\n+ ") for name in results], fontsize=8)
        axis.set(title={"si": "sufficiency index"}.get(column, column), ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = make_parser(__doc__, "ablation", 5)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    args.output_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.variants]
    done = side_by_side(lambda name, seed: run(name, seed, args, extra), jobs, args.jobs)
    results = {name: [done[name, seed] for seed in range(args.seeds)] for name in args.variants}
    (args.output_dir / "ablation.json").write_text(json.dumps(results, indent=1))
    print(table(results), claims(results), sep="\n\n")
    write_plot(args.output_dir / "ablation.json", lambda plt: plot(plt, results))


if __name__ == "__main__":
    main()
