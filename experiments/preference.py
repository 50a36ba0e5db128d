"""InfoPO against DPO on the embedded pairs: each at the best of several settings, then five seeds.

    python experiments/preference.py                     # the grid on seed 100, then seeds 0 to 4 at each one's best
    python experiments/preference.py --seeds 3 --jobs 1

Every run is `python train.py --preferences tiny`; flags not listed here go to it. The best setting
of a loss is the one with the highest sampled accuracy on held-out questions, on a seed and on
sums that the comparison does not use. Then DPO at the setting of the grid whose implicit
accuracy comes nearest to InfoPO's, and both at the lowest beta and the highest rate, which go
farthest from the start. Finished runs are kept in --output-dir. Writes preference.json and
preference.png there, and prints the tables.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import train  # noqa: E402
from experiments.common import after, interval, interval_cell, make_parser, run_training, side_by_side  # noqa: E402
from support import tiny  # noqa: E402
from support.report import write_plot  # noqa: E402

BETAS = {"infopo": ("0.1", "0.3", "1"), "dpo": ("0.1", "0.3", "1")}
RATES = ("1e-4", "2e-4")
COLUMNS = ("accuracy", "format", "pair_accuracy", *(f"pair_logratio_{of}" for of in ("margin", "chosen", "rejected")))
GRID_SEED = 100
REPORTED = 512  # held-out pairs


def train_the_grid(flags) -> int:
    """train.py, evaluated on pairs of other sums than are reported."""
    tiny.make_pairs = after(REPORTED, tiny.make_pairs)
    return train.main(flags)


def run(loss, beta, rate, seed, args, extra) -> dict:
    """eval.json of one training. The grid is evaluated on fewer questions, at its end."""
    part, questions, steps, script = f"seed{seed}", REPORTED, 20, ("train.py",)
    if seed == GRID_SEED:
        part, questions, steps, script = "grid", 256, 0, (__file__, "--grid")
    return run_training(
        args.output_dir / f"{loss}-beta{beta}-lr{rate}-{part}", "--preferences", "tiny", "--preference-loss", loss,
        "--beta", beta, "--learning-rate", rate, "--seed", seed, "--max-steps", 100, "--eval-steps", steps,
        "--eval-questions", questions, *extra, script=script,
    )


def course(evals, name, last: int) -> dict:
    """Step -> mean of a figure, from the start to the last step."""
    steps = {0: evals["start"], **{int(k): v for k, v in evals["steps"].items()}}
    steps[last] = evals["end"]
    return {step: value[name]["mean"] for step, value in steps.items()}


def plot(plt, results):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    titles = {
        "pair_logratio_chosen": "held-out chosen: log-likelihood, change in nats",
        "accuracy": "accuracy of sampled answers", "pair_accuracy": "accuracy of the implicit reward",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for color, (label, row) in enumerate(results.items()):
            courses = [course(evals, name, 100) for evals in row["runs"]]
            steps = list(courses[0])
            for one in courses:
                axis.plot(steps, list(one.values()), color=f"C{color}", lw=0.5, alpha=0.5)
            means = [interval([one[step] for one in courses])[0] for step in steps]
            axis.plot(steps, means, "o-", color=f"C{color}", ms=3, label=label)
        axis.set(title=title, xlabel="step")
        axis.title.set_fontsize(10)
    axes[0].axhline(0, color="0.6", lw=0.8)
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    if sys.argv[1:2] == ["--grid"]:
        sys.exit(train_the_grid(sys.argv[2:]))
    parser = make_parser(__doc__, "preference", 5)
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def run_all(jobs):
        return side_by_side(lambda *job: run(*job, args, extra), jobs, args.jobs)

    grid = run_all([(loss, b, r, GRID_SEED) for loss, betas in BETAS.items() for b in betas for r in RATES])

    def end(job, name):
        return grid[job]["end"][name]["mean"]

    print("| loss | beta | learning rate | " + " | ".join(COLUMNS) + " |\n" + "|---" * (3 + len(COLUMNS)) + "|")
    for job in grid:
        print(f"| {job[0]} | {job[1]} | {job[2]} | " + " | ".join(f"{end(job, name):.2f}" for name in COLUMNS) + " |")
    best = {loss: max((j for j in grid if j[0] == loss), key=lambda j: end(j, "accuracy")) for loss in BETAS}
    target = end(best["infopo"], "pair_accuracy")
    matched = min((j for j in grid if j[0] == "dpo"), key=lambda j: abs(end(j, "pair_accuracy") - target))
    rows = {
        "InfoPO": best["infopo"], "DPO": best["dpo"], "DPO, matched": matched,
        "InfoPO, farthest": ("infopo", BETAS["infopo"][0], RATES[-1]),
        "DPO, farthest": ("dpo", BETAS["dpo"][0], RATES[-1]),
    }
    if matched == best["dpo"]:
        del rows["DPO, matched"]
    runs = run_all(list(dict.fromkeys((*job[:3], seed) for job in rows.values() for seed in range(args.seeds))))
    results = {
        label: {"setting": job[:3], "runs": [runs[(*job[:3], seed)] for seed in range(args.seeds)]}
        for label, job in rows.items()
    }
    (args.output_dir / "preference.json").write_text(json.dumps(results, indent=1))
    print("\n| | beta | learning rate | " + " | ".join(COLUMNS) + " |\n" + "|---" * (3 + len(COLUMNS)) + "|")
    start = [r["start"] for r in results["InfoPO"]["runs"]]
    cells = [interval_cell([s[c]["mean"] for s in start]) for c in COLUMNS]
    print("| start | | | " + " | ".join(cells) + " |")
    for label, row in results.items():
        cells = [interval_cell([r["end"][c]["mean"] for r in row["runs"]]) for c in COLUMNS]
        print(f"| {label} | {row['setting'][1]} | {row['setting'][2]} | " + " | ".join(cells) + " |")
    write_plot(args.output_dir / "preference.json", lambda plt: plot(plt, results))


if __name__ == "__main__":
    main()
