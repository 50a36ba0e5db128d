"""Estimators: what a chain of thought (CoT) says of its principle; geometry of hidden states.

`scores[n, i, j]` is the log-probability, summed over tokens, that principle j gives to the CoT
written under principle i in answer to question n; K principles, n = 1..N.

    row[n, i]         = log K - row_info_nce(scores)[n, i]         information(scores, "row")
    column[n, j]      = log K - column_info_nce(scores)[n, j]      information(scores, "column")
    posterior[n, i]   = log K - sum_j h(softmax(scores[n, j])[i])  information(scores, "posterior")
                        h(p) = -p log p; the same mean as the row, less noise
    MI                = mean_n,i row[n, i]                         mutual_information(scores), nats
    SI of principle i = max(0, mean_n row[n, i]) / log K           sufficiency_index(scores), in [0, 1]
    SI of a set       = max(0, MI) / log K                         share_of_ceiling(MI, K)
    interval          = percentiles of the mean over questions drawn with replacement (bootstrap)

Matched scores: the completions were sampled from the model that scores them, at the same
temperature, with no top-k or top-p, and principles are equally likely. Then MI is unbiased for
I(principle; CoT | question) given the K principles (infonce.py). It cannot exceed log K: near that
ceiling only more principles can tell more.

SI is clamped once, after all averaging. Information has noise on both sides of 0: if values, or
the means of principles, were clamped before they enter the mean of a set, only the noise above 0
would stay, and principles that say next to nothing would get twice their SI.

Training and evaluation use "row", which the loss is made of; `python si.py` reports SI and MI by
"posterior", and MI by "row" beside them. In order: information and SI, intervals, selection,
geometry. To copy: it needs torch and infonce.py.
"""

import itertools
import math
from typing import NamedTuple

import torch

from infonce import column_info_nce, mi_lower_bound, row_info_nce


def information(scores, estimator: str = "row"):
    """What each CoT says of its principle: scores [N, K, K] -> [N, K], nats. Values below 0 occur.

    "row": log K - row InfoNCE of that CoT alone. With any critic its mean is a lower bound of MI.

    "column": log K - column InfoNCE of that principle. No bound of MI: its mean may exceed the row's.

    "posterior": log K - sum_j h(p(c_i | y_j)); the posterior p(. | y_j) is the softmax of row j.
    The row uses only the CoT written under c_i. But any y_j may have been written under c_i, with
    probability p(c_i | y_j); here all are used, with that weight:
    E_{y ~ p_i} f(y) = sum_j E_{y ~ p_j} p(c_i | y) f(y), with the row loss f(y) = -log p(c_i | y).
    Exact for matched scores, neither an estimate nor a bound for other critics. On the embedded
    model its standard deviation over questions is 2 to 4 times smaller. Source: our choice.

    Raises ValueError for another shape or estimator, FloatingPointError for NaN, inf, and scores that
    are not finite on the diagonal.
    """
    _check_scores(scores)
    if estimator == "row":
        losses = row_info_nce(scores)  # [N, K]
    elif estimator == "column":
        losses = column_info_nce(scores)  # [N, K]
    elif estimator == "posterior":
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # [N, K, K]
        losses = torch.special.entr(scores.softmax(-1)).sum(1)  # [N, K]
    else:
        raise ValueError(f'information expects estimator "row", "column" or "posterior", got {estimator!r}')
    return math.log(scores.shape[-1]) - losses  # [N, K]


class MutualInformation(NamedTuple):
    """In nats, but for the two retrieval shares, whose chance level is 1 / K."""

    row: torch.Tensor  # [] the estimate of I(principle; CoT | question)
    column: torch.Tensor  # [] no bound, it may exceed the row
    ceiling: float  # log K
    row_retrieval: torch.Tensor  # [] share of completions whose own principle scores them highest
    column_retrieval: torch.Tensor  # [] share of principles whose own completion they score highest


def mutual_information(scores) -> MutualInformation:
    """Means over questions and principles of scores [N, K, K]. Raises as `information` does."""
    _check_scores(scores)
    num_principles = scores.shape[-1]
    return MutualInformation(
        mi_lower_bound(row_info_nce(scores), num_principles),
        information(scores, "column").mean(),
        math.log(num_principles),
        retrieval(scores).mean(),
        retrieval(scores.mT).mean(),
    )


def retrieval(scores):
    """1 where a CoT is likeliest under its own principle: scores [N, K, K] -> [N, K]; chance 1 / K.

    A tie of several principles is shared among them. Raises as `information` does.
    """
    _check_scores(scores)
    top = scores == scores.amax(-1, keepdim=True)  # [N, K, K]
    return (top.diagonal(dim1=-2, dim2=-1) / top.sum(-1)).float()  # [N, K]


def sufficiency_index(scores, estimator: str = "row"):
    """SI of each principle: scores [N, K, K] -> [K], in [0, 1]. Arguments: see `information`.

    1 where the CoT determines its principle, 0 where it is independent of it.
    The SI of the set is not the mean of these, but share_of_ceiling(mutual_information(scores).row, K).
    """
    return share_of_ceiling(information(scores, estimator).mean(0), scores.shape[-1])  # [K]


def share_of_ceiling(mean_information, num_principles: int):
    """max(0, mean_information) / log K, nats -> share in [0, 1], a number or a tensor as given.

    This makes an SI of a mean, and is the one place where SI is clamped: take all means before.
    Raises ValueError for K < 2.
    """
    if num_principles < 2:
        raise ValueError(f"SI expects K >= 2 principles, got {num_principles}")
    positive = mean_information.clamp(min=0) if torch.is_tensor(mean_information) else max(mean_information, 0.0)
    return positive / math.log(num_principles)


# --------------------------------------------------------------------------------------------------
# Intervals over questions


def bootstrap_interval(values, level: float = 0.95, resamples: int = 2000, seed: int = 0):
    """(low, high) of the mean over the first dimension: values [N, ...] -> two tensors [...].

    Whole questions are drawn with replacement. N = 1 gives an interval of no width, which says
    nothing. Raises ValueError for N = 0.
    """
    if values.ndim < 1 or not len(values):
        raise ValueError(f"bootstrap_interval expects values [N, ...] with N >= 1, got {list(values.shape)}")
    generator = torch.Generator().manual_seed(seed)
    values = values.detach().cpu().double()  # [N, ...]
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)  # [R, N]
    counts = torch.zeros(resamples, len(values), dtype=torch.double)  # [R, N]
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    means = counts @ values.reshape(len(values), -1) / len(values)  # [R, M]
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.double), dim=0)  # [M], [M]
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def interval(values) -> dict:
    """{mean, low, high}: the mean over questions [N] with its 95% bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {"mean": values.double().mean().item(), "low": low.item(), "high": high.item()}


def si_interval(nats, num_principles: int) -> dict:
    """{mean, low, high} of SI from information [N]; for a set, the mean over its principles."""
    return {name: share_of_ceiling(value, num_principles) for name, value in interval(nats).items()}


# --------------------------------------------------------------------------------------------------
# Selection: the best subset of a pool


def subset_information(scores, members):
    """MI of subsets among themselves: scores [N, K, K], members [B, S] -> [N, B], nats.

    A subset's scores are the rows and columns of its members, with no new sampling. The estimator is
    "posterior", for matched scores. Raises ValueError for S < 2.
    """
    _check_scores(scores)
    if members.ndim != 2 or members.shape[1] < 2:
        raise ValueError(f"subset_information expects members [B, S] with S >= 2, got {list(members.shape)}")
    size = max(1, 2**22 // (len(scores) * members.shape[1] ** 2))  # subsets at a time: memory
    parts = []
    for part in members.split(size):
        tables = scores[:, part[:, :, None], part[:, None, :]]  # [N, b, S, S]
        info = information(tables.flatten(0, 1), "posterior").mean(1)  # [N·b]
        parts.append(info.unflatten(0, tables.shape[:2]))  # [N, b]
    return torch.cat(parts, 1)  # [N, B]


def select_subset(scores, size: int, exact_up_to: int = 5000) -> list[int]:
    """Sorted indices of the `size` principles with the highest SI of the set: scores [N, K, K].

    All subsets are tried where there are at most `exact_up_to`. Else a subset grows from each
    principle by the best outsider, then the best swap of a member is made until none raises the SI;
    the best of these K is taken. Raises ValueError unless 2 <= size <= K.
    """
    num_principles = scores.shape[-1]
    if not 2 <= size <= num_principles:
        raise ValueError(f"select_subset expects 2 <= size <= K = {num_principles}, got {size}")

    def best(subsets):
        values = subset_information(scores, torch.tensor(subsets)).mean(0)  # [B]
        return subsets[int(values.argmax())], values.max().item()

    if math.comb(num_principles, size) <= exact_up_to:
        return list(best(list(itertools.combinations(range(num_principles), size)))[0])
    found = {}
    for start in range(num_principles):
        chosen = (start,)
        while len(chosen) < size:
            chosen, value = best([(*chosen, new) for new in range(num_principles) if new not in chosen])
        while size < num_principles:
            others = [new for new in range(num_principles) if new not in chosen]
            swaps = [tuple(new if old == out else old for old in chosen) for out in chosen for new in others]
            swapped, swapped_value = best(swaps)
            if swapped_value <= value + 1e-9:  # it rises strictly, so this ends
                break
            chosen, value = swapped, swapped_value
        found[chosen] = value
    return sorted(max(found, key=found.get))


def _check_scores(scores) -> None:
    """Raises ValueError or FloatingPointError for what the estimators cannot take."""
    if scores.ndim != 3 or scores.shape[1] != scores.shape[2] or not scores.numel():
        shape = list(scores.shape)
        raise ValueError(f"expected scores [N, K, K] (question, completion, principle), not empty, got {shape}")
    if not scores.diagonal(dim1=-2, dim2=-1).isfinite().all() or not (scores < math.inf).all():
        raise FloatingPointError("expected finite scores of each completion under its own principle, and no NaN or inf")


# --------------------------------------------------------------------------------------------------
# Geometry of point clouds (hidden states) and of next-token distributions


def effective_rank(x):
    """exp(entropy of the normalised eigenvalues of the covariance): points x [n, d] -> [], 1 to d.

    r equal eigenvalues give r. NaN where all points are equal. Source: Roy and Vetterli 2007, there
    with singular values; here with variances, by which directions of little variance count little.
    """
    _check_cloud("effective_rank", x)
    variances = torch.linalg.svdvals(centred(x)).square()  # [min(n, d)]
    return torch.special.entr(variances / variances.sum()).sum().exp()  # []


def bures_wasserstein(x, y):
    """Wasserstein-2 distance of the Gaussians fitted to x [n, d] and y [m, d]: [], in their unit.

        distance^2 = ||mean x - mean y||^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2

    A and B: the covariances (over n and m). The last trace is the nuclear norm of X Y^T / sqrt(nm),
    X and Y centred, which takes no matrix root. A distance^2 that is below 0 by rounding counts as
    0; equal clouds may show 1e-7 of their size.
    """
    _check_cloud("bures_wasserstein", x, y)
    a, b = (centred(z) / len(z) ** 0.5 for z in (x, y))  # [n, d], [m, d]
    small = [torch.linalg.qr(z, mode="r").R for z in (a, b)]  # [min(n, d), d], [min(m, d), d] the same covariances
    overlap = torch.linalg.svdvals(small[0] @ small[1].mT).sum()  # []
    shift = (x.double().mean(0) - y.double().mean(0)).square().sum()  # []
    return (shift + a.square().sum() + b.square().sum() - 2 * overlap).clamp(min=0).sqrt()  # []


def linear_cka(x, y, debiased: bool = False):
    """Linear centred kernel alignment of paired points x [n, d], y [n, e]: [], at most 1.

    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms of centred points. 1 where y is x after a
    rotation, reflection, scaling or shift; NaN where all points of one are equal. Unrelated clouds
    give d / (n + d), not 0 (d = e, all directions alike): .36 for 2048 points in 1152 dimensions.
    Source: Kornblith et al. 2019, arXiv 1905.00414.

    debiased: the products count pairs of different points alone, so unrelated clouds give 0 on
    average, and single values may be below. Needs n >= 4; NaN where all points of a cloud are equally
    far apart, whose own product is 0. Sources: HSIC_1 of Song et al. 2012, JMLR 13; Nguyen et al. 2021,
    arXiv 2010.15327.
    """
    _check_cloud("linear_cka", x)
    _check_cloud("linear_cka", y)
    if len(x) != len(y) or (debiased and len(x) < 4):
        least = ", 4 or more of them" if debiased else ""
        raise ValueError(f"linear_cka expects as many points in x as in y{least}, got {len(x)} and {len(y)}")
    x, y = centred(x), centred(y)  # [n, d], [n, e]
    x, y = x / x.norm(), y / y.norm()  # [n, d], [n, e] no overflow of fourth powers
    xy, *own = (_alignment(a, b, debiased) for a, b in ((x, y), (x, x), (y, y)))  # [] each
    xx, yy = (product.where(product > 1e-12, math.nan) for product in own)  # [] both, of rounding alone: NaN
    return xy / (xx.sqrt() * yy.sqrt())  # []


def _alignment(x, y, debiased: bool):
    """||Y^T X||^2 of centred x [n, d], y [n, e]: []; debiased: n (n - 3) HSIC_1."""
    total = (y.mT @ x).square().sum()  # []
    if not debiased:
        return total
    n, a, b = len(x), x.square().sum(-1), y.square().sum(-1)  # [n] both
    return total - n / (n - 2) * (a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2))  # []


def fisher_rao(logits_p, logits_q):
    """Fisher-Rao distance of distributions from logits [..., V]: [...], in [0, pi]; 0 where p = q.

    2 arccos(sum sqrt(p q)), computed as 4 arcsin(||sqrt p - sqrt q|| / 2): the same by half angles,
    and exact for neighbours, where the arccos of nearly 1 loses half of its digits.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim < 1 or not logits_p.is_floating_point():
        shapes = f"{list(logits_p.shape)}, {list(logits_q.shape)}"
        raise ValueError(f"fisher_rao expects floating point logits of one shape, got {shapes}")
    dtype = torch.promote_types(logits_p.dtype, torch.float32)
    root_p, root_q = ((z.to(dtype).log_softmax(-1) / 2).exp() for z in (logits_p, logits_q))  # [..., V] both
    chord = (root_p - root_q).norm(dim=-1)  # [...] at most sqrt 2
    return 4 * (chord / 2).clamp(max=0.5**0.5).arcsin()  # [...]


def principle_means(x, labels, num_principles: int):
    """Mean point of each principle: x [n, d], labels [n] -> [K, d]; ValueError if one has none."""
    counts = torch.bincount(labels, minlength=num_principles)  # [K]
    if len(counts) != num_principles or (counts == 0).any():
        raise ValueError(f"principle_means expects points under each of {num_principles}, got {counts.tolist()}")
    sums = torch.zeros(num_principles, x.shape[1], dtype=torch.double).index_add_(0, labels, x.double())  # [K, d]
    return sums / counts[:, None]  # [K, d]


def share_in_span(x, directions):
    """(share of the squared length of x [n, d] in the span of directions [K, d], its rank r).

    A random subspace of r dimensions holds r / d on average, whatever x is. NaN for x = 0.
    """
    _, values, basis = torch.linalg.svd(directions.double(), full_matrices=False)  # [r'], [r', d]
    basis = basis[values > values.max() * 1e-6]  # [r, d] K directions that sum to 0 span K - 1 dimensions at most
    x = x.double()  # [n, d]
    return (x @ basis.mT).square().sum() / x.square().sum(), len(basis)  # [], r


def mean_angle(directions):
    """Mean angle between pairs of directions [K, d]: [], degrees; of a simplex arccos(-1/(K-1)), of a zero NaN."""
    directions = directions.double()  # [K, d]
    unit = directions / directions.norm(dim=-1, keepdim=True)  # [K, d]
    above = torch.triu_indices(len(unit), len(unit), offset=1)  # [2, pairs]
    return (unit @ unit.mT)[above[0], above[1]].clamp(-1, 1).arccos().rad2deg().mean()  # []


def between_to_within(x, labels, num_principles: int):
    """Variance between the principles' means over variance about them: x [n, d], labels [n] -> [].

    Of n points that know nothing of their principle, as many of each, it is about (K - 1) / n, not 0.
    """
    means = principle_means(x, labels, num_principles)  # [K, d]
    within = (x.double() - means[labels]).square().sum(-1).mean()  # []
    return centred(means).square().sum(-1).mean() / within  # []


def centred(x):
    """Points less their mean, [n, d] in float64; exactly 0 where all points are equal."""
    shifted = x.double() - x[:1].double()  # [n, d] without it the rounding of the mean would stay
    return shifted - shifted.mean(0)  # [n, d]


def _check_cloud(name, *clouds) -> None:
    for x in clouds:
        if x.ndim != 2 or not x.numel() or x.shape[1] != clouds[0].shape[1] or not x.is_floating_point():
            shapes = ", ".join(str(list(z.shape)) for z in clouds)
            raise ValueError(f"{name} expects floating point clouds [points, dimensions], not empty, got {shapes}")
