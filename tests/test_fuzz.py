"""Numerical fuzzing of grpo.py, infonce.py and infopo.py: random shapes, scales and dtypes, infinities and NaN.

Each result must be that of a reference in Python floats (float64), written here from the equations alone, within an
error that is derived, not guessed: rounding of the inputs' differences, carried through each function between two ends.
Where the reference is not finite, the function must raise FloatingPointError (or ValueError); where it is near the end of float32's range, it
may. Where a value is finite its gradient must be, and be the reference's.

    FUZZ_CASES=100000 pytest tests/test_fuzz.py      as many cases in all; a failure names its seed
"""

import math
import os
import random
from fractions import Fraction

import pytest
import torch

from grpo import group_advantages, grpo_loss, kl_k3
from infonce import column_info_nce, mi_lower_bound, row_info_nce, symmetric_info_nce
from infopo import dpo_loss, infopo_loss, sequence_logp

CASES = int(os.environ.get("FUZZ_CASES", 750))
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LARGE = 1e37  # beyond that an intermediate result may overflow in float32
TINY = 1e-36  # below that it may vanish


def draw(rng, *shape, dtype, specials=(), wild=True):
    """A tensor of one random scale, up to 1e±30, now and then with some of `specials` in it."""
    scale = 10 ** (rng.uniform(-30, 30) if wild and rng.random() < 0.5 else rng.uniform(-3, 2))
    size = math.prod(shape)
    values = [rng.gauss(0, 1) * scale + (scale if rng.random() < 0.3 else 0) for _ in range(size)]
    if specials and rng.random() < 0.3:
        for _ in range(rng.randint(1, 2)):
            values[rng.randrange(size)] = rng.choice(specials)
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)


def rounding(dtype, half=False):
    """Half a unit in the last place of 1, in the dtype that the function computes in."""
    if dtype == torch.float64:
        return 2.0**-53
    return 2.0**-9 if half and dtype == torch.bfloat16 else 2.0**-24


def call(function, *args, **options):
    """The result, or None for a ValueError or FloatingPointError that says what was expected and what came."""
    try:
        return function(*args, **options)
    except (ValueError, FloatingPointError) as error:
        assert "expected" in str(error) and len(str(error).splitlines()) == 1, error
        return None


def judge(result, expected, error, dtype):
    """Result [] against the reference: close, or refused where nothing finite is expected. Whether there is a result."""
    limit = 1e300 if dtype == torch.float64 else LARGE
    if result is None:
        assert not (abs(expected) < limit and abs(error) < limit), f"refused, but the reference is {expected}"
        return False
    assert math.isfinite(result), f"{result} is neither finite nor refused; the reference is {expected}"
    assert math.isfinite(expected), f"{result} for what has no finite result"
    assert abs(result - expected) <= error + TINY, f"{result}, reference {expected}, error allowed {error}"
    return True


def between(function, x, error):
    """function(x) of a monotone function, and how far it can be off for x within error."""
    value = function(x)
    return value, max(abs(function(x + error) - value), abs(function(x - error) - value))


def total(terms):
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)


def exp(x):
    return INF if x >= 709 else math.exp(x)


# ------------------------------------------------------------------------------------------------ grpo.py


def fuzz_advantages(rng, dtype):
    size, scale = rng.randint(1, 7), rng.choice(["none", "std"])
    size += scale == "std" and size == 1
    rewards = draw(rng, size, dtype=dtype, specials=[INF, -INF, NAN])
    if rng.random() < 0.2:
        rewards = rewards[:1].expand(size)  # all equal: no advantage at all, whatever their size
    values = [float(r) for r in rewards.double()]
    result = call(group_advantages, rewards, scale)
    if not all(map(math.isfinite, values)):
        assert result is None, f"{result} for rewards {values}"
        return
    eps, mean = rounding(dtype, half=True), sum(map(Fraction, values)) / size
    spread, advantages = max(values) - min(values), [float(Fraction(v) - mean) for v in values]
    error = 8 * eps * spread
    squares = sum((a / spread) ** 2 for a in advantages) if spread else 0.0
    std = spread * math.sqrt(squares / (size - 1)) if scale == "std" else 0.0
    for a, got in zip(advantages, [None] * size if result is None else result.double().tolist()):
        expected, allowed = a, error
        if scale == "std":
            off = std if spread < 1e-17 else min(std, error + 8 * eps * std)  # squares below 1e-38 vanish in float32
            expected = a / (std + 1e-4)
            allowed = error / (std + 1e-4) + abs(expected) * (off / (std + 1e-4 - off) + 8 * eps)
            if result is None and spread > 1e17:
                continue  # and squares above 1e38 overflow
        judge(got, expected, allowed, dtype)
    if spread == 0 and result is not None:
        assert (result == 0).all(), "equal rewards must teach nothing"


def fuzz_k3(rng, dtype):
    shape = rng.choice([(), (3,), (2, 3)])
    logp, ref = (draw(rng, *shape, dtype=dtype) for _ in range(2))
    logp.requires_grad_()
    result = kl_k3(logp, ref)
    result.sum().backward()
    eps = rounding(dtype)
    assert (result >= 0).all(), "k3 is never negative"
    for p, q, got, slope in zip(*(x.detach().double().flatten().tolist() for x in (logp, ref, result, logp.grad))):
        d = q - p
        expected, error = between(k3, d, 2 * eps * abs(d))
        judge(got, expected, error + 8 * eps * (expected + abs(min(d, 20.0))), dtype)
        if abs(d - 20) > 1e-3:  # the cut, past which the gradient is 0
            low, high = (0 if x > 20 else 1 - math.exp(x) for x in (d - 2 * eps * abs(d), d + 2 * eps * abs(d)))
            slack = abs(high - low) + 8 * eps * (1 + abs(low)) + (2**-8 * abs(low) if dtype == torch.bfloat16 else 0)
            assert abs(slope - low) <= slack, f"gradient {slope} at d = {d}"


def k3(d):
    d = min(d, 20.0)
    return math.expm1(d) - d


def fuzz_grpo(rng, dtype):
    shape = rng.randint(1, 4), rng.randint(1, 5)
    level, normalizer = rng.choice(["sequence", "token"]), rng.choice(["sequence", "token", "constant"])
    low, high, beta = rng.choice([0.0, 0.1, 1.0]), rng.choice([0.0, 0.1, INF]), rng.choice([0.0, 0.3])
    old = draw(rng, *shape, dtype=dtype, specials=[INF, NAN])
    logp = (old + draw(rng, *shape, dtype=dtype, specials=[-INF, -INF, INF, NAN])).to(dtype)
    ref = draw(rng, *shape, dtype=dtype, specials=[-INF, NAN])
    advantages = draw(rng, shape[0], dtype=dtype, specials=[INF, NAN] if rng.random() < 0.3 else ())
    mask = torch.tensor([[rng.random() < 0.8 for _ in range(shape[1])] for _ in range(shape[0])])
    if rng.random() < 0.5:  # a generation that is over: log-probabilities of padding are often -inf or NaN
        logp, old, ref = (x.masked_fill(~mask, rng.choice([-INF, NAN, INF])) for x in (logp, old, ref))
    logp.requires_grad_()
    options = dict(level=level, normalizer=normalizer, clip_low=low, clip_high=high, max_tokens=7, beta=beta, ref_logp=ref)
    result = call(grpo_loss, logp, old, advantages, mask, **options)

    eps = rounding(dtype)
    count, length = int(mask.sum()), mask.sum(1).tolist()
    values, errors, slopes = [], [], {}
    for i, a in enumerate(advantages.double().tolist()):
        at = [t for t in range(shape[1]) if mask[i, t]]
        p, o, r = ({t: float(x[i, t].detach().double()) for t in at} for x in (logp, old, ref))
        gap = {t: p[t] - o[t] for t in at}
        weight = {"sequence": 1 / (shape[0] * max(length[i], 1)), "token": 1 / max(count, 1), "constant": 1 / (shape[0] * 7)}[normalizer]
        for t in at:
            if level == "sequence":
                x = total(gap.values()) / length[i]
                off = 4 * eps * len(at) * sum(abs(g) for g in gap.values()) / length[i]
            else:
                x, off = gap[t], 4 * eps * abs(gap[t])
            off = 0.0 if abs(x) == INF else off + 8 * eps  # the latter for exp
            ratios = [exp(min(y, 20.0) if y == y else y) for y in (x, x + off, x - off)]
            terms = [surrogate(ratio, a, low, high) for ratio in ratios]
            value, error = terms[0], max(abs(y - terms[0]) for y in terms) + 16 * eps * abs(terms[0])
            share = 1 / length[i] if level == "sequence" else 1
            slope = [0.0 if y > 20 or stopped(ratio, a, low, high) else -a * ratio * share for y, ratio in zip((x, x + off, x - off), ratios)]
            if beta:
                d = r[t] - p[t]
                kl, kl_error = between(k3, d, 2 * eps * abs(d) if abs(d) < INF else 0.0) if d == d else (NAN, 0.0)
                value, error = value + beta * kl, error + beta * kl_error + 16 * eps * abs(beta * kl)
            values.append(weight * value)
            errors.append(weight * error + 8 * eps * abs(weight * value))
            if level == "sequence":
                slope = [weight * length[i] * s for s in slope]
            else:
                slope = [weight * s for s in slope]
            if beta:
                near = 2 * eps * abs(d) + 8 * eps
                pull = [weight * beta * (0 if y > 20 else 1 - exp(y)) for y in (d, d + near, d - near)] if abs(d) < INF else [weight * beta * (d < 0)] * 3
                slope = [y + z for y in slope for z in pull]
            slopes[i, t] = slope
    expected, error = total(values), sum(errors) if all(map(math.isfinite, errors)) else INF
    if not judge(None if result is None else result[0].item(), expected, error, dtype):
        return
    result[0].backward()
    assert logp.grad.isfinite().all(), "a finite loss with a gradient that is not"
    for (i, t), slope in slopes.items():
        got, around = logp.grad[i, t].item(), [min(slope), max(slope)]
        slack = (2**-7 if dtype == torch.bfloat16 else 32 * eps) * max(map(abs, around)) + TINY
        assert around[0] - slack <= got <= around[1] + slack, f"gradient {got} of token {i}, {t}, expected within {around}"
    assert (logp.grad[~mask] == 0).all(), "a gradient where the mask is not set"
    impossible = ((logp == -INF) & (ref == -INF) | ref.isnan() | (logp == INF))[mask].any()
    for name, value in result[1].items():
        assert not value.isnan() or (name == "kl" and impossible), f"{name} is NaN"


def surrogate(ratio, a, low, high):
    one, two = ratio * a, min(max(ratio, 1 - low), 1 + high) * a
    return NAN if one != one or two != two else -min(one, two)


def stopped(ratio, a, low, high):
    return (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)


# ------------------------------------------------------------------------------------------------ infonce.py


def fuzz_infonce(rng, dtype):
    size, batch = rng.randint(1, 5), rng.choice([(), (2,), (1, 2)])
    scores = draw(rng, *batch, size, size, dtype=dtype, specials=[-INF, -INF, -INF, INF, NAN])
    scores += draw(rng, *batch, size, 1, dtype=dtype, wild=False)  # a completion's own likelihood
    scores.requires_grad_()
    rows = scores.detach().double().reshape(-1, size, size).tolist()
    eps = rounding(dtype)
    row = [cross_entropy(m[i], i, eps) for m in rows for i in range(size)]
    column = [cross_entropy([line[j] for line in m], j, eps) for m in rows for j in range(size)]
    for function, expected in ((row_info_nce, row), (column_info_nce, column)):
        result = call(function, scores)
        if result is None:
            assert not all(abs(value) < (1e300 if dtype == torch.float64 else LARGE) for value, _ in expected)
            continue
        for got, (value, error) in zip(result.flatten().tolist(), expected):
            judge(got, value, error, dtype)
    result = call(symmetric_info_nce, scores)
    value = (sum(v for v, _ in row) / len(row) + sum(v for v, _ in column) / len(column)) / 2
    error = sum(e for _, e in row + column) / len(row) + 8 * eps * len(row) * abs(value)
    if not judge(None if result is None else result.item(), value, error, dtype):
        return
    result.backward()
    got = scores.grad.double().reshape(-1, size, size)
    matrix = torch.tensor(rows, dtype=torch.float64)
    exact = (matrix.softmax(-1) + matrix.softmax(-2)) / 2 - torch.eye(size)
    top = matrix.masked_fill(matrix == -INF, INF).amin((-1, -2)).abs().maximum(matrix.amax((-1, -2)).abs()).max().item()
    slack = (2**-6 if dtype == torch.bfloat16 else 64 * eps) + min(1.0, 8 * eps * min(top, 1e3))
    assert (got - exact / len(row)).abs().max() <= slack / len(row), "the gradient is not softmax - identity"


def cross_entropy(values, target, eps):
    """(-log softmax(values)[target], its error in float32)."""
    top = max(values) if all(v == v for v in values) else NAN
    own = top - values[target]
    rest = math.log(sum(math.exp(v - top) for v in values)) if math.isfinite(top) else NAN
    return own + rest, 4 * eps * (abs(own) + rest + len(values)) if own + rest < INF else INF


def fuzz_bound(rng, dtype):
    losses = draw(rng, rng.randint(1, 6), dtype=dtype, specials=[INF, -INF, NAN])
    num = rng.choice([1, 2, 7, 10**9, 10**30])
    values = losses.double().tolist()
    expected = math.log(num) - total(values) / len(values)
    eps = rounding(dtype, half=True)
    error = 8 * eps * (math.log(num) + max(map(abs, values))) if math.isfinite(expected) else INF
    result = call(mi_lower_bound, losses, num)
    judge(None if result is None else result.item(), expected, error, dtype)


# ------------------------------------------------------------------------------------------------ infopo.py


def fuzz_pairs(rng, dtype):
    loss, size, beta = rng.choice([infopo_loss, dpo_loss]), rng.randint(1, 4), 10 ** rng.choice([-30, -1, 0, 0, 1, rng.uniform(-3, 3)])
    refs = [draw(rng, size, dtype=dtype) for _ in range(2)]
    specials = [-INF, NAN, INF]
    policies = [(ref + draw(rng, size, dtype=dtype, specials=s)).to(dtype).requires_grad_() for ref, s in zip(refs, (specials, specials[:1] * 3 + specials))]
    result = call(loss, *policies, *refs, beta=beta)
    eps, terms = rounding(dtype), []
    for w, l, ref_w, ref_l in zip(*(x.detach().double().tolist() for x in (*policies, *refs))):  # noqa: E741
        w, l = w - ref_w, l - ref_l  # noqa: E741
        if loss is dpo_loss:
            margin = beta * (w - l)
            off = 4 * eps * beta * (abs(w) + abs(l)) if abs(margin) < INF else 0.0
            value, error = between(softplus, -margin, off)
            value = NAN if w == INF else value  # refused: the loss would be 0, whatever the rejected response
            slopes = [beta * sigmoid(-margin + s) for s in (0, off, -off)]
            terms.append((value, error + 8 * eps * value, [-s for s in slopes], slopes))
        else:
            off = 4 * eps * beta * abs(l) if abs(l) < INF else 0.0
            value, error = between(tangent, beta * l, off)
            error += 16 * eps * (value + 1 + abs(beta * w))
            slopes = [beta * exp(min(beta * l + s, 20.0)) for s in (0, off, -off)]
            terms.append((value - 1 - beta * w, error, [-beta] * 3, slopes))
    expected, error = (sum(t[n] for t in terms) / size for n in range(2))
    error = error + 8 * eps * sum(abs(t[0]) for t in terms) if math.isfinite(expected) else INF
    huge = max([t[0] for t in terms], default=0) * 1e9 > LARGE  # e^20 beyond the cut
    if result is None and huge:
        return
    if not judge(None if result is None else result[0].item(), expected, error, dtype):
        return
    result[0].backward()
    for side, policy in enumerate(policies):
        assert policy.grad.isfinite().all(), "a finite loss with a gradient that is not"
        for got, term in zip(policy.grad.double().tolist(), terms):
            slopes = [s / size for s in term[2 + side]]
            slack = (2**-7 if dtype == torch.bfloat16 else 32 * eps) * max(map(abs, slopes)) + TINY
            assert min(slopes) - slack <= got <= max(slopes) + slack, f"gradient {got}, expected about {slopes}"
    assert not any(value.isnan() for value in result[1].values()), f"NaN among {result[1]}"


def tangent(r):
    return NAN if r != r else exp(min(r, 20.0)) * (1 + max(r - 20.0, 0.0))


def softplus(x):
    return x + math.log1p(math.exp(-x)) if x > 0 else NAN if x != x else math.log1p(exp(x))


def sigmoid(x):
    return 1 / (1 + exp(-x))


def fuzz_sequence(rng, dtype):
    shape = rng.randint(1, 3), rng.randint(1, 6)
    logp = draw(rng, *shape, dtype=dtype, specials=[-INF, -INF, INF, NAN]).requires_grad_()
    mask = torch.tensor([[rng.random() < 0.7 for _ in range(shape[1])] for _ in range(shape[0])])
    normalized = rng.random() < 0.5
    result = call(sequence_logp, logp, mask, normalized)
    rows = [[float(v) for v in row[keep].double()] for row, keep in zip(logp.detach(), mask)]
    sums = [total(row) for row in rows]
    if any(not s < INF for s in sums):
        assert result is None, f"{result} for {rows}"
        return
    assert result is not None, f"refused {rows}"
    for got, s, row in zip(result.tolist(), sums, rows):
        divisor = max(len(row), 1) if normalized else 1
        if s == -INF:
            assert got == -INF, "a response of probability zero"
        else:
            judge(got, s / divisor, 8 * rounding(dtype) * sum(map(abs, row)), dtype)
    result.sum().backward()
    assert logp.grad.isfinite().all() and (logp.grad[~mask] == 0).all()


FUZZERS = [fuzz_advantages, fuzz_k3, fuzz_grpo, fuzz_infonce, fuzz_bound, fuzz_pairs, fuzz_sequence]
SHARE = {fuzz_grpo: 3, fuzz_infonce: 2, fuzz_pairs: 3}  # of the cases, against 1


@pytest.mark.parametrize("fuzz", FUZZERS, ids=lambda fuzz: fuzz.__name__)
def test_finite_and_right_or_refused(fuzz):
    shares = sum(SHARE.get(f, 1) for f in FUZZERS)
    for seed in range(math.ceil(CASES * SHARE.get(fuzz, 1) / shares)):
        try:
            fuzz(random.Random(f"{fuzz.__name__} {seed}"), DTYPES[seed % 3])
        except Exception as error:
            raise AssertionError(f"{fuzz.__name__}(random.Random('{fuzz.__name__} {seed}'), {DTYPES[seed % 3]}): {error}") from error
