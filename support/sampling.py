"""Completions of prompts, each a function of its prompt and its name."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.answers import decode
from support.errors import check_finite
from support.prefix import autocast, copy_cache, forward, head, prefill
from support.prompts import eos_ids


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


def write(model, tokenizer, prompts, names, num_completions: int, max_new_tokens: int, temperature, opening=""):
    """(N completions of each of P prompts, their texts as P lists of N): sampled, then decoded.

    names: one for each prompt, or one for as many prompts as follow each other under a name. What
    is written is a function of prompt, name and place under that name; see uniform_numbers. `opening`
    is what the prompt has begun the answer with: it belongs to the text.
    """
    shape = len(prompts) // len(names), num_completions, max_new_tokens
    uniform = uniform_numbers(names, *shape, device=model.device).flatten(0, 1)  # [P, N, T]
    ends = eos_ids(model, tokenizer)
    out = sample(model, prompts, uniform, temperature, ends, tokenizer.pad_token_id)
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
@autocast
def sample(model, prompts, uniform, temperature, eos, pad_id) -> Completions:
    """Sample N completions of at most T tokens of each prompt from softmax(logits / temperature).

    uniform: [P, N, T] float64 in [0, 1). Token t is where the cumulated probabilities pass its
    number, so a completion is a function of its prompt and its numbers. eos: the ids that end one
    (see eos_ids). There is no top-k or top-p: the score of a sample is its exact log-probability.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if uniform.ndim != 3 or len(uniform) != len(prompts) or uniform.dtype != torch.float64:
        raise ValueError(f"expected float64 [P={len(prompts)}, N, T], got {uniform.dtype} {list(uniform.shape)}")
    shape = uniform.shape[:2]
    layers, prefix_mask, last = prefill(model, prompts)
    if torch.is_autocast_enabled(model.device.type):  # rounded once, not for each token
        layers = [tuple(states.bfloat16() for states in layer) for layer in layers]
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(shape[1])  # [R] the prompt of each row
    ends = torch.tensor(eos, dtype=torch.long, device=model.device)  # [number of end tokens]
    tokens, lengths, entropy, truncated = _decode(
        model, layers, rows, prefix_mask[rows], last[rows], uniform.flatten(0, 1), temperature, ends, pad_id
    )
    check_finite("the distribution of the next token", entropy)
    width = int(lengths.max())
    return Completions(
        tokens[:, :width].reshape(*shape, width),  # [P, N, T]
        (torch.arange(width, device=model.device) < lengths[:, None]).reshape(*shape, width),  # [P, N, T]
        truncated.reshape(shape),  # [P, N]
        (entropy / lengths).reshape(shape),  # [P, N]
    )


def _draw(model, hidden, uniform, temperature):
    """Next token and its entropy, [A] both, for hidden [A, d] and uniform [A, 1]."""
    logp = F.log_softmax(head(model, hidden) / temperature, dim=-1)  # [A, V]
    probs = logp.exp()  # [A, V]
    passed = probs.double().cumsum(-1)  # [A, V] in float64: rare tokens of a large vocabulary keep their share
    token = torch.searchsorted(passed, uniform * passed[:, -1:], right=True)[:, 0]  # [A]
    token = token.clamp(max=logp.shape[-1] - 1)  # [A] NaN lands past the last token; `sample` checks at the end
    return token, -(probs * logp.clamp(min=-1e30)).sum(-1)  # [A] both; 0 · -inf would be NaN


def _decode(model, layers, rows, mask, inputs, uniform, temperature, ends, pad_id):
    """tokens [R, T], and lengths, summed entropies, truncated [R], for numbers uniform [R, T].

    Row r continues prompt rows[r]: mask [R, L-1] of its tokens in `layers`, inputs [R] its last
    one. Rows that have ended leave the batch when they are an eighth of it: one long completion
    does not make all cost, and the cache is not copied at each end.
    """
    num_rows, max_new_tokens = uniform.shape
    cache = copy_cache(layers, rows, room=max_new_tokens)
    active = torch.arange(num_rows, device=uniform.device)  # [A] the rows in the batch
    running = torch.ones_like(active, dtype=torch.bool)  # [A] those of them that have not ended
    tokens = torch.full((num_rows, max_new_tokens), pad_id, device=uniform.device)  # [R, T]
    lengths = torch.zeros_like(active)  # [R]
    entropy = torch.zeros(num_rows, device=uniform.device)  # [R]
    for t in range(max_new_tokens):
        mask = F.pad(mask, (0, 1), value=True)  # [A, L+t]
        hidden = forward(model, inputs[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)  # [A, 1, d]
        inputs, nats = _draw(model, hidden[:, -1], uniform[active, t, None], temperature)  # [A] both
        tokens[active, t] = inputs.where(running, pad_id)
        lengths[active] += running
        entropy[active] += nats * running
        running &= ~torch.isin(inputs, ends)  # [A]
        left = int(running.sum())
        if not left:
            break
        if left <= len(running) * 7 // 8:
            keep = running.nonzero()[:, 0]  # [A']
            active, inputs, mask, running = active[keep], inputs[keep], mask[keep], running[keep]
            cache.batch_select_indices(keep)
    truncated = torch.zeros(num_rows, dtype=torch.bool, device=uniform.device)  # [R]
    truncated[active] = running
    return tokens, lengths, entropy, truncated
