"""Attention over a cache as the library has it, with what a GPU would do again in each layer done once.

    attention = softmax(query · key^T · scaling + mask) · value        mask [R, 1, T, S]: 0, or -inf where hidden

A CPU gets the library's numbers to the byte. Models that attend in another way are left alone.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_of_numbers"


def use_attention(model) -> None:
    """Let a model that attends by scaled_dot_product_attention do so as `_attention` and `_mask` have it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)


def _mask(*args, q_length, allow_is_causal_skip=True, dtype=torch.float32, device="cpu", **kwargs):
    """The library's mask [R, 1, T, S] as numbers, 0 or -inf: made once, where a mask of bools is turned
    into numbers by every layer. The library leaves out a mask that hides nothing, which it has to wait
    for a GPU to know: not for each token that is sampled."""
    device = torch.device(device)
    skip = allow_is_causal_skip and not (device.type == "cuda" and q_length == 1)
    shown = sdpa_mask(*args, q_length=q_length, device=device, allow_is_causal_skip=skip, **kwargs)  # [R, 1, T, S]
    if shown is None or shown.dtype != torch.bool:
        return shown
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else dtype
    return _aligned(shown.shape, dtype, device).fill_(-torch.inf).masked_fill_(shown, 0)  # [R, 1, T, S]


def _aligned(shape, dtype, device):
    """An empty tensor of that shape with rows as far apart as a GPU's attention wants them."""
    return torch.empty(*shape[:-1], -(-shape[-1] // 8) * 8, dtype=dtype, device=device)[..., : shape[-1]]


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The library's attention; on a GPU without copies of keys and values for the heads that share them."""
    shared = 1 < key.shape[1] < query.shape[1]  # one head alone is shared without a copy
    one_mask = attention_mask is not None and attention_mask.shape[1] == 1 and kwargs.get("position_bias") is None
    if query.is_cuda and shared and one_mask and query.shape[2] > 1:
        return attention_of_shared_heads(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def attention_of_shared_heads(query, key, value, mask, scaling=None):
    """Attention [R, T, H, D] of query [R, H, T, D] to key, value [R, H', S, D], with the mask [R, 1, T, S].

    The H / H' heads that share keys and values stand behind each other as so many more queries.
    """
    rows, heads, length, width = query.shape
    shared = heads // key.shape[1]
    packed = query.reshape(rows, key.shape[1], shared * length, width)  # [R, H', H/H'·T, D]
    again = _aligned((rows, 1, shared * length, mask.shape[-1]), mask.dtype, mask.device)  # [R, 1, H/H'·T, S]
    again.unflatten(2, (shared, length)).copy_(mask[:, :, None].expand(rows, 1, shared, -1, -1))
    out = F.scaled_dot_product_attention(packed, key, value, again, scale=scaling)  # [R, H', H/H'·T, D]
    return out.reshape(query.shape).transpose(1, 2).contiguous()  # [R, T, H, D]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
