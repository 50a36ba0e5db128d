"""ENIGMA: train a language model to reason by your principles, with no reward model and no labels.

    python train.py --principles principles/reasoning.txt      # embedded model: two minutes, no GPU
    python train.py --principles my.txt --model google/gemma-3-1b-it --dataset my.jsonl
    python train.py --preferences tiny                         # InfoPO on preference pairs instead
    python train.py --resume latest                            # after Ctrl-C, or a kill

A step draws Q questions and K principles for each, and samples G completions under each. Its loss

    L = L_GRPO + lambda_mi * L_SAMI + lambda_ot * S_eps

is a mean over questions of what each gives alone:

    L_GRPO   clipped policy loss; the only reward is the completion's format                 grpo.py
    L_SAMI   symmetric InfoNCE: which principle and which completion belong together?        infonce.py
    S_eps    Sinkhorn divergence of hidden states from those of the frozen reference         sinkhorn.py

In order: the loop, a batch, the rewards, the losses, evaluation. Preferences have a loop of their own,
in support/preferences.py. What surrounds both loops is support/run.py.
"""

import support  # isort: skip  # noqa: F401  (before torch: see there)

import math
import random
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from grpo import format_reward, group_advantages, grpo_loss
from infonce import symmetric_info_nce
from metrics import information, mutual_information
from sinkhorn import relative_eps, sinkhorn_divergence
from support import memory, parallel, preferences, sampling, tiny
from support.answers import answer_is_right, cot_mask
from support.command import exit_status, parse
from support.data import Data, items_of_step, load_data
from support.errors import check_finite
from support.files import Principle, Question
from support.model import add_lora, frozen_copy, load_model
from support.prompts import prompt_limit
from support.run import Run, choose_directory, settle
from support.sampling import uniform_numbers
from support.scoring import frozen_reference, read_completions
from support.settings import Config
from support.steps import backward, combine, descend, gather_evaluation, micro_batches


def loop(run: Run) -> None:
    """Sample, reward, compute the losses, step, log."""
    model, reference, tokenizer, data, config = run.model, run.reference, run.tokenizer, run.data, run.config
    for step in run.steps():
        if run.evaluation_due():
            run.record_evaluation(evaluate(model, reference, tokenizer, data, config))
        step.start_clock()
        tasks = draw(data.questions, data.principles, config, step.number)
        batch = sample(model, tokenizer, data.template, tasks, config.num_generations, config)
        step.log_seconds("seconds_sampling")
        scores = read_scores(model, batch, config) if config.mi_reward else None  # [Q, G, K, K]
        rewards = reward_completions(batch, config, scores)
        targets = make_targets(model, reference, batch, rewards, config)
        update(model, run.optimizer, batch, targets, step, config)
        step.add_batch(batch, rewards, scores)
        run.end_step(step)  # logs; writes a checkpoint where one is due; ends the run after Ctrl-C
    run.record_evaluation(evaluate(model, reference, tokenizer, data, config))


def update(model, optimizer, batch, targets, step, config: Config) -> None:
    """One optimiser step for each pass over the completions."""
    for _ in range(config.num_iterations):
        figures = []
        for cut, share in micro_batches(len(batch.tasks), config.rows_at_once // config.rows_per_question):
            part, fixed = take(batch, cut), take(targets, cut)
            outputs = read(model, part, fixed.ot_tokens, config, config.scored_generations)
            loss, terms = losses(outputs, part, fixed, config)
            figures.append(backward(loss, terms, share))
            if outputs.scores is not None and step.scores is None:  # for the log
                step.scores = outputs.scores.detach()  # [q, N, K, K]
        step.passes.append(descend(model, optimizer, figures, step.learning_rate, config.max_grad_norm))


def train(config: Config) -> Path:
    """A whole run; returns its directory. Under torchrun a process takes a part of every batch."""
    parallel.start()
    directory = choose_directory(config)
    model, tokenizer = load(config)
    data = (load_data if config.principles else preferences.load_pairs)(model, tokenizer, config)
    config.gradient_checkpointing, config.micro_batch, line = memory.fit(model, data, config)
    print(line, flush=True)
    # The reference is a frozen copy; with LoRA, the model without its adapters. Preferences keep its log-probs.
    reference = frozen_copy(model, config.bf16) if config.principles and not config.lora_rank else None
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    run = Run(directory, config, model, reference, tokenizer, optimizer, data)
    with run.catching():
        loop(run) if config.principles else preferences.loop(run)
        run.finish()
    return directory


def load(config: Config):
    """(model, tokenizer), on the GPU if there is one; settings that were left out get a value, see run.settle."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model, tokenizer = load_model(tiny.model_path(config.model), device)
    settle(config, model, tokenizer)
    return add_lora(model, config.lora_rank, config.seed, config.bf16) if config.lora_rank else model, tokenizer


# --------------------------------------------------------------------------------------------------
# A batch: Q questions x K principles x G completions of at most T tokens


@dataclass
class Task:
    """A question, and the principles under which completions of it are sampled and compared."""

    question: Question
    principles: list[Principle]  # K
    key: str  # seeds whatever is random about the task


@dataclass
class Batch:
    """The completions of Q tasks."""

    tasks: list[Task]  # Q
    prompts: list  # Q lists of K prompts, each a list of token ids
    texts: list  # Q lists of K lists of G completions
    tokens: torch.Tensor  # [Q, K, G, T]
    mask: torch.Tensor  # [Q, K, G, T] bool, completion tokens
    cot: torch.Tensor  # [Q, K, G, T] bool, tokens of the chain of thought
    truncated: torch.Tensor  # [Q, K, G] bool
    entropy: torch.Tensor  # [Q, K, G] nats per token

    @property
    def completions(self) -> tuple:
        """What scoring.read_completions reads of them."""
        return self.prompts, self.tokens, self.mask, self.cot


@dataclass
class Outputs:
    """What the policy computes from a batch's completions."""

    logp: torch.Tensor  # [Q, K, G, T] of each token, under the completion's own principle
    states: torch.Tensor  # [Q, n, d] hidden states that predict the tokens of the Sinkhorn term
    scores: torch.Tensor | None  # [Q, N, K, K] CoT i under principle j, of the first N completions of a group; or None


@dataclass
class Targets:
    """What the losses of a batch hold fixed while the policy moves."""

    advantages: torch.Tensor  # [Q, K, G]
    old_logp: torch.Tensor | None  # [Q, K, G, T] of the policy that sampled; None for one pass: it is the policy
    ot_tokens: torch.Tensor  # [Q, n] indices into K·G·T: tokens whose predicting states are compared
    ot_weights: torch.Tensor  # [Q, n] their weights; 0 where a question has fewer than n tokens
    reference_logp: torch.Tensor | None  # [Q, K, G, T] by the frozen reference, with --beta
    reference_states: torch.Tensor | None  # [Q, n, d] by the frozen reference, where a loss needs it


def take(table, cut: slice):
    """Some questions of a Batch or of Targets, all of whose fields have the questions first."""
    values = {field.name: getattr(table, field.name) for field in fields(table)}
    return replace(table, **{name: value[cut] for name, value in values.items() if value is not None})


def draw(questions: list, principles: list, config: Config, step: int) -> list[Task]:
    """This process's tasks of a step, a function of seed and step alone. An epoch repeats no question."""
    rng, key = random.Random(f"{config.seed} step {step}"), f"{config.seed} step {step} question"
    places = items_of_step(len(questions), step, config.num_questions, config.seed)
    tasks = [
        Task(questions[place], rng.sample(principles, config.num_principles), f"{key} {n}")
        for n, place in enumerate(places)
    ]
    return tasks[parallel.share(len(tasks))]


@torch.no_grad()
def sample(model, tokenizer, template, tasks: list[Task], num_generations: int, config: Config) -> Batch:
    """Sample G completions of each question under each principle."""
    num_principles = len(tasks[0].principles)
    pairs = [(task.question.text, principle.text) for task in tasks for principle in task.principles]  # Q·K
    prompts = template.encode(tokenizer, pairs, prompt_limit(model, config.max_completion_length))  # Q·K
    names, length = [task.key for task in tasks], config.max_completion_length
    how = config.temperature, template.prefill, config.bf16
    out, texts = sampling.write(model, tokenizer, prompts, names, num_generations, length, *how)
    tokens, mask, truncated, entropy = (
        t.unflatten(0, (len(tasks), num_principles)) for t in (out.tokens, out.mask, out.truncated, out.entropy)
    )  # [Q, K, G, T] twice, [Q, K, G] twice
    return Batch(
        tasks=tasks,
        prompts=[prompts[q : q + num_principles] for q in range(0, len(prompts), num_principles)],
        texts=[texts[q : q + num_principles] for q in range(0, len(texts), num_principles)],
        tokens=tokens,
        mask=mask,
        cot=cot_mask(tokenizer, tokens, mask),
        truncated=truncated,
        entropy=entropy,
    )


def read(model, batch: Batch, ot_tokens, config: Config, generations: int = 0) -> Outputs:
    """Forward pass: each completion after its own prompt and, for scores, the first `generations` after all."""
    how = {"generations": generations, "picked": ot_tokens, **config.how_read}
    outputs = Outputs(*read_completions(model, *batch.completions, config.temperature, **how))
    check_finite("a hidden state", outputs.states)
    return outputs


@torch.no_grad()
def make_targets(model, reference, batch: Batch, rewards: "Rewards", config: Config) -> Targets:
    """What the passes over a batch hold fixed; it takes a forward pass of the frozen reference."""
    ot_tokens, ot_weights = choose_ot_tokens(batch, config)  # [Q, n] both
    old_logp = reference_logp = reference_states = None
    if config.num_iterations > 1:  # after the first pass the policy is another one than sampled
        old_logp = read(model, batch, ot_tokens, config).logp  # [Q, K, G, T]
    if config.needs_reference:
        reference_logp, reference_states = read_reference(model, reference, batch, ot_tokens, config)
    return Targets(rewards.advantages, old_logp, ot_tokens, ot_weights, reference_logp, reference_states)


@torch.no_grad()
def read_reference(model, reference, batch: Batch, ot_tokens, config: Config):
    """(logp [Q, K, G, T], or None without --beta; states [Q, n, d]) by the frozen reference."""
    with frozen_reference(model, reference) as frozen:
        how = {"generations": 0, "picked": ot_tokens, "own_logp": config.beta > 0, **config.how_read}
        logp, states, _ = read_completions(frozen, *batch.completions, config.temperature, **how)
    check_finite("a hidden state of the reference", states)
    return logp, states


def choose_ot_tokens(batch: Batch, config: Config):
    """(indices into K·G·T, weights), [Q, n] both, of n random completion tokens of each question."""
    mask, keys = batch.mask, [f"{task.key} cloud" for task in batch.tasks]
    shape = *mask.shape[1:3], config.max_completion_length
    priority = uniform_numbers(keys, *shape, device=mask.device)[..., : mask.shape[-1]]  # [Q, K, G, T]
    priority = priority.masked_fill(~mask, -1).flatten(1)  # [Q, K·G·T] padding comes last
    chosen = priority.topk(min(config.ot_tokens, priority.shape[1])).indices  # [Q, n] without replacement
    weights = mask.flatten(1).gather(1, chosen).float()  # [Q, n]
    return chosen, weights / weights.sum(1, keepdim=True)


# --------------------------------------------------------------------------------------------------
# The rewards


@dataclass
class Rewards:
    """What a batch's completions have earned."""

    formats: torch.Tensor  # [Q, K, G] 1 for a completion that keeps the format
    values: torch.Tensor  # [Q, K, G] the formats; with --mi-reward for the information too
    advantages: torch.Tensor  # [Q, K, G] over the G of the question and principle


def reward(question: Question, principle: Principle, text: str) -> float:
    """The only reward: does the text keep the format? For another one, change this function."""
    return format_reward(text)


@torch.no_grad()
def read_scores(model, batch: Batch, config: Config):
    """The scores of all completions, [Q, G, K, K], that --mi-reward computes the information from."""
    how = {"generations": batch.tokens.shape[2], **config.how_read}
    return read_completions(model, *batch.completions, config.temperature, **how)[2]  # [Q, G, K, K]


def reward_completions(batch: Batch, config: Config, scores=None) -> Rewards:
    """Each completion's reward and advantage. One that was cut at the limit earns nothing.

    With scores, [Q, G, K, K], and --mi-reward W, one that keeps the format earns in addition W times
    its information: the nats its chain of thought carries about its principle, -log K to log K.
    """
    formats = [
        [[reward(task.question, p, text) for text in texts] for p, texts in zip(task.principles, row)]
        for task, row in zip(batch.tasks, batch.texts)
    ]
    formats = torch.tensor(formats, device=batch.mask.device).masked_fill(batch.truncated, 0)  # [Q, K, G]
    values = formats  # [Q, K, G]
    if scores is not None:
        nats = information(scores.flatten(0, 1)).unflatten(0, scores.shape[:2]).mT  # [Q, K, G]
        values = formats * (1 + config.mi_reward * nats.clamp(min=-math.log(nats.shape[1])))  # [Q, K, G]
    scale = "std" if config.scale_rewards == "group" and values.shape[-1] > 1 else "none"
    return Rewards(formats, values, group_advantages(values, scale))


# --------------------------------------------------------------------------------------------------
# The losses


def losses(outputs: Outputs, batch: Batch, targets: Targets, config: Config):
    """(loss, terms by name), means over questions. A new loss is a function, and its lines here."""
    terms = policy_terms(outputs.logp, batch, targets, config)
    loss = terms["loss_grpo"]  # []
    if config.lambda_mi:
        terms |= information_terms(outputs.scores, config)
        loss = loss + config.lambda_mi * terms["loss_mi"]  # []
    if config.lambda_ot:
        terms |= drift_terms(outputs.states, targets.reference_states, targets.ot_weights, config)
        loss = loss + config.lambda_ot * terms["loss_ot"]  # []
    return loss, terms


def policy_terms(logp, batch: Batch, targets: Targets, config: Config) -> dict:
    """GRPO of the K·G completions of each question. On the first pass the ratio is 1."""
    old = logp.detach() if targets.old_logp is None else targets.old_logp  # [Q, K, G, T]
    per_question, figures = [], []
    for q, mask in enumerate(batch.mask.flatten(1, 2)):  # [K·G, T]
        loss, stats = grpo_loss(
            logp[q].flatten(0, 1),
            old[q].flatten(0, 1),
            targets.advantages[q].flatten(),
            mask,
            level=config.importance_sampling_level,
            normalizer={"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant"}[config.loss_type],
            clip_low=config.epsilon,
            clip_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            max_tokens=config.max_completion_length,
            ref_logp=targets.reference_logp[q].flatten(0, 1) if config.beta else None,
            beta=config.beta,
        )
        tokens = int(mask.sum())
        ratios = tokens if config.importance_sampling_level == "token" else len(mask)
        per_question.append(loss)
        figures.append({"items": 1, "tokens": tokens, "ratios": ratios, **stats})
    return {"loss_grpo": torch.stack(per_question).mean(), **combine(figures)}  # []


def information_terms(scores, config: Config) -> dict:
    """SAMI's symmetric InfoNCE of scores [Q, N, K, K], and the information in them, in nats."""
    shown = mutual_information(scores.detach().flatten(0, 1))
    return {
        "loss_mi": symmetric_info_nce(scores / config.mi_temperature),  # []
        "mi_row": shown.row,  # []
        "mi_column": shown.column,  # []
    }


def drift_terms(states, reference_states, weights, config: Config) -> dict:
    """The Sinkhorn divergence from the frozen reference, and how well its iterations have converged."""
    value, info = drift(states, reference_states, weights, config)
    return {
        "loss_ot": value.mean(),  # []
        "sinkhorn_iterations": info.iterations,
        "sinkhorn_error": info.marginal_error.max().float(),  # []
        "sinkhorn_converged": info.converged,
    }


def drift(states, reference_states, weights, config: Config):
    """(Sinkhorn divergence [Q] of two clouds [Q, n, d] with the same weights [Q, n], its info)."""
    eps = relative_eps(states, reference_states, config.ot_eps, weights, weights)  # [Q]
    return sinkhorn_divergence(states, reference_states, eps, weights, weights)


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(model, reference, tokenizer, data: Data, config: Config) -> dict:
    """All metrics on the held-out questions: their means with 95% bootstrap intervals."""
    rng, num = random.Random(f"{config.seed} evaluation"), config.num_principles
    tasks = [
        Task(question, rng.sample(data.principles, num), f"{config.seed} evaluation {n}")
        for n, question in enumerate(data.held_out)
    ][parallel.share(len(data.held_out))]
    size = max(1, config.eval_rows // num)
    pieces = [tasks[i : i + size] for i in range(0, len(tasks), size)]
    models = model, reference, tokenizer, data.template
    return gather_evaluation([evaluate_tasks(*models, piece, config) for piece in pieces], num)


@torch.no_grad()
def evaluate_tasks(model, reference, tokenizer, template, tasks: list[Task], config: Config):
    """(values [Q] by name, `accuracy` of known answers alone; an example) of one completion under each principle."""
    batch = sample(model, tokenizer, template, tasks, 1, config)
    rewards = reward_completions(batch, config)
    ot_tokens, ot_weights = choose_ot_tokens(batch, config)  # [Q, n] both
    outputs = read(model, batch, ot_tokens, config, 1)
    _, reference_states = read_reference(model, reference, batch, ot_tokens, config)  # [Q, n, d]
    scores = outputs.scores[:, 0]  # [Q, K, K] of the one completion
    known = [(task.question.answer, row) for task, row in zip(tasks, batch.texts) if task.question.answer is not None]
    right = [[answer_is_right(texts[0], answer) for texts in row] for answer, row in known]
    closed = [["</reasoning>" in texts[0] for texts in row] for row in batch.texts]
    example = {"question": tasks[0].question.text, "principle": tasks[0].principles[0].text}
    return {
        "format": rewards.formats.mean((1, 2)),  # [Q] each
        "closed": torch.tensor(closed).float().mean(1),
        "accuracy": torch.tensor(right).float().reshape(len(known), config.num_principles).mean(1),
        "mi_row": information(scores).mean(1),
        "mi_column": information(scores, "column").mean(1),
        "sinkhorn": drift(outputs.states, reference_states, ot_weights, config)[0],
        "completion_length": batch.mask.sum(-1).float().mean((1, 2)),
    }, example | {"completion": batch.texts[0][0][0]}


def main(argv=None) -> int:
    """Train by the command line; returns the exit status, see command.exit_status."""
    return exit_status(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
