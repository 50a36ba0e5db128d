"""The Sinkhorn divergence and its gradient, beside POT and geomloss, equal in eps and accuracy.

    pip install -r benchmarks/requirements.txt
    python benchmarks/sinkhorn.py                                   # about 7 minutes on two cores
    python benchmarks/sinkhorn.py --sizes 512 1024 --eps-rel 0.1 0.01

Clouds of n points in float32: Gaussians, N(0, 1) against N(0.1, 1.1^2), and last hidden states on
completion tokens, of a model (x) and of the same one before noise came to its weights (y): the
embedded model (d = 128), and a Gemma-3 of two layers with random weights (d = 1152). eps = eps_rel
* mean(C), with C = |x - y|^2, as `train.py --ot-eps` has it.

Accuracy, measured alike: P is formed in float64 from the potentials of each of the three problems
(x, y), (x, x) and (y, y), and the L1 distance of its row sums and of its column sums from the
weights is at most 1e-4; the value is within 1e-4 of ours in float64 at a tolerance of 1e-8,
relative. Each gets the least work that reaches both, but POT that which reaches the first:
- POT: `ot.dist`, `ot.bregman.sinkhorn_log` without autograd, with the fewest iterations that do, found for each
  problem; stopThr=0, as its own stopping test runs at iterations 0, 10, 20 only. Value from the potentials, gradient by
  the envelope theorem (set_gradients, as `ot.solve(grad="envelope")` does). In OT(x, x) one x is detached, which
  saves POT a matrix product; the two halves of the gradient are equal.
- geomloss: `SamplesLoss("sinkhorn", p=2, blur=sqrt(eps / 2), debias=True, backend="tensorized")`, times 2, with the
  largest step of scaling that does. Its iterations fall from diameter^2 to blur^2, one at each eps; the diameter is its
  own default (the box of all points), the root of mean(C), or 1.001 blur, whichever takes fewest at the least n.
- ours: `sinkhorn_divergence` with its default tol of 1e-4, or 3e-5, 1e-5, 1e-6 where the value asks for it.

Then the three take turns, so that a slow moment of the machine hits all of them, and ratios are
medians of the ratios within a round. "products" are the three distance matrices and the two
products of the gradient alone, by `@`: work that all three share, so products / faster peer is what
a ratio comes to where nothing else takes any time. A peer that takes more than --limit seconds for
one divergence is run once, with what did at the n before. Beyond that n, or if it needs more than
1000 iterations, it is left out. Ends with exit status 1 where a marginal or a value, but POT's,
misses its 1e-4.
"""

import argparse
import copy
import json
import math
import random
import statistics
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny-model")]
sys.path.remove(str(Path(__file__).resolve().parent))  # or `import sinkhorn` would find this file

import support  # isort: skip  # noqa: E402, F401  (before torch: see there)

import build  # noqa: E402
import torch  # noqa: E402
from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: E402

import sinkhorn  # noqa: E402
from support import tiny  # noqa: E402
from support.model import load_model  # noqa: E402

try:
    import ot
    from geomloss import SamplesLoss
except ImportError as error:
    raise SystemExit(f"{error.name} is missing: pip install -r benchmarks/requirements.txt") from None

TOL = 1e-4
MOST = 1000  # iterations
NAMES = ("ours", "POT", "geomloss")


class TooSlow(Exception):
    """Why a peer is not timed."""


# ---- the clouds

def gaussians(n, d):
    """Two clouds [n, d]."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n, d, generator=generator)
    return x, 1.1 * y + 0.1


@torch.no_grad()
def hidden_states(model, tokenizer, n, noise):
    """x of a model with `noise` (in standard deviations of each weight), y of the model: [n, d]."""
    torch.manual_seed(0)
    moved = copy.deepcopy(model)
    for weight in moved.parameters():
        weight += noise * weight.std() * torch.randn_like(weight)
    clouds, rng, count = ([], []), random.Random(0), 0
    while count < n:
        ids, mask, labels = build.encode_examples(tokenizer, rng, 32)
        predicts = labels[:, 1:] >= 0  # [32, L - 1] the position before each completion token
        count += int(predicts.sum())
        for cloud, one in zip(clouds, (moved, model)):
            states = one.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # [32, L, d]
            cloud.append(states[:, :-1][predicts])  # [tokens, d]
    return [torch.cat(cloud)[:n].clone() for cloud in clouds]


def make_clouds(n):
    """Name -> (x, y)."""
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    torch.manual_seed(0)
    wide = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=512, hidden_size=1152, intermediate_size=1152, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, pad_token_id=tokenizer.pad_token_id,
    )).eval()
    return {
        "Gaussian, d = 128": gaussians(n, 128), "Gaussian, d = 1152": gaussians(n, 1152),
        "hidden, d = 128": hidden_states(model, tokenizer, n, 0.05),
        "hidden, d = 1152": hidden_states(wide, tokenizer, n, 0.05),
    }


# ---- the three: each returns (value [], gradient [n, d])

def ours(x, y, eps, tol):
    x = x.clone().requires_grad_()
    value, _ = sinkhorn.sinkhorn_divergence(x, y, eps, tol=tol)
    value.backward()
    return value.detach(), x.grad


def pot_problem(x, y, eps, iterations):
    """OT_eps(x, y), differentiable in x, and its potentials over eps."""
    cost = ot.dist(x, y)  # [n, m]
    a, b = torch.full_like(cost[:, 0], 1 / cost.shape[0]), torch.full_like(cost[0], 1 / cost.shape[1])  # [n], [m]
    with torch.no_grad():
        plan, log = ot.bregman.sinkhorn_log(
            a, b, cost.detach(), eps, numItermax=iterations, stopThr=0, log=True, warn=False
        )
        u, v = log["log_u"] - a.log(), log["log_v"] - b.log()  # [n], [m]
        value = eps * (a @ u + b @ v)  # [] P has mass 1: its rows are exact
    return ot.backend.get_backend(x).set_gradients(value, (cost,), (plan,)), u, v


def pot(x, y, eps, iterations):
    x = x.clone().requires_grad_()
    problems = ((x, y), (x, x.detach()), (y, y))
    cross, self_x, self_y = (pot_problem(p, q, eps, k)[0] for (p, q), k in zip(problems, iterations))
    (cross - self_x).backward()  # half of OT(x, x), whose gradient is twice that in one x
    return (cross - (self_x + self_y) / 2).detach(), x.grad


def geomloss_loss(x, y, eps, setting, **options):
    steps, start = setting  # eps falls from diameter^2 to blur^2 in `steps` factors
    low, high = torch.cat([x.detach(), y]).aminmax(dim=0)  # [d], [d]
    blur = math.sqrt(eps / 2)
    diameter = {"blur": 1.001 * blur, "mean": math.sqrt(sinkhorn.relative_eps(x, y, 1.0)), "box": (high - low).norm()}
    ratio = blur / float(diameter[start])
    return SamplesLoss(  # with exactly 1 / steps, rounding could add a step
        "sinkhorn", p=2, blur=blur, scaling=ratio ** (1 / (steps - 0.01)), diameter=float(diameter[start]),
        backend="tensorized", **options,
    )


def geomloss(x, y, eps, setting):
    x = x.clone().requires_grad_()
    value = 2 * geomloss_loss(x, y, eps, setting, debias=True)(x, y)
    value.backward()
    return value.detach(), x.grad


def geomloss_potentials(x, y, eps, setting):
    loss = geomloss_loss(x, y, eps, setting, debias=False, potentials=True)  # the same iterates, not their differences
    for p, q in ((x, y), (x, x), (y, y)):
        f, g = loss(p, q)
        yield p, q, 2 * f.flatten() / eps, 2 * g.flatten() / eps


def our_potentials(x, y, eps, tol):
    found = []

    def spy(solver):
        def solve(*args):
            found.append(solver(*args))
            return found[-1]

        return solve

    solvers = {name: spy(getattr(sinkhorn, name)) for name in ("_solve", "_solve_self")}
    with mock.patch.multiple(sinkhorn, **solvers):
        sinkhorn.sinkhorn_divergence(x, y, eps, tol=tol)
    return [(p, q, u[0], v[0]) for (p, q), (u, v, *_) in zip(((x, y), (x, x), (y, y)), found)]


# ---- accuracy

def marginal_errors(potentials, eps):
    """The larger L1 error of P's row and column sums, of each problem; weights are uniform."""
    errors = []
    for p, q, u, v in potentials:
        p, q, u, v = p.double(), q.double(), u.double(), v.double()
        cost = p.square().sum(-1)[:, None] + q.square().sum(-1) - 2 * p @ q.T  # [n, m]
        plan = (u[:, None] + v - cost / eps).exp_().div_(cost.numel())  # [n, m]
        rows, columns = plan.sum(1) - 1 / len(p), plan.sum(0) - 1 / len(q)  # [n], [m]
        errors.append(max(rows.abs().sum().item(), columns.abs().sum().item()))
    return errors


def fewest(passes, start):
    """About the least k >= 1 that passes, as all larger do, to a twentieth, sought from `start`."""
    bad, good = 0, start
    while not passes(good):
        if good >= MOST:
            raise TooSlow(f"> {MOST} iterations")
        bad, good = good, min(MOST, math.ceil(1.3 * good))
    middle = good - max(1, good // 10)  # often the answer is near
    while good - bad > max(1, good // 20):
        bad, good = (bad, middle) if passes(middle) else (middle, good)
        middle = (good + bad) // 2
    return good


def settle_ours(x, y, eps, truth):
    """The largest tol of four that will do, and what it reaches."""
    for tol in (TOL, 0.3 * TOL, 0.1 * TOL, 0.01 * TOL):
        error = max(marginal_errors(our_potentials(x, y, eps, tol), eps))
        value_error = abs(ours(x, y, eps, tol)[0].item() / truth - 1)
        if max(error, value_error) <= TOL:
            break
    return tol, error, value_error


def settle_pot(x, y, eps, truth, iterations):
    """The fewest iterations of each problem, and what they reach."""
    problems = ((x, y), (x, x.clone()), (y, y.clone()))
    iterations = [
        fewest(lambda k, p=p, q=q: marginal_errors([(p, q, *pot_problem(p, q, eps, k)[1:])], eps)[0] <= TOL, start)
        for (p, q), start in zip(problems, iterations or [10, 10, 10])
    ]
    errors = marginal_errors([(p, q, *pot_problem(p, q, eps, k)[1:]) for (p, q), k in zip(problems, iterations)], eps)
    return iterations, max(errors), abs(pot(x, y, eps, iterations)[0].item() / truth - 1)


def settle_geomloss(x, y, eps, truth, setting):
    """(steps, start) with the fewest steps, and what they reach; one start for a pair of clouds."""
    def accuracy(steps, start):
        errors = marginal_errors(geomloss_potentials(x, y, eps, (steps, start)), eps)
        return max(errors), abs(geomloss(x, y, eps, (steps, start))[0].item() / truth - 1)

    found = []
    for steps, start in [setting] if setting else [(10, "blur"), (10, "mean"), (10, "box")]:
        try:
            found.append((fewest(lambda k, s=start: max(accuracy(k, s)) <= TOL, steps), start))
        except TooSlow as error:
            reason = error
    if not found:
        raise reason
    return min(found), *accuracy(*min(found))


def compare(x, y, eps, rounds, settings, limit):
    """One row of the table; settings: what the peers needed at the size before, updated here."""
    truth = sinkhorn.sinkhorn_divergence(x.double(), y.double(), eps, tol=1e-8)[0].item()
    accuracy, once = {}, {}
    tol, *accuracy["ours"] = settle_ours(x, y, eps, truth)
    plan = torch.rand(len(x), len(y))  # [n, m]
    run = {"ours": lambda: ours(x, y, eps, tol), "products": lambda: (x @ y.T, x @ x.T, y @ y.T, plan @ x, plan @ y)}
    for name, settle, peer in (("POT", settle_pot, pot), ("geomloss", settle_geomloss, geomloss)):
        if isinstance(settings[name], str):  # left out at a smaller n
            continue
        try:
            if settings[name]:
                start = time.perf_counter()
                peer(x, y, eps, settings[name])
                if time.perf_counter() - start > limit:
                    once[name] = time.perf_counter() - start
                    raise TooSlow(f"> {limit:g} s")
            settings[name], *accuracy[name] = settle(x, y, eps, truth, settings[name])
            run[name] = lambda peer=peer, setting=settings[name]: peer(x, y, eps, setting)
        except TooSlow as error:
            settings[name] = str(error)
    seconds, gradients = {name: [] for name in run}, {}
    for _ in range(rounds + 1):
        for name, function in run.items():
            start = time.perf_counter()
            gradients[name] = function()[1]
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    peers = [name for name in NAMES[1:] if name in run]

    def ratio(one):
        ratios = [statistics.median(o / p for o, p in zip(seconds[one], seconds[peer])) for peer in peers]
        return max(ratios + [statistics.median(seconds[one]) / took for took in once.values()], default=None)

    return {
        "value": truth, "eps": eps, "tol": tol, "settings": dict(settings),
        "ratio": ratio("ours"), "products_ratio": ratio("products"), "once_ms": {k: 1e3 * v for k, v in once.items()},
        "iterations": sinkhorn.sinkhorn_divergence(x, y, eps, tol=tol)[1].iterations,
        "marginal_error": {name: errors[0] for name, errors in accuracy.items()},
        "value_error": {name: errors[1] for name, errors in accuracy.items()},
        "gradient_difference": {
            name: ((gradients[name] - gradients["ours"]).norm() / gradients["ours"].norm()).item() for name in peers
        },
        "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()}, "seconds": seconds,
    }


def cells(row) -> list[str]:
    """A row of the table."""
    times, steps = [f"{row['ms']['ours']:.1f}"], [row["iterations"]]
    for name, setting in row["settings"].items():
        timed = not isinstance(setting, str)
        once = f"{row['once_ms'][name]:.0f} (once)" if name in row["once_ms"] else setting
        times.append(f"{row['ms'][name]:.1f}" if timed else once)
        steps.append((max(setting) if name == "POT" else setting[0] + 3) if timed else "-")
    ratios = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("ratio", "products_ratio")]
    return [row["clouds"], f"{row['eps_rel']:g}", str(row["n"]), *times, f"{row['ms']['products']:.1f}",
            f"**{ratios[0]}**", ratios[1], ", ".join(map(str, steps))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="n, rising")
    parser.add_argument("--eps-rel", type=float, nargs="+", default=[0.1], help="eps / mean(C)")
    parser.add_argument("--rounds", type=int, default=9, help="at n <= 1024; fewer above, at least 2")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    args = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)  # ours says so when it does not converge
    clouds, rows = make_clouds(max(args.sizes)), []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, POT {ot.__version__}; milliseconds\n")
    heads = ["clouds", "eps", "n", *NAMES, "products", "ours / faster", "products / faster", "iterations"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for eps_rel in args.eps_rel:
        for name, (x, y) in clouds.items():
            settings = {"POT": None, "geomloss": None}
            for n in args.sizes:
                p, q = x[:n].clone(), y[:n].clone()
                eps = sinkhorn.relative_eps(p, q, eps_rel).item()
                rounds = max(2, min(args.rounds, args.rounds * 1024 * 1024 // n ** 2))
                row = {"clouds": name, "eps_rel": eps_rel, "n": n, **compare(p, q, eps, rounds, settings, args.limit)}
                rows.append(row)
                print(f"| {' | '.join(cells(row))} |", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "sinkhorn.json").write_text(json.dumps(rows, indent=1))
    for what in ("marginal_error", "value_error"):
        worst = max(rows, key=lambda row: max(row[what].values()))
        print(f"\nlargest {what}: {max(worst[what].values()):.1e} ({worst['clouds']}, n = {worst['n']}; {worst[what]})")
    def worst_of(row):
        return max(*row["marginal_error"].values(), *(e for name, e in row["value_error"].items() if name != "POT"))

    if any(worst_of(row) > TOL for row in rows):
        raise SystemExit(f"not all within {TOL:g}")
    print(f"all marginals, and all values but POT's, within {TOL:g}")


if __name__ == "__main__":
    main()
