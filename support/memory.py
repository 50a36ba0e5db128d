"""Memory: what a run takes at its peak, what is free, and the largest micro-batch that fits.

    peak     = weights + bfloat16 copies + reference + optimiser (AdamW's moments: 8 bytes a trained number)
               + the larger of sampling and training
    sampling = keys and values of the prompts and of all rows, and for each row the larger of
               a copy of its prompt's and the distribution of its next token
    training = gradient + activations of a micro-batch + keys and values of the rows of one forward
               + blocks of logits

A row is a completion. What a row and a token of a prompt leave behind is measured, whatever the
architecture: two long prompts, and a row of full length after each, go through the model once. What
a layer takes in passing is left out. --gradient-checkpointing: activations of one block of rows,
and three times the prompts' keys and values, which all blocks share: kept, made again, and
gradient.
"""

import contextlib
import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from support import parallel
from support.errors import InputError
from support.logits import autocast
from support.model import linear_layers
from support.prefix import PREFILL_TOKENS, copy_cache, forward, prefill
from support.prompts import context_length
from support.scoring import block_side, rows_per_forward

HEADROOM = 0.9  # share of the free memory that is used: an estimate may be a tenth too low
RANK = 16  # of the adapters that a model too large is advised to train
LESS = "lower --num-questions, --max-completion-length, --num-generations, a smaller model"
ADVICE = f"try --lora-rank {RANK}, then {LESS}"


def fit(model, data, config) -> tuple[bool, int, str]:
    """(--gradient-checkpointing, --micro-batch, the line to print): what is given, else the first that fits.

    Tried are all questions of a step together, half of them, … one at a time, then activations
    recomputed for ever fewer rows. Raises InputError where nothing fits.
    """
    texts = pairs = None
    if data.principles:
        texts = Texts(model, data.longest_prompts, config.max_completion_length, config.bf16)
    if data.pairs:  # those of training, and of the completions that an evaluation writes
        lengths = (data.pairs, data.pairs.tokens.shape[-1]), (data.held_out_pairs, config.max_completion_length)
        pairs = [Texts(model, sorted(some.prompts, key=len)[-2:], length, config.bf16) for some, length in lengths]
    free, weights = free_memory(model.device), sum(p.nbytes for p in model.parameters())
    room = float("inf") if free is None else HEADROOM * free + weights  # weights: already in memory
    given, tried = (config.gradient_checkpointing, config.micro_batch), []

    def try_it(checkpointing, rows):  # whether it fits
        settings = replace(config, gradient_checkpointing=checkpointing, micro_batch=rows)
        tried.append(sizes(model, texts, pairs, settings))
        return sum(tried[-1].values()) <= room

    possible = choices(config, rows_per_forward(model.device))
    for choice in possible:
        checkpointing, rows = (c if g is None else g for c, g in zip(choice, given))
        if try_it(checkpointing, rows):
            break
    total = sum(tried[-1].values())
    shown = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in tried[-1].items() if size >= 5e6)
    line = f"memory: about {total / 1e9:.2g} GB ({shown})"
    line += "" if free is None else f" of {(free + weights) / 1e9:.3g} GB free"
    if total > room and None in given:
        raise InputError(f"{line}, with the smallest micro-batch: it does not fit; {advice(model, tried[-1], config)}")
    if total > room:
        fitting = next((choice for choice in possible if try_it(*choice)), None)
        flags = "--gradient-checkpointing {} --micro-batch {} would".format(*fitting) if fitting else None
        line += f": it may not fit; {flags or advice(model, tried[-1], config)}"
    elif len(tried) > 1:
        flags = f"--micro-batch {rows}" + " --gradient-checkpointing True" * checkpointing
        line += f"; {flags} is chosen, since all at once would take {sum(tried[0].values()) / 1e9:.2g} GB"
    return checkpointing, rows, line


def choices(config, block: int) -> list[tuple[bool, int]]:
    """(activations recomputed?, rows of a micro-batch), the fastest first; `block`: the most rows in a forward."""
    items, rows = (config.num_pairs, 2) if config.preferences else (config.num_questions, config.rows_per_question)
    halves = [max(1, items >> n) * rows for n in range(items.bit_length())]  # of all of a step, of half, … of one
    kept = [(False, size) for size in dict.fromkeys(min(256, size) for size in halves)]
    return kept + [(True, block >> n) for n in range(block.bit_length())]


def advice(model, parts, config) -> str:
    """What to do where `parts`, the bytes of the smallest micro-batch, do not fit."""
    if config.lora_rank or config.resume:
        return f"try {LESS}"
    trained = RANK * sum(layer.in_features + layer.out_features for layer in linear_layers(model))
    own = {"bfloat16 copies": 0, "reference": 0, "optimiser": 8 * trained, "gradient": 4 * trained}
    own["weights"] = parts["weights"] / (2 if config.bf16 else 1)
    return f"try --lora-rank {RANK} (about {sum((parts | own).values()) / 1e9:.2g} GB), then {LESS}"


def sizes(model, texts, pairs, config) -> dict[str, float]:
    """Bytes by part at the peak, completions of full length; `texts`: Texts or None, `pairs`: two of them or None."""
    phases, num, weights = [], config.num_principles, sum(p.nbytes for p in model.parameters())
    if texts:
        questions = -(-config.num_questions // parallel.world())  # of this process
        evaluated = min(config.eval_rows, config.eval_questions * num)
        for rows, prompts in (questions * num * config.num_generations, questions * num), (evaluated, evaluated):
            phases.append(sampling(model, texts, rows, prompts))
        questions = min(questions, max(1, config.micro_batch // config.rows_per_question))
        phases.append(training(model, texts, questions * config.rows_per_question, questions, num, config))
    if pairs:
        num_pairs = min(config.num_pairs, max(1, config.micro_batch // 2))
        phases.append(training(model, pairs[0], 2 * num_pairs, num_pairs, 1, config))
        evaluated = min(config.eval_rows, -(-config.eval_questions // parallel.world()))
        phases.append(sampling(model, pairs[1], evaluated, evaluated))
    halved = 2 * sum(p.numel() for layer in linear_layers(model) for p in layer.parameters()) if config.bf16 else 0
    return {
        "weights": weights,
        "bfloat16 copies": weights / 2 if config.bf16 and not config.lora_rank else 0,
        "reference": weights - halved if texts and not config.lora_rank else 0,
        "optimiser": 8 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        **max(phases, key=lambda parts: sum(parts.values())),
    }


def sampling(model, texts, rows: int, prompts: int) -> dict[str, float]:
    """Bytes of `rows` completions of `prompts` prompts, as they are sampled."""
    passing = max(texts.prompt_cache, 12 * len(model.get_output_embeddings().weight))  # logits and two of their size
    return {"sampling": prompts * texts.prompt_cache + rows * (texts.cache + passing)}


def training(model, texts, rows: int, questions: int, num: int, config) -> dict[str, float]:
    """Bytes by part of a micro-batch: `rows` completions of `questions` with `num` prompts each."""
    block = min(rows, rows_per_forward(model.device))
    if config.gradient_checkpointing:
        block = min(block, config.micro_batch)
        again = texts.token * min(questions * texts.tokens(num), PREFILL_TOKENS // 4)
        activations = 3 * questions * num * texts.prompt_cache + max(again, block * (texts.row + texts.passing))
    else:
        activations = texts.token * questions * texts.tokens(num) + rows * texts.row + block * texts.passing
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head, side = model.get_output_embeddings().weight, block_side(model.device)
    logits = 3 * 4 * side * min(side, len(head))
    logits += 4 * head.numel() * head.requires_grad  # the head's own gradient
    return {"gradient": 4 * trained, "activations": activations, "logits": logits}


class Texts:
    """Bytes that a token of a prompt (list of ids), and a row of `length` tokens, leave behind."""

    def __init__(self, model, prompts, length: int, bf16: bool | None = False):
        prompts, kept = [prompts[0], prompts[-1]], {}  # storages by address; held: none comes twice
        self.longest = max(map(len, prompts))
        length = min(length, context_length(model) + 1 - self.longest)
        self.common = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 2)

        def pack(tensor):  # returns nothing: a tensor would keep its graph, and no backward follows
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

        def size():
            return sum(storage.nbytes() for storage in kept.values())

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None), \
                autocast(model.device, bool(bf16)):
            layers, cache, of_prompts, of_rows = read(model, prompts, length, size)
        states = [t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)]
        self.token, self.row = of_prompts / self.tokens(2), of_rows / 2  # what autograd keeps
        self.cache = sum(s.nbytes() for s in states) / 2  # keys and values of a prompt and its row
        passing = (s.nbytes() for s in states if s.data_ptr() not in kept)  # autograd keeps the others
        self.passing = sum(passing) / 2
        self.prompt_cache = sum(states.nbytes for layer in layers for states in layer) / 2

    def tokens(self, prompts: int) -> int:
        """How many the model reads of a question's prompts: their common beginning once."""
        return self.common + prompts * (self.longest - self.common)


def read(model, prompts, length: int, size):
    """Keys and values of the prompts, the cache after a row behind each, and by how much the two raise size()."""
    prefill(model, prompts)  # so that weights, and what they are cast to, are kept already
    before = size()
    layers, mask, last = prefill(model, prompts)
    between = size()
    cache = copy_cache(layers, torch.arange(len(prompts), device=model.device))
    ids = last[:, None].expand(-1, length)  # [P, T]
    shown = F.pad(mask, (0, length), value=True)  # [P, L-1+T]
    forward(model, ids, shown, shown.cumsum(1)[:, -length:] - 1, cache)
    return layers, cache, between - before, size() - between


def free_memory(device, root: Path = Path("/")) -> float | None:
    """Bytes this process may still take, of GPU or RAM under cgroup limits; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    try:
        free = 1024.0 * int(re.search(r"MemAvailable:\s+(\d+)", (root / "proc/meminfo").read_text())[1])
        groups = re.findall(r"^\d+:.*?:/(.*)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return None
    files = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    for tree, group in itertools.product(files, dict.fromkeys(groups)):  # version 2, 1
        for above in (root / "sys/fs/cgroup" / tree / group / "-").parents:  # limits hold below
            with contextlib.suppress(OSError, ValueError):  # no limit here
                limit, used = (int((above / name).read_text()) for name in files[tree])
                files_read = re.search(r"^inactive_file (\d+)", (above / "memory.stat").read_text(), re.MULTILINE)
                free = min(free, limit - used + int(files_read[1]))  # pages of files make room
    return free / parallel.world()
