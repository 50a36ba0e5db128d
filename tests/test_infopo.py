"""infopo.py: gradients by hand, the bounds by enumerating small channels, the numerical limits."""

import doctest
import math

import pytest
import torch

import infopo
from infonce import row_info_nce
from infopo import MAX_REWARD, dpo_loss, infopo_loss, sequence_logp

INF = math.inf
LOSSES = [infopo_loss, dpo_loss]
STATS = {
    "logratio_chosen", "logratio_rejected", "reward_chosen", "reward_rejected", "margin", "accuracy",
    "weight_rejected",
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, bug="", **tolerance):
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{bug}\n{text}", **tolerance)


def gradients(loss, chosen, rejected, **options):
    """d loss / d policy_chosen, d loss / d policy_rejected, and stats, at these log-ratios (reference 0)."""
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    value, stats = loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected), **options)
    return *torch.autograd.grad(value, [chosen, rejected]), stats


def test_doctest():
    result = doctest.testmod(infopo)
    assert result.attempted > 0 and result.failed == 0


# ------------------------------------------------------------ values and gradients by hand


def test_by_hand():
    policy_chosen, ref_chosen = torch.tensor([-3.0, -9.0]), torch.tensor([-6.0, -8.0])  # log-ratios 3, -1
    policy_rejected, ref_rejected = torch.tensor([-7.0, -4.0]), torch.tensor([-5.0, -4.0])  # -2, 0
    arguments = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    loss, stats = infopo_loss(*arguments, beta=0.5)  # f_chosen 2.5, 0.5; f_rejected 0, 1
    expected = ((-2.5 + math.exp(-1)) + (-0.5 + 1)) / 2
    assert loss.item() == pytest.approx(expected), "expected the mean of -f_chosen + exp(f_rejected - 1)"
    loss, dpo_stats = dpo_loss(*arguments, beta=0.5)  # margins 2.5, -0.5
    expected = (math.log1p(math.exp(-2.5)) + math.log1p(math.exp(0.5))) / 2
    assert loss.item() == pytest.approx(expected), "expected the mean of -log sigmoid(margin)"
    common = {
        "logratio_chosen": 1, "logratio_rejected": -1, "reward_chosen": 0.5, "reward_rejected": -0.5,
        "margin": 1, "accuracy": 0.5,
    }
    infopo_weight = 0.5 * (math.exp(-1) + 1) / 2
    dpo_weight = 0.5 * (1 / (1 + math.exp(2.5)) + 1 / (1 + math.exp(-0.5))) / 2
    for got, weight in ((stats, infopo_weight), (dpo_stats, dpo_weight)):
        assert {name: value.item() for name, value in got.items()} == pytest.approx(
            common | {"weight_rejected": weight}, abs=1e-6), "stats: a mean, a sign or a beta is off"


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_gradients_at_the_reference(beta):
    zero, share = torch.zeros(4, dtype=torch.float64), torch.full((4,), beta / 4, dtype=torch.float64)
    chosen, rejected, _ = gradients(infopo_loss, zero, zero, beta=beta)
    close(chosen, -share, "expected -beta / N: f_chosen is 1 + beta * logratio, averaged over pairs")
    close(rejected, share, "expected +beta / N: exp(f - 1) is 1 at the reference")
    chosen, rejected, stats = gradients(dpo_loss, zero, zero, beta=beta)
    close(chosen, -share / 2, "DPO: expected half of InfoPO's, sigmoid(0) = 1/2")
    close(rejected, share / 2)
    assert infopo_loss(zero, zero, zero, zero)[0] == 0, "at the reference L is 0: is a 1 lost?"
    assert dpo_loss(zero, zero, zero, zero)[0].item() == pytest.approx(math.log(2))
    assert stats["accuracy"] == 0, "a tie is not a preference"


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    inputs = [random(5, seed=seed).requires_grad_() for seed in range(2)]
    refs = [random(5, seed=seed) for seed in range(2, 4)]
    assert torch.autograd.gradcheck(lambda *policy: loss(*policy, *refs, beta=0.7)[0], inputs)


@pytest.mark.parametrize("rejected", [-30.0, 0.0, 3.0])
def test_the_pull_on_the_chosen_outlives_the_margin(rejected):
    chosen = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64)
    rejected = torch.full_like(chosen, rejected)
    pull, push, _ = gradients(infopo_loss, chosen, rejected, beta=0.5)
    close(pull, torch.full_like(pull, -0.5 / 3), "InfoPO: the chosen's gradient depends on the margin")
    close(push, 0.5 / 3 * (0.5 * rejected).exp(), "InfoPO: the rejected's depends on the chosen")
    pull, push, _ = gradients(dpo_loss, chosen, rejected, beta=0.5)
    close(pull, -0.5 / 3 * (-0.5 * (chosen - rejected)).sigmoid(), "DPO: -beta * sigmoid(-margin)")
    close(pull, -push, "DPO pushes as hard as it pulls")
    assert -pull[2] < 1e-9, "DPO's gradient should vanish behind the margin"


def test_only_infopo_sees_a_common_fall():
    zero = torch.zeros(3, dtype=torch.float64)
    fall = torch.tensor([-0.5, -1.0, -4.0], dtype=torch.float64)
    dpo, start = dpo_loss(fall, fall, zero, zero)[0], dpo_loss(zero, zero, zero, zero)[0]
    assert dpo == start, "DPO sees the difference only"
    assert infopo_loss(fall, fall, zero, zero)[0] > 0, "InfoPO: both falling together should cost"


@pytest.mark.parametrize("loss", LOSSES)
def test_weight_is_the_gradient_on_the_rejected(loss):
    chosen = 5 * random(6, seed=1)
    rejected = torch.tensor([-9.0, -1.0, 0.0, 2.0, 19.0, 60.0], dtype=torch.float64)
    _, gradient, stats = gradients(loss, chosen, rejected, beta=0.7)
    close(gradient.sum(), stats["weight_rejected"], "weight_rejected: not the gradient, summed over pairs")


# ------------------------------------------------------------ invariants


@pytest.mark.parametrize("loss", LOSSES)
def test_invariants(loss):
    arguments = [random(6, seed=seed) for seed in range(4)]
    value, stats = loss(*arguments)
    assert set(stats) == STATS
    assert all(stat.dim() == 0 and not stat.requires_grad for stat in stats.values())

    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(loss(*[x[order] for x in arguments])[0], value, "the order of the pairs matters")
    alone = [loss(*[x[n:n + 1] for x in arguments]) for n in range(6)]
    close(torch.stack([one for one, _ in alone]).mean(), value, "not a mean over pairs")
    for name, stat in stats.items():
        close(torch.stack([one[name] for _, one in alone]).mean(), stat, f"{name} is not a mean over pairs")

    moved = [x + shift for x, shift in zip(arguments, [3.0, -2.0, 3.0, -2.0])]
    close(loss(*moved)[0], value, "only the log-ratios should matter: is a reference missing?")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_and_the_stats_carry_no_gradient(loss):
    arguments = [random(3, seed=seed).requires_grad_() for seed in range(4)]
    value, stats = loss(*arguments)
    value.backward()
    assert arguments[0].grad is not None and arguments[1].grad is not None
    assert arguments[2].grad is None and arguments[3].grad is None, "the reference is a constant: detach it"
    assert not any(stat.requires_grad for stat in stats.values()), "stats keep the graph alive"


# ------------------------------------------------------------ DPO is InfoNCE with one negative


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_is_row_info_nce(beta):
    """scores[i, j]: the reward of the response at place j, with the chosen one at place i.

    The signs: reward = +beta * (policy - ref) for both responses, and the target of row i is place i. Adding
    the critic's 1 to every entry changes no row.
    """
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = [4 * random(5, seed=seed) for seed in range(4)]
    w, l = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)  # noqa: E741
    scores = torch.stack([torch.stack([w, l], -1), torch.stack([l, w], -1)], -2)  # [N, 2, 2]
    loss, _ = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    close(loss, row_info_nce(scores).mean(), "DPO is not InfoNCE over the two responses: a sign or beta?")
    close(loss, row_info_nce(1 + scores)[:, 0].mean(), "the critic's 1 should cancel")


# ------------------------------------------------------------ exact channels: p and q over cells (x, y)


def random_channel(X, Y, seed):
    """A joint law p(x, y) and the product of its marginals, as [X * Y] each, and I(x; y)."""
    joint = (2 * random(X, Y, seed=seed)).softmax(1) / X  # [X, Y]  prompts equally likely
    p, q = joint.flatten(), (joint.sum(1, keepdim=True) * joint.sum(0)).flatten()
    return p, q, (p * (p / q).log()).sum()


def expectation(loss, logratio, p, q, beta=1.0):
    """E of the loss of a pair, chosen cell ~ p and rejected cell ~ q independently, by enumeration."""
    ref = random(len(p), seed=99)  # any reference: only policy - ref may matter
    policy, cells = ref + logratio, range(len(p))
    pairs = [(policy[[a]], policy[[b]], ref[[a]], ref[[b]]) for a in cells for b in cells]
    losses = torch.stack([loss(*pair, beta=beta)[0] for pair in pairs])
    return (torch.outer(p, q).flatten() * losses).sum()


def test_bound_on_a_binary_channel_by_hand():
    # Two equally likely symbols, one in four flipped: p = (3, 1, 1, 3) / 8, q = (2, 2, 2, 2) / 8. Eight
    # chosen and eight rejected cells hold each as often as it is likely. p / q = 3/2 or 1/2.
    ratio = torch.tensor([1.5, 0.5, 0.5, 1.5], dtype=torch.float64)
    chosen = ratio.log()[[0, 0, 0, 1, 2, 3, 3, 3]]
    rejected = ratio.log()[[0, 0, 1, 1, 2, 2, 3, 3]]
    zero = torch.zeros(8, dtype=torch.float64)
    information = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    loss, _ = infopo_loss(chosen, rejected, zero, zero)
    assert -loss.item() == pytest.approx(information), "-L at f* is I(x; y), no constant between"


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("X, Y", [(2, 2), (2, 4), (3, 3)])
def test_bound_is_exact_at_the_density_ratio(X, Y, beta):
    p, q, information = random_channel(X, Y, seed=1)
    best = (p / q).log() / beta  # f* = 1 + log(p / q)
    assert information > 0.05, "this channel carries too little to test anything"
    close(-expectation(infopo_loss, best, p, q, beta), information, "NWJ: -L at f* is not I(x; y)")
    for seed in range(5):
        bound = -expectation(infopo_loss, random(len(p), seed=seed), p, q, beta)
        assert bound < information, f"seed {seed}: a critic that is not f* should give less than I(x; y)"
        dpo = math.log(2) - expectation(dpo_loss, random(len(p), seed=seed), p, q, beta)
        assert dpo < information, f"seed {seed}: log 2 - E[DPO] should be a bound too"


def test_the_density_ratio_is_a_maximum():
    p, q, _ = random_channel(2, 3, seed=3)
    best = (p / q).log().requires_grad_()
    loss = expectation(infopo_loss, best, p, q)
    (gradient,) = torch.autograd.grad(loss, best)
    assert gradient.abs().max() < 1e-12, "the gradient at p / q is -beta * (p - q * p / q) = 0"
    for seed in range(5):
        for size in (1e-3, 0.1, 1.0):
            moved = best.detach() + size * random(len(p), seed=seed)
            assert expectation(infopo_loss, moved, p, q) > loss, f"seed {seed}: -L is not maximal at f*"
    assert expectation(infopo_loss, best.detach() + 0.1, p, q) > loss, "a constant in f is free?"


def test_the_policy_becomes_the_law_of_the_chosen():
    """At beta = 1, rejected from the reference, the optimum over policies that sum to 1 is pi = p."""
    p, ref = random(5, seed=1).softmax(0), random(5, seed=2).softmax(0)
    logits = p.log().requires_grad_()
    loss = expectation(infopo_loss, logits.log_softmax(0) - ref.log(), p, q=ref)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-12
    close(-loss.detach(), (p * (p / ref).log()).sum(), "the value there is KL(p || pi_ref)")


# ------------------------------------------------------------ numerical limits


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("chosen", [-1000.0, 1000.0])
@pytest.mark.parametrize("rejected", [-1000.0, 1000.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_extremes_are_finite(loss, chosen, rejected, beta):
    chosen, rejected = torch.tensor([chosen, 0.0]), torch.tensor([rejected, 0.0])
    value, stats = loss(chosen, rejected, torch.zeros(2), torch.zeros(2), beta=beta)
    assert value.isfinite() and all(stat.isfinite() for stat in stats.values()), "exp overflows"
    pull, push, _ = gradients(loss, chosen, rejected, beta=beta)
    assert pull.isfinite().all() and push.isfinite().all(), "a NaN or infinite gradient trains on"
    if loss is infopo_loss:
        assert pull[0] == -beta / 2, "the chosen's gradient is -beta / N everywhere"
        assert (push[0] > 1e6) == (rejected[0] > 0), "a rejected response far too likely must be pushed back"


def test_the_tangent_past_the_cut():
    def value_and_slope(reward):
        rejected = torch.tensor([reward], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        loss, _ = infopo_loss(zero, rejected, zero, zero)
        (slope,) = torch.autograd.grad(loss, rejected)
        return loss.item() + 1, slope.item()  # without -f_chosen

    height = math.exp(MAX_REWARD)
    for reward in (-3.0, 5.0, 19.0, MAX_REWARD - 1e-6, MAX_REWARD):
        exact = pytest.approx((math.exp(reward),) * 2, rel=1e-12)
        assert value_and_slope(reward) == exact, f"reward {reward}: up to the cut nothing may change"
    for past in (1e-6, 1.0, 980.0):
        tangent = pytest.approx((height * (1 + past), height), rel=1e-12)
        assert value_and_slope(MAX_REWARD + past) == tangent, f"{past} past the cut: not exp's tangent there"


def test_a_response_of_probability_zero():
    chosen, rejected = torch.zeros(2), torch.tensor([-INF, 0.0])
    for loss in LOSSES:
        pull, push, _ = gradients(loss, chosen, rejected)
        assert pull.isfinite().all() and push.isfinite().all() and push[0] == 0, "-inf poisons the gradient"
        with pytest.raises(FloatingPointError, match="expected finite log-probabilities, got a loss of inf"):
            loss(rejected, chosen, torch.zeros(2), torch.zeros(2))  # a chosen response of probability zero
        with pytest.raises(FloatingPointError, match="expected finite log-probabilities, got a loss of nan"):
            loss(chosen, torch.tensor([math.nan, 0.0]), torch.zeros(2), torch.zeros(2))
        with pytest.raises(FloatingPointError, match="log-ratios of chosen responses from 0.0 to inf"):
            loss(chosen, chosen, rejected, torch.zeros(2))  # DPO's loss is 0 there, with no gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_upcast(loss, dtype):
    arguments = [(4 * random(5, seed=seed)).to(dtype) for seed in range(4)]
    value, stats = loss(*arguments)
    expected, expected_stats = loss(*[x.float() for x in arguments])
    assert value.dtype == torch.float32
    close(value, expected, "computed in half precision", rtol=1e-6, atol=0)
    close(stats, expected_stats)
    mixed, _ = loss(*arguments[:2], *[x.float() for x in arguments[2:]])
    close(mixed, expected, "policy and reference may differ in dtype", rtol=1e-6, atol=0)


# ------------------------------------------------------------ from tokens to responses


def test_sequence_logp_by_hand():
    nan = math.nan
    logp = [[-1.0, -2.0, -3.0], [-4.0, nan, INF], [nan, -5.0, nan], [nan, nan, nan]]
    logp = torch.tensor(logp, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    for kind in (mask, mask.bool(), mask.double()):
        close(sequence_logp(logp, kind), torch.tensor([-6.0, -4.0, -5.0, 0.0]), "padding leaks into the sum")
        mean = sequence_logp(logp, kind, length_normalized=True)
        close(mean, torch.tensor([-2.0, -4.0, -5.0, 0.0]), "expected the mean over the mask, not over T")
    mean.sum().backward()
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    close(logp.grad, expected, "padding has a gradient")


def test_sequence_logp_shapes_and_dtypes():
    logp, mask = random(4, 2, 7), random(4, 2, 7, seed=1) > 0
    for normalized in (False, True):
        pairs = sequence_logp(logp, mask, normalized)
        close(pairs[:, 1], sequence_logp(logp[:, 1], mask[:, 1], normalized), "leading dimensions mix")
    ones = torch.full((1, 4096), -1.0, dtype=torch.bfloat16)
    assert sequence_logp(ones, ones.bool()).item() == -4096
    assert sequence_logp(ones, ones.bool()).dtype == torch.float32, "summed in half precision"


# ------------------------------------------------------------ errors


@pytest.mark.parametrize("bad", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(()), torch.zeros(3).long()])
@pytest.mark.parametrize("place", range(1, 4))
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_reject(loss, place, bad):
    arguments = [torch.zeros(3) for _ in range(4)]
    arguments[place] = bad
    name = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"][place]
    with pytest.raises(ValueError, match=rf"{loss.__name__}: {name}: expected floating point of shape \[3\]"):
        loss(*arguments)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_reject_the_first(loss):
    for bad in (torch.zeros(3, 4), torch.zeros(()), torch.zeros(0)):  # token log-probs, one pair, no pair
        with pytest.raises(ValueError, match=rf"{loss.__name__}: expected policy_chosen \[N\]"):
            loss(bad, bad, bad, bad)
    with pytest.raises(ValueError, match="policy_chosen: expected floating point"):
        loss(*[torch.zeros(3, dtype=torch.long)] * 4)


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, INF])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_reject_beta(loss, beta):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: expected beta > 0 and finite, got"):
        loss(*[torch.zeros(2)] * 4, beta=beta)


@pytest.mark.parametrize("logp, mask", [
    (torch.zeros(2, 3), torch.ones(2)), (torch.zeros(2, 3), torch.ones(3, 2)),
    (torch.zeros(()), torch.ones(())), (torch.zeros(2, 3).long(), torch.ones(2, 3)),
])
def test_sequence_logp_rejects(logp, mask):
    with pytest.raises(ValueError, match="sequence_logp: expected floating point logp and a mask"):
        sequence_logp(logp, mask)
