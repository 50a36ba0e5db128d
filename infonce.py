"""InfoNCE between principles and completions: which principle wrote this, and which completion did it write?

scores[..., i, j] = log p(completion i | principle j) in nats; completion i was written under principle i. The
equations, in this file's names (K = num_candidates):

    row_info_nce[i]    = -log softmax_j(scores[i, :])[i]      which principle wrote completion i?
    column_info_nce[j] = -log softmax_i(scores[:, j])[j]      which completion did principle j write?
    symmetric_info_nce = (mean(row) + mean(column)) / 2
    mi_lower_bound     = log(K) - mean(row)

Sources: van den Oord et al. 2018, arXiv 1807.03748; SAMI, arXiv 2404.14313 (both directions, averaged).
Deviations: none. A critic temperature is the caller's: pass scores / tau.

What they do, with completions drawn from the model that scores them (on-policy), principles equally likely:
(a) The softmax over j is the posterior p(c | y), so log K - E[row] is I(C; Y) itself. log K - E[column] is no
bound: it compares two completions, and can exceed I(C; Y).
(b) With the samples held fixed (no score-function term) the row's expected gradient is exactly zero,
-E_y sum_c p(c | y) grad log p(c | y) = -E_y grad 1 = 0: the row measures; beyond sampling noise it moves
nothing. Two things do move principles apart. tau > 1 makes the critic flatter than the posterior, and descent
then raises log p(y | c) where p(c | y) exceeds the critic's value (tau < 1: the reverse). And in the column,
where E grad log p(y_j | c_j) = 0, only the softmax over i is left: descent lowers log p(y_i | c_j) by that
weight, so most for the completion of the batch that is likeliest under c_j. On the random tables
p(y | c) we tried, a free logit per entry, a step raised I(C; Y) for every row at tau = 2, for every column at
K = 2 and most at K = 3 and 4. Neither is a theorem: tests/test_infonce.py holds a counter-example to each.

Limits. K = 1: loss 0. -inf off the diagonal, a candidate of probability zero: fine in value and gradient.
-inf on the diagonal, a completion that its own principle could not have written, is a ValueError, and so are
NaN and +inf anywhere: no loss would be finite. Half precision is computed in float32; better, sum
log-probabilities in float32 to begin with.

To copy: needs torch only. `python -m doctest infonce.py` runs this example:

    >>> scores = torch.tensor([[-1.0, -3.0], [-4.0, -2.0]])
    >>> row_info_nce(scores)
    tensor([0.1269, 0.1269])
    >>> column_info_nce(scores)
    tensor([0.0486, 0.3133])
    >>> symmetric_info_nce(scores)
    tensor(0.1539)
    >>> mi_lower_bound(row_info_nce(scores), num_candidates=2)
    tensor(0.5662)
"""

import math

import torch


def row_info_nce(scores):
    """Which principle wrote completion i? Cross-entropy over the row: [..., K, K] -> [..., K], nats.

    Gradient: d row[i] / d scores[i, j] = softmax_j(scores[i, :])[j] - 1[i = j]. A constant added to a row
    changes nothing, so how likely a completion is overall does not matter.

    Raises ValueError unless scores is floating point, not empty, square in its last two dimensions, finite on the
    diagonal, and finite or -inf elsewhere.
    """
    square = scores.dim() >= 2 and scores.shape[-1] == scores.shape[-2] and scores.numel() > 0
    if not square or not scores.is_floating_point():
        got = f"{scores.dtype} of shape {list(scores.shape)}"
        raise ValueError(f"InfoNCE: expected floating point scores [..., K, K], not empty, got {got}")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # [..., K, K]
    # Not logsumexp - diagonal: in float32, near scores of -500, that difference comes in steps of 3e-5.
    losses = -scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1)  # [..., K]
    if not losses.isfinite().all():
        got = f"{scores.min().item()} to {scores.max().item()}"
        raise ValueError(f"InfoNCE: expected scores that are finite on the diagonal, finite or -inf off it, got {got}")
    return losses


def column_info_nce(scores):
    """Which completion did principle j write? Cross-entropy over the column: [..., K, K] -> [..., K], nats.

    The row loss of the transpose, so a constant added to a column changes nothing. Raises as row_info_nce.
    """
    return row_info_nce(scores.transpose(-2, -1) if scores.dim() >= 2 else scores)  # [..., K]


def symmetric_info_nce(scores):
    """(mean row + mean column) / 2, SAMI's loss: [..., K, K] -> 0-dim, nats. Raises as row_info_nce does."""
    return (row_info_nce(scores).mean() + column_info_nce(scores).mean()) / 2  # []


def mi_lower_bound(losses, num_candidates):
    """log(num_candidates) - mean(losses): [...] -> 0-dim, nats. Never clamped: below 0 if worse than chance.

    losses: from row_info_nce, over num_candidates = K principles, equally likely. An unbiased estimate of
    I(C; Y) where the scores are the sampling distribution's own log-probabilities (summed, same
    temperature, no top-k, no top-p); with any other critic its expectation is at most I(C; Y). It cannot
    exceed log K. No bound from column losses (see the module docstring). Source: van den Oord et al. 2018.

    Raises ValueError if losses is empty, not floating point or not finite, or num_candidates < 1.
    """
    if not losses.is_floating_point() or losses.numel() == 0 or not losses.isfinite().all():
        got = f"{losses.dtype} of shape {list(losses.shape)}"
        raise ValueError(f"mi_lower_bound: expected floating point losses, finite and not empty, got {got}")
    if not 1 <= num_candidates < math.inf:
        raise ValueError(f"mi_lower_bound: expected num_candidates >= 1, got {num_candidates}")
    return math.log(num_candidates) - losses.mean()  # []
