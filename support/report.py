"""What is printed and drawn: tables of the three commands, warnings, card, plots."""

import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

from support.data import example_prompt
from support.writing import write_aside

PATIENCE = 5  # steps in a row that show a sign of trouble before it is a warning
NO_FORMAT = (
    "{:.2f} of the completions keep the format before training, so there is next to no reward to learn from. What "
    "helps, the most effective first: --examples FILE with --prefill, which show and begin the form; --temperature "
    "0.7; a longer --max-completion-length; a larger model"
)
NEAR_CEILING = 0.95  # a set SI above which more questions show nothing new, only more principles do
FEW_CLOSED = 0.5  # share of CoTs with </reasoning> below which SI is about completions, not CoTs
GEOMETRY_COLUMNS = (  # title, key, key after training, format
    ("scale", "scale", None, ".2f"),
    ("Sinkhorn", "sinkhorn", None, ".3g"),
    ("(error)", "sinkhorn_error", None, ".0e"),
    ("Bures-W.", "bures_wasserstein", None, ".3f"),
    ("CKA", "linear_cka", None, ".3f"),
    ("eff. rank", "rank_before", "rank_after", ".1f"),
    ("mean shift", "mean_shift", None, ".3f"),
    ("shift in span", "shift_in_span", "random_span", ".3f"),
    ("angle", "angle_before", "angle_after", ".0f"),
    ("between/within", "between_within_before", "between_within_after", ".3f"),
)


def draw_run(pyplot, run_dir: Path):
    """The figure of a run, from its metrics.jsonl and eval.json."""
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    points = {0: evals["start"], **{int(k): v for k, v in evals["steps"].items()}, len(steps): evals["end"]}
    panels = (
        ("format", "reward", "format"), ("accuracy", None, "accuracy"), ("sufficiency index", "si", "si"),
        ("drift (Sinkhorn)", "loss_ot", "sinkhorn"), ("entropy, nats per token", "entropy", None),
        ("completion length, tokens", "completion_length", "completion_length"),
    )
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (title, step_key, eval_key) in zip(axes.flat, panels, strict=True):
        if points_of_steps := [(s["step"], s[step_key]) for s in steps if step_key in s]:  # a resumed run may change
            axis.plot(*zip(*points_of_steps), color="0.7", lw=1, label="training batch")
        if eval_key in evals["start"]:
            mean, low, high = ([p[eval_key][k] for p in points.values()] for k in ("mean", "low", "high"))
            axis.plot(list(points), mean, "o-", color="C0", ms=4, label="held out, 95%")
            axis.fill_between(list(points), low, high, color="C0", alpha=0.2)
        axis.set(title=title, xlabel="step")
    axes[0, 0].legend(fontsize=8)
    return figure


def before_and_after(evals) -> list:
    """A row (name, start, end) for each metric, the values as text: "mean [low, high]"."""
    def cell(value):
        shown = [round(value[key], 2) + 0.0 for key in ("mean", "low", "high")]  # + 0.0: no -0.00
        return "{:.2f} [{:5.2f}, {:5.2f}]".format(*shown)

    names = [name for name in evals["start"] if name not in ("questions", "example")]
    return [(name, cell(evals["start"][name]), cell(evals["end"][name])) for name in names]


def model_card(run) -> str:
    """README.md of final/: how to prompt the model as in training, and what training changed."""
    config, evals = run.config, run.state["evals"]
    base = "The embedded model" if config.model == "tiny" else config.model
    method = "with ENIGMA" if run.data.principles else "on preference pairs"
    lines = [f"# {run.directory.name}", ""]
    lines += [f"{base}, trained {method} for {config.max_steps} steps, seed {config.seed}.", ""]
    if run.data.principles:
        lines += ["## Principles", "", *(f"- {principle.text}" for principle in run.data.principles), ""]
        lines += ["## Prompt", "", "Exactly as the model was trained on it, up to where its answer begins:", ""]
        lines += ["````text", example_prompt(run.tokenizer, run.data), "````", ""]
        lines += [f"Sampled at temperature {config.temperature}, without top-k or top-p.", ""]
    lines += [f"## Before and after, on {evals['start']['questions']} held-out questions", ""]
    lines += ["| | start | end |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in before_and_after(evals)]) + "\n"


def report(run_dir, evals) -> None:
    """Print the table of before and after, one example, and where everything is."""
    print(f"\n{'held-out questions: ' + str(evals['start']['questions']):30}{'start':>22}{'end':>22}")
    for name, start, end in before_and_after(evals):
        print(f"{name:30}{start:>22}{end:>22}")
    print()
    for name, text in evals["start"]["example"].items():
        if name != "completion":
            print(f"{name + ':':10} {text}")
    for when in ("start", "end"):
        print(f"{when:10} {evals[when]['example']['completion']!r}")
    print(f"\nmodel {run_dir}/final, figures {run_dir}/eval.json, steps {run_dir}/metrics.jsonl, "
          f"completions {run_dir}/samples.jsonl")


def warnings_for(terms: dict, streaks: Counter, config) -> list[str]:
    """The warnings that are due: of each sign of trouble one, once it has shown for PATIENCE steps in a row.

    `streaks` counts these steps, from one call to the next.
    """
    reward, truncated = terms.get("format", terms.get("reward", 0.0)), terms.get("truncated", 0.0)
    no_spread = terms.get("zero_variance_groups", 0.0) >= 0.9
    signs = {
        f"no completion ends within {config.max_completion_length} tokens, and a cut one earns nothing; raise "
        "--max-completion-length": truncated == 1,
        "no completion has earned a reward, so the GRPO term has nothing to learn from; give --examples and --prefill, "
        "which show and begin the form": no_spread and reward == 0 and truncated < 1,
        "nearly every completion has earned the full reward, so the GRPO term has nothing left to teach; the run can "
        "end here, unless the other terms are to go on alone": reward >= 0.99,
        "in nearly every group all completions earn the same, so the GRPO term teaches next to nothing; raise "
        "--num-generations or --temperature": no_spread and 0 < reward < 0.99 and truncated < 1,
        "Sinkhorn has not converged, so the OT term and its gradient are off; raise --ot-eps":
            terms.get("sinkhorn_converged", 1.0) < 1,
    }
    lines = []
    for sign, holds in signs.items():
        streaks[sign] = streaks[sign] + 1 if holds else min(0, streaks[sign])
        if streaks[sign] == PATIENCE:
            lines.append(f"for {PATIENCE} steps, {sign}")
            streaks[sign] = -math.inf  # and stays there
    return lines


def write_plot(path, draw, dpi: int = 120) -> Path | None:
    """Write the figure that draw(pyplot) returns as `path`, ending in .png; returns that path.

    A plot is optional: call this once the results are on the disk. Whatever goes wrong (matplotlib
    is missing, its settings ask for LaTeX) is one line on stderr, and None is returned.
    """
    path = Path(path).with_suffix(".png")
    try:
        import matplotlib  # here: it is optional, and slow to import

        matplotlib.use("Agg")  # draws into files
        from matplotlib import pyplot

        figure = draw(pyplot)
        write_aside(path, lambda aside: figure.savefig(aside, dpi=dpi))
        pyplot.close(figure)
        return path
    except ImportError:
        reason = "pip install matplotlib"
    except Exception as error:  # matplotlib runs other programs; what these raise is not documented
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    print(f"no plot: {reason}", file=sys.stderr)


def cell(values: dict, digits: int = 2) -> str:
    """An interval for people: "0.42 [0.37, 0.47]"."""
    return "{mean:.{n}f} [{low:.{n}f}, {high:.{n}f}]".format(**values, n=digits)


def print_si(summary: dict, config) -> None:
    """The report of a measurement, for people."""
    print_table(summary)
    together = summary["set"]
    print(
        f"\nSI {cell(together['si'])}, MI {cell(together['mi'])} of at most {summary['ceiling']:.2f} nats. "
        f"{together['closed']:.0%} of chains of thought close with </reasoning>.\nMeasured with "
        f"{summary['questions']} questions and {summary['chains']} chains of thought, {summary['cot_tokens']} tokens, "
        f"model {config.model}, temperature {config.temperature}, seed {config.seed}."
    )
    print("\n".join(text for holds, text in notes(summary, config) if holds))
    if "negatives" in summary:
        print("\nSI of each principle and its opposite, from the principle's chains of thought alone: no bound of MI.")
        for row in summary["negatives"]:
            print(f"{row['id'][:8]:9}{cell(row['si_opposite']):22}top-1 {row['retrieval']:.2f}  {row['negative']}")
    if "selection" in summary:
        best, size = summary["selection"], len(summary["selection"]["ids"])
        print(
            f"\nbest {size}: {', '.join(best['ids'])}\nSI among themselves {cell(best['si'])}; chosen on half the "
            f"questions and measured on the other half {best['si_other_half']:.2f}; a random {size} has "
            f"{best['si_random_subset']:.2f}"
        )


def print_table(summary: dict) -> None:
    """A line for each principle, best first, one for the set, one of what could be at most."""
    answered = "accuracy" in summary["set"]
    width = min(36, max(len(row["text"]) for row in summary["principles"]))
    head = f"\n{'principle':{width + 9}}{'SI [95%]':>19}  {'row MI*':>8}{'column*':>9}{'top-1':>7}"
    head += f"  {'mistaken for':16}{'format':>7}{'length':>8}"
    print(head + (f"{'accuracy':>10}" if answered else ""))
    for row in [*summary["principles"], {"id": "the set", "text": "", **summary["set"]}]:
        text = row["text"] if len(row["text"]) <= width else row["text"][: width - 1] + "…"
        other = f"{row['mistaken_for'][:9]} ({row['mistaken_share']:.2f})" if "mistaken_for" in row else ""
        line = f"{row['id'][:8]:9}{text:{width}}{cell(row['si']):>19}{' ~' if row.get('overlaps_next') else '  '}"
        line += f"{row['mi_row']:8.2f}{row['mi_column']:9.2f}{row['retrieval']:7.2f}  {other:16}"
        line += f"{row['format']:7.2f}{row['cot_length']:8.1f}"
        print(line + (f"{row['accuracy']:10.2f}" if answered else ""))
    bounds = f"{1:19.2f}  {summary['ceiling']:8.2f}{'':9}{summary['chance']:7.2f}"
    print(f"{'at most log K; by chance':{width + 9}}{bounds}")


def notes(summary: dict, config) -> list[tuple[bool, str]]:
    """(whether it holds, the line): what a reader of the table has to know."""
    together, num, pool = summary["set"], summary["per_question"], len(summary["ids"])
    return [
        (together["closed"] < FEW_CLOSED,
         "warning: few chains of thought close. SI is then about whole completions, answers included, and says\n"
         "  little of the reasoning. The model does not write the format that training rewards."),
        (num < pool, f"Each question has drawn {num} of the {pool} principles, so K is {num}. MI is at most log\n"
                     f"  {num}, and a lower bound of the MI of the whole pool."),
        (any(row.get("overlaps_next") for row in summary["principles"]),
         "~ The interval overlaps that of the next line. More --num-questions narrow the intervals."),
        (together["si"]["mean"] >= NEAR_CEILING,
         f"SI is near its ceiling: with {num} principles it cannot show more. Add principles."),
        (summary["truncated"] > 0.05, f"{summary['truncated']:.0%} of completions were cut at "
                                      f"{config.max_completion_length} tokens; raise --max-completion-length."),
        (True, "* log K - InfoNCE in nats, as in training. SI estimates the same share of log K from the posteriors\n"
               "  of all chains of thought, which is less noisy. The column is no bound of MI: it may exceed the row."),
    ]


def heat_map(plt, summary):
    """Who is mistaken for whom, as a figure; pairs that no question has drawn together stay empty."""
    ids, values = summary["ids"], summary["confusion"]
    size = 2 + 0.45 * len(ids)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for (i, row), j in itertools.product(enumerate(values), range(len(ids))):
        color = "white" if row[j] > 0.5 else "black"
        text = "" if math.isnan(row[j]) else f"{row[j]:.2f}".lstrip("0")
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(ids)), ids, rotation=60, ha="right")
    axis.set_yticks(range(len(ids)), ids)
    axis.set(xlabel="is taken for", ylabel="was written under")
    figure.colorbar(image, label="mean posterior")
    return figure


def print_geometry(summary: dict, config) -> None:
    """The report of a comparison, for people."""
    print("\nlayer" + "".join(f"{title:>{17 if after else 11}}" for title, _, after, _ in GEOMETRY_COLUMNS))
    for index, row in enumerate(summary["layers"]):
        line = f"{index:5}"
        for _, key, after, form in GEOMETRY_COLUMNS:
            text = f"{row[key]:{form}}"
            if after:
                text += f" {'/' if after == 'random_span' else '→'} {row[after]:{form}}"
            line += f"{text:>{17 if after else 11}}"
        print(line)
    print(
        "a → b is base → trained, and layer 0 is the embeddings. scale is the root mean squared distance of the\n"
        f"base's states from their mean. Sinkhorn is of {summary['cloud']} of the states, at eps 0.1 of the mean\n"
        "squared distance; (error) is that of its marginals. shift in span is the share of the squared shift in\n"
        "the span of the base's principle directions / in a random subspace of that dimension. CKA is debiased:\n"
        "0 by chance, 1 for equal geometry. angle is the mean angle between principle directions, in degrees."
    )
    print()
    for name, text in (
        ("fisher_rao", "Fisher-Rao distance of next-token distributions, base to trained (at most pi)"),
        ("kl", "KL(trained || base), nats per token"),
        ("principle_before", "Fisher-Rao distance from one principle's prompt to another's, base"),
        ("principle_after", "the same, trained"),
        ("principle_change", "by how much it has grown"),
    ):
        print(f"{cell(summary['outputs'][name], 3):24} {text}")
    print(f"\n{summary['completions']} completions of {config.trained} to {summary['questions']} questions under "
          f"{summary['principles']} principles, compared at {summary['tokens']} of their tokens, seed {config.seed}.")


def layer_plot(plt, summary):
    """The figures of each layer, as a figure."""
    panels = (
        ("drift", ("sinkhorn",)), ("Bures-Wasserstein, mean shift", ("bures_wasserstein", "mean_shift")),
        ("linear CKA", ("linear_cka",)), ("effective rank", ("rank_before", "rank_after")),
        ("shift in principle span", ("shift_in_span", "random_span")),
        ("between / within principles", ("between_within_before", "between_within_after")),
    )
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels):
        for key in keys:
            axis.plot([row[key] for row in summary["layers"]], "o-", ms=4, label=key.replace("_", " "))
        axis.set(title=title, xlabel="layer")
        axis.legend(fontsize=8)
    return figure
