"""Entropic optimal transport between point clouds: log-domain Sinkhorn, divergence, envelope gradient.

    C[i, j] = ||x[i] - y[j]||^2                                       squared Euclidean, no 1/2
    OT_eps  = min_P <P, C> + eps KL(P || a b^T)                       over P >= 0 with marginals a and b
            = max_{f, g} <a, f> + <b, g> - eps (sum P - 1)            the dual: this is what we evaluate
    P[i, j] = a[i] b[j] exp((f[i] + g[j] - C[i, j]) / eps)
    f[i]   <- -eps log sum_j b[j] exp((g[j] - C[i, j]) / eps)         then g alike: one Sinkhorn iteration
    S_eps   = OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2      never clamped: rounding may show as < 0

Sources: Cuturi 2013 (iterations), Feydy et al. 2019 (divergence, symmetric update). The same number as POT's
`ot.solve(C, a, b, reg=eps, reg_type="KL")`; S is twice geomloss `SamplesLoss(blur=sqrt(eps / 2))`.

Our choices:
- Gradients by the envelope theorem: the potentials are constants, nothing is unrolled, so dOT/da = f and
  dOT/dx[i] = sum_j P[i, j] 2 (x[i] - y[j]). First order only: differentiating a gradient again raises in
  torch, or silently adds zero where other terms keep its graph alive. eps carries no gradient.
- Weights are divided by their sum inside the graph: a 0/1 mask is a valid weight, and their gradient is that
  of the normalised problem, f - <a, f>. A zero weight is a removed point: no effect on value or gradient.
- The cross problem adds Nesterov momentum with restarts (O'Donoghue and Candes 2015) to Sinkhorn: 3 to 15
  times fewer iterations at eps = 0.01 mean(C); eps-scaling saved little on top. The self problems take the
  symmetric step f <- (f + T f) / 2, with T the iteration above.
- Distances and gradients are float64 products of centred points: no cancellation, and TF32 and autocast
  leave float64 alone, so no global flag needs saving. Iterations run in float32, or float64 if x or y is so.

Limits. float32 resolves P to about 1e-7 max(C) / eps, so the default tol of 1e-4 can be out of reach below
eps = 0.003 mean(C): use float64 there. Iterations grow as eps falls: a few at eps = mean(C), tens at 0.1, a
hundred at 0.01. Identical points, single points and far outliers are fine. MPS has no float64: use the CPU.

Copy this file alone: it needs torch only. Moving a cloud by v costs ||v||^2, for every eps:

>>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], requires_grad=True)
>>> value, info = sinkhorn_divergence(x, x.detach() + torch.tensor([3.0, 4.0]), eps=0.5)
>>> print(f"{value.item():.3f}", info.converged)
25.000 True
>>> value.backward()
>>> print((3 * x.grad).round(decimals=2).tolist())  # -2 v for each of the three points of weight 1/3
[[-6.0, -8.0], [-6.0, -8.0], [-6.0, -8.0]]
"""

import math
import warnings
from typing import NamedTuple

import torch

PATIENCE = 100  # iterations without a new best error that end the loop, where rounding can be the reason


class SinkhornInfo(NamedTuple):
    iterations: int  # of the slowest problem
    marginal_error: torch.Tensor  # [...] L1 distance of P's marginals from a and b, of total mass 1
    converged: bool  # marginal_error <= tol in every batch element


def relative_eps(x, y, eps_rel, a=None, b=None):
    """eps = eps_rel * mean(C), [...] float64, detached: the same smoothing whatever the scale of the clouds.

    x [..., n, d], y [..., m, d]; the mean weighs C by a b^T (uniform by default). A mean below 1e-16 (all
    points identical) is replaced by 1e-16: any eps gives 0 there. Raises as entropic_ot. Source: our choice.
    """
    x, y, a, b = (t.detach().double() for t in _check_clouds(x, y, a, b)[:4])
    b = b / b.sum(-1, keepdim=True)  # [..., m] again: float32 weights sum to 1 only within 1e-7
    centre = (b[..., None] * y).sum(-2, keepdim=True)  # [..., 1, d] about it, C's cross term averages to 0
    mean_x = (a * (x - centre).square().sum(-1)).sum(-1)  # [...]
    mean_y = (b * (y - centre).square().sum(-1)).sum(-1)  # [...]
    return eps_rel * (mean_x + mean_y).clamp(min=1e-16)  # [...]


def sinkhorn_potentials(cost, eps, a=None, b=None, *, max_iter=1000, tol=1e-4):
    """Dual potentials of entropic OT for any cost matrix. Source: Cuturi 2013, in the log domain.

    cost [..., n, m] finite; eps > 0 a number or tensor [...], in units of cost; a [..., n] or [n], b [..., m]
    or [m] non-negative, divided by their sums, uniform by default. Returns (f [..., n], g [..., m], info),
    detached: P's column sums are exact, its row sums within marginal_error. Stops when every batch element is
    within tol, at max_iter, or after 100 iterations without progress where rounding can be the reason.
    Warns (RuntimeWarning) when not converged. Raises ValueError on bad shapes, weights, eps or cost.
    """
    _require(torch.is_tensor(cost) and cost.ndim >= 2 and cost.is_floating_point() and cost.numel() > 0,
             "cost must be a non-empty floating point tensor [..., n, m]", cost)
    cost = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))  # [..., n, m]
    a = _check_weights("a", a, cost[..., 0]).detach()  # [..., n]
    b = _check_weights("b", b, cost[..., 0, :]).detach()  # [..., m]
    eps = _check_eps(eps, cost[..., 0, 0])  # [...]
    u, v, info = _iterate(cost / eps[..., None, None], a, b, max_iter, tol)  # [..., n], [..., m]
    _warn_unless_converged(info, eps, tol)
    return eps[..., None] * u, eps[..., None] * v, info  # [..., n], [..., m]


def transport_plan(f, g, cost, eps, a=None, b=None):
    """P = a b^T exp((f + g - C) / eps), [..., n, m], of total mass 1. Arguments as in `sinkhorn_potentials`.

    Detached: f and g are constants here, so a gradient of this formula would not be the plan's derivative.
    """
    f, g, cost = f.detach(), g.detach(), cost.detach().to(f.dtype)  # [..., n], [..., m], [..., n, m]
    _require(cost.shape == (*f.shape, g.shape[-1]) and g.shape[:-1] == f.shape[:-1],
             f"cost must be [..., n, m] for f [..., n] {list(f.shape)} and g [..., m] {list(g.shape)}", cost)
    log_a = _check_weights("a", a, f).detach().log()  # [..., n] -inf where a point is removed
    log_b = _check_weights("b", b, g).detach().log()  # [..., m]
    eps = _check_eps(eps, f[..., 0])[..., None]  # [..., 1]
    density = (f[..., :, None] + g[..., None, :] - cost) / eps[..., None]  # [..., n, m] log of P / a b^T
    return (density + log_a[..., :, None] + log_b[..., None, :]).exp()  # [..., n, m]


def entropic_ot(x, y, eps, a=None, b=None, *, max_iter=1000, tol=1e-4):
    """OT_eps(x, y), differentiable once in x, y, a and b. Source: Cuturi 2013; gradient: our choice (above).

    x [..., n, d] and y [..., m, d] with equal leading dimensions, any floating type; eps > 0 in units of C, a
    number or tensor [...] that requires no gradient; a, b, max_iter, tol as in `sinkhorn_potentials`. Returns
    (value [...], SinkhornInfo), float64 if x or y is, else float32. At x = y it is not 0: see the divergence.
    Warns (RuntimeWarning) when not converged: OT is then a lower bound. Raises ValueError on empty
    clouds, bad shapes, weights or eps, and on points that are not finite or whose C / eps overflows.
    """
    x, y, a, b, eps = _check_clouds(x, y, a, b, eps)
    value, info = _solve(x, y, eps, a, b, max_iter, tol)  # [...]
    _warn_unless_converged(info, eps, tol)
    return value, info


def sinkhorn_divergence(x, y, eps, a=None, b=None, *, max_iter=1000, tol=1e-4):
    """S_eps(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, zero only where the weighted clouds are equal.

    Arguments, result and errors as in `entropic_ot`; the info is the worst over the three problems. eps -> 0
    gives the squared Wasserstein-2 distance, eps -> inf ||mean x - mean y||^2. Source: Feydy et al. 2019.
    """
    x, y, a, b, eps = _check_clouds(x, y, a, b, eps)
    cross, info_xy = _solve(x, y, eps, a, b, max_iter, tol)  # [...]
    self_x, info_xx = _solve(x, x, eps, a, a, max_iter, tol, symmetric=True)  # [...]
    self_y, info_yy = _solve(y, y, eps, b, b, max_iter, tol, symmetric=True)  # [...]
    iterations, errors, converged = zip(info_xy, info_xx, info_yy)
    info = SinkhornInfo(max(iterations), torch.stack(errors).amax(0), all(converged))
    _warn_unless_converged(info, eps, tol)
    return cross - (self_x + self_y) / 2, info  # [...]


def _iterate(scaled, a, b, max_iter, tol, symmetric=False):
    """u = f / eps and v = g / eps for scaled = C / eps, v the exact half-step from u, and their info."""
    _require(scaled.isfinite().all(), f"C / eps must be finite in {scaled.dtype}: C bad, or eps too small")
    _require(max_iter >= 1 and tol > 0, f"max_iter must be >= 1 and tol > 0, got {max_iter} and {tol}")
    log_a, log_b = a.log(), b.log()  # [..., n], [..., m] -inf where a point is removed
    rounding = 16 * torch.finfo(scaled.dtype).eps * scaled.abs().max().item()  # of u, generously
    best, best_at = math.inf, 0
    u = old = torch.zeros_like(a)  # [..., n]
    v = u if symmetric else -torch.logsumexp((log_a + u)[..., :, None] - scaled, -2)  # [..., m]
    age = torch.zeros_like(a[..., 0])  # [...] steps since the momentum restarted
    for iteration in range(1, max_iter + 1):
        new = -torch.logsumexp((log_b + v)[..., None, :] - scaled, -1)  # [..., n]
        # P's row sums are a exp(u - new): the error is free. In one exp, removed points give 0, not 0 * inf.
        excess = (log_a + u - new).exp() - a  # [..., n]
        error = excess.abs().sum(-1)  # [...]
        worst = error.max().item()
        if worst < best:
            best, best_at = worst, iteration
        stalled = iteration - best_at >= PATIENCE and best <= rounding
        if worst <= tol or iteration == max_iter or stalled:
            break
        done = (error <= tol)[..., None]  # [..., 1] these stay: a problem's result must not depend on its batch
        if symmetric:
            u = v = torch.where(done, u, (u + new) / 2)  # [..., n]
        else:
            uphill = (excess * (new - old)).sum(-1) <= 0  # [...] -excess is the dual's gradient in u
            age = torch.where(uphill, age + 1, 0)  # [...]
            ahead = new + (age / (age + 3))[..., None] * (new - old)  # [..., n]
            u, old = torch.where(done, u, ahead), new  # [..., n], [..., n]
            v = -torch.logsumexp((log_a + u)[..., :, None] - scaled, -2)  # [..., m]
    v = new if symmetric else v  # [..., m] the error is that of (u, u) then, which (u, new) improves on
    return u, v, SinkhornInfo(iteration, error, worst <= tol)  # [..., n], [..., m]


def _solve(x, y, eps, a, b, max_iter, tol, symmetric=False):
    """OT_eps [...] with its gradient, and the info; arguments checked and of one dtype; symmetric: y is x."""
    centre = y.detach().double().mean(-2, keepdim=True)  # [..., 1, d]
    x64, y64 = x.detach().double() - centre, y.detach().double() - centre  # [..., n, d], [..., m, d]
    x_norm, y_norm = x64.square().sum(-1), y64.square().sum(-1)  # [..., n], [..., m]
    cost = x_norm[..., :, None] + y_norm[..., None, :] - 2 * x64 @ y64.mT  # [..., n, m]
    scaled = cost.clamp(min=0).to(x.dtype) / eps[..., None, None]  # [..., n, m] no gradient passes the clamp
    u, v, info = _iterate(scaled, a.detach(), b.detach(), max_iter, tol, symmetric)  # [..., n], [..., m]

    # <a, f> + <b, g> - eps (sum P - 1) = <a, phi> + <b, g>, phi = f - eps sum_j b[j] expm1((f + g - C) / eps)
    # With expm1, eps >> C is exact too: sum P - 1 would round to 1e-7 eps, and f is known no better.
    row, column = a.detach()[..., :, None], b.detach()[..., None, :]  # [..., n, 1], [..., 1, m]
    exponent = u[..., :, None] + v[..., None, :] - scaled  # [..., n, m]
    exponent = exponent.masked_fill(row * column == 0, 0)  # [..., n, m] between removed points: no 0 * inf
    excess = column * exponent.expm1()  # [..., n, m]
    phi, g = eps[..., None] * (u - excess.sum(-1)), eps[..., None] * v  # [..., n], [..., m]
    value = (a * phi).sum(-1) + (b * g).sum(-1)  # [...]

    # Envelope gradient, as a term of value 0, linear in the points: backward has no matrix product left.
    plan = (row * (excess + column)).double()  # [..., n, m]
    for points, here, there, flow in ((x, x64, y64, plan), (y, y64, x64, plan.mT)):
        if points.requires_grad:
            grad = 2 * (flow.sum(-1, keepdim=True) * here - flow @ there)  # [..., n, d] or [..., m, d]
            value = value + ((points - points.detach()) * grad.to(x.dtype)).sum((-2, -1))  # [...]
    return value, info


def _check_clouds(x, y, a, b, eps=1.0):
    """The arguments in their common dtype, with weights [..., n], [..., m] and eps [...]."""
    for name, points in (("x", x), ("y", y)):
        _require(torch.is_tensor(points) and points.ndim > 1 and points.is_floating_point()
                 and points.numel() > 0,
                 f"{name} must be a non-empty floating point tensor [..., points, dimensions]", points)
        _require(points.isfinite().all(), f"{name} must be finite")
    _require(x.shape[:-2] == y.shape[:-2] and x.shape[-1] == y.shape[-1],
             f"x and y must agree in all but the number of points, got {list(x.shape)} and {list(y.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)  # [..., n, d], [..., m, d]
    a, b = _check_weights("a", a, x[..., 0]), _check_weights("b", b, y[..., 0])  # [..., n], [..., m]
    return x, y, a, b, _check_eps(eps, x[..., 0, 0])


def _check_weights(name, weights, like):
    """Weights with the shape and dtype of like [..., n], summing to 1."""
    if weights is None:
        return torch.full_like(like, 1 / like.shape[-1])  # [..., n]
    _require(torch.is_tensor(weights) and weights.shape in (like.shape, like.shape[-1:]),
             f"{name} must be a tensor {list(like.shape)} or {list(like.shape[-1:])}", weights)
    weights = weights.to(like).expand(like.shape)  # [..., n]
    total = weights.sum(-1, keepdim=True)  # [..., 1]
    _require((weights >= 0).all() and (total > 0).all() and total.isfinite().all(),
             f"{name} must be finite and >= 0 with a positive sum in every batch element")
    return weights / total  # [..., n]


def _check_eps(eps, like):
    """eps as a tensor with the shape and dtype of like [...]."""
    eps = torch.as_tensor(eps, dtype=torch.float64 if not torch.is_tensor(eps) else None)  # [] or [...]
    _require(not eps.requires_grad, "eps carries no gradient here: pass eps.detach()")
    _require(eps.ndim <= like.ndim and all(e in (1, s) for e, s in zip(eps.shape[::-1], like.shape[::-1])),
             f"eps must be a number or broadcast to the batch shape {list(like.shape)}", eps)
    eps = eps.to(like).expand(like.shape)  # [...]
    _require((eps > 0).all() and eps.isfinite().all(), f"eps must be finite and > 0 in {like.dtype}")
    return eps


def _require(condition, message, got=None):
    if not condition:
        if torch.is_tensor(got):
            got = f"{got.dtype} {list(got.shape)}"
        raise ValueError(message + (f", got {got}" if got is not None else ""))


def _warn_unless_converged(info, eps, tol):
    if not info.converged:
        warnings.warn(f"Sinkhorn stopped after {info.iterations} iterations at marginal error "
                      f"{info.marginal_error.max().item():.1e} > tol {tol:.1e} (eps {eps.min().item():.1e}, "
                      f"{eps.dtype}): raise eps, max_iter, tol or use float64", RuntimeWarning, stacklevel=3)
