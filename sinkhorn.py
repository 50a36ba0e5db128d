"""Entropic optimal transport between point clouds: log-domain Sinkhorn, divergence, gradients.

    C[i, j] = |x[i] - y[j]|^2                                     squared Euclidean, no 1/2
    OT_eps  = min_P <P, C> + eps KL(P || a b^T)                   P >= 0 with marginals a and b
            = max_{f, g} <a, f> + <b, g> - eps (sum P - 1)        the dual: what is computed
    P[i, j] = a[i] b[j] exp((f[i] + g[j] - C[i, j]) / eps)
    g[j]   <- -eps log sum_i a[i] exp((f[i] - C[i, j]) / eps)     then f alike: one iteration
    S_eps   = OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2  never clamped: may round to < 0

Sources: Cuturi 2013 (iteration), Feydy et al. 2019 (divergence and its gradient). OT is POT's
`ot.solve(C, a, b, reg=eps, reg_type="KL")`, S twice geomloss `SamplesLoss(blur=sqrt(eps / 2))`.

Two parts give the same numbers. "The textbook" is the equations above, for any cost, in float64.
"The same, faster" is what `entropic_ot` and `sinkhorn_divergence` use unless `fast=False`.

Our choices:
- The gradient is that of the envelope theorem: nothing is unrolled, dOT/da = f and dOT/dC = P, exact
  at convergence. It is of first order only: differentiated again, the divergence raises, and
  ot_of_cost, as entropic_ot in its weights by the textbook, leaves out how f and P move.
- Weights are divided by their sum inside the graph: a 0/1 mask is a valid weight, and the gradient
  of weights is (f - <a, f>) / their sum. A zero weight is a removed point: no effect on value or gradients.
- A batch element that has converged stays: no result depends on what shares its batch.

Limits. Iterations grow as eps falls: tens at 0.1 mean(C), a hundred at 0.01, in the textbook ten
times as many. A solve that stops short warns; OT is then a lower bound. One point costs its squared
distance, identical points 0 with zero gradient. eps -> 0 is the cost of the best assignment,
eps -> inf the mean of C. Rounding is 1e-16 max(C), of float32 clouds 1e-7. MPS lacks float64.

Copy this file alone: it needs torch only. Moving a cloud by v costs |v|^2, for every eps:

>>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], requires_grad=True)
>>> value, info = sinkhorn_divergence(x, x.detach() + torch.tensor([3.0, 4.0]), eps=0.5)
>>> print(f"{value.item():.3f}", info.converged)
25.000 True
>>> value.backward()
>>> print((3 * x.grad).round(decimals=2).tolist())  # -2 v for each of the three, of weight 1/3
[[-6.0, -8.0], [-6.0, -8.0], [-6.0, -8.0]]
"""

import inspect
import math
import warnings
from typing import NamedTuple

import torch


class SinkhornInfo(NamedTuple):
    iterations: int  # of the slowest problem
    marginal_error: torch.Tensor  # [...] L1 distance of P's marginals from a and b, of total mass 1
    converged: bool  # marginal_error <= tol in every batch element


# ------------------------------------------------------------------------------------------------
# The textbook


def sinkhorn_potentials(cost, eps, a=None, b=None, *, max_iter=1000, tol=1e-4):
    """Dual potentials of entropic OT for any cost matrix. Source: Cuturi 2013, in the log domain.

    cost [..., n, m] finite; eps > 0 a number or a tensor [...], in units of cost; a [..., n] or [n]
    and b [..., m] or [m] non-negative, divided by their sums, uniform by default. Returns
    (f [..., n], g [..., m], info), detached, in float64: rounded they would move P where C / eps is large.
    P's column sums are exact, its row sums within info.marginal_error. Stops when every batch element is
    within tol, or at max_iter: then warns (RuntimeWarning). Raises ValueError on bad arguments,
    FloatingPointError if C / eps is not finite.
    """
    _, *checked = _check_cost(cost, eps, a, b, max_iter, tol)
    cost, eps, a, b = (t.detach() for t in checked)  # [..., n, m], [...], [..., n], [..., m] float64
    scale, log_a, log_b = eps[..., None], a.log(), b.log()  # [..., 1], [..., n], [..., m]
    f = torch.zeros_like(a)  # [..., n]
    for iteration in range(1, max_iter + 1):
        exponents = (f[..., :, None] - cost) / scale[..., None] + log_a[..., :, None]  # [..., n, m]
        g = -scale * exponents.logsumexp(-2)  # [..., m] the columns of P sum to b
        exponents = (g[..., None, :] - cost) / scale[..., None] + log_b[..., None, :]  # [..., n, m]
        new = -scale * exponents.logsumexp(-1)  # [..., n] with it the rows would sum to a
        error = ((log_a + (f - new) / scale).exp() - a).abs().sum(-1)  # [...] of the rows as they are
        if error.max() <= tol or iteration == max_iter:
            break
        f = torch.where(error[..., None] > tol, new, f)  # [..., n]
    info = SinkhornInfo(iteration, error, bool((error <= tol).all()))
    _warn_unless_converged(info, eps, tol)
    return f, g, info


def transport_plan(f, g, cost, eps, a=None, b=None):
    """P = a b^T exp((f + g - C) / eps), [..., n, m], of total mass 1, detached, in the type of cost.

    Arguments and errors as in `sinkhorn_potentials`, f and g from there.
    """
    dtype, *checked = _check_cost(cost, eps, a, b)
    f, g, cost, eps, a, b = (t.detach() for t in (f, g, *checked))
    _require(f.shape == a.shape and g.shape == b.shape,
             f"f must be {list(a.shape)} and g {list(b.shape)}, got {list(f.shape)} and {list(g.shape)}")
    log_density = (f[..., :, None] + g[..., None, :] - cost) / eps[..., None, None]  # [..., n, m]
    return (log_density + a.log()[..., :, None] + b.log()[..., None, :]).exp().to(dtype)  # [..., n, m]


def ot_of_cost(cost, eps, a=None, b=None, *, max_iter=1000, tol=1e-4):
    """(OT_eps [...], info) for any cost, differentiable in cost, a and b. Arguments as in `sinkhorn_potentials`."""
    dtype, cost, eps, a, b = _check_cost(cost, eps, a, b, max_iter, tol)
    f, g, info = sinkhorn_potentials(cost, eps, a, b, max_iter=max_iter, tol=tol)  # [..., n], [..., m]
    plan = transport_plan(f, g, cost, eps, a, b)  # [..., n, m]
    value = (a * f).sum(-1) + (b * g).sum(-1) - eps * (plan.sum((-2, -1)) - 1)  # [...]
    envelope = (plan * (cost - cost.detach())).sum((-2, -1))  # [...] 0, with the gradient P in cost
    return (value + envelope).to(dtype), info


def entropic_ot(x, y, eps, a=None, b=None, *, max_iter=1000, tol=1e-4, fast=True):
    """OT_eps(x, y), differentiable in x, y, a and b. Source: Cuturi 2013.

    x [..., n, d] and y [..., m, d] with equal leading dimensions, any floating type; eps > 0 in
    units of C, a number or a tensor [...] that requires no gradient; a, b, max_iter, tol as in
    `sinkhorn_potentials`; fast=False is the textbook's way. Returns (value [...], SinkhornInfo),
    float64 if x or y is, else float32. At x = y it is not 0: see the divergence. Warns and raises so too.
    """
    x, y, eps, a, b = _check_clouds(x, y, eps, a, b, max_iter, tol)
    if fast and not _learns_zeros(a, b):
        return _fast(x, y, eps, a, b, max_iter, tol, [(0, 1, 1.0)])
    cost = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()  # [..., n, m]
    value, info = ot_of_cost(cost, eps, a, b, max_iter=max_iter, tol=tol)  # any other cost goes here
    return _finite(value.to(x.dtype)), info


def sinkhorn_divergence(x, y, eps, a=None, b=None, *, max_iter=1000, tol=1e-4, fast=True):
    """S_eps(x, y), zero only where the weighted clouds are equal. Source: Feydy et al. 2019.

    Arguments, result and errors as in `entropic_ot`; the info is the worst over the three problems.
    eps -> 0 gives the squared Wasserstein-2 distance, eps -> inf |mean x - mean y|^2.
    """
    x, y, eps, a, b = _check_clouds(x, y, eps, a, b, max_iter, tol)
    if fast and not _learns_zeros(a, b):
        return _fast(x, y, eps, a, b, max_iter, tol, [(0, 1, 1.0), (0, 0, -0.5), (1, 1, -0.5)])
    options, p, q = dict(max_iter=max_iter, tol=tol, fast=False), x.double(), y.double()  # [..., n, d], [..., m, d]
    xy, *infos = entropic_ot(p, q, eps, a, b, **options)
    xx, info = entropic_ot(p, p, eps, a, a, **options)
    yy, last = entropic_ot(q, q, eps, b, b, **options)
    return _finite((xy - xx / 2 - yy / 2).to(x.dtype)), _worst([*infos, info, last], eps.shape)


def relative_eps(x, y, eps_rel, a=None, b=None):
    """eps = eps_rel * mean(C), [...] float64, detached: the same smoothing at any scale of clouds.

    x [..., n, d], y [..., m, d]; the mean weighs C by a b^T (uniform by default). A smaller
    mean than 1e-16 counts as that: identical points leave rounding alone, and any eps gives 0 there;
    clouds that are truly so small are smoothed more. Our choice; raises as entropic_ot.
    """
    x, y, _, a, b = (t.detach() for t in _check_clouds(x, y, 1.0, a, b))
    middle = (b.to(y)[..., None] * y).sum(-2, keepdim=True)  # [..., 1, d] mean(C) = the two spreads about it
    about = ((x - middle, a), (y - middle, b))
    spreads = [(w * torch.linalg.vector_norm(z, dim=-1).square()).sum(-1) for z, w in about]  # [...] both
    return eps_rel * sum(spreads).clamp(min=1e-16)  # [...]


# ------------------------------------------------------------------------------------------------
# The same, faster: what a training step calls. With u = f / eps and v = g / eps, an iteration on a
# kernel K at reference potentials u0 and v0,
#
#     K[i, j] = exp(u0[i] + v0[j] - C[i, j] / eps)
#     v[j]   <- v0[j] - log sum_i a[i] exp(u[i] - u0[i]) K[i, j]      then u alike
#
# is the textbook's, at two products of a matrix and a vector instead of 2 n m exponentials. K is
# built anew when u has moved so far from u0 that what underflowed in K could matter (Schmitzer
# 2019). The problem of x and y adds Nesterov's momentum (O'Donoghue and Candes 2015); those of a
# cloud with itself take the step u <- (u + T u) / 2 (Feydy et al. 2019). C is a matrix product.

NEGLIGIBLE = 1e-16  # a weight below this share changes no digit: its point counts as removed


def _fast(x, y, eps, a, b, max_iter, tol, problems):
    """(value, info) of the sum of factor OT_eps(cloud i, cloud j) over problems (i, j, factor).

    Arguments are checked. Cloud 0 is x, cloud 1 is y. Inside, all leading dimensions are one, B.
    """
    given, batch = (x, y), eps.shape
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        weights = [w.reshape(-1, w.shape[-1]) for w in (a, b)]  # [B, n], [B, m]
        eps = eps.reshape(-1, 1)  # [B, 1]
        points, half, unit = _scaled(given, weights, eps, tol)  # [B, n, d] and [B, m, d], [B, n] and [B, m]
        potentials = [torch.zeros_like(w) for w in weights]  # [B, n], [B, m]
        gradients = [torch.zeros_like(z) for z in points]  # [B, n, d], [B, m, d]
        mass, infos = 0, []
        for i, j, factor in problems:
            logits = -half[i][:, :, None] - half[j][:, None, :]  # [B, n, m]
            logits.baddbmm_(points[i], points[j].mT)  # [B, n, m] -C / eps
            solve = _solve_self if i == j else _solve
            u, v, plan, info = solve(logits, weights[i], weights[j], max_iter, tol)
            infos.append(info)
            potentials[i] += factor * u
            potentials[j] += factor * v
            mass = mass + factor * (plan.sum(2).sum(1, dtype=torch.float64) - 1)  # [B] of P, beyond 1
            # Point r gets factor sum_s P[r, s] (x[r] - y[s]), its 2 below; in one cloud with itself twice that.
            sides = [(i, 2 * factor, i, plan)] if i == j else [(i, factor, j, plan), (j, factor, i, plan.mT)]
            for k, share, other, p in sides:
                if given[k].requires_grad:
                    gradients[k].addcmul_(share * p.sum(2, keepdim=True), points[k])
                    gradients[k].baddbmm_(p, points[other], alpha=-share)
        f, g = ((eps * u).reshape(w.shape) for u, w in zip(potentials, (a, b)))  # [..., n], [..., m]
        value = (a * f).sum(-1) + (b * g).sum(-1) - (eps[:, 0] * mass).reshape(batch)  # [...] the dual
        gradients = [g.mul_(2 * unit).reshape(z.shape).to(x.dtype) for g, z in zip(gradients, given)]
    value = _Envelope.apply(value.to(x.dtype), [*gradients, f, g], x, y, a, b)  # [...]
    info = _worst(infos, batch)
    _warn_unless_converged(info, eps, tol)
    return _finite(value), info


class _Envelope(torch.autograd.Function):
    """A value whose gradients in the inputs are given. Where they are None, differentiating it raises.

    With create_graph the gradients are such values themselves, of all inputs and without gradients.
    """

    @staticmethod
    def forward(value, gradients, *inputs):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.gradients, *leaves = inputs
        ctx.save_for_backward(*leaves)

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("Sinkhorn has first derivatives only: its envelope gradient holds the plan fixed")
        scaled = [g * grad.to(g.dtype).reshape(grad.shape + (1,) * (g.ndim - grad.ndim)) for g in ctx.gradients]
        if torch.is_grad_enabled():
            scaled = [_Envelope.apply(g, None, grad, *ctx.saved_tensors) for g in scaled]
        return None, None, *scaled


def _scaled(given, weights, eps, tol):
    """Both clouds about their common centre over unit = sqrt(eps / 2): C / eps = |p - q|^2 / 2.

    Returned as ([p, q], their halved squared lengths, unit). A removed point is moved onto the heaviest one,
    where it cannot make K underflow. Float32 on the CPU gives P to 1e-7 max(C) / eps, OT to 1e-7 eps.
    """
    unit = (eps / 2).sqrt()[..., None]  # [B, 1, 1]
    double = given[0].dtype is torch.float64 or unit.device.type != "cpu"
    for dtype in (torch.float64,) if double else (torch.float32, torch.float64):
        points = []
        for z, w in zip(given, weights):
            z = z.detach().reshape(len(w), *z.shape[-2:]).to(dtype)  # [B, n, d]
            if (w < NEGLIGIBLE).any():
                heaviest = z.take_along_dim(w.argmax(1)[:, None, None], 1)  # [B, 1, d]
                z = z.where((w >= NEGLIGIBLE)[..., None], heaviest)  # [B, n, d]
            points.append(z)
        centre = sum(_product(w.to(dtype), z) for w, z in zip(weights, points))[:, None] / 2  # [B, 1, d]
        points = [(z - centre) / unit.to(dtype) for z in points]  # [B, n, d], [B, m, d]
        half = [torch.linalg.vector_norm(z, dim=-1).square() / 2 for z in points]  # [B, n], [B, m]
        largest = 4 * max(h.max().item() for h in half)  # >= C / eps; NaN where it overflows
        spread = min((w * h).sum(1).min().item() for w, h in zip(weights, half))  # about half of mean(C) / eps
        if spread >= 0.5 and (16 + largest) * torch.finfo(dtype).eps <= tol:  # 1e-7 eps is little beside mean(C)
            break
    _finite(torch.tensor(16 * largest, dtype=dtype), "C / eps must be finite: the points are too far apart for eps")
    return points, half, unit.to(dtype)  # [B, n, d] and [B, m, d], [B, n] and [B, m], [B, 1, 1]


def _solve(logits, a, b, max_iter, tol):
    """u [B, n], v [B, m] (exact half-step from u), P [B, n, m] and info for logits = -C / eps."""
    dtype = logits.dtype
    reach = -math.log(torch.finfo(dtype).tiny) / 3  # of |u - u0|: twice this, and K has digits to spare
    u0, v0, kernel = _kernel(logits, torch.zeros_like(a))  # [B, n], [B, m], [B, n, m]
    u = old = u0  # [B, n]
    age = torch.zeros_like(a[:, :1])  # [B, 1] steps since the momentum restarted
    for iteration in range(1, max_iter + 1):
        if (u - u0).abs().max() > reach:
            u0, v0, kernel = _kernel(logits, u)  # [B, n], [B, m], [B, n, m]
        row = (a * (u - u0).exp()).to(dtype)  # [B, n] P = row K column
        row_kernel = _product(row, kernel)  # [B, m]
        column = (b / row_kernel).to(dtype)  # [B, m]
        kernel_column = _product(column, kernel.mT)  # [B, n]
        new = u0 - kernel_column.log()  # [B, n]
        excess = row * kernel_column - a  # [B, n] of P's row sums; minus it is the dual's gradient in u
        error = excess.abs().sum(1, keepdim=True)  # [B, 1]
        if _read_now(iteration, max_iter, error) and (error.max() <= tol or iteration == max_iter):
            break
        step = new - old  # [B, n]
        age = torch.where((excess * step).sum(1, keepdim=True) <= 0, age + 1, 0)  # [B, 1] 0 where it went downhill
        u, old = torch.where(error > tol, new + age / (age + 3) * step, u), new  # [B, n], [B, n]
    plan = kernel.mul_(row[:, :, None]).mul_(column[:, None, :])  # [B, n, m] in the memory of K
    info = SinkhornInfo(iteration, error[:, 0], bool((error <= tol).all()))
    return u, v0 - row_kernel.log(), plan, info  # [B, n], [B, m]


def _kernel(logits, u):
    """Reference potentials u0 [B, n] and v0 [B, m] near u, and K = exp(u0 + v0 + logits) [B, n, m].

    They are an iteration in the limit eps -> 0: the largest entry of each row and column of K is 1.
    """
    v0 = -(logits + u.to(logits.dtype)[:, :, None]).amax(1)  # [B, m]
    kernel = logits + v0[:, None, :]  # [B, n, m]
    u0 = -kernel.amax(2)  # [B, n]
    return u0.double(), v0.double(), kernel.add_(u0[:, :, None]).exp_()  # [B, n], [B, m], [B, n, m]


def _solve_self(logits, a, b, max_iter, tol):
    """_solve for a cloud with itself: b = a, v = u, and K = exp(-C / eps) will do: its diagonal is 1."""
    kernel = logits.clamp_(max=0).exp_()  # [B, n, n] in the memory of the logits
    kernel.diagonal(dim1=1, dim2=2).fill_(1)
    u = torch.zeros_like(a)  # [B, n]
    for iteration in range(1, max_iter + 1):
        row = (a * u.exp()).to(kernel.dtype)  # [B, n]
        kernel_row = _product(row, kernel)  # [B, n]
        error = (row * kernel_row - a).abs().sum(1, keepdim=True)  # [B, 1]
        better = (u - kernel_row.log()) / 2  # [B, n] the mean of u and T u
        if _read_now(iteration, max_iter, error) and (error.max() <= tol or iteration == max_iter):
            break
        u = torch.where(error > tol, better, u)  # [B, n]
    row = (a * better.exp()).to(kernel.dtype)  # [B, n]
    plan = kernel.mul_(row[:, :, None]).mul_(row[:, None, :])  # [B, n, n] in the memory of K
    return better, better, plan, SinkhornInfo(iteration, error[:, 0], bool((error <= tol).all()))


def _read_now(iteration, max_iter, error):
    """Whether the errors are looked at: on a GPU, which has to be waited for, at every fourth iteration.

    A batch element that has converged stays, so that no value depends on it.
    """
    return not error.is_cuda or iteration % 4 == 0 or iteration == max_iter


def _product(vector, matrix):
    """vector [B, n] times matrix [B, n, m]: [B, m]. As a row: batches of columns are slower."""
    return (vector[:, None, :] @ matrix)[:, 0, :]


# ------------------------------------------------------------------------------------------------
# What is accepted, and what is said when a solve stops short


def _check_cost(cost, eps, a, b, max_iter=1, tol=1.0):
    """Type of results; then, in float64, cost [..., n, m], eps [...], a [..., n], b [..., m]."""
    _require(torch.is_tensor(cost) and cost.ndim >= 2 and cost.is_floating_point() and cost.numel() > 0,
             "cost must be a non-empty floating point tensor [..., n, m]", cost)
    dtype, cost = torch.promote_types(cost.dtype, torch.float32), cost.double()  # [..., n, m]
    eps = _check_eps(eps, cost.shape[:-2], cost.device, max_iter, tol)  # [...]
    _finite(cost.detach() / eps[..., None, None], "cost and C / eps must be finite")
    return dtype, cost, eps, _check_weights("a", a, cost[..., 0]), _check_weights("b", b, cost[..., 0, :])


def _check_clouds(x, y, eps, a, b, max_iter=1, tol=1.0):
    """x and y in their common type, eps [...] and the weights [..., n] and [..., m] in float64."""
    for name, points in (("x", x), ("y", y)):
        _require(torch.is_tensor(points) and points.ndim > 1 and points.is_floating_point() and points.numel() > 0,
                 f"{name} must be a non-empty floating point tensor [..., points, dimensions]", points)
        _finite(torch.stack(points.detach().aminmax()), f"{name} must be finite")
    _require(x.shape[:-2] == y.shape[:-2] and x.shape[-1] == y.shape[-1],
             f"x and y must agree in all but the number of points, got {list(x.shape)} and {list(y.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    eps = _check_eps(eps, x.shape[:-2], x.device, max_iter, tol)  # [...]
    a, b = _check_weights("a", a, x[..., 0]), _check_weights("b", b, y[..., 0])  # [..., n], [..., m]
    same = y is x
    x = x.to(dtype)  # [..., n, d]
    return x, x if same else y.to(dtype), eps, a, b


def _check_weights(name, weights, like):
    """Weights [..., n] like `like` but in float64, summing to 1."""
    if weights is None:
        return torch.full_like(like, 1 / like.shape[-1], dtype=torch.float64, requires_grad=False)  # [..., n]
    _require(torch.is_tensor(weights) and weights.shape in (like.shape, like.shape[-1:]),
             f"{name} must be a tensor {list(like.shape)} or {list(like.shape[-1:])}", weights)
    weights = weights.to(like.device, torch.float64).expand(like.shape)  # [..., n]
    total = weights.sum(-1, keepdim=True)  # [..., 1]
    _require((weights >= 0).all() and (total > 0).all() and total.isfinite().all(),
             f"{name} must be finite and >= 0 with a positive sum in every batch element")
    return weights / total  # [..., n]


def _check_eps(eps, batch, device, max_iter, tol):
    """eps in float64, with the batch shape [...]; the rule for stopping is checked too."""
    _require(max_iter >= 1 and tol > 0, f"max_iter must be >= 1 and tol > 0, got {max_iter} and {tol}")
    eps = torch.as_tensor(eps, dtype=torch.float64, device=device)  # [] or [...]
    _require(not eps.requires_grad, "eps carries no gradient here: pass eps.detach()")
    _require(eps.ndim <= len(batch) and all(e in (1, s) for e, s in zip(eps.shape[::-1], batch[::-1])),
             f"eps must be a number or broadcast to the batch shape {list(batch)}", eps)
    _require((eps >= torch.finfo(eps.dtype).tiny).all() and eps.isfinite().all(), "eps must be finite and > 0")
    return eps.expand(batch)


def _learns_zeros(a, b):
    """Whether a removed point's weight needs a gradient: only the textbook has its potential."""
    return any(w.requires_grad and bool((w < NEGLIGIBLE).any()) for w in (a, b))


def _finite(tensor, message="OT must be finite: the points are too far apart"):
    if not tensor.isfinite().all():
        raise FloatingPointError(message)
    return tensor


def _worst(infos, batch):
    iterations, errors, converged = zip(*infos)
    return SinkhornInfo(max(iterations), torch.stack(errors).amax(0).reshape(batch), all(converged))


def _warn_unless_converged(info, eps, tol):
    """Warns at the first line outside this file."""
    if not info.converged:
        error, level = info.marginal_error.max().item(), 1 + sum(f.filename == __file__ for f in inspect.stack(0))
        text = f"Sinkhorn stopped after {info.iterations} iterations at marginal error {error:.1e} > tol {tol:.1e}"
        warnings.warn(f"{text} (least eps {eps.min().item():.1e}): raise eps, max_iter or tol", RuntimeWarning, level)


def _require(condition, message, got=None):
    if not condition:
        if torch.is_tensor(got):
            got = f"{got.dtype} {list(got.shape)}"
        raise ValueError(message + (f", got {got}" if got is not None else ""))
