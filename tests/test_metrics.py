"""metrics.py: the estimates against exact mutual information, one SI for all, the interval's coverage."""

import itertools
import math

import pytest
import torch

import metrics
import si
import train
from infonce import mi_lower_bound, row_info_nce
from support import settings, tiny
from support.chains import Chain


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
    scores = draw_scores(log_p, 20_000)  # [N, K, K]
    info = metrics.information(scores).mean(1)  # [N]
    error, sigma = info.mean().item() - exact, (info.std() / len(info) ** 0.5).item()
    assert abs(error) < 4 * sigma, f"off by {error / sigma:.1f} standard errors: a bound, not the estimate?"
    estimate = metrics.mutual_information(scores)
    assert estimate.row == mi_lower_bound(row_info_nce(scores), num), "MI has one definition"
    assert math.isclose(estimate.row, info.mean(), rel_tol=1e-9) and estimate.ceiling == math.log(num)
    si = metrics.sufficiency_index(scores).mean()
    assert math.isclose(si, exact / math.log(num), abs_tol=0.02)


def test_sufficiency_is_one_for_a_sufficient_statistic_and_zero_for_noise():
    assert torch.allclose(metrics.sufficiency_index(torch.eye(5).expand(3, 5, 5) * 1e3), torch.ones(5))
    assert torch.equal(metrics.sufficiency_index(torch.zeros(3, 5, 5)), torch.zeros(5))
    mistaken = torch.zeros(3, 2, 2)
    mistaken[:, 0, 1] = 5.0
    assert metrics.sufficiency_index(mistaken)[0] == 0, "a critic worse than chance must not give a negative share"


@pytest.mark.parametrize("estimator", ["row", "posterior"])
def test_a_set_has_the_mean_of_its_principles_unless_one_is_below_0(estimator):
    scores = draw_scores(channel(4, 6)[0], 300)
    by_principle = metrics.sufficiency_index(scores, estimator)  # [K]
    assert (by_principle > 0).all()
    nats = metrics.information(scores, estimator).mean(1)  # [N]
    of_set = metrics.share_of_ceiling(nats.mean(), 4)  # []
    torch.testing.assert_close(of_set, by_principle.mean())
    by_interval = metrics.si_interval(nats, 4)
    assert math.isclose(by_interval["mean"], of_set, rel_tol=1e-9)
    assert by_interval["low"] < by_interval["mean"] < by_interval["high"]


def test_of_principles_that_say_little_the_set_si_is_not_inflated_by_a_clamp_for_each():
    """8 questions at a time: a clamp before the mean over principles would leave the upper half of the noise."""
    log_p, exact = channel(6, 8, sharpness=0.3)
    batches = draw_scores(log_p, 200 * 8).reshape(200, 8, 6, 6)
    true = exact / math.log(6)  # 0.019
    together = torch.stack([metrics.share_of_ceiling(metrics.mutual_information(b).row, 6) for b in batches]).mean()
    clamped_first = torch.stack([metrics.sufficiency_index(batch).mean() for batch in batches]).mean()
    assert abs(together - true) < 0.1 * true, f"SI of the set is {together:.4f}, true {true:.4f}"
    assert clamped_first > 1.5 * true, "were this not so, the order would not matter, and the docstring be wrong"


def test_numbers_and_tensors_have_one_si_and_nan_is_not_hidden():
    assert metrics.share_of_ceiling(-0.3, 4) == 0 and metrics.share_of_ceiling(math.log(4), 4) == 1
    torch.testing.assert_close(metrics.share_of_ceiling(torch.tensor([-0.3, math.log(2)]), 4), torch.tensor([0.0, 0.5]))
    assert math.isnan(metrics.share_of_ceiling(math.nan, 4)) and metrics.share_of_ceiling(torch.tensor(math.nan), 4).isnan()


def test_training_evaluation_and_si_show_one_number_for_the_same_scores():
    """What train.py logs of a step, what eval.json has, and what `python si.py` calls row MI and SI."""
    scores = draw_scores(channel(4, 6)[0], 24).float()  # [N, K, K]: 24 questions, one completion for each principle
    step = train.information_terms(scores.reshape(6, 4, 4, 4), settings.Config())  # [Q, G, K, K]
    logged = metrics.share_of_ceiling(float(step["mi_row"]), 4)
    evaluated = metrics.si_interval(metrics.information(scores).mean(1), 4)["mean"]
    chain = Chain("<reasoning>a</reasoning><answer>1</answer>", [1], 1, False)
    drawn = torch.arange(4).expand(24, 4)  # [N, K]
    questions = tiny.make_questions(24, True)
    shown = si.summarise_si(tiny.principles()[:4], [""] * 4, questions, drawn, [[chain] * 4] * 24, scores)["set"]
    assert math.isclose(logged, evaluated, rel_tol=1e-5)
    assert math.isclose(logged, metrics.share_of_ceiling(metrics.mutual_information(scores).row, 4), rel_tol=1e-5)
    assert math.isclose(step["mi_row"], shown["mi_row"], rel_tol=1e-5)
    assert math.isclose(step["mi_column"], shown["mi_column"], rel_tol=1e-5)
    by_principle = metrics.sufficiency_index(scores)  # [K]
    assert (by_principle > 0).all() and math.isclose(logged, by_principle.mean(), rel_tol=1e-5)
    by_posterior = metrics.share_of_ceiling(metrics.information(scores, "posterior").mean(), 4)
    assert math.isclose(shown["si"]["mean"], by_posterior, rel_tol=1e-5) and abs(logged - by_posterior) < 0.2


def test_sufficiency_belongs_to_the_principle_that_wrote():
    log_p = torch.tensor([[0.98, 0.01, 0.01], [0.01, 0.495, 0.495], [0.01, 0.495, 0.495]]).log().double()  # [K, Y]
    si = metrics.sufficiency_index(draw_scores(log_p, 4000))
    assert si[0] > 0.85 > 0.4 > si[1], f"row and column confused? {si}"
    assert abs(si[1] - si[2]) < 0.02


def test_retrieval_counts_argmax_both_ways():
    scores = torch.tensor([[[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [4.0, 0.0, 5.0]]])
    result = metrics.mutual_information(scores)
    assert math.isclose(result.row_retrieval, 2 / 3, rel_tol=1e-6)  # rows 0 and 2
    assert math.isclose(result.column_retrieval, 1 / 3, rel_tol=1e-6)  # column 2


def test_a_tie_is_shared_whatever_the_order_of_principles():
    scores = torch.tensor([[[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [-2.0, -2.0, -2.0]]])
    torch.testing.assert_close(metrics.retrieval(scores), torch.tensor([[1 / 2, 0.0, 1 / 3]]))
    coarse = (torch.randn(4000, 4, 4, generator=torch.Generator().manual_seed(0)) - 500).bfloat16()  # in steps of 2
    assert (metrics.retrieval(coarse).mean(0) - 1 / 4).abs().max() < 0.03, "half precision favours the first principles"


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
        info = metrics.information(draw_scores(log_p, 100, seed)).mean(1)  # [N]
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
    for function in (
        metrics.mutual_information, metrics.sufficiency_index, metrics.information,
        lambda scores: metrics.information(scores, "column"), lambda scores: metrics.information(scores, "posterior"),
    ):
        with pytest.raises(ValueError, match=r"\[N, K, K\]"):
            function(torch.zeros(shape))


@pytest.mark.parametrize("estimator", ["row", "column", "posterior"])
def test_half_precision_scores_lose_nothing_more(estimator):
    scores = (8 * torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    found = metrics.information(scores, estimator)
    assert torch.equal(found, metrics.information(scores.float(), estimator))


def test_scores_that_are_not_finite_are_refused():
    for place, function in itertools.product(
        [(0, 1, 1), (0, 1, 2)],
        [metrics.mutual_information, metrics.sufficiency_index, lambda s: metrics.information(s, "posterior")],
    ):
        scores = torch.zeros(2, 3, 3)
        scores[place] = float("nan")
        with pytest.raises(FloatingPointError, match="finite"):
            function(scores)
        scores[place] = float("inf")
        with pytest.raises(FloatingPointError, match="finite"):
            function(scores)
    with pytest.raises(ValueError, match="K >= 2"):
        metrics.sufficiency_index(torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match="K >= 2"):
        metrics.share_of_ceiling(0.5, 1)
    with pytest.raises(ValueError, match="got 'rows'"):
        metrics.information(torch.zeros(2, 3, 3), "rows")


@pytest.mark.parametrize("value", [-0.087, 1e-300, 1e150, 0.0])
def test_points_that_are_all_equal_have_no_rank_and_no_alignment(value):
    same = torch.full((3, 8), value, dtype=torch.float64)  # their mean is not quite their value
    spread = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.effective_rank(same).isnan(), "rounding of the mean counts as variance"
    assert metrics.linear_cka(same, spread).isnan() and metrics.linear_cka(spread, same).isnan()
    assert metrics.effective_rank(spread) > 1 and metrics.linear_cka(spread, spread) > 0.999


def unbiased_hsic(x, y):
    """Song et al. 2012, as a mean over quadruples of different points: no shared term, hence no bias."""
    a, b = x @ x.T, y @ y.T  # [n, n] both
    quadruples = list(itertools.permutations(range(len(x)), 4))
    return sum(a[i, j] * (b[i, j] + b[r, s] - 2 * b[i, r]) for i, j, r, s in quadruples) / len(quadruples)


def test_debiased_alignment_is_the_mean_over_different_points():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, d, generator=generator, dtype=torch.float64) + 3 for d in (4, 5))
    y = y + x[:, :1]
    expected = unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)).sqrt()
    torch.testing.assert_close(metrics.linear_cka(x, y, debiased=True), expected)


@pytest.mark.parametrize("num", [4, 5, 6, 7])
def test_points_that_are_all_equally_far_apart_have_no_debiased_alignment(num):
    assert metrics.linear_cka(torch.eye(num), torch.randn(num, 3), debiased=True).isnan()


def test_debiased_alignment_is_zero_by_chance_and_one_after_a_rotation():
    generator = torch.Generator().manual_seed(2)
    n, d = 40, 60
    plain, debiased = [], []
    for _ in range(30):
        x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
        plain.append(metrics.linear_cka(x, y))
        debiased.append(metrics.linear_cka(x, y, debiased=True))
    assert abs(torch.stack(plain).mean() - d / (n + d)) < 0.02, "the level that chance gives"
    mean, error = torch.stack(debiased).mean(), torch.stack(debiased).std() / 30**0.5
    assert abs(mean) < 4 * error < 0.04, "independent clouds must give 0"
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    assert math.isclose(metrics.linear_cka(x, 3 * x @ turn + 1, debiased=True), 1, abs_tol=1e-9)
    with pytest.raises(ValueError, match="4 or more"):
        metrics.linear_cka(x[:3], y[:3], debiased=True)
