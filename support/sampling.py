"""Completions of prompts, each a function of its prompt and its name.

    p_v   = softmax(logits)_v                       # the next token's distribution [V], see logits.py
    token = min {v : p_0 + … + p_v > u · sum_v p_v}         # u in [0, 1), a random number of that name and place
    entropy = - sum_v p_v log p_v

There is no top-k or top-p: the score of a sample is its exact log-probability.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.answers import decode
from support.errors import check_finite
from support.logits import autocast, head
from support.prefix import copy_cache, forward, prefill
from support.prompts import eos_ids

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed first
LARGEST = 1 - 2**-52  # share of a sum that is passed for certain: rounding must not lead beyond the last token
ENDS_SEEN = 8  # on a GPU it is seen every so many tokens who has ended: to look is to wait for it


@dataclass
class Completions:
    """N sampled completions of each of P prompts, padded on the right."""

    tokens: torch.Tensor  # [P, N, T] int64
    mask: torch.Tensor  # [P, N, T] bool, True on completion tokens, the end token among them
    truncated: torch.Tensor  # [P, N] bool, True where no end token came within max_new_tokens
    entropy: torch.Tensor  # [P, N] mean over tokens of the entropy of the next-token distribution, nats

    def __post_init__(self):
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"expected tokens and a bool mask, both [P, N, T]; got {list(self.tokens.shape)} and "
                f"{list(self.mask.shape)} of {self.mask.dtype}"
            )


def write(model, tokenizer, prompts, names, num_completions: int, max_new_tokens: int, temperature, opening="",
          bf16: bool = False):
    """(N completions of each of P prompts, their texts as P lists of N): sampled, then decoded.

    names: one for each prompt, or one for as many prompts as follow each other under a name. What
    is written is a function of prompt, name and place under that name; see uniform_numbers. `opening`
    is what the prompt has begun the answer with: it belongs to the text.
    """
    shape = len(prompts) // len(names), num_completions, max_new_tokens
    uniform = uniform_numbers(names, *shape, device=model.device).flatten(0, 1)  # [P, N, T]
    ends = eos_ids(model, tokenizer)
    out = sample(model, prompts, uniform, temperature, ends, tokenizer.pad_token_id, bf16)
    return out, decode(tokenizer, out.tokens, out.mask, ends, opening)


def uniform_numbers(names: list[str], *shape: int, device="cpu"):
    """Random numbers in [0, 1), [len(names), *shape], float64. A row depends on its name alone.

    What is sampled for a question thus depends neither on its batch, nor on the device, nor on how
    many processes share the work.
    """
    seeds = [random.Random(name).getrandbits(63) for name in names]
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows).to(device)  # [len(names), *shape]


@torch.no_grad()
def sample(model, prompts, uniform, temperature, eos, pad_id, bf16: bool = False) -> Completions:
    """Sample N completions of at most T tokens of each prompt from softmax(logits).

    uniform: [P, N, T] float64 in [0, 1). Token t is where the cumulated probabilities pass its
    number, so a completion is a function of its prompt and its numbers. eos: the ids that end one
    (see eos_ids).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if uniform.ndim != 3 or len(uniform) != len(prompts) or uniform.dtype != torch.float64:
        raise ValueError(f"expected float64 [P={len(prompts)}, N, T], got {uniform.dtype} {list(uniform.shape)}")
    shape = uniform.shape[:2]
    ends = torch.tensor(eos, dtype=torch.long, device=model.device)  # [number of end tokens]
    with autocast(model.device, bf16):
        layers, mask, last = prefill(model, prompts)
        rows = torch.arange(len(prompts), device=model.device).repeat_interleave(shape[1])  # [R] the prompt of each row
        tokens, lengths, entropy, truncated = _decode(
            model, copy_cache(layers, rows, uniform.shape[2]), mask[rows], last[rows], uniform.flatten(0, 1),
            head(model, temperature, bf16), ends, pad_id,
        )
    check_finite("the distribution of the next token", entropy)
    width = int(lengths.max())
    return Completions(
        tokens[:, :width].reshape(*shape, width),  # [P, N, T]
        (torch.arange(width, device=model.device) < lengths[:, None]).reshape(*shape, width),  # [P, N, T]
        truncated.reshape(shape),  # [P, N]
        (entropy / lengths).reshape(shape),  # [P, N]
    )


def _decode(model, cache, mask, inputs, uniform, output, ends, pad_id):
    """tokens [R, T], and lengths, summed entropies, truncated [R], for numbers uniform [R, T].

    Row r continues row r of the cache: mask [R, L-1] of its tokens, inputs [R] the last one of its
    prompt. Rows that have ended leave the batch when they are an eighth of it: one long completion
    does not make all cost, and the cache is not copied at each end.
    """
    (num_rows, max_new_tokens), device = uniform.shape, uniform.device
    weight, bias, logits = output
    weight = logits.rounded(weight)  # [V, d] once, not for each token
    start, positions = mask.shape[1], mask.sum(1, keepdim=True)  # [A, 1] the place of the next token
    mask = F.pad(mask, (0, max_new_tokens), value=True)  # [A, L-1+T]
    active = torch.arange(num_rows, device=device)  # [A] the rows in the batch
    running = torch.ones_like(active, dtype=torch.bool)  # [A] those of them that have not ended
    tokens = torch.full((num_rows, max_new_tokens), pad_id, device=device)  # [R, T]
    lengths, entropy = torch.zeros_like(active), torch.zeros(num_rows, device=device)  # [R] both
    for t in range(max_new_tokens):
        hidden = forward(model, inputs[:, None], mask[:, : start + t + 1], positions + t, cache)  # [A, 1, d]
        inputs, nats = _draw(logits(hidden[:, -1], weight, bias), uniform[:, t].index_select(0, active))  # [A] both
        tokens[:, t].index_copy_(0, active, inputs.where(running, pad_id))
        lengths.index_add_(0, active, running.long())
        entropy.index_add_(0, active, (nats * running).to(entropy.dtype))
        running &= ~torch.isin(inputs, ends)  # [A]
        if device.type == "cuda" and (t + 1) % ENDS_SEEN:
            continue
        left = int(running.sum())
        if not left:
            break
        if left <= len(running) * 7 // 8:
            keep = running.nonzero()[:, 0]  # [A']
            active, inputs, running = active[keep], inputs[keep], running[keep]  # [A'] each
            mask, positions = mask[keep], positions[keep]  # [A', L-1+T], [A', 1]
            cache.batch_select_indices(keep)
    truncated = torch.zeros(num_rows, dtype=torch.bool, device=device)  # [R]
    truncated[active] = running
    return tokens, lengths, entropy, truncated


def _draw(logits, uniform):
    """Next token and its entropy, [A] both, for logits [A, V] and uniform [A]. The entropy of NaN is NaN."""
    logp = F.log_softmax(logits, dim=-1)  # [A, V]
    probs = logp.exp()  # [A, V]
    token, whole = _passed(probs, uniform)  # [A] both
    nats = -logp.mul_(probs).nansum(-1)  # [A] where p is 0, p log p is 0 · -inf = NaN
    return token, nats.where(whole > 0, torch.nan)  # [A] both


def _passed(probs, uniform):
    """The first token at which the cumulated sum of probs [A, V] passes uniform [A] of the whole, and the whole: [A].

    Sums are in float64, so that rare tokens of a large vocabulary keep their share: first of blocks,
    then of the tokens of that block in which the number is passed. On a GPU the sum within a block,
    in many parts anyway, is float32: in float64 it would be the half of what sampling moves.
    """
    size, blocks = probs.shape[1], probs.shape[1] // BLOCK
    parts = probs.split([blocks * BLOCK, size - blocks * BLOCK], 1)  # [A, B·BLOCK], [A, less than a block]
    parts = parts[0].unflatten(1, (blocks, BLOCK)), parts[1][:, None]  # [A, B, BLOCK], [A, 1, less than a block]
    dtype = probs.dtype if probs.is_cuda else torch.float64
    passed = torch.cat([part.sum(-1, dtype=dtype) for part in parts], 1).double().cumsum(-1)  # [A, B + 1]
    number = uniform[:, None].clamp(max=LARGEST) * passed[:, -1:]  # [A, 1]
    block = torch.searchsorted(passed, number, right=True).clamp_(max=blocks)  # [A, 1]
    places = block * BLOCK + torch.arange(BLOCK, device=probs.device)  # [A, BLOCK]
    inside = probs.gather(1, places.clamp(max=size - 1)).double()  # [A, BLOCK]
    inside = inside.masked_fill_(places >= size, 0).cumsum(-1)  # [A, BLOCK]
    number = (number - passed.gather(1, block) + inside[:, -1:]).clamp_(min=0)  # [A, 1] without the blocks before
    number = torch.minimum(number, LARGEST * inside[:, -1:])  # [A, 1]
    token = block * BLOCK + torch.searchsorted(inside, number, right=True)  # [A, 1]
    return token[:, 0].clamp_(max=size - 1), passed[:, -1]  # [A] both; NaN lands past the last token
