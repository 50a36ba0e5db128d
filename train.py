"""ENIGMA: train a language model to reason by your principles, with no reward model and no labels.

    python train.py --principles principles/reasoning.txt                 # the embedded model: two minutes, no GPU
    python train.py --principles mine.txt --model google/gemma-3-1b-it --dataset mine.jsonl
    python train.py --preferences tiny                                    # InfoPO on preference pairs; or both flags
    python train.py --resume latest                                       # after a kill, with --save-steps; or Ctrl-C

One loop, one optimiser step, three terms, each a mean over questions:

    L = L_GRPO + lambda_mi * L_SAMI + lambda_ot * S_eps

    L_GRPO   clipped policy loss; the only reward is the format of the completion               grpo.py
    L_SAMI   symmetric InfoNCE: which principle wrote this, which completion did it write?      infonce.py
    S_eps    Sinkhorn divergence between hidden states of policy and frozen start, same tokens  sinkhorn.py

A batch is num_questions x num_principles (K) x num_generations (G) completions. The GRPO group of a completion is the G
completions of its question and principle. `--lambda-mi 0 --lambda-ot 0` is plain GRPO. With --preferences as well,
`lambda_pref * L_InfoPO` is a fourth term, on a mini-batch of pairs of its own (infopo.py, preferences.py).
"""

import contextlib
import copy
import math
import random
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

import checkpoint
import parallel
import tiny
from commands import check_numbers, flag_parser, interval
from data import (
    DatasetConfig,
    InputError,
    build_messages,
    check_flags,
    encode_prompts,
    option,
)
from grpo import format_reward, group_advantages, grpo_loss
from infonce import column_info_nce, row_info_nce, symmetric_info_nce
from metrics import answer_is_right
from policy import (
    ROWS_PER_FORWARD,
    add_lora,
    at_start,
    cot_mask,
    eos_ids,
    hidden_states,
    load_model,
    log_probs,
    prompt_limit,
    sample,
    save,
    uniform_numbers,
)
from preferences import Pairs, evaluate_pairs, preference_loss
from run import (
    Data,
    append_json,
    check_parts,
    choose_run_dir,
    estimate_memory,
    fingerprint,
    keep_failure,
    load_data,
    memory_advice,
    memory_line,
    plot_run,
    report,
    resume_config,
    resume_run,
    signs_of_trouble,
    start_run,
    stop_signals,
    summary,
    write_json,
)
from sinkhorn import relative_eps, sinkhorn_divergence


@dataclass
class Config(DatasetConfig):
    """Every setting of a run, in the order of `--help`. Names that TRL has mean what they mean there."""

    principles: str | None = option(None, "file of principles: .txt (one a line) or .jsonl")
    preferences: str | None = option(None, "pairs: .jsonl, .parquet, .csv, a hub id, or tiny (the embedded task's)")
    model: str = option("tiny", "the embedded model, a folder, or a Hugging Face hub id")
    output_dir: str | None = option(None, "new or empty; runs/<time> if not given")
    seed: int = option(0, "of everything random")

    num_questions: int = option(4, "questions in a step")
    num_principles: int = option(4, "K: principles drawn for each question")
    num_generations: int = option(4, "G: completions of each question under each principle")
    max_completion_length: int = option(64, "tokens; longer completions are cut and earn nothing")
    temperature: float = option(1.0, "of sampling, and of every log-probability")
    cuda_graphs: bool = option(
        False, "sample by replaying one captured step on a GPU: faster where Python is slower than the GPU; not yet "
        "measured, and not for models that read a value back in a step, such as mixtures of experts"
    )

    max_steps: int = option(70, "batches sampled")
    num_iterations: int = option(1, "optimiser steps on each batch; above 1 the ratio leaves 1 and clipping is real")
    learning_rate: float | None = option(
        None, "of AdamW, after the warm-up; else, for the embedded model, 7e-4, on pairs alone 1e-4 (a 1B: about 1e-6)"
    )
    lr_scheduler_type: str = option("linear", "a name of transformers.SchedulerType")
    warmup_steps: int = option(5, "steps of linear warm-up")
    weight_decay: float = option(0.0, "of AdamW")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    micro_batch: int = option(
        256, "completions, each under one principle, in one forward and backward pass: memory against speed, same "
        "result; without --gradient-checkpointing all of one question's pass together"
    )
    gradient_checkpointing: bool = option(
        False, "make activations again in the backward pass: a third slower, and memory is that of --micro-batch "
        "completions (up to 64), whatever K and G; prompts stay shared"
    )
    bf16: bool | None = option(None, "bfloat16 matrix products, float32 weights; else on a GPU only")
    lora_rank: int = option(0, "train LoRA adapters of this rank (alpha twice it) and not the weights; 0: the weights")

    lambda_mi: float = option(0.012, "weight of the InfoNCE term")
    mi_temperature: float = option(1.0, "divides the scores in the InfoNCE term (not in the metrics)")
    lambda_ot: float = option(0.002, "weight of the Sinkhorn term")
    ot_eps: float = option(0.1, "eps of the Sinkhorn term, relative to the mean squared distance")
    ot_tokens: int = option(128, "completion tokens of a question that its Sinkhorn term compares")

    epsilon: float = option(0.1, "the ratio is clipped below 1 - epsilon")
    epsilon_high: float | None = option(None, "the ratio is clipped above 1 + epsilon_high; else epsilon")
    importance_sampling_level: Literal["sequence", "token"] = option("sequence", "what one ratio covers")
    loss_type: Literal["grpo", "bnpo", "dr_grpo"] = option("dr_grpo", "how the policy loss is averaged over tokens")
    scale_rewards: Literal["none", "group"] = option("none", "group: divide advantages by the group's std")
    beta: float | None = option(
        None, "with --preferences: reward per nat of log-ratio, else 0.1; without: weight of the KL to "
        "the frozen start inside the GRPO term, else 0")

    preference_loss: Literal["infopo", "dpo"] = option("infopo", "what --preferences trains with")
    lambda_pref: float = option(0.03, "weight of the preference loss beside the three terms; alone it is 1")
    num_pairs: int = option(16, "preference pairs in a step")

    eval_steps: int = option(35, "evaluate every so many steps; 0: only before and after")
    eval_questions: int = option(128, "held-out questions in an evaluation")

    save_steps: int = option(0, "write a checkpoint every so many steps; 0: only when stopped by Ctrl-C or SIGTERM")
    save_total_limit: int | None = option(None, "keep only so many of the newest checkpoints")
    resume: str | None = option(
        None, "go on with a run: its directory, one of its checkpoints, or latest; other flags change its settings")

    def check(self) -> None:
        """Raises InputError for the first value that cannot be; settles defaults that depend on the kind of run."""
        check_flags(self)
        if not (self.principles or self.preferences):
            raise InputError("--principles: missing; a file of principles, or --preferences with pairs, is accepted")
        if self.learning_rate is None:
            self.learning_rate = 7e-4 if self.principles else 1e-4
        lowest = dict.fromkeys(
            "num_questions num_generations max_completion_length max_steps num_iterations micro_batch eval_questions "
            "ot_tokens num_pairs".split(), 1,
        ) | {"num_principles": 2, "warmup_steps": 0, "eval_steps": 0, "seed": 0, "lora_rank": 0, "save_steps": 0,
             "save_total_limit": 1}
        check_numbers(self, **lowest)
        for name in "learning_rate temperature max_grad_norm mi_temperature ot_eps".split():
            if not 1e-9 <= getattr(self, name) < math.inf:  # 1e-300 is 0 in float32
                raise InputError(f"--{name.replace('_', '-')}: got {getattr(self, name)}; a number above 0 (1e-9 or "
                                 "more) is accepted")
        for name in "weight_decay lambda_mi lambda_ot lambda_pref epsilon epsilon_high beta".split():
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')}: got {getattr(self, name)}; 0 or more is accepted")
        if self.epsilon > 1:
            raise InputError(f"--epsilon: got {self.epsilon}; 0 to 1 is accepted")
        if self.scale_rewards == "group" and self.num_generations == 1:
            raise InputError("--num-generations: got 1; 2 or more is accepted with --scale-rewards group")
        if self.preferences and self.beta == 0:
            raise InputError("--beta: got 0.0; a number above 0 is accepted with --preferences")
        names = [t.value for t in transformers.SchedulerType]
        if self.lr_scheduler_type not in names:
            raise InputError(f"--lr-scheduler-type: got {self.lr_scheduler_type!r}; {', '.join(names)} are accepted")


    @property
    def kl_weight(self) -> float:
        """beta of the GRPO term: with --preferences, `--beta` is that of the pairs."""
        return 0.0 if self.preferences else self.beta or 0.0


    @property
    def rows_of_a_question(self) -> int:
        """Completions that pass through the model with gradient: each under its own principle, or, for SAMI, all."""
        return self.num_principles * self.num_generations * (self.num_principles if self.lambda_mi else 1)

    @property
    def eval_rows(self) -> int:
        """Completions sampled together in an evaluation."""
        return min(256, self.micro_batch)


NORMALIZER = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant"}  # TRL's name -> grpo.py's
SCALE = {"none": "none", "group": "std"}


# ----------------------------------------------------------------------------------------------------------------------
# A batch: draw, sample, reward, score


@dataclass
class Batch:
    """Q questions x K principles x G completions; tensors with a leading Q are cut by `part`."""

    prompts: list  # Q lists of K prompts, each a list of token ids
    questions: list  # Q Questions
    principles: list  # Q lists of K Principles
    texts: list  # Q lists of K lists of G completions
    tokens: torch.Tensor  # [Q, K, G, T]
    mask: torch.Tensor  # [Q, K, G, T] bool, completion tokens
    cot: torch.Tensor  # [Q, K, G, T] bool, those of the chain of thought
    truncated: torch.Tensor  # [Q, K, G] bool
    entropy: torch.Tensor  # [Q, K, G] nats per token
    rewards: torch.Tensor  # [Q, K, G]
    advantages: torch.Tensor  # [Q, K, G]
    cloud: torch.Tensor  # [Q, n] indices into K·G·T: the tokens whose hidden states the Sinkhorn term compares
    weights: torch.Tensor  # [Q, n] their weights; 0 where a question has fewer than n tokens
    ref_cloud: torch.Tensor | None = None  # [Q, n, d] hidden states of the reference
    ref_logp: torch.Tensor | None = None  # [Q, K, G, T]
    old_logp: torch.Tensor | None = None  # [Q, K, G, T] set by the first pass over the batch

    def part(self, start: int, size: int) -> "Batch":
        return Batch(*(None if value is None else value[start : start + size] for value in vars(self).values()))


def draw(questions, principles, config, step: int):
    """The questions of a step, each with K principles. A function of seed and step alone; an epoch repeats nothing."""
    chosen = []
    for index in range(step * config.num_questions, (step + 1) * config.num_questions):
        epoch, position = divmod(index, len(questions))
        order = list(range(len(questions)))
        random.Random(f"{config.seed} epoch {epoch}").shuffle(order)
        chosen.append(questions[order[position]])
    rng = random.Random(f"{config.seed} step {step}")
    return chosen, [rng.sample(principles, config.num_principles) for _ in chosen]


def roll_out(model, tokenizer, questions, principles, num_generations, config, names) -> Batch:
    """Sample, reward, and find the chain of thought: everything about a batch that needs no gradient.

    names: one for each question; all that is random about a question is a function of its name.
    """
    conversations = [build_messages(q.text, p.text) for q, ps in zip(questions, principles) for p in ps]
    prompts = encode_prompts(tokenizer, conversations, prompt_limit(model, config.max_completion_length))
    shape = (len(questions), len(principles[0]), num_generations)
    uniform = uniform_numbers(names, *shape[1:], config.max_completion_length, device=model.device)  # [Q, K, G, T]
    ends = eos_ids(model, tokenizer)
    out = sample(
        model, prompts, uniform.flatten(0, 1), config.temperature, ends, tokenizer.pad_token_id, config.cuda_graphs
    )
    tokens, mask = out.tokens.reshape(*shape, -1), out.mask.reshape(*shape, -1)  # [Q, K, G, T]
    flat = [ids[m].tolist() for ids, m in zip(tokens.flatten(0, 2), mask.flatten(0, 2))]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in flat]
    rewards = torch.tensor([format_reward(text) for text in texts], device=model.device).reshape(shape)  # [Q, K, G]
    scale = SCALE[config.scale_rewards] if num_generations > 1 else "none"  # an evaluation samples one
    valid = mask.flatten(1)  # [Q, K·G·T]
    size = min(config.ot_tokens, valid.shape[1])
    keys = uniform_numbers([f"{name} cloud" for name in names], *uniform.shape[1:], device=model.device)
    keys = keys[..., : mask.shape[-1]].flatten(1).masked_fill(~valid, -1)  # [Q, K·G·T]
    cloud = keys.topk(size).indices  # [Q, n] drawn without replacement, padding last
    weights = valid.gather(1, cloud).float()  # [Q, n]

    def nest(rows, n):
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    return Batch(
        nest(prompts, shape[1]), questions, principles, nest(nest(texts, shape[2]), shape[1]), tokens, mask,
        cot_mask(tokenizer, tokens, mask), out.truncated.reshape(shape), out.entropy.reshape(shape), rewards,
        group_advantages(rewards, scale), cloud, weights / weights.sum(1, keepdim=True),
    )


def own_completions(model, batch: Batch):
    """Hidden states [Q, K, G, T, d] of every completion under its own principle."""
    shape = batch.tokens.shape
    prompts = [p for row in batch.prompts for p in row]
    return hidden_states(model, prompts, batch.tokens.flatten(0, 1), batch.mask.flatten(0, 1)).reshape(*shape, -1)


def all_completions(model, batch: Batch, temperature):
    """Every completion of a question under each of its principles: one pass gives the scores and all own tokens.

    Returns scores [Q, G, K, K] (completion i, principle j) summed over the chain of thought; hidden [Q, K, G, T, d] and
    logp [Q, K, G, T] of the completions under their own principle.
    """
    num_questions, num, per_group, width = batch.tokens.shape
    prompts = [p for row in batch.prompts for p in row]

    def under_each(tensor):  # [Q, K, G, T] -> [Q·K, K·G, T]: the question's completions, once for each principle j
        wide = tensor.flatten(1, 2)[:, None].expand(-1, num, -1, -1)  # [Q, K, K·G, T]
        return wide.flatten(0, 1)  # [Q·K, K·G, T]

    own = torch.eye(num, dtype=torch.bool, device=batch.mask.device)[None, :, :, None, None]  # [1, K, K, 1, 1]
    own = own.expand(num_questions, num, num, per_group, 1).reshape(num_questions * num, num * per_group, 1)
    needed = under_each(batch.cot) | (own & under_each(batch.mask))  # the answer counts under its own principle only
    hidden = hidden_states(model, prompts, under_each(batch.tokens), needed)  # [Q·K, K·G, T, d]
    logp = log_probs(model, hidden, under_each(batch.tokens), needed, temperature)  # [Q·K, K·G, T]
    logp = logp.reshape(num_questions, num, num, per_group, width)  # [Q, j, i, G, T]
    hidden = hidden.reshape(num_questions, num, num, per_group, width, -1)  # [Q, j, i, G, T, d]
    scores = (logp * batch.cot[:, None]).sum(-1)  # [Q, j, i, G]
    own_hidden, own_logp = (t.diagonal(dim1=1, dim2=2).movedim(-1, 1) for t in (hidden, logp))  # [Q, K, G, T, d] and so
    return scores.permute(0, 3, 2, 1), own_hidden, own_logp  # see above


def refer(reference, batch: Batch, config) -> None:
    """What the losses need of the frozen start, on the same tokens."""
    if not (config.lambda_ot or config.kl_weight):
        return
    with torch.no_grad():
        hidden = own_completions(reference, batch)  # [Q, K, G, T, d]
        batch.ref_cloud = pick(hidden, batch.cloud)  # [Q, n, d]
        batch.ref_logp = log_probs(reference, hidden, batch.tokens, batch.mask, config.temperature)  # [Q, K, G, T]


def pick(hidden, cloud):
    """The hidden states [Q, n, d] of the chosen tokens: hidden [Q, K, G, T, d], cloud [Q, n]."""
    states = hidden.flatten(1, 3)  # [Q, K·G·T, d]
    return states.gather(1, cloud[..., None].expand(-1, -1, states.shape[-1]))  # [Q, n, d]


# ----------------------------------------------------------------------------------------------------------------------
# The three losses


class NotFinite(FloatingPointError):
    """What is not a finite number, and the terms of the loss as far as they are known."""

    def __init__(self, what: str, terms: dict):
        super().__init__(what)
        self.terms = {name: float(torch.as_tensor(value).detach()) for name, value in terms.items()}


def losses(model, batch: Batch, config):
    """(loss, statistics by name, scores) of the questions of a batch: means over questions of what each gives alone."""
    stats = {}
    if config.lambda_mi:
        scores, hidden, logp = all_completions(model, batch, config.temperature)
    else:
        scores, hidden = None, own_completions(model, batch)  # [Q, K, G, T, d]
        logp = log_probs(model, hidden, batch.tokens, batch.mask, config.temperature)  # [Q, K, G, T]

    for name, values in (("log-probability", logp), ("score", scores)):
        if values is not None and not values.isfinite().all():
            raise NotFinite(f"a {name} is not finite", stats)
    if config.lambda_mi:
        stats["loss_mi"] = symmetric_info_nce(scores / config.mi_temperature)  # []
        stats["mi_row"] = math.log(scores.shape[-1]) - row_info_nce(scores).mean()  # []
        stats["mi_column"] = math.log(scores.shape[-1]) - column_info_nce(scores).mean()  # []
    if batch.old_logp is None:  # the first pass is on-policy: the ratio is exactly 1, its gradient is not 0
        batch.old_logp = logp.detach()
    by_question = [policy_loss(batch.part(q, 1), logp[q], config) for q in range(len(batch.questions))]
    stats["loss_grpo"] = torch.stack([loss for loss, _ in by_question]).mean()  # []
    for name in by_question[0][1]:
        stats[name] = torch.stack([s[name] for _, s in by_question]).mean()  # []

    if config.lambda_ot:
        states = pick(hidden, batch.cloud)  # [Q, n, d]
        try:
            eps = relative_eps(states, batch.ref_cloud, config.ot_eps, batch.weights, batch.weights)  # [Q]
            value, info = sinkhorn_divergence(states, batch.ref_cloud, eps, batch.weights, batch.weights)
        except ValueError as error:  # hidden states so large that their distances overflow
            raise NotFinite(f"the Sinkhorn term: {error}", stats) from None
        stats["loss_ot"] = value.mean()  # []
        stats["sinkhorn_iterations"] = info.iterations
        stats["sinkhorn_error"] = info.marginal_error.max()  # []
        stats["sinkhorn_converged"] = info.converged
    weighted = {"loss_mi": config.lambda_mi, "loss_ot": config.lambda_ot}
    loss = stats["loss_grpo"] + sum(weight * stats[name] for name, weight in weighted.items() if weight)  # []
    return loss, stats, scores


def policy_loss(one: Batch, logp, config):
    """grpo_loss of the K·G completions of one question; logp [K, G, T]."""
    return grpo_loss(
        logp.flatten(0, 1), one.old_logp.flatten(0, 2), one.advantages.flatten(), one.mask.flatten(0, 2),
        level=config.importance_sampling_level, normalizer=NORMALIZER[config.loss_type], clip_low=config.epsilon,
        clip_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        max_tokens=config.max_completion_length, beta=config.kl_weight,
        ref_logp=None if one.ref_logp is None else one.ref_logp.flatten(0, 2),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation

def evaluate(model, reference, tokenizer, data: Data, config) -> dict:
    """Every figure on held-out questions and pairs, a mean over them with its 95% bootstrap interval."""
    values, example, total = {}, None, len(data.held_out or data.held_out_pairs)
    mine = parallel.part(total)
    names = [f"{config.seed} evaluation {n}" for n in mine]
    if data.principles:
        values, example = evaluate_principles(model, reference, tokenizer, data, config, mine, names)
    if data.held_out_pairs:
        pairs = data.held_out_pairs.part(mine.start, len(mine))
        more, sampled = evaluate_pairs(model, tokenizer, pairs, config, None if data.principles else names)
        values, example = values | more, example or {"question": sampled[0], "completion": sampled[1]}
    everyones = parallel.gather((values, example))
    result, example = {"questions": total}, everyones[0][1]
    for name in values:
        column = torch.cat([part[name].cpu() for part, _ in everyones])  # [N]
        if len(column):
            result[name] = interval(column)
    if "si" in result:
        result["si"] = {key: max(0.0, value) for key, value in result["si"].items()}
    return {**result, "example": example}


def evaluate_principles(model, reference, tokenizer, data: Data, config, mine: range, names: list[str]):
    """K principles for each question, one completion under each, at the training temperature: (values, example).

    mine, names: which of data.held_out, and what is random about each is a function of (see roll_out): the same in
    each evaluation of a run. values: tensors [N] by name, a value for each of these questions.
    """
    rng = random.Random(f"{config.seed} evaluation")
    drawn = [rng.sample(data.principles, config.num_principles) for _ in data.held_out][mine.start : mine.stop]
    questions = data.held_out[mine.start : mine.stop]
    values = {name: [] for name in ("format", "accuracy", "si", "mi_row", "mi_column", "sinkhorn", "completion_length")}
    size = max(1, config.eval_rows // config.num_principles)
    sample_text = None
    for start in range(0, len(questions), size):
        questions_here, drawn_here, names_here = (x[start : start + size] for x in (questions, drawn, names))
        batch = roll_out(model, tokenizer, questions_here, drawn_here, 1, config, names_here)
        with torch.no_grad():
            scores, hidden, _ = all_completions(model, batch, config.temperature)  # [Q, 1, K, K], [Q, K, 1, T, d]
            with at_start(model, reference) as start_model:
                ref = pick(own_completions(start_model, batch), batch.cloud)  # [Q, n, d]
            states = pick(hidden, batch.cloud)  # [Q, n, d]
        eps = relative_eps(states, ref, config.ot_eps, batch.weights, batch.weights)  # [Q]
        ceiling = math.log(config.num_principles)
        mi_row = ceiling - row_info_nce(scores).mean((1, 2))  # [Q]
        values["format"].append(batch.rewards.mean((1, 2)))
        values["mi_row"].append(mi_row)
        values["mi_column"].append(ceiling - column_info_nce(scores).mean((1, 2)))
        values["si"].append(mi_row / ceiling)
        values["sinkhorn"].append(sinkhorn_divergence(states, ref, eps, batch.weights, batch.weights)[0])
        values["completion_length"].append(batch.mask.sum(-1).float().mean((1, 2)))
        right = [[answer_is_right(texts[0], q.answer) for texts in row] for q, row in zip(batch.questions, batch.texts)
                 if q.answer is not None]
        values["accuracy"].append(torch.tensor(right).float().reshape(len(right), config.num_principles).mean(1))
        sample_text = sample_text or (batch.questions[0].text, batch.principles[0][0].text, batch.texts[0][0][0])
    values = {name: torch.cat(parts) for name, parts in values.items()}  # [N] each
    return values, dict(zip(("question", "principle", "completion"), sample_text))


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(config: Config) -> Path:
    """A whole run; returns its directory. Under torchrun, each process runs this on its part of every batch."""
    parallel.start()
    writer = parallel.rank() == 0
    check_parts(config)
    run_dir = parallel.gather(choose_run_dir(config))[0]  # the time in its name is that of process 0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    config.bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    rows = min(config.micro_batch, ROWS_PER_FORWARD) if config.gradient_checkpointing else None
    name = str(tiny.MODEL_DIR) if config.model == "tiny" else config.model
    model, tokenizer = load_model(name, device, config.bf16, rows)
    state = {"step": 0, "settings": fingerprint(config), "start_sha256": checkpoint.weights_sha256(model),
             "evals": {"start": None, "steps": {}}}  # what a checkpoint holds beside the model and the optimiser
    if config.lora_rank:
        model = add_lora(model, config.lora_rank, config.seed)
    data = load_data(model, tokenizer, config)
    if writer and not config.resume:
        start_run(run_dir, config, data, device)

    print(memory_line(estimate_memory(model, tokenizer, data, config), config, device), flush=True)
    copied = data.principles and not config.lora_rank  # else at_start knows the policy at the start, or none is needed
    reference = copy.deepcopy(model).requires_grad_(False) if copied else None
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    if config.resume:
        resume_run(run_dir, config, model, optimizer, schedule, state)

    evals, streaks, drawn, batch, pairs = state["evals"], Counter(), None, None, None
    with stop_signals() as stopped:
        try:
            if not evals["start"]:
                evals["start"] = evaluate(model, reference, tokenizer, data, config)
            write_json(run_dir / "eval.json", evals)
            print(f"start: {summary(evals['start'])}", flush=True)
            bar = tqdm(range(state["step"], config.max_steps), "training", config.max_steps, initial=state["step"],
                       dynamic_ncols=True, disable=not writer)
            for step in bar:
                clock = time.perf_counter()
                batch = None
                if data.principles:
                    mine = parallel.part(config.num_questions)
                    whole = draw(data.questions, data.principles, config, step)
                    drawn = [each[mine.start : mine.stop] for each in whole]
                    names = [f"{config.seed} step {step} question {n}" for n in mine]
                    batch = roll_out(model, tokenizer, *drawn, config.num_generations, config, names)
                sampled = time.perf_counter()
                if batch:
                    with at_start(model, reference) as start_model:
                        refer(start_model, batch, config)
                if data.pairs:
                    pairs = data.pairs.part(step * config.num_pairs % len(data.pairs), config.num_pairs)
                    mine = parallel.part(len(pairs))
                    pairs = pairs.part(mine.start, len(mine))
                stats, scores = update(model, optimizer, config, batch, pairs)
                stats["learning_rate"] = schedule.get_last_lr()[0]
                schedule.step()
                seconds = sampled - clock, time.perf_counter() - sampled
                record(run_dir, step, config, batch, stats, scores, *seconds)
                state["step"] = step + 1
                shown = ("reward", "si", "loss_ot", "pair_margin", "pair_accuracy")
                bar.set_postfix({name: f"{stats[name]:.2f}" for name in shown if name in stats})
                for line in signs_of_trouble(stats, streaks, config) if writer else ():
                    bar.write(f"warning: {line}", file=sys.stderr)
                if config.eval_steps and (step + 1) % config.eval_steps == 0 and step + 1 < config.max_steps:
                    evals["steps"][str(step + 1)] = evaluate(model, reference, tokenizer, data, config)
                    write_json(run_dir / "eval.json", evals)
                    bar.write(f"step {step + 1}: {summary(evals['steps'][str(step + 1)])}")
                signal_number = max(parallel.gather(stopped[0] if stopped else 0))  # all stop after the same step
                if signal_number or (config.save_steps and (step + 1) % config.save_steps == 0):
                    if writer:
                        checkpoint.save(run_dir / "checkpoints", model, optimizer, state, config.save_total_limit)
                    if signal_number:
                        bar.close()
                        if writer:
                            told = f"stopped after step {step + 1}; {checkpoint.how_to_resume(run_dir)}"
                            print(told, file=sys.stderr)
                        raise SystemExit(128 + signal_number)

            evals["end"] = evaluate(model, reference, tokenizer, data, config)
            write_json(run_dir / "eval.json", evals)
            if writer:
                plot = plot_run(run_dir)
                save(model, tokenizer, run_dir)
                report(run_dir, evals, plot)
        except FloatingPointError as error:
            how = keep_failure(run_dir, error, config, model, optimizer, state, drawn, batch, pairs)
            raise FloatingPointError(f"{error}; {how}") from None
        except (OSError, SafetensorError) as error:  # a full disk
            raise InputError(f"{run_dir}: cannot be written: {error}; {checkpoint.how_to_resume(run_dir)}") from None
    return run_dir


def update(model, optimizer, config, batch: Batch | None = None, pairs: Pairs | None = None):
    """num_iterations optimiser steps on a batch, or one on pairs alone.

    Returns the means of the statistics, and the scores [Q, G, K, K] of the first pass (None without an InfoNCE term).
    """
    counts = {"questions": len(batch.questions) if batch else 0, "pairs": len(pairs) if pairs else 0}
    whole = parallel.total(counts)
    parts = split(batch, *(c["questions"] for c in (counts, whole)), config.micro_batch // config.rows_of_a_question)
    pair_parts = split(pairs, *(c["pairs"] for c in (counts, whole)), config.micro_batch // 2)
    passes, scores = [], []
    for iteration in range(config.num_iterations if batch else 1):
        sums = {}
        for share, part in parts:
            with not_finite():
                loss, stats, part_scores = losses(model, part, config)
            backward(share, loss, stats, sums)
            if iteration == 0 and part_scores is not None:
                scores.append(part_scores.detach())
        for share, part in pair_parts:
            with not_finite():
                loss, stats = preference_loss(model, part, config)
            backward(share, config.lambda_pref * loss if batch else loss, stats, sums)
        parallel.sum_gradients(model.parameters())
        sums = parallel.total(sums)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not norm.isfinite():
            raise NotFinite(f"the gradient norm is {norm.item()}", sums)
        optimizer.step()
        optimizer.zero_grad()
        passes.append({**sums, "grad_norm": norm.item()})
    stats = {name: sum(p[name] for p in passes) / len(passes) for name in passes[0]}
    return stats, torch.cat(scores) if scores else None


@contextlib.contextmanager
def not_finite():
    """A ValueError of the losses, which say it where no finite loss exists, as what it is here: a broken training."""
    try:
        yield
    except ValueError as error:
        raise FloatingPointError(error) from None


def split(batch, count: int, whole: int, size: int) -> list:
    """(share of the whole batch of all processes, part) of each micro-batch of `size`, or of 1 where that is 0."""
    size = max(1, size)
    return [(min(size, count - start) / whole, batch.part(start, size)) for start in range(0, count, size)]


def backward(share: float, loss, stats, sums) -> None:
    """Add a micro-batch's share to the gradient and to the statistics."""
    if not loss.isfinite():
        raise NotFinite(f"the loss is {loss.item()}", {"loss": loss, **stats})
    (share * loss).backward()
    for name, value in {"loss": loss, **stats}.items():
        sums[name] = sums.get(name, 0.0) + share * float(torch.as_tensor(value).detach())


def record(run_dir, step, config, batch: Batch | None, stats, scores, seconds_sampling, seconds_training) -> None:
    """Complete `stats`, and append a line to metrics.jsonl and some completions to samples.jsonl."""
    stats["seconds_training"] = seconds_training
    if batch:
        spread = batch.rewards.amax(-1) - batch.rewards.amin(-1)  # [Q, K]
        means = {
            "reward": batch.rewards.mean().item(),
            "zero_variance_groups": (spread == 0).float().mean().item(),
            "completion_length": batch.mask.sum(-1).float().mean().item(),
            "truncated": batch.truncated.float().mean().item(),
            "entropy": batch.entropy.mean().item(),
        }
        share = len(batch.questions) / config.num_questions  # of this process
        tokens = parallel.total({"tokens": batch.mask.sum().item()})["tokens"]
        stats |= parallel.total({name: share * value for name, value in means.items()}) | {
            "seconds_sampling": seconds_sampling,
            "tokens_per_second_sampling": tokens / seconds_sampling,
            "tokens_per_second_training": tokens / seconds_training,
        }
    if scores is not None:
        stats["mi_ceiling"] = math.log(scores.shape[-1])
        stats["si"] = max(0.0, stats["mi_row"]) / stats["mi_ceiling"]
    append_json(run_dir / "metrics.jsonl", {"step": step + 1, **stats})
    for i, principle in enumerate(batch.principles[0] if batch else []):
        append_json(run_dir / "samples.jsonl", {
            "step": step + 1,
            "question": batch.questions[0].text,
            "principle": principle.text,
            "completion": batch.texts[0][i][0],
            "reward": batch.rewards[0, i, 0].item(),
            "scores": None if scores is None else
            {p.id: round(s, 3) for p, s in zip(batch.principles[0], scores[0, 0, i].tolist())},
        })


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse(argv=None) -> Config:
    parser = flag_parser(Config, description=__doc__.split("\n\n")[0])
    config = Config(**vars(parser.parse_args(argv)))
    if config.resume:
        parser.set_defaults(**dict.fromkeys(vars(config)))  # None, to see which flags are given
        config = resume_config(Config, {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None})
    config.check()
    return config


def main(argv=None) -> int:
    """0; after one line on stderr, 2 for input that cannot be used and 1 for a training that broke down.

    Stopped by a signal, it exits with 128 + its number, as a shell would put it.
    """
    warnings.filterwarnings("ignore", "Sinkhorn stopped")  # `signs_of_trouble` says it once
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
    try:
        config = parse(argv)
        train(config)
        parallel.stop()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: training has broken down: {error}; a lower --learning-rate may help", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"error: the GPU's memory does not suffice. {memory_advice(config)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if parallel.world() == 1:
            raise
        print(f"error: process {parallel.rank()}: {str(error).splitlines()[0]}: another process has ended, and says "
              "why, if this is about a connection", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped before the training began", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # no emoji may end a run where the terminal knows ASCII only
    sys.exit(main())
