"""Which principles to train with, before training; what training did to the manifold, after it; and the estimators.

    python metrics.py si --principles principles/reasoning.txt                        # a table, best principle first
    python metrics.py si --principles FILE --propose 4 --select 4 --out best.jsonl     # create some, keep the best four
    python metrics.py geometry --base tiny --trained runs/<time>/final --principles FILE

The estimators:

    row_info[n, i]  = log K - row_info_nce(scores)[n, i]        nats; its mean over n and i is the MI estimate
    SI[i]           = max(0, mean_n row_info[n, i]) / log K      share of the principle's identity in the text
    sharper[n, i]   = log K - sum_j h(softmax(scores[n, j])[i])  h(p) = -p log p; same mean, less noise: `si` uses it
    reach[i]        = 0.9 quantile over n of row_info[n, i] / log K   what the most telling tenth of the texts carries
    interval        = percentiles of the statistic over questions drawn with replacement (bootstrap)

`scores[n, i, j]` is the log-probability under principle j of the chain of thought written under principle i to
question n, summed over its tokens. If the completions were sampled from that very model at that very temperature, with
no top-k or top-p, and principles are equally likely, the MI estimate is unbiased for I(C; CoT | x) given the K
principles of a question (infonce.py says why). It can never exceed log K: near that ceiling, only more principles can
tell more.

In order: estimators, geometry, the command `si`, the command `geometry`, the command line. To copy the first two parts:
they need torch and infonce.py.
"""

import itertools
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from data import (
    DatasetConfig,
    InputError,
    Principle,
    build_messages,
    check_flags,
    encode_prompts,
    load_principles,
    option,
    save_principles,
)
from grpo import TAGS, format_reward
from infonce import column_info_nce, mi_lower_bound, row_info_nce
from policy import (
    LOGITS_PER_CHUNK,
    cot_mask,
    eos_ids,
    head,
    hidden_states,
    load_model,
    log_probs,
    sample,
    uniform_numbers,
)
from sinkhorn import relative_eps, sinkhorn_divergence


class MutualInformation(NamedTuple):
    """In nats, but for the two retrieval shares, whose chance level is 1 / K."""

    row: torch.Tensor  # [] log K - row InfoNCE: the estimate of I(C; CoT | x)
    column: torch.Tensor  # [] log K - column InfoNCE: no bound, it may exceed the row estimate
    ceiling: float  # log K
    row_retrieval: torch.Tensor  # [] share of completions whose own principle scores them highest
    column_retrieval: torch.Tensor  # [] share of principles whose own completion they score highest


def mutual_information(scores) -> MutualInformation:
    """Estimates from scores [N, K, K] (question, completion, principle), summed log-probabilities in nats.

    Raises ValueError for another shape or for scores that are not finite on the diagonal.
    """
    _check_scores(scores)
    num = scores.shape[-1]
    target = torch.arange(num, device=scores.device)  # [K]
    return MutualInformation(
        mi_lower_bound(row_info_nce(scores), num),  # []
        mi_lower_bound(column_info_nce(scores), num),  # []
        math.log(num),
        (scores.argmax(-1) == target).float().mean(),  # []
        (scores.argmax(-2) == target).float().mean(),  # []
    )


def row_information(scores):
    """log K - row InfoNCE of each completion, in nats: scores [N, K, K] -> [N, K]. Single values may be negative."""
    _check_scores(scores)
    return math.log(scores.shape[-1]) - row_info_nce(scores)  # [N, K]


def posterior_information(scores):
    """The same information with less sampling noise, for matched scores: scores [N, K, K] -> [N, K], nats.

        log C - sum_j h(p(c_i | y_j)),   h(p) = -p log p,   p(. | y_j) = softmax of row j, C its number of candidates

    Its mean over questions estimates what that of row_information does. A row sees only the completion written under
    c_i; but any completion y_j may have been, with probability p(c_i | y_j), so all are used with that weight:
    E_{y ~ p_i} f(y) = sum_j E_{y ~ p_j} p(c_i | y) f(y), where f(y) = -log p(c_i | y) is the row loss. Exact where
    completions come from the model that scores them; with any other critic this is neither estimate nor bound, and
    row_information still is a bound. On the embedded model the standard deviation over questions is 2 to 4 times
    smaller, as good as 3 to 14 times the questions. -inf off the diagonal: no candidate. Source: our choice.
    """
    _check_scores(scores)
    return _ceiling(scores) - torch.special.entr(scores.softmax(-1)).sum(1)  # [N, K]


def sufficiency_index(scores):
    """SI of each of K principles, in [0, 1]: scores [N, K, K] -> [K]. SI of a set: the mean over K.

    1 where the chain of thought is a sufficient statistic for its principle, 0 where it is independent of it.
    Raises ValueError as mutual_information does, and for K = 1, which leaves nothing to tell apart.
    """
    if scores.shape[-1] < 2:
        raise ValueError("sufficiency_index expects K >= 2: the identity of a single principle carries no information")
    return row_information(scores).mean(0).clamp(min=0) / math.log(scores.shape[-1])  # [K]


def reach(scores):
    """What the most telling tenth of the texts says of each of K principles: scores [N, K, K] -> [K], in [0, 1].

    The 0.9 quantile over the N questions of row_information, as a share of log K. SI is about the average text: it is
    low for a principle that the model rarely follows, and for one that another principle says again. Training changes
    how often, not what can be told apart: reach is 1 for the first kind and stays low for the second. It needs tens of
    questions. Source: our choice, and benchmarks/si_study.py shows what for.
    """
    _check_scores(scores)
    ceiling = _ceiling(scores)
    return (ceiling - row_info_nce(scores)).double().quantile(0.9, dim=0).clamp(min=0) / ceiling  # [K]


def bootstrap_interval(values, level: float = 0.95, resamples: int = 2000, seed: int = 0):
    """(low, high) of the mean over the first dimension: values [N, ...] -> two tensors [...].

    The N questions are drawn with replacement, so everything that belongs to one question stays together.
    N = 1 gives an interval of no width: it says nothing then. Raises ValueError for N = 0.
    """
    if values.ndim < 1 or not len(values):
        raise ValueError(f"bootstrap_interval expects values [N, ...] with N >= 1, got {list(values.shape)}")
    generator = torch.Generator().manual_seed(seed)
    values = values.detach().cpu().double()
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)  # [R, N]
    counts = torch.zeros(resamples, len(values), dtype=torch.double)  # [R, N]
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    means = (counts @ values.flatten(1 if values.ndim > 1 else 0).reshape(len(values), -1)) / len(values)  # [R, M]
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.double), dim=0)  # [M], [M]
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def confusion(scores):
    """Who is mistaken for whom: scores [N, K, K] -> [K, K]. Row i: the posterior of principle j given CoT i, averaged.

    An ideal reader who guesses from the posterior names j that often. -inf off the diagonal marks a principle that was
    no candidate there (see `si --num-negatives`); the average is over the questions where it was one.
    """
    _check_scores(scores)
    return scores.softmax(-1).sum(0) / scores.isfinite().sum(0).clamp(min=1)  # [K, K]


def subset_information(scores, members):
    """MI of subsets, each with its own members as the only candidates: scores [N, K, K], members [B, S] -> [N, B] nats.

    No new sampling: a subset's table is the rows and columns of its members. The mean of posterior_information: divided
    by log S it is the set's SI (clamped at 0 after the mean over questions). For matched scores only, as that is.
    """
    _check_scores(scores)
    if members.ndim != 2 or members.shape[1] < 2:
        raise ValueError(f"subset_information expects members [B, S] with S >= 2, got {list(members.shape)}")
    size = max(1, 2**22 // (len(scores) * members.shape[1] ** 2))  # subsets at a time: memory
    parts = [scores[:, part[:, :, None], part[:, None, :]] for part in members.split(size)]  # [N, b, S, S] each
    left = [torch.special.entr(part.softmax(-1)).sum(-1).mean(-1) for part in parts]  # [N, b] each, of the posterior
    return math.log(members.shape[1]) - torch.cat(left, 1)  # [N, B]


def select_subset(scores, size: int, exact_up_to: int = 5000) -> list[int]:
    """The `size` of K principles whose set SI is highest, as sorted indices: scores [N, K, K], all pairs scored.

    All subsets are tried where there are at most `exact_up_to`. Else, from each principle in turn: the subset grows by
    the best outsider, then members are swapped for outsiders, the best swap first, until none raises the SI; the best
    of these K ends is taken. Raises ValueError unless 2 <= size <= K.
    """
    num = scores.shape[-1]
    if not 2 <= size <= num:
        raise ValueError(f"select_subset expects 2 <= size <= K = {num}, got {size}")

    def best(subsets):
        values = subset_information(scores, torch.tensor(subsets)).mean(0)  # [B]
        return subsets[int(values.argmax())], values.max().item()

    if math.comb(num, size) <= exact_up_to:
        return list(best(list(itertools.combinations(range(num), size)))[0])
    ends = {}
    for start in range(num):
        chosen = (start,)
        while len(chosen) < size:
            chosen, value = best([(*chosen, new) for new in range(num) if new not in chosen])
        while size < num:
            others = [new for new in range(num) if new not in chosen]
            swaps = [tuple(new if old == out else old for old in chosen) for out in chosen for new in others]
            swapped, swapped_value = best(swaps)
            if swapped_value <= value + 1e-9:  # it rises strictly, so this ends
                break
            chosen, value = swapped, swapped_value
        ends[chosen] = value
    return sorted(max(ends, key=ends.get))


def _ceiling(scores) -> float:
    """log of the number of candidates: K, or fewer where -inf off the diagonal marks principles that were none."""
    return math.log(scores.isfinite().sum(-1).amax().item())


def _check_scores(scores) -> None:
    if scores.ndim != 3 or scores.shape[1] != scores.shape[2]:
        raise ValueError(f"expected scores [N, K, K] (question, completion, principle), got {list(scores.shape)}")
    if not scores.diagonal(dim1=-2, dim2=-1).isfinite().all():
        raise ValueError("expected finite scores of each completion under its own principle")


def answer_is_right(text: str, answer: str) -> bool:
    """Whether a completion ends in `answer`: read in the last <answer>, or in the whole text where that is missing.

    Lenient on purpose, so that accuracy does not rise merely because the format does. A number is compared with the
    last number there (1,000 and 1000.0 are one number); anything else with the text there, without case and final dot.
    """
    found = text.rpartition("<answer>")[2].partition("</answer>")[0]
    expected = _numbers(answer)
    if len(expected) == 1 and re.fullmatch(r"\W*+[\d.,]++\W*+", answer):
        return _numbers(found)[-1:] == expected
    return found.strip().strip(".").casefold() == answer.strip().strip(".").casefold()


def _numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?", text)]


def plot_run(run_dir):
    """Write curves.png into a run's directory and return its path; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    run_dir = Path(run_dir)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    points = {0: evals["start"], **{int(k): v for k, v in evals["steps"].items()}, len(steps): evals["end"]}
    panels = (
        ("format", "reward", "format"), ("accuracy", None, "accuracy"), ("sufficiency index", "si", "si"),
        ("drift (Sinkhorn)", "loss_ot", "sinkhorn"), ("entropy, nats per token", "entropy", None),
        ("completion length, tokens", "completion_length", "completion_length"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (title, step_key, eval_key) in zip(axes.flat, panels, strict=True):
        if step_key in steps[0]:
            x, y = zip(*((s["step"], s[step_key]) for s in steps))
            axis.plot(x, y, color="0.7", lw=1, label="training batch")
        if eval_key in evals["start"]:
            mean, low, high = ([p[eval_key][k] for p in points.values()] for k in ("mean", "low", "high"))
            axis.plot(list(points), mean, "o-", color="C0", ms=4, label="held out, 95%")
            axis.fill_between(list(points), low, high, color="C0", alpha=0.2)
        axis.set(title=title, xlabel="step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(run_dir / "curves.png", dpi=120)
    plt.close(figure)
    return run_dir / "curves.png"


# ----------------------------------------------------------------------------------------------------------------------
# Geometry of point clouds (hidden states) and of next-token distributions


def effective_rank(x):
    """exp(entropy of the normalised eigenvalues of the covariance): points x [n, d] -> 0-dim, between 1 and d.

    r equal eigenvalues give r. NaN where all points are equal. Source: Roy and Vetterli 2007, there with singular
    values of a matrix; here with variances, so that directions of little variance count for little.
    """
    _check_cloud("effective_rank", x)
    variances = torch.linalg.svdvals(_centred(x)).square()  # [min(n, d)]
    return torch.special.entr(variances / variances.sum()).sum().exp()  # []


def bures_wasserstein(x, y):
    """Wasserstein-2 distance between the Gaussians fitted to x [n, d] and y [m, d]: 0-dim, in the points' own unit.

        distance^2 = ||mean x - mean y||^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2     A, B: the covariances (over n)

    The last trace is the nuclear norm of X Y^T / sqrt(nm), X and Y centred, which takes no matrix root. Rounding can
    make distance^2 a tiny negative number: it counts as 0, so equal clouds may show 1e-7 of their size and no less.
    """
    _check_cloud("bures_wasserstein", x, y)
    a, b = (_centred(z) / len(z) ** 0.5 for z in (x, y))  # [n, d], [m, d]
    small = [torch.linalg.qr(z, mode="r").R for z in (a, b)]  # [min(n, d), d], [min(m, d), d] the same covariances
    overlap = torch.linalg.svdvals(small[0] @ small[1].mT).sum()  # []
    shift = (x.double().mean(0) - y.double().mean(0)).square().sum()  # []
    return (shift + a.square().sum() + b.square().sum() - 2 * overlap).clamp(min=0).sqrt()  # []


def linear_cka(x, y):
    """Linear centred kernel alignment of paired points x [n, d], y [n, e]: 0-dim in [0, 1].

    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms of centred points. 1 where y is x after a rotation, reflection,
    scaling or shift; NaN where all points of one are equal. Source: Kornblith et al. 2019, arXiv 1905.00414.
    """
    _check_cloud("linear_cka", x)
    _check_cloud("linear_cka", y)
    if len(x) != len(y):
        raise ValueError(f"linear_cka expects as many points in x as in y, got {len(x)} and {len(y)}")
    x, y = _centred(x), _centred(y)  # [n, d], [n, e]
    x, y = x / x.norm(), y / y.norm()  # no overflow of fourth powers
    return (y.mT @ x).square().sum() / ((x.mT @ x).norm() * (y.mT @ y).norm())  # []


def fisher_rao(logits_p, logits_q):
    """Fisher-Rao distance of distributions from logits [..., V]: [...], in [0, pi], 0 only where p = q.

    2 arccos(sum sqrt(p q)), computed as 4 arcsin(||sqrt p - sqrt q|| / 2), which is the same (half-angle) and exact for
    neighbours, where the arccos of nearly 1 has lost half of its digits.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim < 1 or not logits_p.is_floating_point():
        raise ValueError(
            f"fisher_rao expects floating point logits of one shape, got {list(logits_p.shape)}, {list(logits_q.shape)}"
        )
    dtype = torch.promote_types(logits_p.dtype, torch.float32)
    root_p, root_q = ((z.to(dtype).log_softmax(-1) / 2).exp() for z in (logits_p, logits_q))  # [..., V] both
    chord = (root_p - root_q).norm(dim=-1)  # [...] at most sqrt 2
    return 4 * (chord / 2).clamp(max=0.5**0.5).arcsin()  # [...]


def principle_means(x, labels, num: int):
    """Mean of the points under each principle: x [n, d], labels [n] -> [K, d], float64.

    Raises ValueError where a principle has no point.
    """
    counts = torch.bincount(labels, minlength=num)  # [K]
    if len(counts) != num or (counts == 0).any():
        raise ValueError(f"principle_means expects points under each of {num} principles, got {counts.tolist()}")
    sums = torch.zeros(num, x.shape[1], dtype=torch.double).index_add_(0, labels, x.double())  # [K, d]
    return sums / counts[:, None]  # [K, d]


def share_in_span(x, directions):
    """(share of the squared length of x [n, d] that lies in the span of directions [K, d], the rank r of that span).

    A uniformly random subspace of r dimensions holds r / d on average, whatever x is. NaN for x = 0.
    """
    _, values, basis = torch.linalg.svd(directions.double(), full_matrices=False)  # [r'], [r', d]
    basis = basis[values > values.max() * 1e-6]  # [r, d] K directions that sum to 0 span K - 1 dimensions at most
    x = x.double()  # [n, d]
    return (x @ basis.mT).square().sum() / x.square().sum(), len(basis)  # [], r


def mean_angle(directions):
    """Mean angle between pairs of directions [K, d], in degrees: 0-dim. A regular simplex has arccos(-1 / (K - 1))."""
    unit = F.normalize(directions.double(), dim=-1)  # [K, d]
    above = torch.triu_indices(len(unit), len(unit), offset=1)  # [2, pairs]
    return (unit @ unit.mT)[above[0], above[1]].clamp(-1, 1).arccos().rad2deg().mean()  # []


def between_to_within(x, labels, num: int):
    """Variance between the principles' means over variance of points about their own mean: x [n, d], labels [n] -> [].

    Of n points that know nothing of their principle it is about (K - 1) / n, not 0.
    """
    means = principle_means(x, labels, num)  # [K, d]
    within = (x.double() - means[labels]).square().sum(-1).mean()  # []
    return _centred(means).square().sum(-1).mean() / within  # []


def _centred(x):
    return x.double() - x.double().mean(0)  # [n, d]


def _check_cloud(name, *clouds) -> None:
    for x in clouds:
        if x.ndim != 2 or not x.numel() or x.shape[1] != clouds[0].shape[1] or not x.is_floating_point():
            shapes = ", ".join(str(list(z.shape)) for z in clouds)
            raise ValueError(f"{name} expects floating point clouds [points, dimensions], not empty, got {shapes}")


# ----------------------------------------------------------------------------------------------------------------------
# python metrics.py si: how well each principle is told apart, before any training

MAX_SCORED_ALL = 16  # principles; of more, each chain of thought meets MAX_SCORED_ALL - 1 sampled others
SAMPLED_ROWS = 128  # completions sampled together
HIDDEN_ELEMENTS = 2**24  # of the hidden states of the completions that are scored together: 64 MB
NEAR_CEILING = 0.95  # a set SI from which more principles, not more questions, would tell more


@dataclass
class SiConfig(DatasetConfig):
    """Measure, select and create principles, before training."""

    principles: str = field(metadata={"help": "file of principles: .txt (one a line) or .jsonl"})
    model: str = option("tiny", "the embedded model, a folder, or a Hugging Face hub id")
    num_questions: int = option(128, "questions, drawn from --dataset; all of them where it has fewer")
    select: int | None = option(None, "find the subset of so many principles with the highest SI of the set")
    propose: int | None = option(None, "create so many new principles, which are measured with the others")
    num_negatives: int | None = option(
        None, "other principles that a chain of thought is scored under, drawn anew for each question; "
        "default: all of up to 15, else 15"
    )
    out: str | None = option(None, ".jsonl of the selected principles (without --select: of all, best first)")
    json: str | None = option(None, "file of all numbers; the heat map of confusions goes beside it, as .png")
    max_completion_length: int = option(64, "tokens; longer completions are cut")
    temperature: float = option(1.0, "of sampling, and of every log-probability: that of the training to come")
    seed: int = option(0, "of everything random")

    def check(self) -> None:
        """Raises InputError for the first value that cannot be."""
        check_flags(self)
        _at_least(self, num_questions=2, max_completion_length=1, seed=0, select=2, propose=1, num_negatives=1)
        if not 1e-9 <= self.temperature < math.inf:
            raise InputError(f"--temperature: got {self.temperature}; a number above 0 (1e-9 or more) is accepted")
        _check_written(self, out=".jsonl", json=".json")


class Chain(NamedTuple):
    """A sampled completion, cut for scoring."""

    text: str  # the whole completion
    whole: list[int]  # its tokens
    ids: list[int]  # its chain of thought: through </reasoning>, all of it (an end token too) where that never comes
    context: list[int]  # ids without the end token: what an answer can follow
    closed: bool  # whether </reasoning> came
    truncated: bool  # whether no end token came within --max-completion-length


@torch.no_grad()
def sample_chains(model, tokenizer, prompts, max_new_tokens, temperature, seed) -> list[list[Chain]]:
    """One completion of every prompt, no top-k and no top-p: N lists of K prompts -> N lists of K chains."""
    num, eos, chains = len(prompts[0]), eos_ids(model, tokenizer), []
    flat = [prompt for row in prompts for prompt in row]
    for start in tqdm(range(0, len(flat), SAMPLED_ROWS), desc="sampling", dynamic_ncols=True):
        some = flat[start : start + SAMPLED_ROWS]
        names = [f"{seed} chain {n}" for n in range(start, start + len(some))]
        uniform = uniform_numbers(names, 1, max_new_tokens, device=model.device)  # [P, 1, T]
        out = sample(model, some, uniform, temperature, eos, tokenizer.pad_token_id)
        spans = cot_mask(tokenizer, out.tokens, out.mask).sum(-1)  # [P, 1]
        for row, mask, span, cut in zip(out.tokens[:, 0], out.mask[:, 0], spans[:, 0].tolist(), out.truncated[:, 0]):
            text, ids = tokenizer.decode(row[mask], skip_special_tokens=True), row[:span].tolist()
            closed = "</reasoning>" in text
            ended = not closed and ids[-1] in eos
            chains.append(Chain(text, row[mask].tolist(), ids, ids[:-1] if ended else ids, closed, bool(cut)))
    return [chains[i : i + num] for i in range(0, len(chains), num)]


def draw_candidates(num: int, num_questions: int, num_negatives: int, seed: int):
    """Which chains of thought prompt j scores: [N, K, C], its own and those of C - 1 = num_negatives others.

    A ring in random order, anew for each question: a chain is scored under its own principle and the next C - 1 in the
    ring. So each has C - 1 others drawn uniformly, and each prompt scores C chains. log C - row InfoNCE is then the
    information within a random subset, I(C; CoT | x, subset): a lower bound of that in the whole pool.
    """
    generator = torch.Generator().manual_seed(seed)
    ring = torch.rand(num_questions, num, generator=generator).argsort(-1)  # [N, K] the principle at each place
    offsets = torch.arange(num)[:, None] - torch.arange(num_negatives + 1)  # [K, C] places of its writers
    return torch.empty(num_questions, num, num_negatives + 1, dtype=torch.long).scatter_(  # [N, K, C]
        1, ring[..., None].expand(-1, -1, num_negatives + 1), ring[:, offsets % num]
    )


@torch.no_grad()
def score_chains(model, tokenizer, prompts, chains, answers, written_by, temperature, title="scoring"):
    """Every chain of thought under its candidate principles, and the right answer after it.

    prompts, chains: N lists of K; answers: N strings or None; written_by [N, K, C]: see draw_candidates. Returns

        scores[n, i, j]        log-probability of chain i under principle j, nats; -inf where not scored
        answer_logp[n, j, i]   log-probability of "{answer}</answer>" after prompt j, chain i and "<answer>"; NaN where
                               not scored or no answer is known. A chain that never closed is closed by </reasoning>

    both [N, K, K] on the CPU. One pass gives both, for the answer follows the chain in the same row.
    """
    num_questions, num, per_prompt = written_by.shape
    encode = _encoder(tokenizer)
    longest = max(len(chain.ids) for row in chains for chain in row) + 16  # about
    elements = num * per_prompt * longest * model.get_output_embeddings().weight.shape[1]
    size = max(1, HIDDEN_ELEMENTS // elements)  # questions at a time
    scores = torch.full((num_questions, num, num), -math.inf)  # [N, K, K]
    answer_logp = torch.full((num_questions, num, num), math.nan)  # [N, K, K]
    for start in tqdm(range(0, num_questions, size), desc=title, dynamic_ncols=True):
        part = slice(start, start + size)
        rows = [_score_row(c, a, encode) for row, a in zip(chains[part], answers[part]) for c in row]  # Q·K
        index = written_by[part].to(model.device)  # [Q, K, C]
        first = torch.arange(len(index), device=model.device)[:, None, None] * num  # [Q, 1, 1]
        inputs, targets, kinds = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row[n]) for row in rows], batch_first=True).to(model.device)
            [(first + index).flatten(0, 1)] for n in range(3)
        )  # [Q·K, C, T] each
        hidden = hidden_states(model, [p for row in prompts[part] for p in row], inputs, kinds > 0)  # [Q·K, C, T, d]
        logp = log_probs(model, hidden, targets, kinds > 1, temperature)  # [Q·K, C, T]
        by_chain = torch.empty(len(index), num, num, 2, device=model.device).fill_(math.nan)  # [Q, j, i, 2]
        sums = torch.stack([(logp * (kinds == kind)).sum(-1) for kind in (COT, ANSWER)], -1)  # [Q·K, C, 2]
        by_chain.scatter_(2, index[..., None].expand(-1, -1, -1, 2), sums.reshape(*index.shape, 2).to(by_chain))
        scores[part] = by_chain[..., 0].mT.nan_to_num(-math.inf).cpu()  # [Q, i, j]
        known = torch.tensor([answer is not None for answer in answers[part]])[:, None, None]  # [Q, 1, 1]
        answer_logp[part] = by_chain[..., 1].cpu().where(known, math.nan)  # [Q, j, i]
    return scores, answer_logp


CONTEXT, COT, ANSWER = 1, 2, 3  # a token that is only read; one whose probability counts for the chain, for the answer


def _score_row(chain: Chain, answer: str | None, encode):
    """(inputs, targets, kinds) of one chain and the answer after it, lists of one length T.

    Targets differ from inputs in one place: an end token that the chain wrote counts in its probability, and where it
    stood the model reads on.
    """
    bridge = tail = []
    if answer is not None:
        bridge = encode("<answer>" if chain.closed else "</reasoning><answer>")
        tail = encode(answer + "</answer>")
    inputs = (chain.context + bridge if answer is not None else chain.ids) + tail
    targets = chain.ids + inputs[len(chain.ids) :]
    kinds = [COT] * len(chain.ids) + [CONTEXT] * (len(inputs) - len(chain.ids) - len(tail)) + [ANSWER] * len(tail)
    return inputs, targets, kinds


def estimate_si(model, tokenizer, principles, questions, config, sources) -> tuple[dict, torch.Tensor]:
    """Sample, score, summarise: (every number of the report, scores [N, K, K] with all pairs of `summary["pool"]`)."""
    num, wanted = len(principles), config.num_negatives
    if wanted is not None and wanted >= num:
        raise InputError(f"--num-negatives: got {wanted}, of {num} principles; 1 to {num - 1} is accepted")
    negatives = wanted or min(num, MAX_SCORED_ALL) - 1
    answers, encode = [q.answer for q in questions], _encoder(tokenizer)
    ends = [encode(f"</reasoning><answer>{answer}</answer>") for answer in answers if answer is not None]
    limit = _prompt_limit(model, config.max_completion_length + max(map(len, ends), default=0))

    def prompts_of(texts):  # N lists of K prompts
        return [encode_prompts(tokenizer, [build_messages(q.text, t) for t in texts], limit) for q in questions]

    prompts = prompts_of([p.text for p in principles])
    opposed = [i for i, p in enumerate(principles) if p.negative is not None]
    opposites = prompts_of([principles[i].negative for i in opposed])
    rows = len(questions) * num
    read = sum(len(p) for row in prompts for p in row)
    print(
        f"{len(questions)} questions x {num} principles: {rows} chains of thought to sample, {rows * (negatives + 1)} "
        f"sequences to score; through the model go 2 x {read} tokens of prompts and at most "
        f"{rows * (negatives + 2) * config.max_completion_length} of completions", flush=True,
    )
    chains = sample_chains(model, tokenizer, prompts, config.max_completion_length, config.temperature, config.seed)
    written_by = draw_candidates(num, len(questions), negatives, config.seed)  # [N, K, C]
    scores, answer_logp = score_chains(model, tokenizer, prompts, chains, answers, written_by, config.temperature)
    summary = summarise_si(principles, sources, questions, chains, scores, answer_logp, negatives + 1)
    if opposed:
        only_own = torch.arange(len(opposed))[None, :, None].expand(len(questions), -1, -1)  # [N, K', 1]
        under, _ = score_chains(
            model, tokenizer, opposites, [[row[i] for i in opposed] for row in chains], [None] * len(questions),
            only_own, config.temperature, "negatives",
        )  # [N, K', K']
        own = scores.diagonal(dim1=1, dim2=2)[:, opposed]  # [N, K']
        summary["negatives"] = compare_negatives([principles[i] for i in opposed], own, under.diagonal(dim1=1, dim2=2))

    pool = list(range(num))
    if config.select and negatives + 1 < num:  # a selection needs every pair: complete the table of the best
        ranked = [p["index"] for p in summary["principles"]]
        pool = sorted(ranked[: max(MAX_SCORED_ALL, 2 * config.select)])
        everyone = draw_candidates(len(pool), len(questions), len(pool) - 1, config.seed)  # [N, K', K']
        scores, _ = score_chains(
            model, tokenizer, [[row[i] for i in pool] for row in prompts], [[row[i] for i in pool] for row in chains],
            [None] * len(questions), everyone, config.temperature, "the best under each other",
        )  # [N, K', K']
    summary["pool"] = pool
    return summary, scores


def summarise_si(principles, sources, questions, chains, scores, answer_logp, num_candidates: int) -> dict:
    """All figures of the table, best principle first; every interval is a 95% bootstrap interval over questions."""
    ceiling = math.log(num_candidates)
    info, row_mi = posterior_information(scores), ceiling - row_info_nce(scores)  # [N, K] both
    column = ceiling - column_info_nce(scores).mean(0)  # [K]
    own = torch.arange(len(principles))  # [K]
    hits = (scores.argmax(-1) == own).double()  # [N, K]
    mistaken = confusion(scores)  # [K, K]
    likeliest = mistaken.masked_fill(torch.eye(len(own), dtype=torch.bool), -1).max(-1)  # [K] both
    shaped = torch.tensor([[format_reward(c.text) for c in row] for row in chains]).double()  # [N, K]
    lengths = torch.tensor([[len(c.ids) for c in row] for row in chains]).double()  # [N, K]
    answered = [n for n, q in enumerate(questions) if q.answer is not None]
    right = torch.tensor(
        [[answer_is_right(c.text, questions[n].answer) for c in chains[n]] for n in answered]
    ).double()  # [A, K]
    gain, reached = answer_gain(answer_logp[answered]), reach(scores)  # [A, K], [K]

    def share(values):  # info -> SI: clamped after the mean over questions, never before
        return {name: max(0.0, value / ceiling) for name, value in _interval(values).items()}

    rows = []
    for i, principle in enumerate(principles):
        row = {
            "id": principle.id, "text": principle.text, "source": sources[i], "index": i,
            "si": share(info[:, i]), "reach": reached[i].item(),
            "mi": _interval(info[:, i]), "mi_row": row_mi[:, i].mean().item(),
            "mi_column": column[i].item(), "retrieval": hits[:, i].mean().item(),
            "mistaken_for": principles[likeliest.indices[i]].id, "mistaken_share": likeliest.values[i].item(),
            "format": shaped[:, i].mean().item(), "cot_length": lengths[:, i].mean().item(),
        }
        if answered:
            row |= {"accuracy": right[:, i].mean().item(), "answer_gain": _interval(gain[:, i])}
        rows.append(row)
    rows.sort(key=lambda row: -row["mi"]["mean"])
    for row, following in itertools.pairwise(rows):
        row["overlaps_next"] = row["si"]["low"] <= following["si"]["high"]
    together = {
        "si": share(info.mean(1)), "reach": reached.mean().item(),
        "mi": _interval(info.mean(1)), "mi_row": row_mi.mean().item(),
        "mi_column": column.mean().item(), "retrieval": hits.mean().item(), "format": shaped.mean().item(),
        "cot_length": lengths.mean().item(),
    }
    if answered:
        together |= {"accuracy": right.mean().item(), "answer_gain": _interval(gain.mean(1))}
    scored = scores.isfinite()  # [N, K, K]
    return {
        "questions": len(questions), "chains": shaped.numel(), "cot_tokens": int(lengths.sum()),
        "truncated": sum(c.truncated for row in chains for c in row) / shaped.numel(),
        "candidates": num_candidates, "ceiling": ceiling, "chance": 1 / num_candidates,
        "set": together, "principles": rows, "ids": [p.id for p in principles], "confusion": mistaken.tolist(),
        "mean_scores": (scores.where(scored, 0).sum(0) / scored.sum(0).clamp(min=1)).tolist(),
    }


def answer_gain(answer_logp):
    """Nats that a principle's own CoT adds to the right answer: answer_logp [N, K prompts, K CoTs] -> [N, K].

    log p(answer | prompt i, CoT i) - mean over j != i of log p(answer | prompt i, CoT j): only the CoT changes.
    Above 0: what is written under this principle helps to the answer more than what others write. NaN entries (not
    scored) are left out. The answer's likelihood is that of its text and `</answer>`, after a forced `<answer>`.
    """
    own = answer_logp.diagonal(dim1=-2, dim2=-1)  # [N, K]
    off = ~torch.eye(answer_logp.shape[-1], dtype=torch.bool)  # [K, K]
    return own - answer_logp.where(off, math.nan).nanmean(-1)  # [N, K]


def compare_negatives(principles, own, under_negative) -> list[dict]:
    """Own [N, K'] against negative [N, K'] log-probabilities: KL(p(. | c) || half p(. | c) + half p(. | negative)).

    At most log 2, and no bound on any mutual information: all chains were written under c, none under the negative.
    """
    nats = math.log(2) - F.softplus(under_negative - own)  # [N, K']
    return [
        {"id": p.id, "negative": p.negative, "nats": _interval(nats[:, i]),
         "retrieval": (own[:, i] > under_negative[:, i]).double().mean().item()}
        for i, p in enumerate(principles)
    ]


def summarise_selection(scores, pool, principles, size: int) -> dict:
    """The best subset of the pool, its SI, and two figures to hold that against.

    The SI of the best of many subsets, on the questions it was chosen on, is too high. `si_other_half` is free of that:
    chosen on one half of the questions, measured on the other, mean of both ways.
    """
    chosen = select_subset(scores, size)
    ceiling = math.log(size)

    def mean_si(some_scores, subsets):
        return max(0.0, subset_information(some_scores, torch.tensor(subsets)).mean().item() / ceiling)

    halves = scores[::2], scores[1::2]
    rng = random.Random(0)
    info = subset_information(scores, torch.tensor([chosen]))[:, 0]  # [N]
    return {
        "ids": [principles[pool[i]].id for i in chosen],
        "indices": [pool[i] for i in chosen],
        "si": {name: max(0.0, value / ceiling) for name, value in _interval(info).items()},
        "si_other_half": sum(mean_si(there, [select_subset(here, size)]) for here, there in (halves, halves[::-1])) / 2,
        "si_random_subset": mean_si(scores, [rng.sample(range(len(pool)), size) for _ in range(200)]),
    }


# Creation: the model rewrites and joins principles, or, where it cannot write, the texts are joined as they are

REPEAT = "Repeat this sentence and write nothing else: {}"
REWRITE = (
    "This is a principle for how to reason: {}\nWrite a different principle with the same purpose, more concrete, as "
    "one short instruction. Write that sentence and nothing else."
)
COMBINE = (
    "These are two principles for how to reason:\n- {}\n- {}\nWrite one new principle that joins the best of both, as "
    "one short instruction. Write that sentence and nothing else."
)
MAX_WORDS = 40  # of a created principle
ROUNDS = 4  # of sampling, before what is missing is joined from the texts


def propose(model, tokenizer, principles, num: int, config) -> list[tuple[Principle, str]]:
    """Up to `num` new principles, each with where it came from; different from all others in more than case and dots.

    The model writes them, if it can repeat half of the given ones when asked to; else, and where too few of its texts
    are usable, two given texts are joined with "and". Fewer than `num` come where no more pairs exist.
    """
    rng = random.Random(f"{config.seed} propose")
    known = {_essence(p.text) for p in principles}
    ids, found = {p.id for p in principles}, []

    def add(name, text, source):
        if len(found) < num and _essence(text) not in known:
            known.add(_essence(text))
            while name in ids:
                name += "'"
            ids.add(name)
            found.append((Principle(name, text), source))

    repeated = _ask(model, tokenizer, [REPEAT.format(p.text) for p in principles], 0.01, f"{config.seed} repeat")
    if sum(_essence(a) == _essence(p.text) for a, p in zip(repeated, principles)) * 2 >= len(principles):
        for turn in range(ROUNDS):
            one, two = rng.choices(principles, k=num), [rng.sample(principles, 2) for _ in range(num)]
            asked = [REWRITE.format(p.text) for p in one] + [COMBINE.format(a.text, b.text) for a, b in two]
            texts = _ask(model, tokenizer, asked, 1.0, f"{config.seed} round {turn}")
            labels = [(f"{p.id}*", f"{p.id} rewritten by {config.model}") for p in one]
            labels += [(f"{a.id}*{b.id}", f"{a.id} and {b.id} combined by {config.model}") for a, b in two]
            drawn = list(zip(labels, texts))
            rng.shuffle(drawn)
            for (name, source), text in drawn:
                if _is_usable(text) and _encodes(tokenizer, text):
                    add(name, text, source)
    pairs = list(itertools.combinations(principles, 2))
    rng.shuffle(pairs)
    for a, b in pairs:
        text = _join(a.text, b.text)
        if len(text.split()) <= MAX_WORDS:
            add(f"{a.id}+{b.id}", text, f"{a.id} and {b.id} joined by their texts")
    return found


@torch.no_grad()
def _ask(model, tokenizer, requests: list[str], temperature: float, name: str) -> list[str]:
    """The first line of the model's reply to each request, without bullets and quotes."""
    prompts = encode_prompts(tokenizer, [[{"role": "user", "content": r}] for r in requests], _prompt_limit(model, 80))
    uniform = uniform_numbers([f"{name} {n}" for n in range(len(prompts))], 1, 80, device=model.device)  # [P, 1, T]
    out = sample(model, prompts, uniform, temperature, eos_ids(model, tokenizer), tokenizer.pad_token_id)
    texts = [tokenizer.decode(t[m], skip_special_tokens=True) for t, m in zip(out.tokens[:, 0], out.mask[:, 0])]
    lines = [(text.strip().splitlines() or [""])[0] for text in texts]
    return [re.sub(r"^[\s\-*•\d.)\"“']+|[\s\"”'*]+$", "", line) for line in lines]


def _is_usable(text: str) -> bool:
    words = text.split()
    return 3 <= len(words) <= MAX_WORDS and text[-1] in ".!" and text.isprintable() and not any(t in text for t in TAGS)


def _encodes(tokenizer, text: str) -> bool:
    try:
        return bool(encode_prompts(tokenizer, [build_messages("?", text)]))
    except InputError:  # a control token of the tokenizer
        return False


def _essence(text: str) -> str:
    """Letters and digits without case: what has to differ between two principles."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _join(first: str, second: str) -> str:
    second = second if second[1:2].isupper() else second[:1].lower() + second[1:]  # "SI units" keeps its capitals
    return f"{first.rstrip(' .!;')} and {second}"


def run_si(config: SiConfig) -> None:
    principles, questions = load_principles(config.principles), _load_questions(config)
    model, tokenizer = _load("--model", config.model)
    sources = [config.principles] * len(principles)
    if config.propose:
        found = propose(model, tokenizer, principles, config.propose, config)
        print(f"{len(found)} of {config.propose} new principles were found")
        for principle, source in found:
            principles, sources = [*principles, principle], [*sources, source]
            print(f"proposed {principle.id}: {principle.text} ({source})")
    if config.select and config.select > len(principles):
        raise InputError(f"--select: got {config.select}, of {len(principles)} principles; 2 to {len(principles)} "
                         "is accepted")
    summary, scores = estimate_si(model, tokenizer, principles, questions, config, sources)
    chosen = [row["index"] for row in summary["principles"]]
    if config.select:
        summary["selection"] = summarise_selection(scores, summary["pool"], principles, config.select)
        chosen = summary["selection"]["indices"]
    print_si(summary, config)
    if config.json:
        _write_json(config.json, {"command": "si", "settings": asdict(config), **summary})
        _plot(config.json, lambda plt: _heat_map(plt, summary))
    if config.out:
        save_principles(config.out, [principles[i] for i in chosen])
        print(f"{config.out}: {len(chosen)} principles, for `python train.py --principles {config.out}`")


def print_si(summary: dict, config) -> None:
    """The report of a measurement, for people."""
    together, num = summary["set"], summary["candidates"]
    answered = "accuracy" in together
    width = min(36, max(len(row["text"]) for row in summary["principles"]))

    def line(name, row, other=""):
        cells = f"{name:{width + 9}}{_cell(row['si']):>19}{' ~' if row.get('overlaps_next') else '  '}"
        cells += f"{row['reach']:5.2f}{row['mi_row']:8.2f}{row['mi_column']:9.2f}{row['retrieval']:7.2f}  {other:16}"
        cells += f"{row['format']:7.2f}{row['cot_length']:8.1f}"
        print(cells + (f"{row['accuracy']:10.2f}{row['answer_gain']['mean']:+8.2f}" if answered else ""))

    head = f"\n{'principle':{width + 9}}{'SI [95%]':>19}  {'reach':>5}{'row MI*':>8}{'column*':>9}{'top-1':>7}"
    head += f"  {'mistaken for':16}"
    print(head + f"{'format':>7}{'length':>8}" + (f"{'accuracy':>10}{'gain**':>8}" if answered else ""))
    for row in summary["principles"]:
        text = row["text"] if len(row["text"]) <= width else row["text"][: width - 1] + "…"
        line(f"{row['id'][:8]:9}{text}", row, f"{row['mistaken_for'][:9]} ({row['mistaken_share']:.2f})")
    line("the set", together)
    bounds = f"{1:19.2f}  {1:5.2f}{summary['ceiling']:8.2f}{'':9}{summary['chance']:7.2f}"
    print(f"{'at most log K; by chance':{width + 9}}{bounds}")

    print(f"\nSI {_cell(together['si'])}, MI {_cell(together['mi'])} of at most {summary['ceiling']:.2f} nats: "
          f"{summary['questions']} questions,\n{summary['chains']} chains of thought, {summary['cot_tokens']} tokens, "
          f"model {config.model}, temperature {config.temperature}, seed {config.seed}")
    notes = (
        (num < len(summary["ids"]), f"each chain of thought is scored against {num - 1} sampled principles of "
                                    f"{len(summary['ids'])}: MI is a lower bound, at most log {num}"),
        (any(row.get("overlaps_next") for row in summary["principles"]),
         "~ not distinguishable from the next line: the intervals overlap; more --num-questions narrow them"),
        (together["si"]["mean"] >= NEAR_CEILING,
         f"near the ceiling: {num} candidates are too few to tell more; add principles"),
        (summary["truncated"] > 0.05, f"{summary['truncated']:.0%} of completions were cut at "
                                      f"{config.max_completion_length} tokens: raise --max-completion-length"),
        (True, "reach: the share that the most telling tenth of the texts carries. Training can make rare texts\n"
               "  frequent; where reach is low as well, principles say the same, or nothing"),
        (True, "* log K - InfoNCE, nats, as in training. SI estimates the same share of log K from the posteriors of\n"
               "  all chains of thought, which is less noisy. The column is no bound: it may exceed the row"),
        (answered, "** nats that the principle's own chain of thought adds to the right answer, over others'"),
    )
    print("\n".join(text for holds, text in notes if holds))
    if "negatives" in summary:
        print(f"\nagainst its own negative, at most log 2 = {math.log(2):.2f} nats (unmatched: no bound on MI)")
        for row in summary["negatives"]:
            print(f"{row['id'][:8]:9}{_cell(row['nats']):22}told apart {row['retrieval']:.2f}  {row['negative']}")
    if "selection" in summary:
        best, size = summary["selection"], len(summary["selection"]["ids"])
        print(f"\nbest {size}: {', '.join(best['ids'])}\nSI among themselves {_cell(best['si'])}; chosen on half the "
              f"questions, measured on the other half {best['si_other_half']:.2f}; a random {size} has "
              f"{best['si_random_subset']:.2f}")


def _heat_map(plt, summary):
    ids, values = summary["ids"], summary["confusion"]
    size = 2 + 0.45 * len(ids)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                      color="white" if value > 0.5 else "black")
    axis.set_xticks(range(len(ids)), ids, rotation=60, ha="right")
    axis.set_yticks(range(len(ids)), ids)
    axis.set(xlabel="is taken for", ylabel="was written under")
    figure.colorbar(image, label="mean posterior")
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# python metrics.py geometry: what training did to the manifold

CLOUD = 512  # points of a Sinkhorn divergence
HIDDEN_ROWS = 2**26  # elements of the hidden states of all layers that one forward makes: 256 MB


@dataclass
class GeometryConfig(DatasetConfig):
    """What training did to the hidden states and to the next-token distribution, on the same tokens."""

    base: str = field(metadata={"help": "the model before: tiny (the embedded one), a folder, or a hub id"})
    trained: str = field(metadata={"help": "the model after, of the same shape; it writes the completions"})
    principles: str = field(metadata={"help": "file of principles: .txt (one a line) or .jsonl"})
    num_questions: int = option(32, "questions, each under every principle; all of --dataset where it has fewer")
    num_tokens: int = option(2048, "positions in completions that are compared, drawn from all")
    json: str | None = option(None, "file of all numbers; the plot over layers goes beside it, as .png")
    max_completion_length: int = option(64, "tokens; longer completions are cut")
    seed: int = option(0, "of everything random")

    def check(self) -> None:
        """Raises InputError for the first value that cannot be."""
        check_flags(self)
        _at_least(self, num_questions=1, num_tokens=2, max_completion_length=1, seed=0)
        _check_written(self, json=".json")


@torch.no_grad()
def layer_states(model, prompts, completions, picked):
    """Hidden states [L + 1, n, d] of every layer (0: the embeddings; the last: after the norm) at picked positions.

    prompts and completions: R lists of token ids; picked: n pairs (row, t), sorted, for the position that predicts
    token t of that row's completion. The plain forward, a few rows at a time; the result is on the CPU.
    """
    rows = [p + c[:-1] for p, c in zip(prompts, completions)]
    longest = max(map(len, rows))
    layers, width = model.config.get_text_config().num_hidden_layers + 1, model.get_output_embeddings().weight.shape[1]
    size = max(1, HIDDEN_ROWS // (longest * layers * width))
    parts = []
    for start in range(0, len(rows), size):
        block = [torch.tensor(row) for row in rows[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(block, batch_first=True).to(model.device)  # [r, L] padded on the right:
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in block])[:, None]  # no token sees it
        hidden = model.get_decoder()(
            input_ids=ids, attention_mask=mask.long().to(ids.device), output_hidden_states=True
        ).hidden_states  # L + 1 of [r, L, d]
        here = [(r - start, len(prompts[r]) - 1 + t) for r, t in picked if start <= r < start + size]
        if here:
            row, position = torch.tensor(here, device=ids.device).T  # [n'], [n']
            parts.append(torch.stack([h[row, position] for h in hidden]).float().cpu())  # [L + 1, n', d]
    return torch.cat(parts, 1)  # [L + 1, n, d]


def compare_layer(base, trained, labels, num: int) -> dict:
    """The figures of one layer: base and trained [n, d], the same tokens; labels [n], the principle of each."""
    ends = labels.new_tensor(range(0, len(base), max(1, len(base) // CLOUD)))[:CLOUD]  # spread over all rows
    x, y = base[ends].double(), trained[ends].double()  # [m, d] float64: the divergence is often a small difference
    divergence, info = sinkhorn_divergence(x, y, relative_eps(x, y, 0.1))
    drift = trained.double() - base.double()  # [n, d]
    directions = [_centred(principle_means(states, labels, num)) for states in (base, trained)]  # [K, d] each
    share, rank = share_in_span(drift, directions[0])
    row = {
        "scale": _centred(base).square().sum(-1).mean().sqrt(),
        "sinkhorn": divergence, "sinkhorn_error": info.marginal_error,
        "bures_wasserstein": bures_wasserstein(base, trained),
        "linear_cka": linear_cka(base, trained),
        "rank_before": effective_rank(base), "rank_after": effective_rank(trained),
        "mean_shift": drift.mean(0).norm(),
        "drift_in_span": share, "random_span": rank / base.shape[1],
        "angle_before": mean_angle(directions[0]), "angle_after": mean_angle(directions[1]),
        "between_within_before": between_to_within(base, labels, num),
        "between_within_after": between_to_within(trained, labels, num),
    }
    return {name: float(value) for name, value in row.items()}


@torch.no_grad()
def compare_outputs(models, hidden, hidden_elsewhere) -> dict:
    """Distances [n] between next-token distributions, from last hidden states [n, d] of (base, trained).

    `hidden_elsewhere` are those of the same tokens after the prompt of another principle.
    """
    size = max(1, LOGITS_PER_CHUNK // models[0].get_output_embeddings().weight.shape[0])
    values = {"fisher_rao": [], "kl": [], "principle_before": [], "principle_after": []}
    for start in range(0, len(hidden[0]), size):
        part = slice(start, start + size)
        base, trained = (head(m, h[part].to(m.device)) for m, h in zip(models, hidden))  # [c, V] both
        elsewhere = [head(m, h[part].to(m.device)) for m, h in zip(models, hidden_elsewhere)]  # [c, V] both
        values["fisher_rao"].append(fisher_rao(base, trained))
        logp, logq = trained.log_softmax(-1), base.log_softmax(-1)  # [c, V]
        values["kl"].append((logp.exp() * (logp - logq)).sum(-1))
        values["principle_before"].append(fisher_rao(base, elsewhere[0]))
        values["principle_after"].append(fisher_rao(trained, elsewhere[1]))
    return {name: torch.cat(parts).cpu() for name, parts in values.items()}  # [n] each


def run_geometry(config: GeometryConfig) -> None:
    principles, questions = load_principles(config.principles), _load_questions(config)
    (base, tokenizer), (trained, other) = _load("--base", config.base), _load("--trained", config.trained)
    limit = _prompt_limit(trained, config.max_completion_length)
    talks = [build_messages(q.text, p.text) for q in questions for p in principles]
    prompts = encode_prompts(tokenizer, talks, limit)
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (base, trained)]
    if shapes[0] != shapes[1] or prompts != encode_prompts(other, talks, limit):
        raise InputError(f"--trained: {config.trained} has another shape or tokenizer than {config.base}; "
                         "a model that was trained from --base is accepted")
    num, rng = len(principles), random.Random(f"{config.seed} geometry")
    print(f"{len(questions)} questions x {num} principles: {len(prompts)} completions to sample from {config.trained}; "
          "each goes through both models twice, under its own principle and under another", flush=True)
    chains = sample_chains(trained, tokenizer, [prompts], config.max_completion_length, 1.0, config.seed)[0]
    completions = [chain.whole for chain in chains]
    each = max(1, config.num_tokens // len(prompts))  # positions of one completion
    picked = [(r, t) for r, c in enumerate(completions) for t in sorted(rng.sample(range(len(c)), min(each, len(c))))]
    elsewhere = [prompts[r - r % num + (r + rng.randrange(1, num)) % num] for r in range(len(prompts))]
    labels = torch.tensor([r % num for r, _ in picked])  # [n] the principle
    owners = torch.tensor([r // num for r, _ in picked])  # [n] the question

    models, hidden, hidden_elsewhere = (base, trained), [], []
    for model in tqdm(models, desc="hidden states", dynamic_ncols=True):
        hidden.append(layer_states(model, prompts, completions, picked))  # [L + 1, n, d]
        hidden_elsewhere.append(layer_states(model, elsewhere, completions, picked)[-1])  # [n, d]
    pairs = tqdm(list(zip(*hidden)), desc="layers", dynamic_ncols=True)
    layers = [compare_layer(x, y, labels, num) for x, y in pairs]
    outputs = compare_outputs(models, [h[-1] for h in hidden], hidden_elsewhere)
    by_question = {  # [Q] each: a question is what the bootstrap draws
        name: torch.zeros(len(questions)).index_add_(0, owners, v) / torch.bincount(owners, minlength=len(questions))
        for name, v in outputs.items()
    }
    summary = {"questions": len(questions), "principles": num, "completions": len(prompts), "tokens": len(picked),
               "cloud": min(CLOUD, len(picked)), "layers": layers,
               "outputs": {name: _interval(v) for name, v in by_question.items()}}
    print_geometry(summary, config)
    if config.json:
        _write_json(config.json, {"command": "geometry", "settings": asdict(config), **summary})
        _plot(config.json, lambda plt: _layer_plot(plt, summary))


GEOMETRY_COLUMNS = (  # title, key, key after training, format
    ("scale", "scale", None, ".2f"),
    ("Sinkhorn", "sinkhorn", None, ".3g"),
    ("(error)", "sinkhorn_error", None, ".0e"),
    ("Bures-W.", "bures_wasserstein", None, ".3f"),
    ("CKA", "linear_cka", None, ".3f"),
    ("eff. rank", "rank_before", "rank_after", ".1f"),
    ("mean shift", "mean_shift", None, ".3f"),
    ("drift in span", "drift_in_span", "random_span", ".3f"),
    ("angle", "angle_before", "angle_after", ".0f"),
    ("between/within", "between_within_before", "between_within_after", ".3f"),
)


def print_geometry(summary: dict, config) -> None:
    """The report of a comparison, for people."""
    print("\nlayer" + "".join(f"{title:>{_geometry_width(after)}}" for title, _, after, _ in GEOMETRY_COLUMNS))
    for index, row in enumerate(summary["layers"]):
        cells = f"{index:5}"
        for _, key, after, form in GEOMETRY_COLUMNS:
            text = f"{row[key]:{form}}"
            if after:
                text += f" {'/' if after == 'random_span' else '→'} {row[after]:{form}}"
            cells += f"{text:>{_geometry_width(after)}}"
        print(cells)
    print(
        "a → b: base → trained. layer 0: the embeddings. scale: root mean squared distance of the base's states\n"
        f"from their mean. Sinkhorn: eps 0.1 of the mean squared distance, {summary['cloud']} points, (error) of the\n"
        "marginals. drift in span: share of the squared drift in the span of the base's principle directions / in\n"
        "a random subspace of that dimension. angle: between principle directions, degrees"
    )
    told = {
        "fisher_rao": "Fisher-Rao distance of next-token distributions, base to trained (at most pi)",
        "kl": "KL(trained || base), nats per token",
        "principle_before": "Fisher-Rao distance from one principle's prompt to another's, base",
        "principle_after": "the same, trained",
    }
    print()
    for name, text in told.items():
        print(f"{_cell(summary['outputs'][name], 3):24} {text}")
    print(f"\n{summary['completions']} completions of {config.trained} to {summary['questions']} questions under "
          f"{summary['principles']} principles, compared at {summary['tokens']} of their tokens, seed {config.seed}")


def _geometry_width(after) -> int:
    return 17 if after else 11


def _layer_plot(plt, summary):
    panels = (
        ("drift", ("sinkhorn",)), ("Bures-Wasserstein, mean shift", ("bures_wasserstein", "mean_shift")),
        ("linear CKA", ("linear_cka",)), ("effective rank", ("rank_before", "rank_after")),
        ("drift in principle span", ("drift_in_span", "random_span")),
        ("between / within principles", ("between_within_before", "between_within_after")),
    )
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels):
        for key in keys:
            axis.plot([row[key] for row in summary["layers"]], "o-", ms=4, label=key.replace("_", " "))
        axis.set(title=title, xlabel="layer")
        axis.legend(fontsize=8)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# What the commands share: input, intervals, files, the command line


def _load(flag: str, name: str):
    """(model, tokenizer) of a name given with `flag`; raises InputError that names it."""
    import tiny  # here, because tiny imports this file

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_model(str(tiny.MODEL_DIR) if name == "tiny" else name, device)
    except ValueError as error:  # InputError, or an architecture that policy cannot score
        raise InputError(f"{flag}: {str(error).removeprefix('--model: ')}") from None


def _load_questions(config):
    """--num-questions of them, of the file or of the embedded task's held-out part."""
    import tiny

    if config.dataset is None:
        return tiny.make_questions(config.num_questions, held_out=True, seed=config.seed)
    questions = config.load_questions(config.num_questions, config.seed)
    return random.Random(f"{config.seed} questions").sample(questions, min(config.num_questions, len(questions)))


def _encoder(tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _prompt_limit(model, more_tokens: int) -> int:
    """The longest prompt that leaves room for `more_tokens` in the model's context."""
    limit = (getattr(model.config, "max_position_embeddings", None) or 2**20) - more_tokens
    if limit < 2:
        raise InputError(f"--max-completion-length: leaves no room for a prompt in a context of {limit + more_tokens} "
                         "tokens; a lower number is accepted")
    return limit


def _interval(values) -> dict:
    """Mean over questions [N] with its 95% bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {"mean": values.double().mean().item(), "low": low.item(), "high": high.item()}


def _cell(interval: dict, digits: int = 2) -> str:
    mean, low, high = (f"{interval[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _at_least(config, **lowest) -> None:
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')}: got {value}; {low} or more is accepted")
    if config.seed >= 2**32:
        raise InputError(f"--seed: got {config.seed}; 0 to {2**32 - 1} is accepted")


def _check_written(config, **endings) -> None:
    """Raises InputError for a file that could not, or must not, be written: at once, not after an hour of sampling."""
    for name, ending in endings.items():
        path = getattr(config, name)
        if path is None:
            continue
        if not path.lower().endswith(ending):
            raise InputError(f"--{name}: got {path}; a file that ends in {ending} is accepted")
        if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
            raise InputError(f"--{name}: {path} cannot be written; a file in a writable folder is accepted")
        for read in (config.principles, config.dataset):
            if read and os.path.exists(read) and os.path.exists(path) and os.path.samefile(read, path):
                raise InputError(f"--{name}: {path} is read by this command; another file is accepted")


def _write_aside(path, write) -> None:
    """`write(aside)`, then moved to `path`: an interrupted run leaves the old file or the new one, never half."""
    aside = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp{Path(path).suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write_json(path, value) -> None:
    def plain(value):  # JSON has no NaN
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"{path}: all numbers")


def _plot(json_path, draw) -> None:
    """The figure that draw(pyplot) returns, as .png beside a --json file; one line where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path = Path(json_path).with_suffix(".png")
    figure = draw(plt)
    _write_aside(path, lambda aside: figure.savefig(aside, dpi=120))
    plt.close(figure)
    print(f"{path}: the plot")


COMMANDS = {"si": (SiConfig, run_si), "geometry": (GeometryConfig, run_geometry)}


def parse(argv):
    """(function, its settings) of a command line; raises InputError for one that cannot be."""
    if not argv or argv[0] not in COMMANDS:
        got = repr(argv[0]) if argv else "nothing"
        raise InputError(f"command: got {got}; {' and '.join(COMMANDS)} are accepted, each with --help")
    settings, command = COMMANDS[argv[0]]
    parser = transformers.HfArgumentParser(settings, prog=f"metrics.py {argv[0]}", description=settings.__doc__)

    def refuse(message):
        raise InputError(f"{message}; --help lists what is accepted")

    parser.error = refuse
    config = settings(**vars(parser.parse_args(argv[1:])))
    config.check()
    return command, config


def main(argv=None) -> int:
    """0; 2 after one line on stderr for input that cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        command, config = parse(argv)
        command(config)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII only
    sys.exit(main())
