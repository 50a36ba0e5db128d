"""A step of the optimiser: its micro-batches, its learning rate, and what is logged of it.

    gradient of a step = sum over micro-batches and processes of share · gradient of the part's mean loss

so that neither micro-batches nor processes change a step. What is logged comes in parts as well: of questions,
micro-batches, passes and processes. `combine` makes one figure of them, by the kind of the figure:

    a count         the sum                                          items, tokens, ratios
    an extreme      the largest or the smallest                      ratio_max, sinkhorn_error, …
    a mean          weighed by what it is a mean over: tokens, ratios, else items (questions, or pairs)
"""

import time
from dataclasses import dataclass, field

import torch
import transformers

from metrics import interval, mutual_information, si_interval
from support import parallel
from support.errors import InputError, check_finite

COUNTS = ("items", "tokens", "ratios")
LARGEST = ("ratio_max", "sinkhorn_error", "sinkhorn_iterations")
SMALLEST = ("sinkhorn_converged",)
MEAN_OVER = {  # else of items
    "approx_kl": "tokens", "kl": "tokens", "entropy": "tokens", "ratio_mean": "ratios", "clip_fraction": "ratios",
}


@dataclass
class Step:
    """What a step has so far; the log is written from it."""

    number: int = 0
    learning_rate: float = 0.0
    passes: list = field(default_factory=list)  # of each step of the optimiser: its figures, see steps.combine
    scores: object = None  # of the first micro-batch, with --lambda-mi: [q, N, K, K]
    figures: dict = field(default_factory=dict)  # what else is logged, by name
    samples: list = field(default_factory=list)  # rows of samples.jsonl
    clock: float = field(default_factory=time.perf_counter)

    def start_clock(self) -> None:
        """What came before, an evaluation, does not count for the step."""
        self.clock = time.perf_counter()

    def log_seconds(self, name: str) -> None:
        """Log under `name` the seconds since this was last called, or since the clock was started."""
        time_now = time.perf_counter()
        self.figures[name], self.clock = time_now - self.clock, time_now

    def add_batch(self, batch, rewards, scores=None) -> None:
        """Log what train.Batch and train.Rewards hold; scores: [Q, G, K, K] of --mi-reward."""
        figures = batch_figures(batch, rewards, scores)
        self.figures |= combine(parallel.gather(figures))
        self.samples = sample_rows(batch, rewards, self.scores if scores is None else scores)


def combine(parts: list[dict]) -> dict:
    """The figures of a whole, by name, from those of its parts; each part has its counts, `items` at least."""
    whole = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part]
        values = [float(part[name]) for part in having]
        if name in COUNTS:
            whole[name] = sum(values)
        elif name in LARGEST or name in SMALLEST:
            whole[name] = max(values) if name in LARGEST else min(values)
        else:
            weights = [part[MEAN_OVER.get(name, "items")] for part in having]
            whole[name] = sum(weight * value for weight, value in zip(weights, values)) / max(sum(weights), 1)
    return whole


def micro_batches(count: int, size: int) -> list[tuple[slice, float]]:
    """(part, share) of each micro-batch of `size`, 1 at least; the shares of all processes sum to 1."""
    size, total = max(1, size), sum(parallel.gather(count))
    return [(slice(i, i + size), min(size, count - i) / total) for i in range(0, count, size)]


def backward(loss, terms: dict, share: float) -> dict:
    """Add the share of a micro-batch's mean loss to the gradient; returns its figures.

    Raises NotFinite that names the term, or the loss, that is no finite number.
    """
    terms = {"loss": loss, **terms}
    terms = {name: value.detach() if torch.is_tensor(value) else value for name, value in terms.items()}
    for name in [name for name in terms if name.startswith("loss_")]:  # a term says more than their sum
        check_finite(name, terms[name])
    check_finite("the loss", loss)
    (share * loss).backward()
    return terms


def descend(model, optimizer, parts: list[dict], learning_rate: float, max_grad_norm: float) -> dict:
    """One step of the optimiser on the gradients that `backward` has left; returns its figures."""
    parallel.sum_gradients(model.parameters())
    parts = [{name: float(value) for name, value in part.items()} for part in parts]  # as in gather_evaluation
    figures = combine([part for parts in parallel.gather(parts) for part in parts])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)  # []
    check_finite("the gradient norm", norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return {**figures, "grad_norm": norm.item()}


def learning_rates(config) -> list[float]:
    """The learning rate of every step. Raises InputError where the library refuses the settings.

    The shape is the library's. Its warm-up starts at 0, where a step teaches nothing: ours rises
    from 1 / (warmup_steps + 1), and reaches the full rate at the same step.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], config.learning_rate)  # [1] carries the rate, no more
    name, warmup, total = config.lr_scheduler_type, config.warmup_steps, config.max_steps
    try:
        schedule = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        factor = schedule.lr_lambdas[0]
        factors = [factor(step) for step in range(total)]
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"--lr-scheduler-type: {name}: {error}; linear always works") from None
    if name != "constant":  # which knows no warm-up
        first = range(min(warmup, total))
        factors[: len(first)] = [(step + 1) / (warmup + 1) for step in first]
    return [config.learning_rate * factor for factor in factors]


def gather_evaluation(parts: list, num_principles: int | None = None) -> dict:
    """The means over questions, with their intervals, from (values [q] by name, an example) of all processes.

    With `num_principles` SI is among them: it is clamped here, after all averaging.
    """
    # On the CPU: of a tensor on a GPU every process would open a context there.
    parts = [({name: value.cpu() for name, value in values.items()}, example) for values, example in parts]
    everywhere = [part for parts in parallel.gather(parts) for part in parts]
    columns = {name: torch.cat([values[name] for values, _ in everywhere]) for name in everywhere[0][0]}  # [N] each
    result = {name: interval(column) for name, column in columns.items() if len(column)}
    if num_principles:
        result["si"] = si_interval(columns["mi_row"], num_principles)
    first = next(iter(columns.values()))
    return {"questions": len(first), **result, "example": everywhere[0][1]}


def batch_figures(batch, rewards, scores=None) -> dict:
    """What is logged of this process's completions beside their losses; see steps.combine."""
    spread = rewards.values.amax(-1) - rewards.values.amin(-1)  # [Q, K]
    lengths = batch.mask.sum(-1)  # [Q, K, G]
    figures = {
        "items": len(batch.tasks),
        "tokens": lengths.sum().item(),
        "reward": rewards.values.mean().item(),
        "zero_variance_groups": (spread == 0).float().mean().item(),
        "completion_length": lengths.float().mean().item(),
        "truncated": batch.truncated.float().mean().item(),
        "entropy": ((batch.entropy * lengths).sum() / lengths.sum()).item(),
    }
    if scores is not None:
        figures["format"] = rewards.formats.mean().item()
        figures["mi_row"] = mutual_information(scores.flatten(0, 1)).row.item()
    return figures


def sample_rows(batch, rewards, scores=None) -> list[dict]:
    """One completion of the first question under each of its principles, for samples.jsonl."""
    task, rows = batch.tasks[0], []
    for i, principle in enumerate(task.principles):
        row = {"question": task.question.text, "principle": principle.text, "completion": batch.texts[0][i][0]}
        under = [] if scores is None else scores[0, 0, i].tolist()  # K
        by_principle = {p.id: round(score, 3) for p, score in zip(task.principles, under)}
        rows.append({**row, "reward": rewards.values[0, i, 0].item(), "scores": by_principle or None})
    return rows
