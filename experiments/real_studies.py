"""Five questions about ENIGMA on a real model, beyond the table of experiments/real.py.

    python experiments/real_studies.py transfer --data FOLDER       # the flags of experiments/real.py
    python experiments/real_studies.py temperature --seeds 0 1 --limit 120

transfer     Does it show where nobody rewarded it? Following under the principles of the pool that were not
             trained (without that of few words, which a collapse to short answers follows too); and lm-eval's
             truthfulqa_gen on the half that was not trained: is a written answer nearer to a true one?
temperature  Does the papers' own term teach following at the temperature of its text? The InfoNCE loss without
             any information in the reward: TEMPERATURES x WEIGHTS for 18 steps, on a seed and on questions that
             are not reported; the weight with the most following, the format not below the start's. The best of
             all, 36 steps on two seeds, beside GRPO alone and ENIGMA; and in the grid its row and column apart.
si           Do principles of high SI train better? Eight sets of four from the pool, their SI as far apart as it
             goes: measured by si.py before the training, ENIGMA for 24 steps each. Rank correlations with where
             the training ends and how steady it is (reward_std and falls are the format's, as the reward
             holds the information itself). The sets are chosen by their SI on other questions.
geometry     What moves in the hidden states, layer by layer, under ENIGMA, under GRPO alone, and under a random
             change of every weight matrix as large as ENIGMA's: what chance gives.
long         Three times as long, 108 steps of both arms, evaluated every 18: following, words, mc2 at the end.

Nothing is chosen on what is reported: weights and sets are, on questions of choice.jsonl (others of GSM8K), and
weights on a seed of their own. All share --output-dir with experiments/real.py; transfer, temperature and geometry
stand on its trainings, and make those that are missing. Flags that are left go to train.py. A study goes on where
it was stopped; what is in --output-dir already is not asked again, with whatever flags it was made.

Hours of one quiet core of an AMD EPYC without bfloat16 instructions, where a step of GRPO takes 20 seconds and one of
ENIGMA 35, an evaluation six minutes, and a comparison by geometry.py eleven; --jobs 2, the default, takes half as long
on two: transfer a half for each seed, temperature 5, si 4, geometry a half for each seed, long 3. Writes STUDY.json, of
some STUDY.png, and prints the tables.
"""

import itertools
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import torch  # noqa: E402

import metrics  # noqa: E402
import si  # noqa: E402
from experiments import reading, real, si_study  # noqa: E402
from experiments.common import (  # noqa: E402
    interval_cell,
    markdown,
    read_lines,
    run_script,
    run_training,
    side_by_side,
)
from experiments.preference import course  # noqa: E402
from support.data import make_template, pick_questions  # noqa: E402
from support.files import load_principles, save_principles  # noqa: E402
from support.model import load_model  # noqa: E402
from support.report import write_plot  # noqa: E402


def figures(run: Path, evals: dict, when: str) -> dict:
    """Name -> mean of the figures of a run's evaluation, at the start or the end; follows by the present marks."""
    means = {name: value["mean"] for name, value in evals[when].items() if isinstance(value, dict) and "mean" in value}
    share, _ = reading.following(reading.read_answers(run / f"answers-{when}.jsonl"))
    return means | {"follows": share}


# --------------------------------------------------------------------------------------------------
# transfer

BY_LENGTH = "Use at most eight words."  # whatever is short follows it: in the table by principle alone


def transfer(args) -> dict:
    untrained = args.output_dir / "untrained.txt"
    trained = {principle.text for principle in load_principles(real.PRINCIPLES)}
    others = [principle.text for principle in load_principles(real.POOL) if principle.text not in trained]
    untrained.write_text("\n".join(others) + "\n")
    real.run_arms(args, real.BOTH, args.seeds)

    def asked(name, seed):
        """(completions under the other principles, scores of written answers to TruthfulQA) of one model."""
        run = real.own_folder(args, f"{name}-{seed}")
        folder = args.model if name == "start" else run / "final"
        flags = real.flags_of(args, seed, "--principles", untrained)
        rows = real.ask(args, folder, run / "untrained.jsonl", flags)
        return rows, real.score(args, folder, name if name == "start" else run.name, "generation")

    real.score(args, args.model, "start", "generation")  # the same for each seed
    jobs = [(name, seed) for seed in args.seeds for name in ("start", *real.BOTH)]
    found = side_by_side(asked, jobs, args.jobs)
    rows, results = [], {}
    for name, seed in jobs:
        answers, before = (
            [row for row in found[of, seed][0] if row["principle"] != BY_LENGTH] for of in (name, "start")
        )
        share, error = reading.following(answers)
        change = reading.following(answers, before) if name != "start" else None
        rows.append([name, seed, f"{share:.3f} ± {error:.3f}", f"{change[0]:+.3f} ± {change[1]:.3f}" if change else ""])
        results[f"{name} {seed}"] = {"follows": (share, error), "change": change, "TruthfulQA": found[name, seed][1]}
    print("Following under principles that were not trained\n")
    print(markdown(["", "seed", "share ± standard error", "− the start's, the same questions"], rows), "\n")
    pooled = {name: [row for seed in args.seeds for row in found[name, seed][0]] for name in ("start", *real.BOTH)}
    print(reading.by_principle(others, pooled), "\n")
    columns = list(real.SCORES["generation"])
    rows = [
        [name, seed, *("{:.3f} ± {:.3f}".format(*found[name, seed][1][column]) for column in columns)]
        for name, seed in jobs if (name, seed) not in {("start", other) for other in args.seeds[1:]}
    ]
    print("TruthfulQA, written answers\n")
    print(markdown(["", "seed", *columns], rows))
    return results


# --------------------------------------------------------------------------------------------------
# temperature

MEAN_LENGTH = 40  # tokens of a chain of thought at the start
TEMPERATURES = (5, 15, MEAN_LENGTH)
WEIGHTS = (0.001, 0.003, 0.01)  # times the temperature, which divides the gradient
GRID_SEED, GRID_STEPS = 100, 18


def infonce_flags(temperature: float, weight: float) -> tuple:
    """The InfoNCE loss in place of information as a reward; two of the four completions take part."""
    return (
        "--mi-reward", 0, "--lambda-mi", round(temperature * weight, 6), "--mi-temperature", temperature,
        "--mi-generations", 2, "--lambda-ot", 0.003,
    )


def temperature(args) -> dict:
    def tried(tau, weight, part="both"):
        flags = real.flags_of(
            args, GRID_SEED, *infonce_flags(tau, weight), "--max-steps", GRID_STEPS, dataset="choice"
        )
        directory = args.output_dir / f"grid-{tau}-{weight}{'' if part == 'both' else f'-{part}'}"
        evals = run_training(directory, *flags, "--model", args.model, script=reading.script(part))
        after, before = (reading.read_answers(directory / f"answers-{when}.jsonl") for when in ("end", "start"))
        found = {when: figures(directory, evals, when) for when in ("start", "end")}
        return found | {"gain": "{:+.2f} ± {:.2f}".format(*reading.following(after, before))}

    def order(job):
        end, start = grid[job]["end"], grid[job]["start"]
        return end["format"] >= start["format"], end["follows"]

    grid = side_by_side(tried, list(itertools.product(TEMPERATURES, WEIGHTS)), args.jobs)
    best = max(grid, key=order)
    seeds = args.seeds[:2]
    results = real.run_arms(args, real.BOTH | {"InfoNCE-{}-{}".format(*best): infonce_flags(*best)}, seeds)
    halves = side_by_side(tried, [(*best, "row"), (*best, "column")], args.jobs)
    columns = ("format", "follows", "si", "sinkhorn", "completion_length", "words")
    rows = [["", "", "start", *(f"{grid[best]['start'][c] + 0.0:.2f}" for c in columns), ""]]
    rows += [
        [tau, f"{tau * weight:g}", *part, *(f"{row['end'][c] + 0.0:.2f}" for c in columns), row["gain"]]
        for (tau, weight, *part), row in ({(*job, ""): row for job, row in grid.items()} | halves).items()
    ]
    print(markdown(["temperature", "--lambda-mi", "", *columns, "follows − start"], rows), "\n")
    for tau in TEMPERATURES:
        chosen = max((job for job in grid if job[0] == tau), key=order)
        print(f"at {tau}: --lambda-mi {chosen[0] * chosen[1]:g}, following {grid[chosen]['end']['follows']:.2f}")
    names = list(results)[1:]
    print("", real.table(results), real.table_by_seed(results), real.gains(args, names, seeds), sep="\n\n")
    return {"grid": list(grid.items()), "halves": list(halves.items()), "best": best, "rows": results}


# --------------------------------------------------------------------------------------------------
# si

SETS = 8
SI_STEPS = 24
SET_SIZE = 4
PREDICTORS = ("SI", "top-1", "follows before")
OUTCOMES = ("format", "follows", "gain in following", "si_end", "reward_std", "grad_norm", "falls", "drift_step")


def write_sets(model: str, dataset: str, directory: str) -> None:
    """SETS files of principles in the directory: subsets of the pool whose SI is spread evenly from least to most.

    One measurement of the whole pool gives the SI of every subset among itself. Of subsets about
    equally near to a wanted SI that one is taken which shares least with those before it.
    """
    config = si.SiConfig(
        principles=str(real.POOL), model=model, dataset=dataset, num_questions=16, temperature=0.8,
        max_completion_length=48,
    )
    principles, template = load_principles(real.POOL), make_template(config)
    reader = *load_model(model, torch.device("cpu")), template
    questions = pick_questions(*reader[:2], [principle.text for principle in principles], template, config)
    _, scores = si.estimate_si(*reader, principles, ["pool"] * len(principles), questions, config)  # [N, 14, 14]
    subsets = list(itertools.combinations(range(len(principles)), SET_SIZE))
    nats = metrics.subset_information(scores, torch.tensor(subsets)).mean(0)  # [B]
    order = nats.argsort().tolist()
    chosen = []
    for place in range(SETS):
        wanted = nats[order[0]] + (nats[order[-1]] - nats[order[0]]) * place / (SETS - 1)  # []
        near = sorted(range(len(subsets)), key=lambda i: abs(nats[i] - wanted).item())[:5]
        chosen.append(min(near, key=lambda i: sum(len({*subsets[i]} & {*subsets[j]}) for j in chosen)))
    Path(directory).mkdir(exist_ok=True)
    for number, subset in enumerate(chosen, 1):
        save_principles(Path(directory) / f"set{number}.jsonl", [principles[i] for i in subsets[subset]])


def si_before_training(args) -> dict:
    directory = args.output_dir / "sets"
    files = [directory / f"set{number}.jsonl" for number in range(1, SETS + 1)]
    if not all(file.exists() for file in files):
        run_script(__file__, "--sets", args.model, args.questions["choice"], directory)
    seed = args.seeds[0]

    def measured(file):
        return si_study.measure_si(
            file, "--model", args.model, "--dataset", args.questions["all"], "--num-questions", 32, *real.PROMPT
        )

    def trained(file):
        run = args.output_dir / f"ENIGMA-{file.stem}-{seed}"
        flags = real.flags_of(args, seed, "--principles", file, "--max-steps", SI_STEPS, *real.ARMS["ENIGMA"])
        evals = run_training(run, *flags, "--model", args.model, script=reading.script())
        steps = read_lines(run / "metrics.jsonl")
        drifts = [step["loss_ot"] for step in steps]
        before, after = figures(run, evals, "start"), figures(run, evals, "end")
        formats = [step | {"reward": step["format"]} for step in steps]  # the reward holds the information itself
        return si_study.outcomes(evals, formats) | {
            "follows before": before["follows"], "follows": after["follows"],
            "gain in following": after["follows"] - before["follows"],
            "drift_step": statistics.mean(abs(b - a) for a, b in zip(drifts, drifts[1:])),
        }

    jobs = [(file,) for file in files]
    before, runs = side_by_side(measured, jobs, args.jobs), side_by_side(trained, jobs, args.jobs)
    rows = {
        file.stem: {"SI": before[file,]["set"]["si"]["mean"], "top-1": before[file,]["set"]["retrieval"], **runs[file,]}
        for file in files
    }
    columns = (*PREDICTORS, *OUTCOMES)
    texts = {file.stem: "; ".join(p.text for p in load_principles(file)) for file in files}
    shown = [
        [texts[name], *(f"{rows[name][column]:.3f}" for column in columns)]
        for name in sorted(rows, key=lambda name: -rows[name]["SI"])
    ]
    print(markdown(["principles", *columns], shown), "\n")

    def spearman(predictor, outcome):
        found = si_study.correlation(
            [row[predictor] for row in rows.values()], [[row[outcome]] for row in rows.values()]
        )
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)

    cells = [[outcome, *(spearman(predictor, outcome) for predictor in PREDICTORS)] for outcome in OUTCOMES]
    cells[OUTCOMES.index("gain in following")][-1] = ""  # what was there before is in both
    print(f"Spearman over {len(rows)} sets, 95% bootstrap interval over sets\n")
    print(markdown(["", *PREDICTORS], cells))
    write_plot(args.output_dir / "si.json", lambda pyplot: si_plot(pyplot, rows))
    return {"sets": texts, "rows": rows}


def si_plot(pyplot, rows: dict):
    outcomes = ("format", "follows", "gain in following", "si_end", "reward_std", "drift_step")
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 6), layout="constrained", sharex=True)
    for axis, outcome in zip(axes.flat, outcomes, strict=True):
        axis.plot([row["SI"] for row in rows.values()], [row[outcome] for row in rows.values()], "o")
        axis.set(title=outcome)
    for axis in axes[1]:
        axis.set(xlabel="SI before training")
    return figure


# --------------------------------------------------------------------------------------------------
# geometry

CHANGED = ("ENIGMA", "GRPO", "random")
LAYER_FIGURES = {  # title -> figure of a layer of geometry.py's file
    "effective rank, after / before": lambda row: row["rank_after"] / row["rank_before"],
    "CKA": lambda row: row["linear_cka"],
    "drift / scale²": lambda row: row["sinkhorn"] / row["scale"] ** 2,
    "shift in the span of the principles / chance": lambda row: (row["shift_in_span"] or math.nan) / row["random_span"],
    "between / within, after / before": lambda row: row["between_within_after"] / row["between_within_before"],
}


def write_random_change(start: str, trained: str, out: str) -> None:
    """The start with noise in every weight, of the norm that training has changed that weight by."""
    cpu = torch.device("cpu")
    (model, tokenizer), (other, _) = load_model(start, cpu), load_model(trained, cpu)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight, after in zip(model.parameters(), other.parameters(), strict=True):
            noise = torch.randn(weight.shape, generator=generator)
            weight += noise * ((after - weight).norm() / noise.norm())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def over_seeds(values) -> str:
    """The interval over seeds of figures of geometry.py; of a single seed that over its questions."""
    if len(values) > 1:
        return interval_cell([value["mean"] for value in values], 3)
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**values[0])


def geometry(args) -> dict:
    real.run_arms(args, real.BOTH, args.seeds)

    def compared(name, seed):
        run = real.own_folder(args, f"{name}-{seed}")
        result, folder = run / "geometry.json", run / "final"
        if not result.exists():
            if name == "random" and not folder.exists():
                run_script(__file__, "--random", args.model, args.output_dir / f"ENIGMA-{seed}" / "final", folder)
            run_script(
                "geometry.py", "--base", args.model, "--trained", folder, "--principles", real.PRINCIPLES,
                "--dataset", args.questions["all"], "--max-completion-length", 48, "--seed", seed, "--json", result,
            )
        return json.loads(result.read_text())

    found = side_by_side(compared, list(itertools.product(CHANGED, args.seeds)), args.jobs)
    layers = len(found[CHANGED[0], args.seeds[0]]["layers"])
    shown = sorted({*range(0, layers, max(1, layers // 6)), layers - 1})  # about seven of them
    rows = [
        [layer, name, *(
            f"{statistics.mean(value(found[name, seed]['layers'][layer]) for seed in args.seeds):.4g}"
            for value in LAYER_FIGURES.values()
        )]
        for layer in shown for name in CHANGED
    ]
    print(markdown(["layer", "", *LAYER_FIGURES], rows), "\n")
    outputs = {
        "fisher_rao": "Fisher-Rao, start to trained", "kl": "KL(trained ‖ start)",
        "principle_before": "Fisher-Rao between principles, start", "principle_after": "the same, trained",
        "principle_change": "by how much it has grown",
    }
    rows = [
        [title, *(over_seeds([found[name, seed]["outputs"][key] for seed in args.seeds]) for name in CHANGED)]
        for key, title in outputs.items()
    ]
    print(markdown(["next-token distributions", *CHANGED], rows))
    write_plot(args.output_dir / "geometry.json", lambda pyplot: geometry_plot(pyplot, found))
    return {f"{name} {seed}": value for (name, seed), value in found.items()}


def geometry_plot(pyplot, found: dict):
    figure, axes = pyplot.subplots(1, len(LAYER_FIGURES), figsize=(16, 3.4), layout="constrained")
    for axis, (title, value) in zip(axes, LAYER_FIGURES.items(), strict=True):
        for (name, seed), report in found.items():
            color, values = f"C{CHANGED.index(name)}", [value(row) for row in report["layers"]]
            axis.plot(values, color=color, lw=1, label=f"{name}, seed {seed}")
        axis.set(title=title, xlabel="layer", yscale="log" if title.startswith(("drift", "shift")) else "linear")
        axis.title.set_fontsize(9)
    axes[0].legend(fontsize=7)
    return figure


# --------------------------------------------------------------------------------------------------
# long

LONG_STEPS, LONG_EVERY = 108, 18
COURSE = ("format", "follows", "si", "sinkhorn", "completion_length", "words", "distinct_words", "short_chains")


def long(args) -> dict:
    seed = args.seeds[0]

    def trained(name):
        flags = *real.ARMS[name], "--max-steps", LONG_STEPS, "--eval-steps", LONG_EVERY
        found = real.run_arm(f"{name}-long", seed, args, flags)
        return found | {"evals": json.loads((args.output_dir / f"{name}-long-{seed}" / "eval.json").read_text())}

    found = side_by_side(trained, [(name,) for name in real.BOTH], args.jobs)
    results = {name: value for (name,), value in found.items()}
    courses = {
        name: {figure: course(value["evals"], figure, LONG_STEPS) for figure in COURSE}
        for name, value in results.items()
    }
    rows = [
        [name, step, *(f"{round(by_figure[figure][step], 2) + 0.0:.2f}" for figure in COURSE)]
        for name, by_figure in courses.items() for step in by_figure["format"]
    ]
    print(markdown(["", "step", *COURSE], rows), "\n")
    by_seed = {"start": {seed: next(iter(results.values()))["start"]}}
    by_seed |= {name: {seed: value["end"]} for name, value in results.items()}
    print(real.table_by_seed(by_seed), "\n")
    print(real.ten_completions(args, {name: f"{name}-long-{seed}" for name in results}))
    write_plot(args.output_dir / "long.json", lambda pyplot: course_plot(pyplot, courses))
    return results


def course_plot(pyplot, courses: dict):
    figure, axes = pyplot.subplots(2, len(COURSE) // 2, figsize=(12, 5.5), layout="constrained", sharex=True)
    for axis, title in zip(axes.flat, COURSE, strict=True):
        for name, by_figure in courses.items():
            axis.plot(*zip(*by_figure[title].items()), "o-", ms=4, label=name)
        axis.set(title=title.replace("_", " "), yscale="symlog" if title == "sinkhorn" else "linear")
    for axis in axes[1]:
        axis.set(xlabel="step")
    axes[0, 0].legend(fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------

STUDIES = {
    "transfer": transfer, "temperature": temperature, "si": si_before_training, "geometry": geometry, "long": long,
}
IN_A_PROCESS = {"--sets": write_sets, "--random": write_random_change}  # of its own, on one thread


def main() -> None:
    if (part := sys.argv[1:2]) and part[0] in IN_A_PROCESS:
        return IN_A_PROCESS[part[0]](*sys.argv[2:])
    parser = real.make_parser(__doc__, "real")
    parser.add_argument("study", choices=list(STUDIES))
    args = real.settings(parser)
    results = STUDIES[args.study](args)
    (args.output_dir / f"{args.study}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
