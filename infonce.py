"""InfoNCE between principles and completions: which wrote which?

scores[..., i, j] = log p(completion i | principle j) in nats, where completion i was written under
principle i. The equations, in this file's names (K = num_candidates):

    row_info_nce[i]    = -log softmax_j(scores[i, :])[i]     which principle wrote completion i?
    column_info_nce[j] = -log softmax_i(scores[:, j])[j]     which completion did principle j write?
    symmetric_info_nce = (mean(row) + mean(column)) / 2
    mi_lower_bound     = log(K) - mean(row)

On-policy, log K - mean(row) estimates the mutual information without bias, and the row's expected
gradient is 0: it only measures. The column, or a row temperature above 1, moves principles apart.
tests/test_infonce.py shows both on channels small enough to enumerate.

Sources: van den Oord et al. 2018, arXiv 1807.03748; SAMI, arXiv 2404.14313 (both directions).
Deviations: a score is the sum over all tokens of the CoT; SAMI's authors average over tokens, which
acts as a temperature, and mask the padding token, often the end token too. Their matrix is the
transpose of ours, so their row is our column. The KL to the start that they add is left to the
caller, and so is a critic temperature: pass scores / tau (below 1 the row moves principles together).

Limits. K = 1: loss 0. -inf off the diagonal, a candidate of probability zero: fine in value and
gradient. -inf on the diagonal, NaN and +inf raise FloatingPointError.
Half precision is computed in float32; better, sum log-probabilities in float32 to begin with.

To copy: needs torch only. `python -m doctest infonce.py` runs this example:

    >>> scores = torch.tensor([[-1.0, -3.0], [-4.0, -2.0]])
    >>> row_info_nce(scores), column_info_nce(scores)
    (tensor([0.1269, 0.1269]), tensor([0.0486, 0.3133]))
    >>> symmetric_info_nce(scores)
    tensor(0.1539)
    >>> mi_lower_bound(row_info_nce(scores), num_candidates=2)
    tensor(0.5662)
"""

import math

import torch


def row_info_nce(scores):
    """Which principle wrote completion i? Row cross-entropy: [..., K, K] -> [..., K], nats.

    A constant added to a row changes nothing: how likely a completion is overall does not matter.
    Raises ValueError unless scores is floating point, not empty and square in its last dimensions;
    FloatingPointError unless it is finite on the diagonal, and finite or -inf elsewhere.
    """
    square = scores.dim() >= 2 and scores.shape[-1] == scores.shape[-2] and scores.numel() > 0
    if not square or not scores.is_floating_point():
        got = f"{scores.dtype} of shape {list(scores.shape)}"
        raise ValueError(f"InfoNCE: expected floating point scores [..., K, K], not empty, got {got}")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # [..., K, K]
    # Not logsumexp - diagonal: near scores of -500 that comes in float32 steps of 3e-5.
    losses = -scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1)  # [..., K]
    if not losses.isfinite().all():
        got = f"{scores.min().item()} to {scores.max().item()}"
        expected = "expected scores that are finite on the diagonal, finite or -inf off it"
        raise FloatingPointError(f"InfoNCE: {expected}, got {got}")
    return losses


def column_info_nce(scores):
    """Which completion did principle j write? Column cross-entropy: [..., K, K] -> [..., K], nats.

    The row loss of the transpose: a constant added to a column changes nothing. Raises as it does.
    """
    return row_info_nce(scores.transpose(-2, -1) if scores.dim() >= 2 else scores)  # [..., K]


def symmetric_info_nce(scores):
    """(mean row + mean column) / 2, SAMI's loss: [..., K, K] -> [] nats. Raises as row_info_nce."""
    return (row_info_nce(scores).mean() + column_info_nce(scores).mean()) / 2  # []


def mi_lower_bound(losses, num_candidates):
    """log(num_candidates) - mean(losses): [...] -> 0-dim, nats. Below 0 if worse than chance.

    losses: from row_info_nce, over num_candidates = K principles, equally likely; column losses
    give no bound. An unbiased estimate of I(principle; completion) where the scores are the
    sampling distribution's own log-probabilities (summed, same temperature, no top-k, no top-p);
    with any other critic its expectation is at most that. It cannot exceed log K.
    Source: van den Oord et al. 2018.

    Raises ValueError if losses is empty, not floating point or not finite, or num_candidates < 1.
    """
    if not losses.is_floating_point() or losses.numel() == 0 or not losses.isfinite().all():
        got = f"{losses.dtype} of shape {list(losses.shape)}"
        raise ValueError(f"mi_lower_bound: expected floating point losses, finite and not empty, got {got}")
    if not 1 <= num_candidates < math.inf:
        raise ValueError(f"mi_lower_bound: expected num_candidates >= 1, got {num_candidates}")
    return math.log(num_candidates) - losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()  # []
