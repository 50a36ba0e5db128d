"""A prompt goes through the model once, and its completions continue copies of what that left.

    cache    = prompt[:-1] through the model                # keys and values [P, H, L-1, D], left-padded
    hidden_t = prompt[-1], y_1 … y_{t-1} behind a copy      # [R, T, d], which predicts y_t

Gradients flow through the copies, so they too are those of the plain forward.
"""

import functools
import inspect
import os

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

PREFILL_TOKENS = 8192  # of prompts in one forward; a quarter of it where activations are recomputed


def forward(model, ids, shown, positions, cache):
    """Final hidden states [R, T, d] of ids [R, T] after the S tokens in `cache`, which they join.

    positions: [R, T]. shown: [R, S + T] bool, False on padding.
    """
    decoder = model.get_decoder()
    past = {_cache_name(type(decoder)): cache}
    out = decoder(input_ids=ids, attention_mask=shown.long(), position_ids=positions, use_cache=True, **past)
    return out.last_hidden_state  # [R, T, d]


@functools.cache
def _cache_name(kind) -> str:
    """The argument that takes the cache: transformers 5.24 renames `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def recomputing(recompute, function, *args):
    """function(*args); with `recompute` its activations are made again in the backward pass."""
    if recompute:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def prefill(model, prompts: list[list[int]], recompute=False):
    """All but the last token of each prompt through the model.

    Returns keys and values [P, H, L-1, D] by layer, their mask [P, L-1], the last tokens [P]. What
    all prompts begin with, such as a system message and examples, goes through the model once.
    """
    if not prompts or min(map(len, prompts)) < 2:
        raise ValueError("expected at least one prompt, each of at least two tokens")
    device, common, layers = model.device, [], None
    if len(prompts) > 1:
        common = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 2]  # C tokens
    own = [prompt[len(common) :] for prompt in prompts]
    length = max(map(len, own)) - 1
    ids = torch.tensor([p[:-1] + [p[0]] * (length + 1 - len(p)) for p in own], device=device)  # [P, L-1-C]
    lengths = torch.tensor([len(p) - 1 for p in prompts], device=device)  # [P]
    mask = torch.arange(len(common) + length, device=device) < lengths[:, None]  # [P, L-1]
    if common:
        first = torch.tensor([common], device=device)  # [1, C]
        layers = recomputing(recompute, _encode, model, first, torch.ones_like(first).bool())
    size = max(1, PREFILL_TOKENS // (4 if recompute else 1) // length)
    groups = [recomputing(recompute, _encode, model, *part, layers) for part in zip(ids.split(size), mask.split(size))]
    layers = groups[0]
    if len(groups) > 1:
        layers = [tuple(torch.cat(states) for states in zip(*layer)) for layer in zip(*groups)]
    return layers, mask.flip(1), torch.tensor([p[-1] for p in prompts], device=device)  # [P]


def _encode(model, ids, mask, layers=None):
    """Keys and values by layer, [P, H, S, D] both, of the common beginning `layers` and ids [P, L].

    mask: [P, S] bool. Padding is on the right here, and moved to the left at the end: windows and
    ALiBi count the places between two tokens, so it must not stand between tokens of one row.
    """
    cache = copy_cache(layers or [], torch.zeros(len(ids), dtype=torch.long, device=ids.device), rounded=False)
    width = mask.shape[1]
    positions = torch.arange(width - ids.shape[1], width, device=ids.device).expand_as(ids)  # [P, L]
    forward(model, ids, mask, positions, cache)
    if mask.all():
        return [(layer.keys, layer.values) for layer in cache.layers]
    padding = (~mask).sum(1, keepdim=True)  # [P, 1]
    places = (torch.arange(width, device=ids.device) - padding) % width  # [P, S]

    def moved(states):  # [P, H, S, D]
        return states.gather(2, places[:, None, :, None].expand_as(states))

    return [(moved(layer.keys), moved(layer.values)) for layer in cache.layers]


def copy_cache(layers, rows, room: int = 0, rounded: bool = True) -> DynamicCache:
    """A cache whose row r continues prompt rows[r], with `room` for so many more tokens.

    rounded: with bfloat16 products (see logits.autocast) to bfloat16. The keys, rotated in float32, would
    stay so, although attention rounds them; gradients of a prompt's keys are summed in float32 all the same.
    """
    rounded = rounded and torch.is_autocast_enabled(rows.device.type)
    cache = DynamicCache()  # made without the config, so that sliding-window layers keep all places
    for layer in layers:
        # not keys[rows]: on a CPU its gradient depends on the order of threads (on a GPU this one's does)
        keys, values = (states.index_select(0, rows) for states in layer)  # [R, H, L-1, D] both
        for states in (keys, values) if keys.requires_grad else ():
            states.register_hook(torch.Tensor.contiguous)  # adding up rows of a strided gradient is 4 times slower
        keys, values = (keys.bfloat16(), values.bfloat16()) if rounded else (keys, values)  # [R, H, L-1, D] both
        cache.layers.append(RoomyLayer(keys, values, room) if room else GrowingLayer(keys, values))
    return cache


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that begins with keys and values [R, H, L, D], and keeps their precision."""

    def __init__(self, keys, values):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values  # [R, H, L, D] both

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(self.keys.dtype), values.to(self.values.dtype), *args, **kwargs)


class RoomyLayer(DynamicLayer):
    """Keys and values [R, H, L, D] with room for more: a DynamicLayer copies all for each token."""

    def __init__(self, keys, values, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length, self.room = keys.shape[2], (F.pad(keys, (0, 0, 0, room)), F.pad(values, (0, 0, 0, room)))
        self.keys, self.values = keys, values  # [R, H, L, D]: the filled part of the room

    def update(self, keys, values, *args, **kwargs):
        start, self.length = self.length, self.length + keys.shape[2]
        for room, new in zip(self.room, (keys, values), strict=True):
            room[:, :, start : self.length] = new  # [R, H, 1, D]
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)  # [R, H, L, D]
        return self.keys, self.values

    def batch_select_indices(self, rows):
        self.room = tuple(room.index_select(0, rows) for room in self.room)  # [rows, H, L + room, D]
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)  # [rows, H, L, D]
