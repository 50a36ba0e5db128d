"""ENIGMA: train a language model to reason by your principles, with no reward model and no labels.

    python train.py --principles principles/reasoning.txt      # embedded model: two minutes, no GPU
    python train.py --principles my.txt --model google/gemma-3-1b-it --dataset my.jsonl
    python train.py --preferences tiny                         # InfoPO on preference pairs; or both
    python train.py --resume latest                            # after Ctrl-C, or a kill

A step draws Q questions and K principles for each, and samples G completions of each pair. Its loss

    L = L_GRPO + lambda_mi * L_SAMI + lambda_ot * S_eps     (+ lambda_pref * L_InfoPO, with pairs)

is a mean over questions of what each gives alone:

    L_GRPO   clipped policy loss; the only reward is the completion's format            grpo.py
    L_SAMI   symmetric InfoNCE: which principle and which completion belong together?   infonce.py
    S_eps    Sinkhorn divergence of hidden states from those of the frozen start        sinkhorn.py

In order: the loop, a batch, the losses, evaluation. What surrounds the loop is run.py.
"""

import math
import random
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from grpo import format_reward, group_advantages, grpo_loss
from infonce import symmetric_info_nce
from metrics import column_information, information, interval, mutual_information, sufficiency_interval
from sinkhorn import relative_eps, sinkhorn_divergence
from support import answers, memory, parallel, sampling, tiny
from support.answers import answer_is_right, cot_mask
from support.command import outcome, parse
from support.data import Data, load_data
from support.errors import check_finite, diverging
from support.files import Principle, Question
from support.model import add_lora, frozen_copy, has_bf16, load_model
from support.preferences import evaluate_pairs, preference_loss
from support.prompts import eos_ids, prompt_limit, set_date
from support.run import Run, Step, choose_directory, make_schedule
from support.sampling import uniform_numbers
from support.scoring import frozen_start, read_completions
from support.settings import Config


def loop(run: Run, model, reference, tokenizer, optimizer, schedule, data: Data, config: Config):
    """Sample, reward, score, lose, step, log."""
    for step in run.steps():
        if run.evaluation_due():
            run.record_evaluation(evaluate(model, reference, tokenizer, data, config))
        if data.principles:
            tasks = draw(data.questions, data.principles, config, step.number)
            step.tasks = tasks[parallel.share(len(tasks))]
            step.batch = sample(model, tokenizer, step.tasks, config.num_generations, config)
            add_rewards(step.batch, config, model)
            step.lap("seconds_sampling")
            step.batch.start = read_start(model, reference, step.batch, config) if config.needs_start else None
        step.pairs = data.next_pairs(step.number, config.num_pairs)
        update(model, optimizer, step, config)
        step.terms["learning_rate"] = schedule.get_last_lr()[0]
        schedule.step()
        run.end_step(step)  # logs; writes a checkpoint where one is due; ends the run after Ctrl-C
    run.record_evaluation(evaluate(model, reference, tokenizer, data, config))


def update(model, optimizer, step: Step, config: Config) -> None:
    """One optimiser step for each pass over the completions, or a single one on pairs alone."""
    batch, pairs = step.batch, step.pairs
    if batch and config.num_iterations > 1:  # after a pass it is another policy
        with torch.no_grad():
            batch.old_logp = read(model, batch, config).logp  # [Q, K, G, T]
    for _ in range(config.num_iterations if batch else 1):
        terms = {}
        for part, share in micro_batches(batch, config.rows_at_once // config.rows_of_a_question):
            now = read(model, part, config, config.mi_generations if config.lambda_mi else 0)
            backward(*losses(now, part, config), share, terms)
            step.scores += [] if now.scores is None else [now.scores.detach()]  # for the log
        for part, share in micro_batches(pairs, config.rows_at_once // 2):
            backward(*preference_loss(model, part, config), share, terms)
        parallel.sum_gradients(model.parameters())
        terms = parallel.total(terms)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)  # []
        check_finite("the gradient norm", norm, terms)
        optimizer.step()
        optimizer.zero_grad()
        step.passes.append(terms | {"grad_norm": norm.item()})


def micro_batches(batch, size: int) -> list:
    """(part, share) of each micro-batch of `size` or 1; the shares of all processes sum to 1."""
    count, size = len(batch) if batch else 0, max(1, size)
    total = parallel.total({"count": count})["count"]
    return [(batch[i : i + size], min(size, count - i) / total) for i in range(0, count, size)]


def backward(loss, terms: dict, share: float, sums: dict) -> None:
    """Add the share of a micro-batch's loss to the gradient, and that of its terms to `sums`."""
    terms = {"loss": loss, **terms}
    check_finite("the loss", loss, terms)
    (share * loss).backward()
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + share * float(torch.as_tensor(value).detach())


def train(config: Config) -> Path:
    """A whole run; returns its directory. Under torchrun a process takes a part of every batch."""
    parallel.start()
    directory = choose_directory(config)
    model, tokenizer = load(config)
    data = load_data(model, tokenizer, config)
    config.gradient_checkpointing, config.micro_batch, line = memory.fit(model, data, config)
    print(line, flush=True)
    # The frozen start is a copy of the model; with LoRA it is the model without its adapters.
    reference = frozen_copy(model, config.bf16) if data.principles and not config.lora_rank else None
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = make_schedule(optimizer, config)
    run = Run(directory, config, model, tokenizer, optimizer, schedule, data)
    with run.guarded():  # a number that is not finite leaves failure/; a full disk is one line
        loop(run, model, reference, tokenizer, optimizer, schedule, data, config)
        run.finish()
    return directory


def load(config: Config):
    """(model, tokenizer) on the GPU if there is one; with --lora-rank the adapters are added."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if config.bf16 is None:  # the embedded model is too small to gain by it on a CPU
        config.bf16 = has_bf16(device) and (device.type == "cuda" or config.model != "tiny")
    model, tokenizer = load_model(tiny.model_path(config.model), device)
    config.date = set_date(tokenizer, parallel.gather(set_date(tokenizer, config.date))[0])  # of process 0
    return add_lora(model, config.lora_rank, config.seed, config.bf16) if config.lora_rank else model, tokenizer


# --------------------------------------------------------------------------------------------------
# A batch: Q questions x K principles x G completions of at most T tokens


@dataclass
class Task:
    """A question, and the principles under which completions of it are sampled and compared."""

    question: Question
    principles: list[Principle]  # K
    key: str  # seeds whatever is random about the task


class Sliced:
    """A dataclass whose fields share their first dimension: batch[2:4] holds questions 2 and 3."""

    def __getitem__(self, part: slice):
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if value is None else value[part] for name, value in values.items()})


@dataclass
class Reading(Sliced):
    """What a model computes from a batch's completions: the policy's, and the frozen start's."""

    logp: torch.Tensor | None  # [Q, K, G, T] of each token, under the completion's own principle
    states: torch.Tensor  # [Q, n, d] hidden states of the tokens in the cloud
    scores: torch.Tensor | None  # [Q, N, K, K] chain of thought of completion i under principle j


@dataclass
class Batch(Sliced):
    """The completions of Q tasks, and what is computed from them before the losses."""

    tasks: list  # Q Tasks
    prompts: list  # Q lists of K prompts, each a list of token ids
    texts: list  # Q lists of K lists of G completions
    tokens: torch.Tensor  # [Q, K, G, T]
    mask: torch.Tensor  # [Q, K, G, T] bool, completion tokens
    cot: torch.Tensor  # [Q, K, G, T] bool, tokens of the chain of thought
    truncated: torch.Tensor  # [Q, K, G] bool
    entropy: torch.Tensor  # [Q, K, G] nats per token
    cloud: torch.Tensor  # [Q, n] indices into K·G·T: the tokens that the Sinkhorn term compares
    weights: torch.Tensor  # [Q, n] their weights; 0 where a question has fewer than n tokens
    formats: torch.Tensor | None = None  # [Q, K, G] 1 for a completion that keeps the format
    rewards: torch.Tensor | None = None  # [Q, K, G] formats, with --mi-reward the information too
    scores: torch.Tensor | None = None  # [Q, G, K, K] that the information is computed from
    advantages: torch.Tensor | None = None  # [Q, K, G]
    start: Reading | None = None  # by the frozen start
    old_logp: torch.Tensor | None = None  # [Q, K, G, T] by the policy that sampled; None: by this one

    def __len__(self):
        return len(self.tasks)


def draw(questions: list, principles: list, config: Config, step: int) -> list[Task]:
    """The tasks of a step: a function of seed and step alone. An epoch repeats no question."""
    chosen = []
    for index in range(step * config.num_questions, (step + 1) * config.num_questions):
        epoch, position = divmod(index, len(questions))
        order = list(range(len(questions)))
        random.Random(f"{config.seed} epoch {epoch}").shuffle(order)
        chosen.append(questions[order[position]])
    rng = random.Random(f"{config.seed} step {step}")
    return [
        Task(question, rng.sample(principles, config.num_principles), f"{config.seed} step {step} question {n}")
        for n, question in enumerate(chosen)
    ]


@torch.no_grad()
def sample(model, tokenizer, tasks: list[Task], num_generations: int, config: Config) -> Batch:
    """Sample G completions of each question under each principle, and choose the cloud's tokens."""
    pairs = [(task.question.text, principle.text) for task in tasks for principle in task.principles]  # Q·K
    prompts = config.form.encode(tokenizer, pairs, prompt_limit(model, config.max_completion_length))  # Q·K
    num = len(tasks[0].principles)
    keys, shape = [task.key for task in tasks], (num, num_generations, config.max_completion_length)
    uniform = uniform_numbers(keys, *shape, device=model.device)  # [Q, K, G, T]
    ends = eos_ids(model, tokenizer)
    how = config.temperature, ends, tokenizer.pad_token_id, config.bf16
    out = sampling.sample(model, prompts, uniform.flatten(0, 1), *how)
    tokens, mask, truncated, entropy = (
        t.unflatten(0, (len(tasks), num)) for t in (out.tokens, out.mask, out.truncated, out.entropy)
    )  # [Q, K, G, T] twice, [Q, K, G] twice

    valid = mask.flatten(1)  # [Q, K·G·T]
    lots = uniform_numbers([f"{key} cloud" for key in keys], *shape, device=model.device)  # [Q, K, G, T]
    lots = lots[..., : mask.shape[-1]].flatten(1).masked_fill(~valid, -1)  # [Q, K·G·T]
    cloud = lots.topk(min(config.ot_tokens, valid.shape[1])).indices  # [Q, n] without replacement, padding last
    weights = valid.gather(1, cloud).float()  # [Q, n]
    return Batch(
        tasks=tasks,
        prompts=[prompts[q : q + num] for q in range(0, len(prompts), num)],
        texts=answers.decode(tokenizer, tokens, mask, ends, config.form.prefill),
        tokens=tokens,
        mask=mask,
        cot=cot_mask(tokenizer, tokens, mask),
        truncated=truncated,
        entropy=entropy,
        cloud=cloud,
        weights=weights / weights.sum(1, keepdim=True),
    )


def reward(question: Question, principle: Principle, text: str) -> float:
    """The only reward: does the text keep the format? For another one, change this function."""
    return format_reward(text)


def add_rewards(batch: Batch, config: Config, model=None) -> None:
    """Set each completion's reward, and its advantage over the G of its question and principle.

    With --mi-reward W and a model, a completion that keeps the format earns in addition W times its
    information: the nats its chain of thought carries about its principle, from -log K to log K.
    """
    formats = [
        [[reward(task.question, p, text) for text in texts] for p, texts in zip(task.principles, row)]
        for task, row in zip(batch.tasks, batch.texts)
    ]
    formats = torch.tensor(formats, device=batch.mask.device).masked_fill(batch.truncated, 0)  # [Q, K, G] 0 if cut
    batch.formats = batch.rewards = formats
    if config.mi_reward and model:
        with torch.no_grad():
            batch.scores = read(model, batch, config, batch.tokens.shape[2]).scores  # [Q, G, K, K]
        nats = information(batch.scores.flatten(0, 1)).unflatten(0, batch.scores.shape[:2]).mT  # [Q, K, G]
        batch.rewards = batch.formats * (1 + config.mi_reward * nats.clamp(min=-math.log(nats.shape[1])))  # [Q, K, G]
    scale = "std" if config.scale_rewards == "group" and batch.rewards.shape[-1] > 1 else "none"
    batch.advantages = group_advantages(batch.rewards, scale)  # [Q, K, G]


def read(model, batch: Batch, config: Config, generations: int = 0, own_logp: bool = True) -> Reading:
    """Each completion under its own principle; for the scores, `generations` of G under all."""
    tokens = batch.prompts, batch.tokens, batch.mask, batch.cot
    which = config.temperature, generations, batch.cloud, own_logp
    reading = Reading(*read_completions(model, *tokens, *which, **config.how_read))
    check_finite("a hidden state", reading.states)
    return reading


@torch.no_grad()
def read_start(model, reference, batch: Batch, config: Config) -> Reading:
    """The same by the frozen start, from which the drift, and with --beta the KL, is measured."""
    with frozen_start(model, reference) as start:
        return read(start, batch, config, own_logp=config.kl_weight > 0)


# --------------------------------------------------------------------------------------------------
# The losses


@diverging()
def losses(now: Reading, batch: Batch, config: Config):
    """(loss, terms by name), means over questions. A new loss is a function, and a line here."""
    terms = policy_terms(now, batch, config)
    if config.lambda_mi:
        terms |= information_terms(now.scores, config)
    if config.lambda_ot:
        terms |= drift_terms(now.states, batch, config)
    weights = {"loss_grpo": 1.0, "loss_mi": config.lambda_mi, "loss_ot": config.lambda_ot}
    return sum(weight * terms[name] for name, weight in weights.items() if weight), terms


def policy_terms(now: Reading, batch: Batch, config: Config) -> dict:
    """GRPO of a question's K·G completions. In a first pass the ratio is 1, not its gradient 0."""
    old = now.logp.detach() if batch.old_logp is None else batch.old_logp  # [Q, K, G, T]
    by_question = []
    for q in range(len(batch)):
        loss, terms = grpo_loss(
            now.logp[q].flatten(0, 1),
            old[q].flatten(0, 1),
            batch.advantages[q].flatten(),
            batch.mask[q].flatten(0, 1),
            level=config.importance_sampling_level,
            normalizer={"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant"}[config.loss_type],
            clip_low=config.epsilon,
            clip_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            max_tokens=config.max_completion_length,
            ref_logp=batch.start.logp[q].flatten(0, 1) if config.kl_weight else None,
            beta=config.kl_weight,
        )
        by_question.append({"loss_grpo": loss, **terms})
    return {name: torch.stack([terms[name] for terms in by_question]).mean() for name in by_question[0]}


def information_terms(scores, config: Config) -> dict:
    """SAMI's symmetric InfoNCE of scores [Q, N, K, K], and the information in them, in nats."""
    shown = mutual_information(scores.detach().flatten(0, 1))
    return {
        "loss_mi": symmetric_info_nce(scores / config.mi_temperature),  # []
        "mi_row": shown.row,  # []
        "mi_column": shown.column,  # []
    }


def drift_terms(states, batch: Batch, config: Config) -> dict:
    """The Sinkhorn divergence from the frozen start, and how well its iterations have converged."""
    value, info = drift(states, batch, config)
    return {
        "loss_ot": value.mean(),  # []
        "sinkhorn_iterations": info.iterations,
        "sinkhorn_error": info.marginal_error.max().float(),  # []
        "sinkhorn_converged": info.converged,
    }


def drift(states, batch: Batch, config: Config):
    """(Sinkhorn divergence [Q] of states [Q, n, d] from those of the frozen start, its info)."""
    eps = relative_eps(states, batch.start.states, config.ot_eps, batch.weights, batch.weights)  # [Q]
    return sinkhorn_divergence(states, batch.start.states, eps, batch.weights, batch.weights)


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(model, reference, tokenizer, data: Data, config: Config) -> dict:
    """All metrics on held-out questions and pairs: their means with 95% bootstrap intervals."""
    total, values, example = len(data.held_out or data.held_out_pairs), {}, {}
    share, keys = parallel.share(total), [f"{config.seed} evaluation {n}" for n in range(total)]
    if data.held_out_pairs:
        sampled = None if data.principles else keys[share]
        values, example = evaluate_pairs(model, tokenizer, data.held_out_pairs[share], config, sampled)
    if data.principles:
        rng, num = random.Random(f"{config.seed} evaluation"), config.num_principles
        tasks = [Task(q, rng.sample(data.principles, num), key) for q, key in zip(data.held_out, keys)][share]
        size = max(1, config.eval_rows // num)
        pieces = [tasks[i : i + size] for i in range(0, len(tasks), size)]
        parts = [evaluate_tasks(model, reference, tokenizer, piece, config) for piece in pieces]
        values = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]} | values  # [N] each
        example = parts[0][1]
    everywhere = parallel.gather((values, example))
    columns = {name: torch.cat([part[name].cpu() for part, _ in everywhere]) for name in values}  # [N] each
    result = {name: interval(column) for name, column in columns.items() if len(column)}
    if data.principles:
        result["si"] = sufficiency_interval(columns["mi_row"], config.num_principles)
    return {"questions": total, **result, "example": everywhere[0][1]}


@torch.no_grad()
def evaluate_tasks(model, reference, tokenizer, tasks: list[Task], config: Config):
    """(values [Q] by name, an example) of one completion of each question under each principle."""
    batch = sample(model, tokenizer, tasks, 1, config)
    add_rewards(batch, config)
    now, batch.start = read(model, batch, config, 1), read_start(model, reference, batch, config)
    scores = now.scores[:, 0]  # [Q, K, K] of the one completion
    known = [(task.question.answer, row) for task, row in zip(tasks, batch.texts) if task.question.answer is not None]
    right = [[answer_is_right(texts[0], answer) for texts in row] for answer, row in known]
    closed = [["</reasoning>" in texts[0] for texts in row] for row in batch.texts]
    example = {"question": tasks[0].question.text, "principle": tasks[0].principles[0].text}
    return {
        "format": batch.formats.mean((1, 2)),
        "closed": torch.tensor(closed).float().mean(1),
        "accuracy": torch.tensor(right).float().reshape(len(known), config.num_principles).mean(1),
        "mi_row": information(scores).mean(1),
        "mi_column": column_information(scores).mean(1),
        "sinkhorn": drift(now.states, batch, config)[0],
        "completion_length": batch.mask.sum(-1).float().mean((1, 2)),
    }, example | {"completion": batch.texts[0][0][0]}


def main(argv=None) -> int:
    """Train by the command line; returns the exit status, see outcome."""
    return outcome(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # an emoji must not end a run on an ASCII terminal
    sys.exit(main())
