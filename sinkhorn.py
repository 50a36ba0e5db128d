"""Entropic optimal transport between point clouds: log-domain Sinkhorn, divergence, envelope gradient.

    C[i, j] = ||x[i] - y[j]||^2                                       squared Euclidean, no 1/2
    OT_eps  = min_P <P, C> + eps KL(P || a b^T)                       over P >= 0 with marginals a and b
            = max_{f, g} <a, f> + <b, g> - eps (sum P - 1)            the dual: this is what we evaluate
    P[i, j] = a[i] b[j] exp((f[i] + g[j] - C[i, j]) / eps)
    f[i]   <- -eps log sum_j b[j] exp((g[j] - C[i, j]) / eps)         then g alike: one Sinkhorn iteration
    S_eps   = OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2      never clamped: rounding may show as < 0

What makes it fast: with u = f / eps, v = g / eps and reference potentials u0, v0 absorbed into a kernel K,

    K[i, j] = exp(u0[i] + v0[j] - C[i, j] / eps)                      <= 1, with a 1 in each row and column
    u[i]   <- u0[i] - log sum_j K[i, j] b[j] exp(v[j] - v0[j])        the iteration above, to the last digits

so an iteration is two matrix-vector products, where the log domain takes 2 n m exponentials. K is built anew only
when u has moved so far from u0 that something which underflowed in K could matter: any eps that the log domain
bears is safe here. (Schmitzer 2019 calls this stabilised scaling.)

Sources: Cuturi 2013 (iterations), Feydy et al. 2019 (divergence, symmetric update). The same number as POT's
`ot.solve(C, a, b, reg=eps, reg_type="KL")`; S is twice geomloss `SamplesLoss(blur=sqrt(eps / 2))`.

Our choices:
- Gradients by the envelope theorem: the potentials are constants, nothing is unrolled, so dOT/da = f and
  dOT/dx[i] = sum_j P[i, j] 2 (x[i] - y[j]). First order only: differentiating a gradient again raises in
  torch, or silently adds zero where other terms keep its graph alive. eps carries no gradient.
- Weights are divided by their sum inside the graph: a 0/1 mask is a valid weight, and their gradient is that
  of the normalised problem, f - <a, f>. A zero weight is a removed point: no effect on value or gradient.
  So is one below 1e-24 of the sum.
- The cross problem adds Nesterov momentum with restarts (O'Donoghue and Candes 2015) to Sinkhorn: 3 to 15
  times fewer iterations at eps = 0.01 mean(C); eps-scaling saved little on top. The self problems take the
  symmetric step f <- (f + T f) / 2, with T the iteration above.
- Distances and gradients are matrix products of centred points: about 4 of [n, m, d] for S with its gradient in x.
  C / eps, K and P = row K column, with row = a exp(u - u0) and column = b exp(v - v0), take turns in one [n, m]: fresh
  memory costs more than what is computed in it. The rare new K pays for C again.
- All is float32 on the CPU, with autocast off; float64 if x or y is so, or where eps > mean(C) (P is nearly a b^T,
  and what matters is the rest). Elsewhere all is float64: TF32 and autocast leave it alone, so no global flag
  needs saving. (On a CPU with AMX or the like, `torch.set_float32_matmul_precision("medium")` lowers float32 there:
  pass float64.)

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

LEAST = 1e-24  # a weight below this share of all is 0: what float32 can divide by with room for K
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
    x, y, a, b = (t.detach() for t in _check_clouds(x, y, a, b)[:4])
    unit = torch.full((1, 1), 0.5 ** 0.5, dtype=torch.float64, device=x.device)  # that of eps = 1
    return eps_rel * _mean(_cloud(x, a, unit), _cloud(y, b, unit)).clamp(min=1e-16)  # [...]


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
    eps = _check_eps(eps, cost[..., 0, 0])  # [...]
    a, b = _check_weights("a", a, cost[..., 0]), _check_weights("b", b, cost[..., 0, :])  # [..., n], [..., m]
    wide = _working_dtype(cost)
    p, q, e = a.detach().to(wide), b.detach().to(wide), eps.to(wide)[..., None]  # [..., n], [..., m], [..., 1]
    with torch.autocast("cpu", enabled=False):
        u, v, _, info = _iterate(lambda: cost.to(wide) / -e[..., None], p, q, max_iter, tol)  # [..., n], [..., m]
    _warn_unless_converged(info, eps, tol)
    return (e * u).to(cost.dtype), (e * v).to(cost.dtype), info  # [..., n], [..., m]


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
    value, info = _differentiable(x, y, eps, a, b, max_iter, tol, [(0, 1, 1.0)])  # [...]
    _warn_unless_converged(info, eps, tol)
    return value, info


def sinkhorn_divergence(x, y, eps, a=None, b=None, *, max_iter=1000, tol=1e-4):
    """S_eps(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, zero only where the weighted clouds are equal.

    Arguments, result and errors as in `entropic_ot`; the info is the worst over the three problems. eps -> 0
    gives the squared Wasserstein-2 distance, eps -> inf ||mean x - mean y||^2. Source: Feydy et al. 2019.
    """
    x, y, a, b, eps = _check_clouds(x, y, a, b, eps)
    problems = [(0, 1, 1.0), (0, 0, -0.5), (1, 1, -0.5)]
    value, info = _differentiable(x, y, eps, a, b, max_iter, tol, problems)  # [...]
    _warn_unless_converged(info, eps, tol)
    return value, info


class _Cloud(NamedTuple):
    """A cloud about its centre in units of sqrt(eps / 2): with those, C / eps = |x|^2 / 2 + |y|^2 / 2 - x y^T."""

    points: torch.Tensor  # [..., n, d]
    half: torch.Tensor  # [..., n] |points|^2 / 2
    centre: torch.Tensor  # [..., 1, d]
    weights: torch.Tensor  # [..., n] of sum 1
    spread: torch.Tensor  # [...] the mean of half


def _cloud(x, weights, unit):
    x, weights = x.to(unit.dtype), weights.to(unit.dtype)  # [..., n, d], [..., n]
    weights = weights / weights.sum(-1, keepdim=True)  # [..., n] again: in float32 their sum is 1 only within 1e-7
    centre = _product(weights, x)[..., None, :]  # [..., 1, d]
    points = (x - centre).div_(unit).contiguous()  # [..., n, d]
    half = torch.linalg.vector_norm(points, dim=-1).square() / 2  # [..., n]
    return _Cloud(points, half, centre / unit, weights, torch.linalg.vecdot(weights, half))


def _mean(x, y):
    """The mean of C / eps, [...]."""
    return x.spread + y.spread + (x.centre - y.centre).square().sum((-2, -1)) / 2  # [...]


def _differentiable(x, y, eps, a, b, max_iter, tol, problems):
    """The sum of factor OT_eps(cloud i, cloud j) over problems (i, j, factor), 0 for x and 1 for y, and the worst info.

    Arguments checked and of one dtype.
    """
    needed = [x.requires_grad, y.requires_grad]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for wide in dict.fromkeys((_working_dtype(x), torch.float64)):  # one or both
            e = eps.to(wide)  # [...]
            unit = (e / 2).sqrt()[..., None, None]  # [..., 1, 1]
            clouds = _cloud(x, a, unit), _cloud(y, b, unit)
            # Where eps > C, P is nearly a b^T, and float32 would drown the rest.
            if all((_mean(clouds[i], clouds[j]) >= 1).all() for i, j, _ in problems):
                break
        potentials = [torch.zeros_like(cloud.weights, dtype=torch.float64) for cloud in clouds]  # [..., n], [..., m]
        gradients = [torch.zeros_like(cloud.points) if need else None for cloud, need in zip(clouds, needed)]
        excess, infos = 0, []
        for i, j, factor in problems:
            u, v, more, info = _solve(clouds[i], clouds[j], factor, gradients[i], gradients[j], max_iter, tol)
            potentials[i].add_(u, alpha=factor)
            potentials[j].add_(v, alpha=factor)
            excess = excess + factor * more  # [...]
            infos.append(info)
        f, g = ((eps[..., None] * potential).to(x.dtype) for potential in potentials)  # [..., n], [..., m]
        excess = (eps * excess).to(x.dtype)  # [...]
        gradients = [None if gradient is None else gradient.mul_(2 * unit) for gradient in gradients]  # like the points
    value = (a * f).sum(-1) + (b * g).sum(-1) - excess  # [...]
    _require(value.isfinite().all(), f"OT must be finite in {x.dtype}: the points are too far apart")
    for points, gradient in zip((x, y), gradients):
        if gradient is not None:
            value = _WithGradient.apply(value, points, gradient.to(x.dtype))  # [...]
    iterations, errors, converged = zip(*infos)
    return value, SinkhornInfo(max(iterations), torch.stack(errors).amax(0), all(converged))


class _WithGradient(torch.autograd.Function):
    """value [...], with `gradient` [..., n, d] in points: backward has no matrix product left."""

    @staticmethod
    def forward(ctx, value, points, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer):
        return outer, outer[..., None, None] * ctx.saved_tensors[0], None


def _iterate(make_logits, a, b, max_iter, tol, symmetric=False):
    """u = f / eps and v = g / eps for logits = -C / eps, P by its factors (row, K, column), and the info.

    make_logits() is called for each K, which overwrites it. v is the exact half-step from u; symmetric: C is
    symmetric with b = a, and v = u.
    """
    logits = make_logits()  # [..., n, m]
    size = max(abs(bound.item()) for bound in logits.aminmax())  # a NaN passes through
    _require(size < torch.finfo(logits.dtype).max / 16,
             f"C / eps must be finite in {logits.dtype}, by a factor of 16: C bad, or eps too small")
    _require(max_iter >= 1 and tol > 0, f"max_iter must be >= 1 and tol > 0, got {max_iter} and {tol}")
    log_a, present = a.log(), (a > 0).to(a)  # [..., n] -inf and 0 where a point is removed
    rounding = 16 * torch.finfo(logits.dtype).eps * size  # of u, generously
    reach = -math.log(torch.finfo(logits.dtype).tiny) / 3  # of |u - u0|: twice this, and K still has digits to spare
    best, best_at = math.inf, 0
    s = old = torch.zeros_like(a)  # [..., n] u - u0
    if symmetric and (a > 0).all():  # C[i, i] = 0: nothing to absorb
        u0, v0, kernel = s, s, logits.exp_()  # [..., n], [..., n], [..., n, n]
    else:
        u0, v0, kernel = _absorb(logits, s, a, b)  # [..., n], [..., m], [..., n, m] symmetric: v0 = u0
    age = torch.zeros_like(a[..., 0])  # [...] steps since the momentum restarted
    for iteration in range(1, max_iter + 1):
        if not symmetric:  # there |s| <= -log(min a) / 2 < reach: K[i, i] is 1
            far = torch.linalg.vector_norm(present * s, math.inf, dim=-1) > reach  # [...]
            if far.any():
                fresh = _absorb(make_logits(), u0 + s, a, b)  # [..., n], [..., m], [..., n, m]
                change = torch.where(far[..., None], u0 - fresh[0], 0)  # [..., n]
                s, old = s + change, old + change  # [..., n], [..., n]
                u0[far], v0[far], kernel[far] = (t[far] for t in fresh)
        row = (log_a + s).exp()  # [..., n] in one exp: removed points give 0, not 0 * inf
        row_kernel = None if symmetric else _product(row, kernel)  # [..., m]
        column = row if symmetric else b / row_kernel  # [..., m]
        kernel_column = _product(column, kernel.mT)  # [..., n]
        new = -kernel_column.log()  # [..., n]
        excess = row * kernel_column - a  # [..., n] of P's row sums: the error is free
        error = torch.linalg.vector_norm(excess, 1, dim=-1)  # [...]
        worst = error.max().item()
        if worst < best:
            best, best_at = worst, iteration
        stalled = iteration - best_at >= PATIENCE and best <= rounding
        if worst <= tol or iteration == max_iter or stalled:
            break
        done = (error <= tol)[..., None]  # [..., 1] these stay: a problem's result must not depend on its batch
        if symmetric:
            s = torch.where(done, s, (s + new) / 2)  # [..., n]
        else:
            step = new - old  # [..., n]
            uphill = torch.linalg.vecdot(excess, step) <= 0  # [...] -excess is the dual's gradient in u
            age = torch.where(uphill, age + 1, 0)  # [...]
            ahead = torch.addcmul(new, (age / (age + 3))[..., None], step)  # [..., n]
            s, old = torch.where(done, s, ahead), new  # [..., n], [..., n]
    info = SinkhornInfo(iteration, error, worst <= tol)
    if symmetric:
        s = (s + new) / 2  # [..., n] the error is that of u before, which this improves on
        row = column = (log_a + s).exp()  # [..., n]
        return u0 + s, u0 + s, (row, kernel, column), info  # [..., n], [..., n]
    return u0 + s, v0 - row_kernel.log(), (row, kernel, column), info  # [..., n], [..., m]


def _absorb(logits, u, a, b):
    """Reference potentials u0 [..., n] and v0 [..., m] near u, and K = exp(u0 + v0 + logits), which overwrites logits.

    Two Sinkhorn half-steps in the limit eps -> 0: v0[j] = min_i (C[i, j] / eps - u[i]) over a[i] > 0, then u0 alike.
    So the largest entry of each row and column of K is exactly 1, whatever u, eps and the weights are.
    """
    removed = bool((a == 0).any() or (b == 0).any())

    def highest(kernel, weights, dim):  # over the points that are not removed
        if removed:
            kernel = kernel.masked_fill((weights == 0).unsqueeze(-3 - dim), -math.inf)  # [..., n, m]
        return kernel.amax(dim)

    v0 = -highest(logits + u[..., :, None] if u.any() else logits, a, -2)  # [..., m]
    kernel = logits.add_(v0[..., None, :])  # [..., n, m]
    u0 = -highest(kernel, b, -1)  # [..., n]
    kernel.add_(u0[..., :, None])  # [..., n, m]
    if removed:  # a removed column took no part in u0: its own largest entry is not at 1 yet
        more = -highest(kernel, a, -2).masked_fill(b > 0, 0)  # [..., m]
        v0.add_(more)
        kernel.add_(more[..., None, :]).clamp_(max=0)  # [..., n, m] above 0 only between removed points
    return u0, v0, kernel.exp_()  # [..., n, m]


def _solve(x, y, factor, of_x, of_y, max_iter, tol):
    """u, v, sum P - 1 and the info of one problem; adds its gradients, times factor eps / unit, to of_x and of_y.

    These are [..., n, d] and [..., m, d], or None where not needed. If y is x, of_x takes both.
    """
    symmetric = x is y
    u, v, (row, kernel, column), info = _iterate(lambda: _logits(x, y), x.weights, y.weights, max_iter, tol, symmetric)
    plan = kernel.mul_(row[..., :, None]).mul_(column[..., None, :])  # [..., n, m] P, in the memory of K
    mass = plan.sum(-1)  # [..., n]

    # The envelope gradient of sum P |x + shift - y|^2 / 2, shift between the centres.
    def add(total, factor, near, shift, mass, plan, far):
        mass = factor * mass[..., None]  # [..., n, 1]
        total.addcmul_(mass, near.points)
        if not symmetric:
            total.addcmul_(mass, shift)
        _batch(total).baddbmm_(_batch(plan), _batch(far.points), alpha=-factor)

    shift = x.centre - y.centre  # [..., 1, d]
    if of_x is not None:
        add(of_x, 2 * factor if symmetric else factor, x, shift, mass, plan, y)
    if of_y is not None and not symmetric:
        add(of_y, factor, y, -shift, plan.sum(-2), plan.mT, x)
    return u, v, mass.double().sum(-1) - 1, info


def _logits(x, y, block=256):
    """-C / eps between two clouds, [..., n, m]. If y is x, only blocks on and above the diagonal are multiplied."""
    left, right = x.half, y.half  # [..., n], [..., m]
    if x is not y:  # |x + shift - y|^2 / 2
        shift = x.centre - y.centre  # [..., 1, d]
        left = left + _product(shift[..., 0, :], x.points.mT) + shift.square().sum(-1) / 2  # [..., n]
        right = right - _product(shift[..., 0, :], y.points.mT)  # [..., m]
    logits = -left[..., :, None] - right[..., None, :]  # [..., n, m]
    into, rows, columns = _batch(logits), _batch(x.points), _batch(y.points).mT  # [B, n, m], [B, n, d], [B, d, m]
    if x is not y:
        into.baddbmm_(rows, columns)
        return logits
    for i in range(0, rows.shape[1], block):
        here, after = slice(i, i + block), slice(i + block, None)
        into[:, here, i:].baddbmm_(rows[:, here], columns[:, :, i:])
        into[:, after, here] = into[:, here, after].mT
    into.diagonal(dim1=1, dim2=2).zero_()
    return logits.clamp_(max=0)


def _batch(matrices):
    """[..., n, m] as [B, n, m], the same memory."""
    return matrices.view(-1, *matrices.shape[-2:])


def _product(vector, matrix):
    """vector [..., n] times matrix [..., n, m]: [..., m]. As a row: batches of columns are many times slower."""
    return (vector[..., None, :] @ matrix)[..., 0, :]


def _working_dtype(like):
    return like.dtype if like.device.type == "cpu" else torch.float64


def _check_clouds(x, y, a, b, eps=1.0):
    """The arguments in their common dtype, with weights [..., n], [..., m] and eps [...]."""
    for name, points in (("x", x), ("y", y)):
        _require(torch.is_tensor(points) and points.ndim > 1 and points.is_floating_point()
                 and points.numel() > 0,
                 f"{name} must be a non-empty floating point tensor [..., points, dimensions]", points)
        _require(torch.stack(points.detach().aminmax()).isfinite().all(), f"{name} must be finite")
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
    weights = weights / total  # [..., n]
    return weights.masked_fill((weights > 0) & (weights < LEAST), 0)  # [..., n]


def _check_eps(eps, like):
    """eps as a tensor with the shape and dtype of like [...]."""
    eps = torch.as_tensor(eps, dtype=torch.float64 if not torch.is_tensor(eps) else None)  # [] or [...]
    _require(not eps.requires_grad, "eps carries no gradient here: pass eps.detach()")
    _require(eps.ndim <= like.ndim and all(e in (1, s) for e, s in zip(eps.shape[::-1], like.shape[::-1])),
             f"eps must be a number or broadcast to the batch shape {list(like.shape)}", eps)
    eps = eps.to(like).expand(like.shape)  # [...]
    least = torch.finfo(like.dtype).tiny  # below, eps itself is rounded
    _require((eps >= least).all() and eps.isfinite().all(), f"eps must be finite and > 0 in {like.dtype}")
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
