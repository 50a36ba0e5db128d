"""How much of a principle its chains of thought carry, with intervals; and whether an answer is right.

    row_info[n, i]  = log K - row_info_nce(scores)[n, i]        nats; its mean over n and i is the MI estimate
    SI[i]           = max(0, mean_n row_info[n, i]) / log K      share of the principle's identity in the text
    interval        = percentiles of the statistic over questions drawn with replacement (bootstrap)

`scores[n, i, j]` is the log-probability under principle j of the chain of thought written under principle i to
question n, summed over its tokens. If the completions were sampled from that very model at that very temperature, with
no top-k or top-p, and principles are equally likely, the MI estimate is unbiased for I(C; CoT | x) given the K
principles of a question (infonce.py says why). It can never exceed log K: near that ceiling, only more principles can
tell more.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from infonce import column_info_nce, mi_lower_bound, row_info_nce


class MutualInformation(NamedTuple):
    """In nats, but for the two retrieval shares, whose chance level is 1 / K."""

    row: torch.Tensor  # [] log K - row InfoNCE: the estimate of I(C; CoT | x)
    column: torch.Tensor  # [] log K - column InfoNCE: no bound, it may exceed the row estimate
    ceiling: float  # log K
    row_retrieval: torch.Tensor  # [] share of completions whose own principle scores them highest
    column_retrieval: torch.Tensor  # [] share of principles whose own completion they score highest


def mutual_information(scores) -> MutualInformation:
    """Estimates from scores [N, K, K] (question, completion, principle), summed log-probabilities in nats.

    Raises ValueError for another shape or for scores that are not finite on the diagonal.
    """
    _check_scores(scores)
    num = scores.shape[-1]
    target = torch.arange(num, device=scores.device)  # [K]
    return MutualInformation(
        mi_lower_bound(row_info_nce(scores), num),  # []
        mi_lower_bound(column_info_nce(scores), num),  # []
        math.log(num),
        (scores.argmax(-1) == target).float().mean(),  # []
        (scores.argmax(-2) == target).float().mean(),  # []
    )


def row_information(scores):
    """log K - row InfoNCE of each completion, in nats: scores [N, K, K] -> [N, K]. Single values may be negative."""
    _check_scores(scores)
    return math.log(scores.shape[-1]) - row_info_nce(scores)  # [N, K]


def sufficiency_index(scores):
    """SI of each of K principles, in [0, 1]: scores [N, K, K] -> [K]. SI of a set: the mean over K.

    1 where the chain of thought is a sufficient statistic for its principle, 0 where it is independent of it.
    Raises ValueError as mutual_information does, and for K = 1, which leaves nothing to tell apart.
    """
    if scores.shape[-1] < 2:
        raise ValueError("sufficiency_index expects K >= 2: the identity of a single principle carries no information")
    return row_information(scores).mean(0).clamp(min=0) / math.log(scores.shape[-1])  # [K]


def bootstrap_interval(values, level: float = 0.95, resamples: int = 2000, seed: int = 0):
    """(low, high) of the mean over the first dimension: values [N, ...] -> two tensors [...].

    The N questions are drawn with replacement, so everything that belongs to one question stays together.
    N = 1 gives an interval of no width: it says nothing then. Raises ValueError for N = 0.
    """
    if values.ndim < 1 or not len(values):
        raise ValueError(f"bootstrap_interval expects values [N, ...] with N >= 1, got {list(values.shape)}")
    generator = torch.Generator().manual_seed(seed)
    values = values.detach().cpu().double()
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)  # [R, N]
    counts = torch.zeros(resamples, len(values), dtype=torch.double)  # [R, N]
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    means = (counts @ values.flatten(1 if values.ndim > 1 else 0).reshape(len(values), -1)) / len(values)  # [R, M]
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.double), dim=0)  # [M], [M]
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def answer_is_right(text: str, answer: str) -> bool:
    """Whether a completion ends in `answer`: read in the last <answer>, or in the whole text where that is missing.

    Lenient on purpose, so that accuracy does not rise merely because the format does. A number is compared with the
    last number there (1,000 and 1000.0 are one number); anything else with the text there, without case and final dot.
    """
    found = text.rpartition("<answer>")[2].partition("</answer>")[0]
    expected = _numbers(answer)
    if len(expected) == 1 and re.fullmatch(r"\W*[-+]?[\d.,]+\W*", answer):
        return _numbers(found)[-1:] == expected
    return found.strip().strip(".").casefold() == answer.strip().strip(".").casefold()


def _numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?", text)]


def _check_scores(scores) -> None:
    if scores.ndim != 3 or scores.shape[1] != scores.shape[2]:
        raise ValueError(f"expected scores [N, K, K] (question, completion, principle), got {list(scores.shape)}")
    if not scores.diagonal(dim1=-2, dim2=-1).isfinite().all():
        raise ValueError("expected finite scores of each completion under its own principle")


def plot_run(run_dir):
    """Write curves.png into a run's directory and return its path; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    run_dir = Path(run_dir)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    points = {0: evals["start"], **{int(k): v for k, v in evals["steps"].items()}, len(steps): evals["end"]}
    panels = (
        ("format", "reward", "format"), ("accuracy", None, "accuracy"), ("sufficiency index", "si", "si"),
        ("drift (Sinkhorn)", "loss_ot", "sinkhorn"), ("entropy, nats per token", "entropy", None),
        ("completion length, tokens", "completion_length", "completion_length"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (title, step_key, eval_key) in zip(axes.flat, panels, strict=True):
        if step_key in steps[0]:
            x, y = zip(*((s["step"], s[step_key]) for s in steps))
            axis.plot(x, y, color="0.7", lw=1, label="training batch")
        if eval_key in evals["start"]:
            mean, low, high = ([p[eval_key][k] for p in points.values()] for k in ("mean", "low", "high"))
            axis.plot(list(points), mean, "o-", color="C0", ms=4, label="held out, 95%")
            axis.fill_between(list(points), low, high, color="C0", alpha=0.2)
        axis.set(title=title, xlabel="step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(run_dir / "curves.png", dpi=120)
    plt.close(figure)
    return run_dir / "curves.png"
