"""Which principles to train with, before training; what training did to the manifold, after it; and the estimators.

    python metrics.py si --principles principles/reasoning.txt                        # a table, best principle first
    python metrics.py si --principles FILE --propose 4 --select 4 --out best.jsonl     # create some, keep the best four
    python metrics.py geometry --base tiny --trained runs/<time>/final --principles FILE

The estimators:

    row_info[n, i]  = log K - row_info_nce(scores)[n, i]        nats; its mean over n and i is the MI estimate
    SI[i]           = max(0, mean_n row_info[n, i]) / log K      share of the principle's identity in the text
    sharper[n, i]   = log K - sum_j h(softmax(scores[n, j])[i])  h(p) = -p log p; same mean, less noise: `si` uses it
    reach[i]        = 0.9 quantile over n of row_info[n, i] / log K   what the most telling tenth of the texts carries
    interval        = percentiles of the statistic over questions drawn with replacement (bootstrap)

`scores[n, i, j]` is the log-probability under principle j of the chain of thought written under principle i to
question n, summed over its tokens. If the completions were sampled from that very model at that very temperature, with
no top-k or top-p, and principles are equally likely, the MI estimate is unbiased for I(C; CoT | x) given the K
principles of a question (infonce.py says why). It can never exceed log K: near that ceiling, only more principles can
tell more.

In order: estimators, what an answer is worth, geometry. The commands are in si.py and geometry.py.
To copy: it needs torch and infonce.py.
"""

import itertools
import math
import re
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

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


def posterior_information(scores):
    """The same information with less sampling noise, for matched scores: scores [N, K, K] -> [N, K], nats.

        log C - sum_j h(p(c_i | y_j)),   h(p) = -p log p,   p(. | y_j) = softmax of row j, C its number of candidates

    Its mean over questions estimates what that of row_information does. A row sees only the completion written under
    c_i; but any completion y_j may have been, with probability p(c_i | y_j), so all are used with that weight:
    E_{y ~ p_i} f(y) = sum_j E_{y ~ p_j} p(c_i | y) f(y), where f(y) = -log p(c_i | y) is the row loss. Exact where
    completions come from the model that scores them; with any other critic this is neither estimate nor bound, and
    row_information still is a bound. On the embedded model the standard deviation over questions is 2 to 4 times
    smaller, as good as 3 to 14 times the questions. -inf off the diagonal: no candidate. Source: our choice.
    """
    _check_scores(scores)
    return _ceiling(scores) - torch.special.entr(scores.softmax(-1)).sum(1)  # [N, K]


def sufficiency_index(scores):
    """SI of each of K principles, in [0, 1]: scores [N, K, K] -> [K]. SI of a set: the mean over K.

    1 where the chain of thought is a sufficient statistic for its principle, 0 where it is independent of it.
    Raises ValueError as mutual_information does, and for K = 1, which leaves nothing to tell apart.
    """
    if scores.shape[-1] < 2:
        raise ValueError("sufficiency_index expects K >= 2: the identity of a single principle carries no information")
    return row_information(scores).mean(0).clamp(min=0) / math.log(scores.shape[-1])  # [K]


def reach(scores):
    """What the most telling tenth of the texts says of each of K principles: scores [N, K, K] -> [K], in [0, 1].

    The 0.9 quantile over the N questions of row_information, as a share of log K. SI is about the average text: it is
    low for a principle that the model rarely follows, and for one that another principle says again. Training changes
    how often, not what can be told apart: reach is 1 for the first kind and stays low for the second. It needs tens of
    questions. Source: our choice, and benchmarks/si_study.py shows what for.
    """
    _check_scores(scores)
    ceiling = _ceiling(scores)
    return (ceiling - row_info_nce(scores)).double().quantile(0.9, dim=0).clamp(min=0) / ceiling  # [K]


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


def confusion(scores):
    """Who is mistaken for whom: scores [N, K, K] -> [K, K]. Row i: the posterior of principle j given CoT i, averaged.

    An ideal reader who guesses from the posterior names j that often. -inf off the diagonal marks a principle that was
    no candidate there (see `si --num-negatives`); the average is over the questions where it was one.
    """
    _check_scores(scores)
    return scores.softmax(-1).sum(0) / scores.isfinite().sum(0).clamp(min=1)  # [K, K]


def subset_information(scores, members):
    """MI of subsets, each with its own members as the only candidates: scores [N, K, K], members [B, S] -> [N, B] nats.

    No new sampling: a subset's table is the rows and columns of its members. The mean of posterior_information: divided
    by log S it is the set's SI (clamped at 0 after the mean over questions). For matched scores only, as that is.
    """
    _check_scores(scores)
    if members.ndim != 2 or members.shape[1] < 2:
        raise ValueError(f"subset_information expects members [B, S] with S >= 2, got {list(members.shape)}")
    size = max(1, 2**22 // (len(scores) * members.shape[1] ** 2))  # subsets at a time: memory
    parts = [scores[:, part[:, :, None], part[:, None, :]] for part in members.split(size)]  # [N, b, S, S] each
    left = [torch.special.entr(part.softmax(-1)).sum(-1).mean(-1) for part in parts]  # [N, b] each, of the posterior
    return math.log(members.shape[1]) - torch.cat(left, 1)  # [N, B]


def select_subset(scores, size: int, exact_up_to: int = 5000) -> list[int]:
    """The `size` of K principles whose set SI is highest, as sorted indices: scores [N, K, K], all pairs scored.

    All subsets are tried where there are at most `exact_up_to`. Else, from each principle in turn: the subset grows by
    the best outsider, then members are swapped for outsiders, the best swap first, until none raises the SI; the best
    of these K ends is taken. Raises ValueError unless 2 <= size <= K.
    """
    num = scores.shape[-1]
    if not 2 <= size <= num:
        raise ValueError(f"select_subset expects 2 <= size <= K = {num}, got {size}")

    def best(subsets):
        values = subset_information(scores, torch.tensor(subsets)).mean(0)  # [B]
        return subsets[int(values.argmax())], values.max().item()

    if math.comb(num, size) <= exact_up_to:
        return list(best(list(itertools.combinations(range(num), size)))[0])
    ends = {}
    for start in range(num):
        chosen = (start,)
        while len(chosen) < size:
            chosen, value = best([(*chosen, new) for new in range(num) if new not in chosen])
        while size < num:
            others = [new for new in range(num) if new not in chosen]
            swaps = [tuple(new if old == out else old for old in chosen) for out in chosen for new in others]
            swapped, swapped_value = best(swaps)
            if swapped_value <= value + 1e-9:  # it rises strictly, so this ends
                break
            chosen, value = swapped, swapped_value
        ends[chosen] = value
    return sorted(max(ends, key=ends.get))


def _ceiling(scores) -> float:
    """log of the number of candidates: K, or fewer where -inf off the diagonal marks principles that were none."""
    return math.log(scores.isfinite().sum(-1).amax().item())


def _check_scores(scores) -> None:
    if scores.ndim != 3 or scores.shape[1] != scores.shape[2]:
        raise ValueError(f"expected scores [N, K, K] (question, completion, principle), got {list(scores.shape)}")
    if not scores.diagonal(dim1=-2, dim2=-1).isfinite().all():
        raise ValueError("expected finite scores of each completion under its own principle")


def answer_is_right(text: str, answer: str) -> bool:
    """Whether a completion ends in `answer`: read in the last <answer>, or in the whole text where that is missing.

    Lenient on purpose, so that accuracy does not rise merely because the format does. A number is compared with the
    last number there (1,000 and 1000.0 are one number); anything else with the text there, without case and final dot.
    """
    found = text.rpartition("<answer>")[2].partition("</answer>")[0]
    expected = _numbers(answer)
    if len(expected) == 1 and re.fullmatch(r"\W*+[\d.,]++\W*+", answer):
        return _numbers(found)[-1:] == expected
    return found.strip().strip(".").casefold() == answer.strip().strip(".").casefold()


def _numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?", text)]


# ----------------------------------------------------------------------------------------------------------------------
# Geometry of point clouds (hidden states) and of next-token distributions


def effective_rank(x):
    """exp(entropy of the normalised eigenvalues of the covariance): points x [n, d] -> 0-dim, between 1 and d.

    r equal eigenvalues give r. NaN where all points are equal. Source: Roy and Vetterli 2007, there with singular
    values of a matrix; here with variances, so that directions of little variance count for little.
    """
    _check_cloud("effective_rank", x)
    variances = torch.linalg.svdvals(centred(x)).square()  # [min(n, d)]
    return torch.special.entr(variances / variances.sum()).sum().exp()  # []


def bures_wasserstein(x, y):
    """Wasserstein-2 distance between the Gaussians fitted to x [n, d] and y [m, d]: 0-dim, in the points' own unit.

        distance^2 = ||mean x - mean y||^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2     A, B: the covariances (over n)

    The last trace is the nuclear norm of X Y^T / sqrt(nm), X and Y centred, which takes no matrix root. Rounding can
    make distance^2 a tiny negative number: it counts as 0, so equal clouds may show 1e-7 of their size and no less.
    """
    _check_cloud("bures_wasserstein", x, y)
    a, b = (centred(z) / len(z) ** 0.5 for z in (x, y))  # [n, d], [m, d]
    small = [torch.linalg.qr(z, mode="r").R for z in (a, b)]  # [min(n, d), d], [min(m, d), d] the same covariances
    overlap = torch.linalg.svdvals(small[0] @ small[1].mT).sum()  # []
    shift = (x.double().mean(0) - y.double().mean(0)).square().sum()  # []
    return (shift + a.square().sum() + b.square().sum() - 2 * overlap).clamp(min=0).sqrt()  # []


def linear_cka(x, y):
    """Linear centred kernel alignment of paired points x [n, d], y [n, e]: 0-dim in [0, 1].

    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms of centred points. 1 where y is x after a rotation, reflection,
    scaling or shift; NaN where all points of one are equal. Source: Kornblith et al. 2019, arXiv 1905.00414.
    """
    _check_cloud("linear_cka", x)
    _check_cloud("linear_cka", y)
    if len(x) != len(y):
        raise ValueError(f"linear_cka expects as many points in x as in y, got {len(x)} and {len(y)}")
    x, y = centred(x), centred(y)  # [n, d], [n, e]
    x, y = x / x.norm(), y / y.norm()  # no overflow of fourth powers
    return (y.mT @ x).square().sum() / ((x.mT @ x).norm() * (y.mT @ y).norm())  # []


def fisher_rao(logits_p, logits_q):
    """Fisher-Rao distance of distributions from logits [..., V]: [...], in [0, pi], 0 only where p = q.

    2 arccos(sum sqrt(p q)), computed as 4 arcsin(||sqrt p - sqrt q|| / 2), which is the same (half-angle) and exact for
    neighbours, where the arccos of nearly 1 has lost half of its digits.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim < 1 or not logits_p.is_floating_point():
        raise ValueError(
            f"fisher_rao expects floating point logits of one shape, got {list(logits_p.shape)}, {list(logits_q.shape)}"
        )
    dtype = torch.promote_types(logits_p.dtype, torch.float32)
    root_p, root_q = ((z.to(dtype).log_softmax(-1) / 2).exp() for z in (logits_p, logits_q))  # [..., V] both
    chord = (root_p - root_q).norm(dim=-1)  # [...] at most sqrt 2
    return 4 * (chord / 2).clamp(max=0.5**0.5).arcsin()  # [...]


def principle_means(x, labels, num: int):
    """Mean of the points under each principle: x [n, d], labels [n] -> [K, d], float64.

    Raises ValueError where a principle has no point.
    """
    counts = torch.bincount(labels, minlength=num)  # [K]
    if len(counts) != num or (counts == 0).any():
        raise ValueError(f"principle_means expects points under each of {num} principles, got {counts.tolist()}")
    sums = torch.zeros(num, x.shape[1], dtype=torch.double).index_add_(0, labels, x.double())  # [K, d]
    return sums / counts[:, None]  # [K, d]


def share_in_span(x, directions):
    """(share of the squared length of x [n, d] that lies in the span of directions [K, d], the rank r of that span).

    A uniformly random subspace of r dimensions holds r / d on average, whatever x is. NaN for x = 0.
    """
    _, values, basis = torch.linalg.svd(directions.double(), full_matrices=False)  # [r'], [r', d]
    basis = basis[values > values.max() * 1e-6]  # [r, d] K directions that sum to 0 span K - 1 dimensions at most
    x = x.double()  # [n, d]
    return (x @ basis.mT).square().sum() / x.square().sum(), len(basis)  # [], r


def mean_angle(directions):
    """Mean angle between pairs of directions [K, d], in degrees: 0-dim. A regular simplex has arccos(-1 / (K - 1))."""
    unit = F.normalize(directions.double(), dim=-1)  # [K, d]
    above = torch.triu_indices(len(unit), len(unit), offset=1)  # [2, pairs]
    return (unit @ unit.mT)[above[0], above[1]].clamp(-1, 1).arccos().rad2deg().mean()  # []


def between_to_within(x, labels, num: int):
    """Variance between the principles' means over variance of points about their own mean: x [n, d], labels [n] -> [].

    Of n points that know nothing of their principle it is about (K - 1) / n, not 0.
    """
    means = principle_means(x, labels, num)  # [K, d]
    within = (x.double() - means[labels]).square().sum(-1).mean()  # []
    return centred(means).square().sum(-1).mean() / within  # []


def centred(x):
    return x.double() - x.double().mean(0)  # [n, d]


def _check_cloud(name, *clouds) -> None:
    for x in clouds:
        if x.ndim != 2 or not x.numel() or x.shape[1] != clouds[0].shape[1] or not x.is_floating_point():
            shapes = ", ".join(str(list(z.shape)) for z in clouds)
            raise ValueError(f"{name} expects floating point clouds [points, dimensions], not empty, got {shapes}")


if __name__ == "__main__":
    import commands  # here, because the commands need this file, and all the others

    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII only
    sys.exit(commands.main())
