"""The numbers of docs/one-step.md: what the program computes from one question, at the start and after training.

All that experiments/one_step.py asks of the program stands here, most of it in `Program`.
"""

import copy
import itertools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

import sinkhorn
import train
from experiments.common import ROOT
from metrics import share_of_ceiling
from support import checkpoint, tiny
from support.answers import answer_is_right
from support.data import load_data
from support.steps import Step, learning_rates

PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
RUNS = {"ENIGMA": (), "GRPO alone": ("--lambda-mi", "0", "--lambda-ot", "0")}
STEPS = 35, 70
SHOWN = 2  # of the four completions of each principle, the one whose score matrix is drawn: the third
LENGTH = 0.02  # of the small step along a gradient
EPSILONS = 0.01, 0.1, 1, 10  # of the mean cost
TERMS = {"loss_grpo": "GRPO", "loss_mi": "SAMI", "loss_ot": "transport"}


@dataclass
class Moment:
    """The question at one moment of a training: K principles, G completions of each."""

    batch: train.Batch  # Q = 1
    targets: train.Targets
    rewards: torch.Tensor  # [K, G]
    old_logp: torch.Tensor  # [K, G, T] of the tokens, by the policy that sampled them
    scores: torch.Tensor  # [G, K, K]
    states: torch.Tensor  # [n, d] of the cloud's tokens, by the policy
    start_states: torch.Tensor  # [n, d] of the same tokens, by the frozen start
    terms: dict  # name -> number: the loss, its terms, and what is logged beside them
    gradients: dict  # name of a term -> its gradient without its weight λ, a tensor for each weight of the model

    @property
    def names(self) -> list:
        """Short names of the principles."""
        known = {style.texts[0]: name for name, style in tiny.STYLES.items()}
        return [known[principle.text] for principle in self.batch.tasks[0].principles]  # K

    @property
    def si(self) -> float:
        return share_of_ceiling(self.terms["mi_row"], len(self.names))

    @property
    def working(self):
        """Whether a completion calculates; else it guesses."""
        return self._of_each(lambda text: " = " in text)  # [K, G] bool

    @property
    def right(self):
        answer = self.batch.tasks[0].question.answer
        return self._of_each(lambda text: answer_is_right(text, answer))  # [K, G] bool

    def _of_each(self, asked):
        return torch.tensor([[asked(text) for text in texts] for texts in self.batch.texts[0]])  # [K, G]

    def pair(self) -> tuple:
        """Places (i, g) of a guess and of a working, of the first group that has both."""
        working = self.working  # [K, G]
        i = int((working.any(1) & ~working.all(1)).nonzero()[0])
        return (i, int((~working[i]).nonzero()[0])), (i, int(working[i].nonzero()[0]))


class Program:
    """The embedded model, its frozen start, and the first question of a training with seed 0.

    That training draws four questions a step. With one, the first is the same, and so are its
    principles and its random numbers, which depend on seed, step and place alone.
    """

    def __init__(self):
        self.config = train.parse(["--principles", PRINCIPLES, "--num-questions", "1", "--eval-questions", "1"])
        self.model, self.tokenizer = train.load(self.config)
        self.model.cpu()  # whose numbers the page has
        self.start = copy.deepcopy(self.model).requires_grad_(False)
        self.data = load_data(self.model, self.tokenizer, self.config)
        self.tasks = train.draw(self.data.questions, self.data.principles, self.config, 0)  # 1

    @property
    def weights(self) -> list:
        return list(self.model.parameters())

    def moment(self, trained: Path | None = None) -> Moment:
        """What the loop computes from the question, by the start or by the weights of a checkpoint."""
        weights = checkpoint.read(trained)["weights"] if trained else self.start.state_dict()
        self.model.load_state_dict(weights, strict=False)  # a checkpoint leaves out the head, which is the embedding
        num, template = self.config.num_generations, self.data.template
        batch = train.sample(self.model, self.tokenizer, template, self.tasks, num, self.config)
        rewards = train.reward_completions(batch, self.config)
        targets = train.make_targets(self.model, self.start, batch, rewards, self.config)
        outputs, loss, terms = self.read(batch, targets)
        gradients = {name: torch.autograd.grad(terms[name], self.weights, retain_graph=True) for name in TERMS}
        numbers = {name: float(torch.as_tensor(value).detach()) for name, value in {"loss": loss, **terms}.items()}
        found = (of[0].detach() for of in (rewards.values, outputs.logp, outputs.scores, outputs.states))
        return Moment(batch, targets, *found, targets.reference_states[0], numbers, gradients)

    def read(self, batch, targets) -> tuple:
        """(Outputs, loss, terms) of the batch by the model as it is now."""
        outputs = train.read(self.model, batch, targets.ot_tokens, self.config, self.config.num_generations)
        return outputs, *train.losses(outputs, batch, targets, self.config)

    @torch.no_grad()
    def along(self, moment: Moment, name: str) -> tuple:
        """(change of the log-probabilities [K, G], S_ε) after a small step down the gradient of one term."""
        gradient, kept = moment.gradients[name], [weight.clone() for weight in self.weights]
        before, _ = self.read_again(moment)
        for weight, slope in zip(self.weights, gradient):
            weight -= LENGTH / norm(gradient) * slope
        after, terms = self.read_again(moment)
        for weight, old in zip(self.weights, kept):
            weight.copy_(old)
        return after - before, terms["loss_ot"]

    def step(self, moment: Moment) -> dict:
        """Take the first optimiser step of the loop, and read the batch again. The model is left changed."""
        kept, step = [weight.detach().clone() for weight in self.weights], Step(0, learning_rates(self.config)[0])
        before, _ = self.read_again(moment)
        optimizer = torch.optim.AdamW(self.weights, weight_decay=0.0)
        train.update(self.model, optimizer, moment.batch, moment.targets, step, self.config)
        after, terms = self.read_again(moment)
        moved = norm([weight.detach() - old for weight, old in zip(self.weights, kept)])
        return {"rate": step.learning_rate, "grad_norm": step.passes[0]["grad_norm"], "moved": moved, "terms": terms,
                "change": after - before}

    @torch.no_grad()
    def read_again(self, moment: Moment) -> tuple:
        """(log-probabilities of a moment's completions [K, G], nats; terms) by the model as it is now."""
        old = moment.old_logp[None]  # [Q, K, G, T]
        outputs, _, terms = self.read(moment.batch, replace(moment.targets, old_logp=old))
        return (outputs.logp * moment.batch.mask).sum(-1)[0], {name: float(value) for name, value in terms.items()}


def number(value, digits: int = 2) -> str:
    """A number as the page and its figures show it."""
    text = f"{float(value):.{digits}f}"
    return text.replace("-", "−" if float(text) else "")


def norm(tensors) -> float:
    return torch.cat([t.flatten() for t in tensors]).norm().item()


def cosines(gradients: dict) -> dict:
    """(name, name) -> cosine of the gradients of two terms."""
    flat = {name: torch.cat([t.flatten() for t in tensors]) for name, tensors in gradients.items()}
    return {(a, b): cosine_similarity(flat[a], flat[b], dim=0).item() for a, b in itertools.combinations(flat, 2)}


# --------------------------------------------------------------------------------------------------
# The two clouds of a moment


@dataclass
class Transport:
    """The clouds at one ε."""

    plan: torch.Tensor  # [n, n]
    divergence: float  # S_ε
    errors: dict  # "textbook" or "fast" -> [(iterations, error of the plan's row sums), ...] until it has converged

    def strongest(self) -> tuple:
        """(rows, columns) of the fewest links that carry half of the plan's mass."""
        mass, places = self.plan.flatten().sort(descending=True)  # [n·n] both
        places = places[: int((mass.cumsum(0) < 0.5).sum()) + 1]
        return places // self.plan.shape[1], places % self.plan.shape[1]


def transports(moment: Moment) -> dict:
    """ε, in units of the mean cost -> Transport."""
    x, y = moment.states, moment.start_states  # [n, d] both
    cost, found = torch.cdist(x.double(), y.double()).square(), {}  # [n, n]
    for eps_rel in EPSILONS:
        eps = sinkhorn.relative_eps(x, y, eps_rel)  # []
        f, g, _ = sinkhorn.sinkhorn_potentials(cost, eps, max_iter=5000)
        value, _ = sinkhorn.sinkhorn_divergence(x, y, eps)
        errors = {name: errors_by_iteration(x, y, eps, name == "fast") for name in ("textbook", "fast")}
        found[eps_rel] = Transport(sinkhorn.transport_plan(f, g, cost, eps), value.item(), errors)
    return found


def errors_by_iteration(x, y, eps, fast: bool) -> list:
    """(iterations, error) of solves that are stopped early, and last of the one that has converged."""
    _, end = sinkhorn.entropic_ot(x, y, eps, max_iter=5000, fast=fast)
    counts = {round(10 ** (k / 12)) for k in range(60)} & set(range(1, end.iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each that is stopped
        infos = [sinkhorn.entropic_ot(x, y, eps, max_iter=count, fast=fast)[1] for count in sorted(counts)]
    return [(info.iterations, info.marginal_error.item()) for info in (*infos, end)]


def principal_axes(points) -> tuple:
    """(the first two principal axes [d, 2] of points [n, d], the share of the variance along them)."""
    _, spread, axes = torch.linalg.svd(points - points.mean(0), full_matrices=False)  # [d], [d, d]
    return axes[:2].T, (spread[:2].square().sum() / spread.square().sum()).item()
