"""Sinkhorn against closed forms first, then invariants, gradients, the two layers, numerical limits and the door.

`entropic_ot` and `sinkhorn_divergence` in a test with the fixture of that name are those of the textbook, then the fast
ones: closed forms and invariants hold for both.
"""

import doctest
import functools
import math
import os
import re
import warnings

import pytest
import torch

import sinkhorn
from sinkhorn import ot_of_cost, relative_eps, sinkhorn_potentials, transport_plan

pytestmark = pytest.mark.filterwarnings("error")  # a solve that does not converge fails its test
TIGHT = dict(max_iter=20000, tol=1e-8)  # values are right to about tol^2


@pytest.fixture(params=["textbook", "fast"])
def layer(request):
    return request.param


@pytest.fixture
def at_least(layer):
    """The least eps of a test: below 1 and at a tight tolerance the textbook takes tens of thousands of iterations."""
    return 0.0 if layer == "fast" else 1.0


@pytest.fixture
def entropic_ot(layer):
    return functools.partial(sinkhorn.entropic_ot, fast=layer == "fast")


@pytest.fixture
def sinkhorn_divergence(layer):
    return functools.partial(sinkhorn.sinkhorn_divergence, fast=layer == "fast")


def cloud(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(*shape, seed=0):
    w = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    return w / w.sum(-1, keepdim=True)


def close(actual, expected, bug, rtol=1e-9, atol=1e-9):
    actual, expected = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda m: f"{bug}\n{m}")


# ---- closed forms

@pytest.mark.parametrize("eps", [0.3, 1.0, 30.0])
def test_two_by_two_plan_by_hand(eps, entropic_ot):
    c = 2.0  # P = [[p, q], [q, p]], p + q = 1/2, p / q = exp(c / eps)
    cost = torch.tensor([[0.0, c], [c, 0.0]], dtype=torch.float64)
    f, g, _ = sinkhorn_potentials(cost, eps, **TIGHT)
    p, q = 0.5 / (1 + math.exp(-c / eps)), 0.5 / (1 + math.exp(c / eps))
    plan = torch.tensor([[p, q], [q, p]], dtype=torch.float64)
    close(transport_plan(f, g, cost, eps), plan, "plan is not a b exp((f + g - C) / eps)")
    x = torch.tensor([[0.0], [math.sqrt(c)]], dtype=torch.float64)
    close(entropic_ot(x, x, eps, **TIGHT)[0], -eps * math.log((1 + math.exp(-c / eps)) / 2),
          "value is not <P, C> + eps KL(P | a b): entropy convention or a lost factor 1/2")


def test_two_diracs(entropic_ot, sinkhorn_divergence):
    x, y = cloud(1, 5), cloud(1, 5, seed=1)
    squared = (x - y).square().sum()
    for eps in (1e-3, 1.0, 1e3):
        close(entropic_ot(x, y, eps)[0], squared, "one point to one point must cost ||x - y||^2, with no 1/2")
        close(sinkhorn_divergence(x, y, eps)[0], squared, "self terms of a Dirac must be 0")


@pytest.mark.parametrize("eps", [0.05, 1.0, 100.0])
def test_translation_costs_its_squared_length(eps, sinkhorn_divergence, at_least):
    # ||x_i - x_j - v||^2 = ||x_i - x_j||^2 + terms of i alone and of j alone, which the potentials absorb
    x, v, a = cloud(12, 3), torch.tensor([1.0, -2.0, 0.5]), weights(12)
    value, _ = sinkhorn_divergence(x, x + v, max(eps, at_least), a, a, max_iter=5000, tol=1e-6)
    close(value, v.square().sum(), "S(x, x + v) must be ||v||^2", rtol=1e-7)


@pytest.mark.parametrize("eps", [0.2, 1.0, 20.0])
def test_gaussians_janati_2020(eps, entropic_ot, sinkhorn_divergence):
    # OT_eps between N(0, A) and N(t, B) in 1-D, C = (x - y)^2, eps = 2 s^2 (Janati et al. 2020, theorem 1):
    # t^2 + A + B - D + s^2 (1 - log 2 s^2) + s^2 log(D + s^2),  D = sqrt(4 A B + s^4)
    grid, A, B, t, s2 = torch.linspace(-7, 7, 121, dtype=torch.float64), 1.0, 0.49, 0.8, eps / 2
    x, y, w = grid[:, None] * A ** 0.5, t + grid[:, None] * B ** 0.5, torch.exp(-grid.square() / 2)

    def closed(A, B, t):
        D = math.sqrt(4 * A * B + s2 * s2)
        return t * t + A + B - D + s2 * (1 - math.log(2 * s2)) + s2 * math.log(D + s2)

    ot, debiased = closed(A, B, t), closed(A, B, t) - closed(A, A, 0) / 2 - closed(B, B, 0) / 2
    close(entropic_ot(x, y, eps, w, w, **TIGHT)[0], ot, "eps convention: KL to a b, eps = 2 sigma^2")
    close(sinkhorn_divergence(x, y, eps, w, w, **TIGHT)[0], debiased, "self terms: wrong weights or factor")


def test_small_eps_is_the_sorted_assignment(entropic_ot, sinkhorn_divergence):
    x, y = cloud(8, 1), cloud(8, 1, seed=1)
    sorted_cost = (x.sort(0).values - y.sort(0).values).square().mean()
    loose = dict(max_iter=5000, tol=1e-2)  # values are right to eps * tol here
    ot = entropic_ot(x, y, 1e-3, **loose)[0] - 1e-3 * math.log(8)  # the KL of a permutation plan is log n
    close(ot, sorted_cost, "eps -> 0: not the optimal assignment", atol=1e-4)
    close(sinkhorn_divergence(x, y, 1e-3, **loose)[0], sorted_cost, "eps -> 0: S is not W2^2", atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_eps_limits(dtype, entropic_ot, sinkhorn_divergence):
    x, y = cloud(20, 3, dtype=dtype), cloud(30, 3, seed=1, dtype=dtype) + 0.1
    bug = "eps -> infinity: sum P - 1 (or log b) rounded at 1e-7 eps instead of 1e-7 C"
    rtol = 2e-5 if dtype is torch.float32 else 1e-6
    mean_cost = torch.cdist(x.double(), y.double()).square().mean()
    close(entropic_ot(x, y, 1e7)[0], mean_cost, bug, rtol)
    close(sinkhorn_divergence(x, y, 1e7)[0], (x.mean(0) - y.mean(0)).square().sum(), bug, rtol, atol=2e-6)


def test_small_eps_is_the_squared_distance_of_points_that_have_moved_little():
    x, y = cloud(40, 16).requires_grad_(), cloud(40, 16) + 0.3 * cloud(40, 16, seed=1)  # the same tokens, read twice
    value, _ = sinkhorn.sinkhorn_divergence(x, y, relative_eps(x, y, 0.01))
    squared = (x - y).square().sum(1).mean()
    close(value, squared, "eps -> 0: the best plan is not the pairing", rtol=1e-6)
    pulls = torch.autograd.grad(value, x)[0], torch.autograd.grad(squared, x)[0]
    close(*pulls, "eps -> 0: not the pull of the pairs", rtol=1e-4)


# ---- invariants

def test_symmetric_zero_at_equality_and_nonnegative(sinkhorn_divergence, at_least):
    for seed in range(4):
        x, y = cloud(15, 2, seed=seed), cloud(10, 2, seed=seed + 10)
        a, b = weights(15, seed=seed), weights(10, seed=seed + 1)
        for eps in (max(0.1, at_least), 2.0, 10.0):
            s = sinkhorn_divergence(x, y, eps, a, b, **TIGHT)[0]
            close(s, sinkhorn_divergence(y, x, eps, b, a, **TIGHT)[0], "S(x, y) != S(y, x)")
            assert s > 0, "S of different clouds must be positive: self terms too large?"
            close(sinkhorn_divergence(x, x.clone(), eps, a, a, **TIGHT)[0], 0.0, "S(x, x) != 0")


def test_scaling_permutation_and_translation(sinkhorn_divergence):
    x, y, a, b = cloud(14, 3), cloud(9, 3, seed=1), weights(14), weights(9)
    s = sinkhorn_divergence(x, y, 1.5, a, b, **TIGHT)[0]
    close(sinkhorn_divergence(3 * x, 3 * y, 13.5, a, b, **TIGHT)[0], 9 * s, "S(c x, c y, c^2 eps) != c^2 S")
    p = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    close(sinkhorn_divergence(x[p], y, 1.5, a[p], b, **TIGHT)[0], s, "S depends on the order of the points")
    close(sinkhorn_divergence(x + 1e3, y + 1e3, 1.5, a, b, **TIGHT)[0], s, "S depends on the origin", 1e-8)
    close(sinkhorn_divergence(x, y, 1.5, 7 * a, b, **TIGHT)[0], s, "weights are not normalised")


def test_relative_eps_is_the_weighted_mean_cost(sinkhorn_divergence):
    x, y, a, b = cloud(2, 7, 3), cloud(2, 5, 3, seed=1), weights(2, 7), weights(5)
    mean = torch.einsum("...i,j,...ij->...", a, b, torch.cdist(x, y).square())
    close(relative_eps(x.requires_grad_(), y, 0.1, a, b), 0.1 * mean, "mean(C) not weighted by a b^T")
    assert not relative_eps(x, y, 0.1).requires_grad, "eps must be detached"
    point = torch.ones(3, 2)
    value, info = sinkhorn_divergence(point, point, relative_eps(point, point, 0.1))
    assert info.converged and abs(value.item()) < 1e-12, "identical points: eps floor missing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_weight_is_a_removed_point(dtype, entropic_ot, sinkhorn_divergence):
    eps, where = 0.3, (slice(None), slice(0, 6))
    x, y = cloud(2, 8, 3, dtype=dtype), cloud(2, 9, 3, seed=1, dtype=dtype)
    x[:, 6:], y[:, 7:] = 1e3, 1e3  # both pads at one far place: exp((f + g - C) / eps) overflows there
    a, b = torch.ones(8), torch.ones(9)  # masks
    a[6:], b[7:] = 0, 0
    for function in (entropic_ot, sinkhorn_divergence):
        full, cut = x.clone().requires_grad_(), x[where].clone().requires_grad_()
        value, info = function(full, y, eps, a, b)
        expected, _ = function(cut, y[:, :7], eps)
        tol = 1e-5 if dtype is torch.float32 else 1e-9
        assert info.converged, "a padded point must not enter the stopping test"
        close(value, expected, "a zero-weight point changes the value", tol, tol)
        value.sum().backward()
        expected.sum().backward()
        close(full.grad[where], cut.grad, "a zero-weight point changes another point's gradient", tol, tol)
        close(full.grad[:, 6:], torch.zeros(2, 2, 3), "a zero-weight point has a gradient", 0, 0)


def test_batch_equals_loop(sinkhorn_divergence, at_least):
    x, y = cloud(2, 3, 10, 4), cloud(2, 3, 7, 4, seed=1) * torch.tensor([1.0, 2.0, 0.1])[:, None, None]
    eps = relative_eps(x, y, torch.tensor([0.05, 0.5, 5.0]).clamp(min=at_least / 2))
    a, b = weights(2, 3, 10), weights(7)
    value, info = sinkhorn_divergence(x, y, eps, a, b, **TIGHT)
    assert value.shape == info.marginal_error.shape == (2, 3), "batch dimensions lost"
    for i in range(2):
        for j in range(3):
            alone, _ = sinkhorn_divergence(x[i, j], y[i, j], eps[i, j].item(), a[i, j], b, **TIGHT)
            close(value[i, j], alone, "batch elements influence each other")


def test_a_loose_tolerance_does_not_couple_batch_elements(sinkhorn_divergence):
    """With an early stop the slowest element must not refine the others: accumulation would change results."""
    x, y = cloud(3, 12, 4), cloud(3, 9, 4, seed=1)
    eps = relative_eps(x, y, torch.tensor([0.02, 0.3, 3.0]))
    together, _ = sinkhorn_divergence(x, y, eps, tol=1e-2)
    alone = torch.stack([sinkhorn_divergence(x[i], y[i], eps[i], tol=1e-2)[0] for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


# ---- the plan and the gradients

def test_plan_marginals_and_duality(entropic_ot):
    x, y, a, b, eps = cloud(3, 11, 2), cloud(3, 6, 2, seed=1), weights(3, 11), weights(6), 0.2
    cost = torch.cdist(x, y).square()
    f, g, info = sinkhorn_potentials(cost, eps, a, b, max_iter=5000, tol=1e-10)
    plan = transport_plan(f, g, cost, eps, a, b)
    close(plan.sum(-2), b.expand(3, 6), "column sums must be exact after the last g update", atol=1e-12)
    error = (plan.sum(-1) - a).abs().sum(-1)
    close(info.marginal_error, error, "marginal_error is not that of the returned (f, g)", 1e-3, 1e-13)
    kl = (plan * (plan / (a[..., None] * b)).log()).sum((-2, -1))
    primal = (plan * cost).sum((-2, -1)) + eps * kl
    close(entropic_ot(x, y, eps, a, b, **TIGHT)[0], primal, "dual value != <P, C> + eps KL(P | a b)")


def test_the_plan_of_a_large_float32_cost_has_its_marginals():
    cost = torch.rand(5, 4) + 1e5
    f, g, info = sinkhorn_potentials(cost, 0.1)
    plan = transport_plan(f, g, cost, 0.1)
    assert info.converged and plan.dtype is torch.float32
    close(plan.sum(-2), torch.full((4,), 1 / 4), "potentials are rounded", atol=1e-6)


@pytest.mark.parametrize("name", ["entropic_ot", "sinkhorn_divergence"])
def test_gradcheck_points_and_weights(name, layer):
    function = functools.partial(getattr(sinkhorn, name), fast=layer == "fast")
    leaves = [cloud(2, 4, 2), cloud(2, 3, 2, seed=1), weights(2, 4), weights(2, 3, seed=1)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def value(x, y, a, b):
        return function(x, y, 1.5, a, b, tol=1e-11)[0]

    assert torch.autograd.gradcheck(value, leaves, atol=1e-7, rtol=1e-6), "gradient != finite difference"


def test_weight_gradient_is_the_potential(entropic_ot):
    x, y, a = cloud(6, 2), cloud(5, 2, seed=1), weights(6).requires_grad_()
    f, _, _ = sinkhorn_potentials(torch.cdist(x, y).square(), 0.5, a, tol=1e-11)
    entropic_ot(x, y, 0.5, a, tol=1e-11)[0].backward()
    close(a.grad, f - (a * f).sum(), "dOT/da must be f, less its mean (weights are normalised)")
    mask = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=x.dtype).requires_grad_()
    f, _, _ = sinkhorn_potentials(torch.cdist(x, y).square(), 0.5, mask.detach(), tol=1e-11)
    entropic_ot(x, y, 0.5, mask, tol=1e-11)[0].backward()
    kept = mask.detach() > 0
    close(mask.grad[kept], (f - f[kept].mean())[kept] / 5, "with weights that sum to 5 it is a fifth")


def test_coincident_points_have_zero_gradient(entropic_ot, sinkhorn_divergence):
    x = torch.ones(4, 3, requires_grad=True)
    value, _ = entropic_ot(x, torch.ones(2, 3), 0.1)
    value.backward()
    close(x.grad, torch.zeros(4, 3), "gradient at distance 0: NaN of a sqrt, or half of a clamp", 0, 0)
    y = cloud(30, 4, dtype=torch.float32)
    x = y.clone().requires_grad_()
    sinkhorn_divergence(x, y, 0.5)[0].backward()
    close(30 * x.grad, torch.zeros(30, 4), "S is least at x = y: its gradient must vanish", 0, 2e-3)


def penalties(value):
    """Losses with a gradient inside, of a value(x, a): alone, beside another term in x, and in the weights."""
    def penalty(x, a, weight, wrt):
        grad, = torch.autograd.grad(value(x, a) + weight * x.square().sum(), x if wrt == "x" else a, create_graph=True)
        return grad.square().sum()
    return [lambda x, a, w=w, wrt=wrt: penalty(x, a, w, wrt) for w in (0.0, 1.0) for wrt in "xa"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["entropic_ot", "sinkhorn_divergence"])
def test_a_second_derivative_raises_whatever_stands_beside_it(name, dtype):
    y = cloud(6, 2, seed=1, dtype=dtype)

    def value(x, a):
        return getattr(sinkhorn, name)(x, y, 1.0, a)[0]

    def leaves():
        return cloud(5, 2, dtype=dtype).requires_grad_(), weights(5).requires_grad_()

    for penalty in penalties(value):
        x, a = leaves()
        loss = penalty(x, a)
        for leaf in (x, a):
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(loss, leaf, retain_graph=True)
    x, a = leaves()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.functional.hessian(lambda z: value(z, a.detach()) + z.square().sum(), x.detach())
    scale = torch.ones((), dtype=dtype, requires_grad=True)  # it enters by the incoming gradient alone
    grad, = torch.autograd.grad(scale * value(x, a), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), scale)
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match="jvp"):  # forward mode gave zeros
        warnings.simplefilter("ignore")  # of torch's own parts
        torch.func.jvp(lambda z: value(z, a.detach()), (x.detach(),), (x.detach(),))


def test_a_graph_changes_no_first_derivative():
    x, y = cloud(2, 5, 2).requires_grad_(), cloud(2, 6, 2, seed=1).requires_grad_()
    a, b = weights(2, 5).requires_grad_(), weights(2, 6, seed=1).requires_grad_()
    value = (sinkhorn.sinkhorn_divergence(x, y, 1.0, a, b)[0] * torch.tensor([1.0, -3.0])).sum()
    plain, graph = (torch.autograd.grad(value, (x, y, a, b), retain_graph=True, create_graph=g) for g in (False, True))
    assert all(torch.equal(p, g) and g.requires_grad for p, g in zip(plain, graph))
    through_func = torch.func.grad(lambda z: sinkhorn.sinkhorn_divergence(z, y.detach()[0], 1.0)[0])(x.detach()[0])
    leaf = x.detach()[0].requires_grad_()
    sinkhorn.sinkhorn_divergence(leaf, y.detach()[0], 1.0)[0].backward()
    assert torch.equal(through_func, leaf.grad)


# ---- numerical limits

@pytest.mark.parametrize("outlier", [0, 100])
@pytest.mark.parametrize("eps_rel", [1e-3, 1e-2, 0.1, 1.0, 1e3])
def test_float32_agrees_with_float64(eps_rel, outlier):
    x, y = cloud(2, 24, 8, dtype=torch.float32), cloud(2, 16, 8, seed=1, dtype=torch.float32)
    x[1, 0] += outlier
    eps, results = relative_eps(x, y, eps_rel), []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype, copy=True).requires_grad_()
        value, _ = sinkhorn.sinkhorn_divergence(leaf, y, eps, max_iter=3000)
        value.sum().backward()
        results.append((value, leaf.grad * 24))
    (value, grad), (value64, grad64) = results
    assert value.dtype is torch.float32, "float32 clouds must give a float32 value"
    close(value, value64, "float32 loses the value: cancellation in C or in the dual", 1e-4)
    scale = torch.tensor([1.0, max(1.0, outlier)])[:, None, None]  # the outlier's gradient sets the scale of its cloud
    close(grad / scale, grad64 / scale, "float32 loses the gradient", 1e-3, 2e-2)


def test_far_from_the_origin_keeps_float32_precision(sinkhorn_divergence):
    x, y = cloud(20, 64, dtype=torch.float32), cloud(20, 64, seed=1, dtype=torch.float32)
    shift = torch.zeros(64)
    shift[3] = 4096.0  # a "massive activation": one huge coordinate shared by all
    moved_x, moved_y = x + shift, y + shift
    expected = sinkhorn_divergence(moved_x.double() - shift, moved_y.double() - shift, 10.0)[0]
    value, _ = sinkhorn_divergence(moved_x, moved_y, 10.0)
    close(value, expected, "cancellation in |x|^2 + |y|^2 - 2 x y", 1e-5)


def test_autocast_and_bfloat16_are_float32_inside(sinkhorn_divergence):
    x, y = cloud(2, 20, 16, dtype=torch.bfloat16), cloud(2, 20, 16, seed=1, dtype=torch.bfloat16)
    x.requires_grad_()
    expected = sinkhorn_divergence(x.float(), y.float(), 3.0)[0]
    value, _ = sinkhorn_divergence(x, y, 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = sinkhorn_divergence(x.float(), y.float(), 3.0)
    assert value.dtype is inside.dtype is torch.float32, "the value must leave in float32"
    close(value, expected, "bfloat16 input was not upcast", 0, 0)
    close(inside, expected, "autocast reached a matrix product", 0, 0)
    value.sum().backward()
    assert x.grad.dtype is torch.bfloat16 and x.grad.isfinite().all(), "gradient not in the input's type"


def test_not_converged_is_loud(entropic_ot, sinkhorn_divergence):
    x, y = cloud(20, 2), cloud(20, 2, seed=1)
    for function in (entropic_ot, sinkhorn_divergence):  # at this eps the self problems converge at once
        with pytest.warns(RuntimeWarning, match="after 3 iterations") as caught:
            value, info = function(x, y, 1e-3, max_iter=3)
        assert len(caught) == 1 and caught[0].filename == __file__, "one warning, pointing at the caller"
        assert not info.converged and info.iterations == 3 and info.marginal_error > 1e-4, "info hides it"
        assert value.isfinite(), "an early stop must still be finite"
    early, exact = entropic_ot(x, y, 0.5, tol=0.5)[0], entropic_ot(x, y, 0.5, tol=1e-6)[0]
    assert exact - 1 < early < exact, "an early dual value must bound the value from below"
    with pytest.warns(RuntimeWarning, match="raise eps, max_iter or tol") as caught:
        info = sinkhorn_potentials(torch.cdist(x, y).square(), 1e-3, max_iter=3)[2]
    assert not info.converged and caught[0].filename == __file__, "the potentials hide it"


# ---- the door

@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(0, 2)), "x must be a non"), (dict(y=torch.zeros(3, 2).long()), "y must be a non"),
    (dict(x=torch.zeros(4, 3)), "x and y must agree"), (dict(x=torch.zeros(2, 4, 2)), "x and y must agree"),
    (dict(x=torch.full((4, 2), math.nan)), "x must be finite"), (dict(x=torch.full((4, 2), 1e30)), "C / eps|far apart"),
    (dict(a=torch.ones(3)), r"a must be a tensor \[4\]"), (dict(a=torch.tensor([2.0, 1, 1, -1])), "a must"),
    (dict(b=torch.zeros(3)), "positive sum"), (dict(b=torch.tensor([1, math.inf, 1])), "b must be finite"),
    (dict(eps=0.0), "eps must be finite and > 0"), (dict(eps=math.nan), "eps must be finite and > 0"),
    (dict(eps=torch.ones(2)), "broadcast to the"), (dict(eps=torch.ones((), requires_grad=True)), "det"),
    (dict(max_iter=0), "max_iter must be >= 1"), (dict(tol=0.0), "tol > 0"),
])
def test_door(change, message, entropic_ot, sinkhorn_divergence):
    good = dict(x=torch.rand(4, 2), y=torch.rand(3, 2), eps=1.0)
    for function in (entropic_ot, sinkhorn_divergence):
        with pytest.raises(FloatingPointError if "x must be finite" in message or "far" in message else ValueError,
                           match=message):
            function(**(good | change))


def test_door_of_the_potentials():
    for cost, message in ((torch.ones(3), "cost must be"), (torch.ones(2, 0), "cost must be"),
                          (torch.tensor([[0.0, math.inf]]), "C / eps must be finite")):
        with pytest.raises(FloatingPointError if "finite" in message else ValueError, match=message):
            sinkhorn_potentials(cost, 1.0)


def test_docstring_examples():
    result = doctest.testmod(sinkhorn)
    assert result.attempted > 0 and result.failed == 0, "the example in the module docstring is wrong"


# ---- the two layers

@pytest.mark.parametrize("name", ["entropic_ot", "sinkhorn_divergence"])
def test_the_layers_agree(name):
    """Values and gradients in points and weights, in a batch, with removed points and fast and slow elements."""
    x, y = cloud(2, 3, 12, 4), cloud(2, 3, 9, 4, seed=1) + 0.5
    a, b = weights(2, 3, 12), weights(9)
    eps, results = relative_eps(x, y, torch.tensor([0.3, 1.0, 5.0])), []
    for removed in (False, True):
        if removed:
            a[0, :, 3:5], b[2] = 0, 0  # weights that are 0 and learn are the textbook's: none learns here
        for fast in (False, True):
            leaves = [leaf.clone().requires_grad_() for leaf in (x, y, a, b)]
            p, q, u, v = leaves[:2] + [a, b] if removed else leaves
            value, _ = getattr(sinkhorn, name)(p, q, eps, u, v, max_iter=20_000, tol=1e-10, fast=fast)
            value.sum().backward()
            results.append((value, *(leaf.grad for leaf in leaves if leaf.grad is not None)))
        for what, textbook, ours in zip(("value", "d/dx", "d/dy", "d/da", "d/db"), *results[-2:]):
            close(ours, textbook, f"the fast layer has another {what}, removed points: {removed}", 1e-8, 1e-8)
    assert len(results[0]) == 5 and len(results[2]) == 3


def test_the_weight_of_a_removed_point_has_its_own_potential(entropic_ot):
    """The fast layer moves removed points, so a gradient of their weights must not come from there."""
    x, y = cloud(6, 2), cloud(5, 2, seed=1)
    x[2] = 5.0
    a = torch.ones(6, dtype=torch.float64)
    a[2] = 0
    leaf = a.clone().requires_grad_()
    value, _ = entropic_ot(x, y, 1.0, leaf, tol=1e-10)
    value.backward()
    a[2] = 1e-6
    change = (entropic_ot(x, y, 1.0, a, tol=1e-10)[0] - value) / 1e-6
    close(leaf.grad[2], change, "not the one-sided difference", 1e-4)


def test_any_cost():
    """A cost that no pair of clouds has: value against the primal, gradient against differences."""
    cost = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    a, b = weights(2, 5).requires_grad_(), weights(4, seed=1).requires_grad_()

    def value(cost, a, b):
        return ot_of_cost(cost, 0.5, a, b, tol=1e-11)[0]

    assert torch.autograd.gradcheck(value, (cost, a, b), atol=1e-7, rtol=1e-6), "gradient != finite difference"
    f, g, _ = sinkhorn_potentials(cost, 0.5, a, b, tol=1e-11)
    plan = transport_plan(f, g, cost, 0.5, a, b)
    kl = (plan * (plan / (a[..., None] * b)).log()).sum((-2, -1))
    close(value(cost, a, b), (plan * cost).sum((-2, -1)) + 0.5 * kl, "dual value != <P, C> + eps KL(P | a b)")


def hard_case(name):
    """(x, y, a, b, eps) in float64."""
    x, y, a, b, eps = cloud(9, 2), cloud(7, 2, seed=1), weights(9), weights(7), 0.1
    if name == "small eps":
        eps = 0.02
    elif name == "far clusters":  # C / eps is 2e6 between them
        x[4:], y[4:], eps = x[4:] + 1e3, y[4:] + 1e3, 1.0
        a[:], b[:4], b[4:] = 1.0, 1.0, 5 / 3  # 4 : 5 in both clouds
    elif name == "unequal clusters":  # a part of the mass must cross, at C / eps of 200
        x[4:], y[4:], eps = x[4:] + 10, y[4:] + 10, 1.0
        a[:], b[:] = 1.0, 1.0  # 4 : 5 and 4 : 3
    elif name == "zero weights":
        a[2:4], b[0], x[2], y[0] = 0, 0, 50, -50
    elif name == "tiny weights":
        a[0], b[1] = 1e-20, 1e-15
    elif name == "tiny":
        x, y, eps = x * 1e-12, y * 1e-12, eps * 1e-24
    elif name == "huge":
        x, y, eps = x * 1e12, y * 1e12, eps * 1e24
    return x, y, a / a.sum(), b / b.sum(), eps


@pytest.mark.parametrize(
    "name", "plain, small eps, far clusters, unequal clusters, zero weights, tiny weights, tiny, huge".split(", "))
def test_hard_cases_equal_the_textbook(name):
    x, y, a, b, eps = hard_case(name)
    options = dict(max_iter=5000, tol=1e-8)
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the textbook and float32 may stop above tol where clusters are far
        expected, _ = sinkhorn.entropic_ot(leaves[0], y, eps, a, b, **options, fast=False)
        single, _ = sinkhorn.entropic_ot(leaves[2].float(), y.float(), eps, a, b, max_iter=5000)
    value, _ = sinkhorn.entropic_ot(leaves[1], y, eps, a, b, **options)
    scale = torch.cdist(x, y).square().mean()
    close(value / scale, expected / scale, "the fast layer underflows", 1e-7)
    close(single / scale, expected / scale, "float32 underflows", 1e-4, 1e-5)
    for result in (expected, value, single):
        result.backward()
    size = scale.sqrt()
    close(leaves[1].grad / size, leaves[0].grad / size, "another gradient", 0, 1e-6)
    close(leaves[2].grad / size, leaves[0].grad / size, "another gradient in float32", 0, 1e-3)


def test_kernel_has_a_one_in_each_row_and_column():
    logits = -50 * cloud(3, 9, 7).square()
    for u in (torch.zeros(3, 9, dtype=torch.float64), 1e3 * cloud(3, 9, seed=2)):
        u0, v0, kernel = sinkhorn._kernel(logits, u)
        close(kernel, (u0[..., None] + v0[..., None, :] + logits).exp(), "K != exp(u0 + v0 - C / eps)")
        close(kernel.amax(-1), torch.ones(3, 9), "a row could underflow", 1e-12, 0)
        close(kernel.amax(-2), torch.ones(3, 7), "a column could underflow", 1e-12, 0)


@pytest.mark.parametrize("eps_rel, tol, expected", [
    (0.1, 1e-4, torch.float32), (3.0, 1e-4, torch.float64),  # eps > C: P is nearly a b^T
    (1e-3, 1e-4, torch.float64), (0.1, 1e-6, torch.float64),  # float32 cannot reach tol
])
def test_float32_only_where_it_resolves_the_problem(eps_rel, tol, expected):
    x, y = cloud(2, 30, 8, dtype=torch.float32), cloud(2, 20, 8, seed=1, dtype=torch.float32)
    eps, sizes = relative_eps(x, y, eps_rel)[:, None], [weights(2, 30), weights(2, 20)]
    points, half, unit = sinkhorn._scaled((x, y), sizes, eps, tol)
    assert {t.dtype for t in (*points, *half, unit)} == {expected}
    close((points[0][:, :, None] - points[1][:, None]).square().sum(-1) / 2,
          torch.cdist(x, y).square() / eps[..., None], "C / eps != |p - q|^2 / 2", 1e-5, 1e-5)


# ---- fuzzing

def fuzz_case(number):
    """Arguments of sinkhorn_divergence as hostile as they come: shapes, scales, weights, types, values."""
    rng = torch.Generator().manual_seed(number)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=rng))]

    dtype = pick([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    batch = pick([(), (), (1,), (3,), (2, 2)])
    n, m, d = (pick([1, 2, 3, 5, 17]) for _ in "nmd")
    exponent = 60 * torch.rand((), generator=rng, dtype=torch.float64).item() - 30
    scale = 10.0 ** exponent if number % 3 == 0 else 1.0
    clouds = []
    for points in (n, m):
        cloud = torch.randn(*batch, points, d, generator=rng, dtype=torch.float64)
        cloud *= pick([1.0, 1.0, 0.0, 1e-3, 1e3])
        cloud[..., : pick([0, 0, 1, 2]), :] *= pick([10.0, 1e4])  # outliers
        cloud += pick([0.0, 0.0, 1.0, 1e2])
        clouds.append((cloud * scale).to(dtype))
    x, y = clouds
    if number % 5 == 0:
        y = x.flip(-2).clone()
    if number % 11 == 0:
        pick(clouds)[..., 0, 0] = pick([math.inf, -math.inf, math.nan])
    sizes = []
    for cloud in (x, y):
        w = torch.rand(*pick([batch, ()]), cloud.shape[-2], generator=rng, dtype=torch.float64)
        w *= 10.0 ** (pick([0, 0, 3, 10, 40]) * torch.randn(w.shape, generator=rng, dtype=torch.float64).abs()).neg()
        w[torch.rand(w.shape, generator=rng) < (1.0 if number % 17 == 0 else pick([0, 0, 0.2]))] = 0
        if number % 13 == 0:
            w[..., 0] = pick([-1.0, math.inf, math.nan, 1e300])
        sizes.append(pick([None, w, w.to(dtype)]))
    eps = 10.0 ** (pick([0, 0, -1, -2, -3, 2, 6]))
    if pick([True, True, False]):
        eps *= (x.double().square().mean() + y.double().square().mean()).item() * d
    return x, y, eps, *sizes


@pytest.mark.parametrize("part", range(5))
def test_fuzz_finite_and_right_or_a_clear_error(part):
    """The fast layer against the textbook. FUZZ_CASES is the total number of cases."""
    refused = 0
    cases = range(part, int(os.environ.get("FUZZ_CASES", 250)), 5)
    for number in cases:
        x, y, eps, a, b = fuzz_case(number)
        leaf = x.clone().requires_grad_()
        where = f"case {number}: {x.dtype} {list(x.shape)} {list(y.shape)} eps {eps:.1e}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converging is allowed, when info says so
            try:
                value, info = sinkhorn.sinkhorn_divergence(leaf, y, eps, a, b, max_iter=200)
            except (ValueError, FloatingPointError) as error:
                assert re.search("finite|positive sum", str(error)), f"{where}: not clear: {error}"
                refused += 1
                continue
            value.sum().backward()
            assert value.isfinite().all() and leaf.grad.isfinite().all(), f"{where}: {value} {leaf.grad}"
            assert info.marginal_error.isfinite().all(), f"{where}: {info}"
            if not info.converged:
                continue
            other = x.double().requires_grad_()
            options = dict(max_iter=int(os.environ.get("FUZZ_ITERATIONS", 500)), tol=1e-5)
            expected, exact = sinkhorn.sinkhorn_divergence(other, y.double(), eps, a, b, **options, fast=False)
            expected.sum().backward()
            assert expected.isfinite().all() and other.grad.isfinite().all(), f"{where}: {expected} {other.grad}"
        points = torch.cat([x, y], -2).double()  # [..., n + m, d]
        size = (points - points.mean(-2, keepdim=True)).square().sum(-1).amax(-1) + 1e-6 * eps  # [...] of C
        size += 1e-16 * points.square().amax((-2, -1)) + 1e-41  # what float32 resolves far from 0, and next to it
        off = ((value - expected).abs() / size).max().item()
        assert off < 1e-3 or not exact.converged, f"{where}: value off by {off:.1e} of C"
        away = ((leaf.grad.double() - other.grad).abs().amax((-2, -1)) / size.sqrt()).max().item()
        resolved = exact.converged and size.max() / eps < 1e4  # else float32 does not know P
        assert away < 2e-2 or not resolved, f"{where}: gradient off by {away:.1e} of a distance"
    assert refused < len(cases) / 2, "most cases are refused: nothing is tested"


@pytest.mark.parametrize("same", [False, True])
def test_reading_the_error_at_every_fourth_iteration_changes_no_value(same, monkeypatch):
    """As on a GPU: elements of a batch that converge at different iterations stay where they are until it is read."""
    torch.manual_seed(0)
    x = torch.randn(6, 20, 3) * torch.linspace(0.3, 2, 6)[:, None, None]  # [B, n, d]
    y = x if same else torch.randn(6, 25, 3)  # [B, m, d]
    value, info = sinkhorn.entropic_ot(x, y, 0.3)
    monkeypatch.setattr(sinkhorn, "_read_now", lambda iteration, max_iter, _: iteration % 4 == 0 or iteration == max_iter)
    again, later = sinkhorn.entropic_ot(x, y, 0.3)
    assert torch.equal(again, value) and torch.equal(later.marginal_error, info.marginal_error)
    assert later.iterations == -(-info.iterations // 4) * 4
