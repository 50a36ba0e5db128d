"""The figures of docs/one-step.md, drawn by experiments/one_step.py into docs/figures/.

They are 8.6 inches wide, as wide as a page is shown, so that text of 8 points is of 8 points there; the background is
white, so that they can be read on a dark page too. The colours are those of Okabe and Ito.
"""

import contextlib
import itertools

import matplotlib
import torch
from matplotlib.collections import LineCollection
from matplotlib.patches import FancyBboxPatch

from experiments.common import ROOT
from experiments.one_step_numbers import RUNS, SHOWN, STEPS, number, principal_axes
from metrics import information

matplotlib.use("Agg")  # draws into files
from matplotlib import pyplot  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.35"


@contextlib.contextmanager
def drawing(name: str, height: float, rows: int = 1, columns: int = 1, **options):
    """(figure, axes) to draw on; written as docs/figures/one-step-NAME.png at the end of the block."""
    with pyplot.rc_context({"font.size": 8, "axes.titlesize": 8, "savefig.facecolor": "white"}):
        figure, axes = pyplot.subplots(rows, columns, figsize=(8.6, height), layout="constrained", **options)
        yield figure, axes
        FIGURES.mkdir(exist_ok=True)
        figure.savefig(FIGURES / f"one-step-{name}.png", dpi=120, metadata={"Software": None})
        pyplot.close(figure)


def draw_all(moments: dict, drifted: dict) -> None:
    """moments: name -> Moment; drifted: name -> {ε: Transport} of some of them."""
    draw_loop()
    draw_scores(moments["start"].scores[SHOWN], moments["start"].names)
    draw_clouds(moments, drifted)
    draw_errors(drifted)
    draw_later(moments, moments["start"].names)


def draw_loop() -> None:
    """What flows into what in a step, with shapes."""
    with drawing("loop", 3.7) as (_, axis):
        axis.set(xlim=(0, 100), ylim=(1, 49))
        axis.axis("off")

        def box(x, y, width, text, color):
            style = {"boxstyle": "round,pad=0.2,rounding_size=1", "fc": "white", "ec": color, "lw": 1.6}
            axis.add_patch(FancyBboxPatch((x, y - 5), width, 10, **style))
            axis.text(x + width / 2, y, text, ha="center", va="center", linespacing=1.4)

        def arrow(*points, color=GREY):
            for start, end in itertools.pairwise(points):
                style = "-|>" if end == points[-1] else "-"
                options = {"arrowstyle": style, "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
                axis.annotate("", end, start, arrowprops=options)

        box(0.5, 24, 13, "question x\nprinciples c\n[Q, K]", GREY)
        box(18, 24, 13, "policy samples\nG completions\nof each", "black")
        box(35.5, 24, 14, "completions y\n[Q, K, G, T]", "black")
        box(55.5, 41, 18, "format reward r\nadvantage A\n[Q, K, G]", BLUE)
        box(55.5, 24, 18, "scores S under\neach principle\n[Q, G, K, K]", ORANGE)
        box(55.5, 7, 18, "hidden states\nof policy and start\n[Q, n, d] twice", GREEN)
        box(35.5, 7, 14, "frozen start\nreads the same\ntokens", GREEN)
        for y, text, color in ((41, "L_GRPO", BLUE), (24, "L_SAMI", ORANGE), (7, "S_ε", GREEN)):
            box(78, y, 8, text, color)
            arrow((73.9, y), (77.6, y), color=color)
        box(92, 24, 6, "loss\nL", "black")
        arrow((13.9, 24), (17.6, 24))
        arrow((31.4, 24), (35.1, 24))
        arrow((49.9, 24), (55.1, 24), color=ORANGE)
        arrow((52.5, 24), (52.5, 41), (55.1, 41), color=BLUE)
        arrow((52.5, 24), (52.5, 9), (55.1, 9), color=GREEN)
        arrow((42.5, 18.6), (42.5, 12.4), color=GREEN)
        arrow((49.9, 6), (55.1, 6), color=GREEN)
        arrow((86.4, 24), (91.6, 24), color=ORANGE)
        arrow((86.4, 41), (95, 41), (95, 29.4), color=BLUE)
        arrow((86.4, 7), (95, 7), (95, 18.6), color=GREEN)
        axis.text(89, 25.4, "× λ_mi", ha="center")
        axis.text(90, 8.4, "× λ_ot", ha="center")
        arrow((98.4, 24), (99.6, 24), (99.6, 48.4), (24.5, 48.4), (24.5, 29.4))
        axis.text(26, 46, "gradient, clipping, AdamW: new weights", va="center")


def heat_map(axis, values, title: str, names: list, low: float = 0) -> None:
    """A matrix with its numbers in the cells: completions down, principles across."""
    values, high = values.numpy(), 0 if low else 1  # [K, K] log-probabilities, or probabilities
    axis.imshow(values, "cividis", vmin=low, vmax=high)
    for i, j in itertools.product(*map(range, values.shape)):
        color = "white" if values[i, j] < (low + high) / 2 else "black"
        axis.text(j, i, number(values[i, j]), ha="center", va="center", color=color, fontsize=9)
    axis.set_title(title, linespacing=1.4)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.label_outer()  # principles are named at the left and below


def draw_scores(scores, names: list) -> None:
    with drawing("scores", 3.3, 1, 3) as (_, axes):
        heat_map(axes[0], scores, "S: log-probability\nof the chain of thought, nats", names, scores.min().item())
        heat_map(axes[1], scores.softmax(1), "row softmax: which principle\nwrote this completion?", names)
        heat_map(axes[2], scores.softmax(0), "column softmax: which completion\ndid this principle write?", names)
        for axis in axes:
            axis.set_xlabel("read under the principle")
        axes[0].set_ylabel("written under the principle")


def draw_clouds(moments: dict, drifted: dict) -> None:
    """A row for each model: both clouds in their principal plane, and the strongest links at each ε."""
    with drawing("clouds", 6.6, len(drifted), 4, sharex="row", sharey="row") as (_, axes):
        for row, (name, by_eps) in zip(axes, drifted.items()):
            both = torch.cat([moments[name].states, moments[name].start_states])  # [2n, d]
            flat = (both - both.mean(0)) @ principal_axes(both)[0]  # [2n, 2]
            x, y = flat.reshape(2, -1, 2).numpy()  # [n, 2] both
            for axis, (eps, transport) in zip(row, by_eps.items()):
                i, j = transport.strongest()
                faint = min(0.8, 50 / len(i))  # the many links of an even plan are a haze
                lines = LineCollection(list(zip(x[i], y[j])), colors="black", linewidths=0.6, alpha=faint)
                axis.add_collection(lines)
                axis.scatter(*y.T, 26, facecolors="none", edgecolors=BLUE, linewidths=0.8, label="start", zorder=3)
                axis.scatter(*x.T, 7, color=ORANGE, linewidths=0, label="policy", zorder=4)
                axis.set_title(f"ε = {eps:g}: S_ε = {transport.divergence:.3f}\n{len(i):,} links", linespacing=1.4)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(name)
        axes[0, 0].legend(loc="best", handletextpad=0.1)


def draw_errors(drifted: dict) -> None:
    """The error of the plan by iteration, of the textbook and of the fast part."""
    ours = [name for name in drifted if name.startswith("ENIGMA")]
    with drawing("sinkhorn", 2.8, 1, len(ours), sharey=True) as (figure, axes):
        for axis, name in zip(axes, ours):
            for (eps, transport), color in zip(drifted[name].items(), (BLUE, ORANGE, GREEN, PURPLE)):
                for part, style in (("textbook", "--"), ("fast", ".-")):
                    points = zip(*transport.errors[part])
                    axis.plot(*points, style, color=color, ms=5, lw=1.3, label=f"{eps:g}, {part}")
            axis.axhline(1e-4, color="0.5", lw=0.8, ls=":")
            axis.set(xscale="log", yscale="log", title=name, xlabel="iteration")
        axes[0].set_ylabel("error of the plan's row sums")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", title="ε")


def draw_later(moments: dict, names: list) -> None:
    with drawing("later", 5.6, 2, 1 + len(STEPS)) as (_, axes):
        for row, run in zip(axes, RUNS):
            for axis, step in zip(row, (0, *STEPS)):
                scores = moments[f"{run}, step {step}" if step else "start"].scores  # [G, K, K]
                title = f"{run}, step {step}\nMI {number(information(scores).mean())}"
                heat_map(axis, scores.softmax(-1).mean(0), title, names)
