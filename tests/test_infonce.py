"""infonce.py: losses by hand, invariants, and exact mutual information by enumerating small channels."""

import doctest
import itertools
import math

import pytest
import torch

import infonce
from infonce import column_info_nce, mi_lower_bound, row_info_nce, symmetric_info_nce

INF = math.inf


def random_scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, bug="", **tolerance):
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{bug}\n{text}", **tolerance)


def test_doctest():
    result = doctest.testmod(infonce)
    assert result.attempted > 0 and result.failed == 0


# ------------------------------------------------------------ values and invariants


def test_by_hand():
    # Odds in the rows are 3 : 1 and 1 : 1; down the columns 3 : 2 and 1 : 2.
    scores = torch.log(torch.tensor([[3.0, 1.0], [2.0, 2.0]], dtype=torch.float64))
    row = -torch.log(torch.tensor([3 / 4, 2 / 4], dtype=torch.float64))
    column = -torch.log(torch.tensor([3 / 5, 2 / 3], dtype=torch.float64))
    close(row_info_nce(scores), row, "row: softmax over principles j, the last dimension")
    close(column_info_nce(scores), column, "column: softmax over completions i")
    close(symmetric_info_nce(scores), (row.mean() + column.mean()) / 2)
    close(mi_lower_bound(row, 2), math.log(2) - row.mean())


@pytest.mark.parametrize("K", [1, 2, 5])
def test_equals_cross_entropy(K):
    scores = random_scores(3, 4, K, K)
    target = torch.arange(K).repeat(12)
    row = torch.nn.functional.cross_entropy(scores.reshape(-1, K), target, reduction="none")
    column = torch.nn.functional.cross_entropy(scores.mT.reshape(-1, K), target, reduction="none")
    close(row_info_nce(scores), row.reshape(3, 4, K))
    close(column_info_nce(scores), column.reshape(3, 4, K))
    close(symmetric_info_nce(scores), (row.mean() + column.mean()) / 2, "SAMI's loss")


@pytest.mark.parametrize("K", [1, 2, 7])
@pytest.mark.parametrize("loss", [row_info_nce, column_info_nce])
def test_chance_and_perfect(loss, K):
    close(loss(torch.full((K, K), -123.0)), torch.full((K,), math.log(K)), "chance is log K")
    assert (loss(200.0 * torch.eye(K)) == 0).all(), "a critic that is never wrong has loss 0"
    assert mi_lower_bound(loss(200.0 * torch.eye(K)), K).item() == pytest.approx(math.log(K))


def test_K_is_1():
    scores = torch.tensor([[-7.0]], requires_grad=True)
    loss = symmetric_info_nce(scores)
    loss.backward()
    assert loss == 0 and scores.grad == 0 and mi_lower_bound(row_info_nce(scores), 1) == 0


def test_invariants():
    scores = random_scores(2, 4, 4)
    order = torch.tensor([2, 0, 3, 1])
    for loss in (row_info_nce, column_info_nce):
        relabelled = loss(scores[:, order][:, :, order])
        close(relabelled, loss(scores)[:, order], "relabelling the principles matters")
        close(loss(scores[:1]), loss(scores)[:1], "questions leak into each other")
    close(row_info_nce(scores), column_info_nce(scores.mT), "column(S) is not row(S^T)")
    close(symmetric_info_nce(scores), symmetric_info_nce(scores.mT))

    shift = random_scores(2, 4, 1, seed=1)  # one constant per completion i, the same for every principle
    close(row_info_nce(scores + shift), row_info_nce(scores), "row sees a row constant")
    assert not torch.allclose(column_info_nce(scores + shift), column_info_nce(scores))
    close(column_info_nce(scores + shift.mT), column_info_nce(scores))
    assert not torch.allclose(row_info_nce(scores + shift.mT), row_info_nce(scores))


def test_gradients_by_hand():
    scores = random_scores(4, 4).requires_grad_()
    eye = torch.eye(4, dtype=torch.float64)
    (row,) = torch.autograd.grad(row_info_nce(scores).sum(), scores)
    (column,) = torch.autograd.grad(column_info_nce(scores).sum(), scores)
    close(row, scores.detach().softmax(1) - eye)
    close(column, scores.detach().softmax(0) - eye)
    assert torch.autograd.gradcheck(symmetric_info_nce, scores)


# ------------------------------------------------------------ numerical limits


def test_impossible_candidates():
    scores = torch.tensor([[-1.0, -INF], [-2.0, -3.0]], requires_grad=True)
    row, column = row_info_nce(scores), column_info_nce(scores)
    close(row, torch.tensor([0.0, 1 + math.log1p(math.exp(-1))]))
    close(column, torch.tensor([math.log1p(math.exp(-1)), 0.0]))
    (row.sum() + column.sum()).backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 1] == 0, "-inf poisons the gradient"


def test_impossible_target_is_not_hidden():
    for bad in ([-INF, 0.0], [-INF, -INF], [0.0, math.nan], [0.0, INF]):
        for loss in (row_info_nce, column_info_nce, symmetric_info_nce):
            with pytest.raises(FloatingPointError, match="InfoNCE: expected scores that are finite on the diagonal"):
                loss(torch.tensor([bad, [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    scores = (4 * random_scores(3, 3)).to(dtype)
    for loss in (row_info_nce, column_info_nce, symmetric_info_nce):
        assert loss(scores).dtype == torch.float32
        close(loss(scores), loss(scores.float()))


def test_the_bound_of_half_precision_losses_is_not_rounded():
    losses = torch.full((64,), 2.0725, dtype=torch.bfloat16)
    assert mi_lower_bound(losses, 8) == mi_lower_bound(losses.float(), 8) > 0


def test_small_losses_survive_large_scores():
    scores = torch.tensor([[-500.0, -512.0], [-512.0, -500.0]])
    expected = torch.full((2,), math.log1p(math.exp(-12)))  # 6e-6, below the float32 spacing at 500
    close(row_info_nce(scores), expected, "logsumexp - diagonal?", rtol=0.02, atol=0)


@pytest.mark.parametrize("scores", [
    torch.zeros(3), torch.tensor(0.0), torch.zeros(2, 3), torch.zeros(4, 2, 3), torch.zeros(0, 0),
    torch.zeros(0, 2, 2), torch.zeros(2, 2, dtype=torch.long),
])
@pytest.mark.parametrize("loss", [row_info_nce, column_info_nce, symmetric_info_nce])
def test_losses_reject(loss, scores):
    with pytest.raises(ValueError, match=r"expected floating point scores \[..., K, K\], not empty, got"):
        loss(scores)


def test_bound_rejects():
    for losses in (torch.zeros(0), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected floating point losses"):
            mi_lower_bound(losses, 2)
    with pytest.raises(ValueError, match="num_candidates >= 1"):
        mi_lower_bound(torch.zeros(3), 0)


# ------------------------------------------------------------ exact channels: logp[c, y] = log p(y | c)


def random_channel(K, Y, seed, scale=1.0):
    return (scale * random_scores(K, Y, seed=seed)).log_softmax(1)  # [K, Y]


def exact_mi(logp):
    """I(C; Y) in nats for equally likely principles: mean_c KL(p(y | c) || p(y))."""
    p = logp.exp()  # [K, Y]
    return (p * (logp - p.mean(0).log())).sum(1).mean()  # []


def expectation(loss, logp, tau=1.0):
    """E of the mean loss over y_i ~ p(. | c_i), independent, by enumeration, samples held fixed."""
    K, Y = logp.shape
    ys = torch.tensor(list(itertools.product(range(Y), repeat=K)))  # [Y**K, K]
    weights = logp.detach()[torch.arange(K), ys].sum(1).exp()  # [Y**K]
    scores = logp.T[ys] / tau  # [Y**K, K, K]  scores[m, i, j] = log p(y_i | c_j)
    return (weights * loss(scores).mean(1)).sum()  # []


def mi_change(logits, loss, tau=1.0, step=0.05):
    """What one descent step on the expected loss does to I(C; Y), and the expected gradient."""
    logits = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expectation(loss, logits.log_softmax(1), tau), logits)
    after = exact_mi((logits - step * gradient).log_softmax(1))
    return (after - exact_mi(logits.log_softmax(1))).item(), gradient


@pytest.mark.parametrize("K, Y", [(2, 2), (2, 5), (3, 4), (4, 3), (5, 3), (6, 3), (7, 2), (8, 2)])
def test_bound_is_exact_for_the_true_likelihood(K, Y):
    logp = random_channel(K, Y, seed=K)
    estimate = mi_lower_bound(expectation(row_info_nce, logp), K)
    close(estimate, exact_mi(logp), "log K - E[row] is not I(C; Y)")
    for tau in (0.5, 2.0):
        assert mi_lower_bound(expectation(row_info_nce, logp, tau), K) < exact_mi(logp), "any critic: a bound"


def test_bound_by_monte_carlo():
    K, Y, draws = 5, 6, 20_000
    logp = random_channel(K, Y, seed=11)
    generator = torch.Generator().manual_seed(0)
    ys = torch.multinomial(logp.exp(), draws, replacement=True, generator=generator).T  # [N, K]
    losses = row_info_nce(logp.T[ys])  # [N, K]
    error = losses.mean(1).std().item() / math.sqrt(draws)
    assert abs(mi_lower_bound(losses, K).item() - exact_mi(logp).item()) < 4 * error
    assert error < 0.01


def test_column_is_not_a_bound():
    # A binary symmetric channel that errs with probability 0.1: I = log 2 - H(0.1) = 0.3681.
    # Column: both right 0.81 (loss log 10/9), equal 0.18 (log 2), both wrong 0.01 (log 10): E = 0.2331.
    logp = torch.log(torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64))
    column = 0.81 * math.log(10 / 9) + 0.18 * math.log(2) + 0.01 * math.log(10)
    assert expectation(column_info_nce, logp).item() == pytest.approx(column)
    assert exact_mi(logp).item() == pytest.approx(0.3681, abs=1e-4)
    assert math.log(2) - column > exact_mi(logp) + 0.09


@pytest.mark.parametrize("K, Y", [(2, 2), (2, 4), (3, 4)])
def test_row_moves_nothing_on_policy(K, Y):
    for seed in range(5):
        _, gradient = mi_change(random_scores(K, Y, seed=seed), row_info_nce)
        assert gradient.abs().max() < 1e-12, "E of the row gradient at tau 1 should vanish: sum_c p(c|y) = 1"


@pytest.mark.parametrize("K, Y, scale", [(2, 2, 1.0), (2, 4, 1.0), (2, 4, 3.0), (3, 4, 1.0), (3, 4, 3.0)])
def test_row_with_temperature_raises_mi(K, Y, scale):
    for seed in range(5):
        logits = scale * random_scores(K, Y, seed=seed)
        change, gradient = mi_change(logits, row_info_nce, tau=2.0)
        assert gradient.abs().max() > 1e-4
        assert change > 0, f"seed {seed}: a step at tau 2 changed MI by {change}"
        change, _ = mi_change(logits, row_info_nce, tau=0.5)
        assert change < 0, f"seed {seed}: a step at tau 0.5 changed MI by {change}"


@pytest.mark.parametrize("Y, scale", [(2, 1.0), (3, 1.0), (4, 1.0), (4, 3.0)])
def test_column_raises_mi_for_two_principles(Y, scale):
    for seed in range(5):
        change, gradient = mi_change(scale * random_scores(2, Y, seed=seed), column_info_nce)
        assert gradient.abs().max() > 1e-4, "the column's expected gradient is not zero"
        assert change > 0, f"seed {seed}: a step on the column changed MI by {change}"


def test_column_gradient_is_the_softmax_weight():
    """E grad column = mean_j E sum_i softmax_i * grad log p(y_i | c_j): the targets' own terms vanish."""
    logits = random_scores(3, 3, seed=4).requires_grad_()

    def without_targets(scores):  # [M, K, K] -> [M, K]
        return (scores.detach().softmax(1) * scores).sum(1)

    logp = logits.log_softmax(1)
    (full,) = torch.autograd.grad(expectation(column_info_nce, logp), logits, retain_graph=True)
    (rest,) = torch.autograd.grad(expectation(without_targets, logp), logits)
    close(full, rest)


def test_column_counter_example():
    channel = torch.tensor([[0.11, 0.73, 0.16], [0.49, 0.01, 0.50], [0.15, 0.84, 0.01]], dtype=torch.float64)
    change, _ = mi_change(channel.log(), column_info_nce)
    assert change < -1e-4, "K = 3: a step on the column lowers I(C; Y) here"


def test_row_temperature_counter_example():
    """A shared t: the logits that tell y = 0 from y = 1 gain 0.05 t, but y = 2, which tells nothing, t."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    s = 1 + 0.05 * t
    logp = torch.stack([torch.stack([s, -s, t]), torch.stack([-s, s, t])]).log_softmax(1)  # [2, 3]
    (row,) = torch.autograd.grad(expectation(row_info_nce, logp, tau=2.0), t, retain_graph=True)
    (mi,) = torch.autograd.grad(exact_mi(logp), t)
    assert row < 0 and mi < 0, "descent on the row raises t, and that lowers I(C; Y)"
