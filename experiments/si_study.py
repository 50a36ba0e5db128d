"""Does SI, measured before training, predict the training? Twelve sets of four principles.

    python experiments/si_study.py                       # an hour and a half on two cores; finished runs are kept
    python experiments/si_study.py --seeds 1 --jobs 1

The sets go from clearly distinct principles over paraphrases of one to strings without meaning. For
each: SI of the set by `si.py`, before any training, and its reach, see `reach`; then `train.py` with
its defaults (full ENIGMA) and without the two other terms (GRPO alone), over seeds. Rank
correlations are over sets, of means over seeds; their intervals are bootstrap intervals over sets
and seeds. Steadiness of a run, from its metrics.jsonl:

    reward_std   standard deviation of the reward over the last half of the steps
    grad_norm    mean gradient norm before clipping, all steps
    falls        share of steps whose reward is below that of the step before

Then the choice by SI: `si.py --select 4` from a pool of 24 texts (the eight principles in two
wordings, opposites of four, empty phrases and strings) against random fours of the same pool. Those
sets took no part when reach was added to SI: they confirm. Writes si_study.json and si_study.png
into --output-dir.
"""

import json
import random
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402

from experiments.common import make_parser, read_lines, run_script, run_training, side_by_side  # noqa: E402
from metrics import share_of_ceiling  # noqa: E402
from support.report import write_plot  # noqa: E402
from support.tiny import STYLES  # noqa: E402


def said(name, wording=0):
    return STYLES[name].texts[wording]


SETS = {
    "strong four": [said(n) for n in ("number", "check", "units", "givens")],
    "mixed four": [said(n) for n in ("number", "givens", "plan", "order")],
    "other mixed four": [said(n) for n in ("check", "units", "goal", "conclude")],
    "weak four": [said(n) for n in ("plan", "goal", "conclude", "order")],
    "three, one said twice": [said("number"), said("number", 1), said("check"), said("units")],
    "two, each said twice": [said("number"), said("number", 1), said("check"), said("check", 1)],
    "two weak, each said twice": [said("goal"), said("goal", 1), said("plan"), said("plan", 1)],
    "one said three times, another": [*STYLES["number"].texts, said("check")],
    "one strong, said four times": [*STYLES["number"].texts, "Number each step."],
    "one weak, said four times": [*STYLES["order"].texts, "Use words that order."],
    "opposites": [STYLES[n].negative for n in ("number", "check", "units", "givens")],
    "strings": ["qwlk vrtz", "mmbo aeiu kkd", "zxcv", "plof dran urt"],
}
POOL = [text for style in STYLES.values() for text in style.texts[:2]]
POOL += [STYLES[n].negative for n in ("plan", "goal", "conclude", "order")]
POOL += ["Be kind.", "Think about it.", "jjw opq rst", "uuvx ab"]
SELECTED, RANDOM_SETS, CONFIRMING_SEEDS = 4, 7, 1
VARIANTS = {"ENIGMA": [], "GRPO": ["--lambda-mi", "0", "--lambda-ot", "0"]}
OUTCOMES = ("accuracy", "format", "reward_std", "grad_norm", "falls", "si_end", "drift")


def write_sets(directory) -> dict:
    """Set -> its principles file: the twelve, the choice by SI, random choices of that pool."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    drawn = {f"random {i + 1}": rng.sample(POOL, SELECTED) for i in range(RANDOM_SETS)}
    files = {name: directory / f"{name.replace(' ', '_').replace(',', '')}.txt" for name in (SETS | drawn)}
    for name, texts in (SETS | drawn).items():
        files[name].write_text("\n".join(texts) + "\n")
    pool, best = directory / "pool.txt", directory / "selected.jsonl"
    pool.write_text("\n".join(POOL) + "\n")
    if not best.exists():
        run_script("si.py", "--principles", pool.resolve(), "--select", SELECTED, "--out", best.resolve())
    return files | {"selected": best}


def measure_si(file: Path, *flags) -> dict:
    """All numbers of `si.py` for a set of principles, on the starting model; kept beside its file."""
    result = file.resolve().with_suffix(".json")
    if not result.exists():
        run_script("si.py", "--principles", file.resolve(), "--json", result, *flags)
    return json.loads(result.read_text())


def train(variant, name, seed, file, args, extra) -> dict:
    """The outcomes of one training."""
    directory = args.output_dir / f"{variant}-{file.stem}-{seed}"
    flags = "--principles", file.resolve(), "--eval-steps", 0, "--seed", seed, *VARIANTS[variant], *extra
    return outcomes(run_training(directory, *flags), read_lines(directory / "metrics.jsonl"))


def outcomes(evals: dict, steps: list[dict]) -> dict:
    """Where a training has ended, and how steady it was, from its eval.json and metrics.jsonl."""
    rewards = [step["reward"] for step in steps]
    return {
        "accuracy": evals["end"]["accuracy"]["mean"], "format": evals["end"]["format"]["mean"],
        "si_end": evals["end"]["si"]["mean"], "drift": evals["end"]["sinkhorn"]["mean"],
        "reward_std": statistics.stdev(rewards[len(rewards) // 2 :]),
        "grad_norm": statistics.mean(step["grad_norm"] for step in steps),
        "falls": statistics.mean(after < before for before, after in zip(rewards, rewards[1:])),
    }


def reach(row_information) -> float:
    """As the SI of each principle, but the 0.9 quantile over questions for the mean: [N][K] nats -> mean over K.

    It is what the most telling tenth of the texts carries. SI is low for a principle that the model
    rarely follows, and for one that another principle repeats. Reach is 1 for the first kind, which
    training can mend, and low for the second. It needs tens of questions.
    """
    quantiles = torch.tensor(row_information, dtype=torch.double).quantile(0.9, dim=0)  # [K]
    return share_of_ceiling(quantiles, len(quantiles)).mean().item()


def ranks(values) -> list[float]:
    """Ranks from 1, ties share their mean."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def spearman(x, y) -> float:
    """Correlation of the ranks; 0 where one side does not vary."""
    x, y = ranks(x), ranks(y)
    return statistics.correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else 0.0


def correlation(predictor, runs, resamples=2000) -> tuple[float, float, float]:
    """Spearman of predictor [sets] and the mean of runs [sets][seeds]; interval over both."""
    rng, found = random.Random(0), []
    for _ in range(resamples):
        chosen = rng.choices(range(len(predictor)), k=len(predictor))
        means = [statistics.mean(rng.choices(runs[i], k=len(runs[i]))) for i in chosen]
        found.append(spearman([predictor[i] for i in chosen], means))
    found.sort()
    rho = spearman(predictor, [statistics.mean(r) for r in runs])
    return rho, found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def plot(plt, predictors, runs, chosen):
    outcomes = {"accuracy": "accuracy", "format": "format", "reward_std": "reward, std of the last half",
                "falls": "share of steps that lower the reward"}
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.4), layout="constrained", sharey="col")
    for row, (predictor, values) in zip(axes, predictors.items(), strict=True):
        for axis, outcome in zip(row, outcomes, strict=True):
            for color, variant in enumerate(VARIANTS):
                points = [(values[name], statistics.mean(r[outcome] for r in runs[variant, name])) for name in SETS]
                axis.plot(*zip(*points), "o", color=f"C{color}", label=f"{variant}: twelve sets")
            points = [(values[name], statistics.mean(r[outcome] for r in runs["ENIGMA", name])) for name in chosen]
            axis.plot(*zip(*points), "o", mfc="none", color="C0", label="ENIGMA: sets that confirm")
            axis.set(xlabel=f"{predictor} of the set, before training")
    for axis, title in zip(axes[0], outcomes.values(), strict=True):
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def main() -> None:
    parser = make_parser(__doc__, "si_study", 3)
    args, extra = parser.parse_known_args()  # what is left goes to train.py
    files = write_sets(args.output_dir / "sets")
    chosen = [name for name in files if name not in SETS]
    measured = side_by_side(
        lambda name: measure_si(files[name], "--num-questions", 256), [(name,) for name in files], args.jobs
    )
    predictors = {
        "SI": {name: measured[name,]["set"]["si"]["mean"] for name in files},
        "reach": {name: reach(measured[name,]["row_information"]) for name in files},
    }
    jobs = [("ENIGMA", name, seed) for seed in range(args.seeds) for name in SETS]
    jobs += [("ENIGMA", name, seed) for seed in range(CONFIRMING_SEEDS) for name in chosen]
    jobs += [("GRPO", name, seed) for seed in range(args.seeds) for name in SETS]
    found = side_by_side(lambda v, name, seed: train(v, name, seed, files[name], args, extra), jobs, args.jobs)
    runs = {(v, name): [found[v, name, s] for s in range(args.seeds) if (v, name, s) in found] for v, name, _ in jobs}
    (args.output_dir / "si_study.json").write_text(
        json.dumps({"predictors": predictors, "runs": {f"{v}: {n}": r for (v, n), r in runs.items()}}, indent=1)
    )

    def mean(variant, name, outcome):
        return statistics.mean(r[outcome] for r in runs[variant, name])

    print("| set | SI | reach | " + " | ".join(OUTCOMES) + " | GRPO: " + " | ".join(OUTCOMES) + " |")
    print("|---" * (3 + 2 * len(OUTCOMES)) + "|")
    for name in sorted(SETS, key=predictors["SI"].get, reverse=True):
        cells = [f"{predictors[p][name]:.2f}" for p in predictors]
        cells += [f"{mean(v, name, outcome):.3f}" for v in VARIANTS for outcome in OUTCOMES]
        print(f"| {name} | {' | '.join(cells)} |")
    for names, what in ((list(SETS), "the twelve sets"), (chosen, "the sets that confirm")):
        for variant in VARIANTS if names != chosen else ("ENIGMA",):
            print(f"\n{variant}, Spearman over {what}, {len(names)} of them [95% interval]")
            for outcome in OUTCOMES:
                values = [[r[outcome] for r in runs[variant, n]] for n in names]
                cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*correlation([p[n] for n in names], values))
                         for p in predictors.values()]
                print(f"  {outcome:11} SI {cells[0]}   reach {cells[1]}")
    for predictor, values in predictors.items():
        halves = sorted(SETS, key=values.get)
        lower, upper = halves[: len(halves) // 2], halves[len(halves) // 2 :]
        for outcome in ("accuracy", "reward_std", "grad_norm", "falls"):
            both = [statistics.mean(mean("ENIGMA", n, outcome) for n in half) for half in (lower, upper)]
            print(f"ENIGMA, {outcome}: lower half of {predictor} {both[0]:.3f}, upper half {both[1]:.3f}")
    print(f"\n| {SELECTED} of a pool of {len(POOL)} | SI | reach | accuracy | format |\n|---|---|---|---|---|")
    for name in sorted(chosen, key=predictors["SI"].get, reverse=True):
        cells = [f"{p[name]:.2f}" for p in predictors.values()]
        cells += [f"{mean('ENIGMA', name, outcome):.2f}" for outcome in ("accuracy", "format")]
        print(f"| {name} | {' | '.join(cells)} |")
    write_plot(args.output_dir / "si_study.json", lambda plt: plot(plt, predictors, runs, chosen), dpi=110)


if __name__ == "__main__":
    main()
