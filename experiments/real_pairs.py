"""InfoPO against DPO on a real model: right and wrong answers to the questions of TruthfulQA.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/real_pairs.py            # --data FOLDER, as experiments/real.py

The halves, the model and the scoring are those of experiments/real.py. One half's questions make the
pairs, "Q: ...\\nA:" with a right and a wrong answer. Each loss is trained at every learning rate on
every seed; its best rate is that of the highest implicit accuracy on that half's held-out pairs, mean
over seeds. Then, of these and on the other half: implicit accuracy, the change of log p(right answer)
and log p(wrong answer) in nats, and mc1 and mc2 by lm-eval. Finished parts in --output-dir are not
repeated. Writes real_pairs.json and real_pairs.png, and prints the tables. Flags not listed here go
to train.py.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import real  # noqa: E402
from experiments.common import read_lines, run_training, side_by_side, write_lines  # noqa: E402
from experiments.preference import course  # noqa: E402
from support.report import write_plot  # noqa: E402

LOSSES = {"InfoPO": "infopo", "DPO": "dpo"}
RATES = ("5e-6", "2e-5")
BETA = 0.1
PAIRS_OF_A_QUESTION = 2
STEPS = 24
GRID = ("pair_accuracy", "pair_logratio_chosen", "pair_logratio_rejected")  # held-out pairs of the first half
MEASURED = ("implicit accuracy", "chosen", "rejected", "mc1", "mc2")


def write_pairs(directory: Path, folder: Path | None) -> tuple[Path, Path]:
    """(pairs.jsonl of the half that trains, other.jsonl of the other half)."""
    paths = directory / "pairs.jsonl", directory / "other.jsonl"
    for path, first in zip(paths, (True, False)):
        write_lines(path, [
            {"prompt": f"Q: {row['question']}\nA:", "chosen": f" {right}", "rejected": f" {wrong}"}
            for row in real.rows_of("truthfulqa", folder) if real.in_first_half(row["question"]) is first
            for right, wrong in list(zip(*(
                [text for text, label in row["mc2_targets"].items() if label == wanted] for wanted in (1, 0)
            )))[:PAIRS_OF_A_QUESTION]
        ])
    return paths


def run(label: str, rate: str, seed: int, args, model: Path, pairs: Path, extra) -> dict:
    """eval.json of one training, in a process of its own."""
    return run_training(
        args.output_dir / f"{label}-lr{rate}-seed{seed}", "--preferences", pairs, "--model", model,
        "--preference-loss", LOSSES[label], "--beta", BETA, "--learning-rate", rate, "--seed", seed,
        "--max-steps", STEPS, "--num-pairs", 16, "--warmup-steps", 2, "--eval-questions", 48, "--eval-steps", 8,
        "--max-completion-length", 8, *extra,
    )


def measure(path: Path, folder: Path, start: list | None, other: Path, questions: Path, limit) -> dict:
    """The figures on the other half; `start`: log-likelihoods of the start, None for its own."""
    if not path.exists():
        rows = read_lines(other)[:limit]
        pairs = [(row["prompt"], row[answer]) for row in rows for answer in ("chosen", "rejected")]
        logp = [value for value, _ in real.log_likelihoods(folder, pairs)]
        change = [now - before for now, before in zip(logp, start or logp, strict=True)]
        chosen, rejected = change[::2], change[1::2]
        write_lines(path, [{
            "logp": logp, "chosen": statistics.mean(chosen), "rejected": statistics.mean(rejected),
            "implicit accuracy": statistics.mean(c > r for c, r in zip(chosen, rejected)),
            **real.truthfulqa(folder, questions, limit),
        }])
    return read_lines(path)[0]


def cells(rows: list[dict]) -> str:
    """The mean and the values of each measure; of mc1 and mc2 [share, standard error] the first."""
    found = []
    for name in MEASURED:
        values = [row[name][0] if name.startswith("mc") else row[name] for row in rows]
        each = ", ".join(f"{value:.2f}" for value in values)
        error = f" ± {rows[0][name][1]:.3f}" if name.startswith("mc") else ""
        found.append(f"{statistics.mean(values):.3f}{error}" + (f" ({each})" if len(values) > 1 else ""))
    return " | ".join(found)


def plot(pyplot, runs: dict):
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    titles = {
        "pair_logratio_chosen": "held-out right answer: change in nats",
        "pair_logratio_rejected": "held-out wrong answer: change in nats",
        "pair_accuracy": "implicit accuracy",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for number, (label, found) in enumerate(runs.items()):
            for seed, evals in enumerate(found):
                values = course(evals, name, STEPS)
                axis.plot(*zip(*values.items()), "o-", ms=3, color=f"C{number}", label=None if seed else label)
        axis.set(title=title, xlabel="step")
        axis.title.set_fontsize(9)
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    args = real.settings(real.make_parser(__doc__, "real_pairs", seeds=(0, 1)))
    model, questions, extra = args.model, args.questions["test"], args.extra
    pairs, other = write_pairs(args.output_dir, args.data)

    def run_all(jobs):
        return side_by_side(lambda *job: run(*job, args, model, pairs, extra), jobs, args.jobs)

    runs = run_all([(label, rate, seed) for seed in args.seeds for label in LOSSES for rate in RATES])
    grid = {}
    for label in LOSSES:
        for rate in RATES:
            ends = [runs[label, rate, seed]["end"] for seed in args.seeds]
            grid[label, rate] = {name: [end[name]["mean"] for end in ends] for name in GRID}
    print("| loss | learning rate | " + " | ".join(GRID) + " |\n" + "|---" * (2 + len(GRID)) + "|")
    for (label, rate), values in grid.items():
        shown = [", ".join(f"{value:.2f}" for value in values[name]) for name in GRID]
        print(f"| {label} | {rate} | " + " | ".join(shown) + " |")
    best = {
        label: max(RATES, key=lambda rate: statistics.mean(grid[label, rate]["pair_accuracy"])) for label in LOSSES
    }

    def measured(name: str, folder: Path, start=None) -> dict:
        return measure(real.result_file(args, name, "measured"), folder, start, other, questions, args.limit)

    results = {"start": [measured("start", model)]}
    start = results["start"][0]["logp"]
    for label, rate in best.items():
        names = [f"{label}-lr{rate}-seed{seed}" for seed in args.seeds]
        results[label] = [measured(name, args.output_dir / name / "final", start) for name in names]
    (args.output_dir / "real_pairs.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n| | learning rate | " + " | ".join(MEASURED) + " |\n" + "|---" * (2 + len(MEASURED)) + "|")
    for label, rows in results.items():
        print(f"| {label} | {best.get(label, '')} | {cells(rows)} |")
    by_label = {label: [runs[label, best[label], seed] for seed in args.seeds] for label in LOSSES}
    write_plot(args.output_dir / "real_pairs.json", lambda pyplot: plot(pyplot, by_label))


if __name__ == "__main__":
    main()
