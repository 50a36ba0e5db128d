"""metrics.py: the estimates against exact mutual information, the interval's coverage, and what counts as right."""

import math

import pytest
import torch

import metrics


def channel(num, letters, sharpness=1.5, seed=0):
    """p(y | c) [K, Y] of a random discrete channel, and its exact mutual information under uniform c, in nats."""
    generator = torch.Generator().manual_seed(seed)
    log_p = (sharpness * torch.randn(num, letters, generator=generator, dtype=torch.double)).log_softmax(-1)  # [K, Y]
    mixture = log_p.logsumexp(0) - math.log(num)  # [Y]
    return log_p, (log_p.exp() * (log_p - mixture)).sum().item() / num


def draw_scores(log_p, num, seed=0):
    """scores [N, K, K] of N draws of one letter under each input: what sampling and scoring give."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.multinomial(log_p.exp(), num, replacement=True, generator=generator).T  # [N, K]
    return log_p.T[letters]  # [N, K, K]: letter i under input j


@pytest.mark.parametrize("num", range(2, 9))
def test_the_estimate_is_the_exact_information_of_a_channel(num):
    log_p, exact = channel(num, 6, seed=num)
    info = metrics.row_information(draw_scores(log_p, 20_000)).mean(1)  # [N]
    error, sigma = info.mean().item() - exact, (info.std() / len(info) ** 0.5).item()
    assert abs(error) < 4 * sigma, f"off by {error / sigma:.1f} standard errors: a bound, not the estimate?"
    estimate = metrics.mutual_information(draw_scores(log_p, 20_000))
    assert math.isclose(estimate.row, info.mean(), rel_tol=1e-9) and estimate.ceiling == math.log(num)
    si = metrics.sufficiency_index(draw_scores(log_p, 20_000)).mean()
    assert math.isclose(si, exact / math.log(num), abs_tol=0.02)


def test_sufficiency_is_one_for_a_sufficient_statistic_and_zero_for_noise():
    assert torch.allclose(metrics.sufficiency_index(torch.eye(5).expand(3, 5, 5) * 1e3), torch.ones(5))
    assert torch.equal(metrics.sufficiency_index(torch.zeros(3, 5, 5)), torch.zeros(5))
    mistaken = torch.zeros(3, 2, 2)
    mistaken[:, 0, 1] = 5.0
    assert metrics.sufficiency_index(mistaken)[0] == 0, "a critic worse than chance must not give a negative share"


def test_sufficiency_belongs_to_the_principle_that_wrote():
    log_p = torch.tensor([[0.98, 0.01, 0.01], [0.01, 0.495, 0.495], [0.01, 0.495, 0.495]]).log().double()  # [K, Y]
    si = metrics.sufficiency_index(draw_scores(log_p, 4000))
    assert si[0] > 0.85 > 0.4 > si[1], f"row and column confused? {si}"
    assert abs(si[1] - si[2]) < 0.02


def test_retrieval_counts_argmax_both_ways():
    scores = torch.tensor([[[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 4.0, 5.0]]])
    result = metrics.mutual_information(scores)
    assert math.isclose(result.row_retrieval, 2 / 3, rel_tol=1e-6)  # rows 0 and 2
    assert math.isclose(result.column_retrieval, 2 / 3, rel_tol=1e-6)  # columns 0 and 2


def test_nothing_changes_when_principles_are_relabelled():
    scores = draw_scores(channel(5, 7)[0], 50)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3))
    relabelled = scores[:, order][:, :, order]
    torch.testing.assert_close(metrics.sufficiency_index(relabelled), metrics.sufficiency_index(scores)[order])
    row = metrics.mutual_information(scores).row
    assert math.isclose(metrics.mutual_information(relabelled).row, row, rel_tol=1e-9)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    log_p, exact = channel(4, 6)
    hits = 0
    for seed in range(200):
        info = metrics.row_information(draw_scores(log_p, 100, seed)).mean(1)  # [N]
        low, high = metrics.bootstrap_interval(info, resamples=500, seed=seed)
        hits += bool(low <= exact <= high)
    assert 180 <= hits <= 199, f"a 95% interval held the exact value in {hits} of 200 repetitions"


def test_interval_of_the_mean_matches_the_normal_one_and_its_limits():
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std(0) / 20
    torch.testing.assert_close(high - values.mean(0), half, rtol=0.15, atol=0)
    torch.testing.assert_close(values.mean(0) - low, half, rtol=0.15, atol=0)
    assert metrics.bootstrap_interval(torch.tensor([2.0])) == (2.0, 2.0)
    assert metrics.bootstrap_interval(torch.full((9,), 0.5)) == (0.5, 0.5)
    with pytest.raises(ValueError, match="N >= 1"):
        metrics.bootstrap_interval(torch.tensor([]))


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4), (2, 1, 3, 3)])
def test_shapes_are_checked(shape):
    for function in (metrics.mutual_information, metrics.sufficiency_index, metrics.row_information):
        with pytest.raises(ValueError, match=r"\[N, K, K\]"):
            function(torch.zeros(shape))


def test_scores_that_are_not_finite_are_refused():
    scores = torch.zeros(2, 3, 3)
    scores[0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        metrics.mutual_information(scores)
    with pytest.raises(ValueError, match="K >= 2"):
        metrics.sufficiency_index(torch.zeros(2, 1, 1))


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("<reasoning>1 + 1 = 2.</reasoning><answer>2</answer>", "2", True),
        ("<reasoning>1 + 1 = 2.</reasoning><answer>3</answer>", "2", False),
        ("<reasoning>So 2</reasoning><answer></answer>", "2", False),
        ("1 + 1 = 2. Answer: 2", "2", True),
        ("<reasoning>2</reasoning> 3", "2", False),
        ("<answer>1</answer><answer>2</answer>", "2", True),
        ("<answer>it is 2 apples.</answer>", "2", True),
        ("<answer>2 of 12</answer>", "2", False),
        ("<answer>12</answer>", "2", False),
        ("<answer>1,234.0</answer>", "1234", True),
        ("<answer>-2</answer>", "2", False),
        ("<answer>5-2</answer>", "2", True),
        ("<answer>Paris.</answer>", "paris", True),
        ("<answer>London</answer>", "Paris", False),
        ("<answer>(B)</answer>", "(B)", True),
        ("", "2", False),
    ],
)
def test_what_counts_as_right(text, answer, right):
    assert metrics.answer_is_right(text, answer) == right
