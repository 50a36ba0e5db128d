"""attention.py: the library's numbers to the byte on a CPU; and heads that share keys, packed as for a GPU."""

import pytest
import torch
from small import PROMPTS, make_completions, make_model, write
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from support.attention import ATTENTION, attention_of_shared_heads, use_attention
from support.scoring import completion_logp


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("bf16", [False, True])
def test_masks_of_numbers_change_no_byte(name, bf16):
    results = []
    for attention in ("sdpa", ATTENTION):
        model, (tokens, mask) = make_model(name, torch.float32), make_completions()
        model.set_attn_implementation(attention)
        logp = completion_logp(model, PROMPTS, tokens, mask, 1.0, bf16=bf16)
        logp.square().sum().backward()
        results.append([write(model, length=6).tokens, logp, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_model_with_another_attention_keeps_it():
    model = make_model("llama", torch.float32)
    model.set_attn_implementation("eager")
    use_attention(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    use_attention(model)
    assert model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_that_share_keys_and_values_give_the_librarys_attention_and_gradients(dtype):
    torch.manual_seed(0)
    shapes = (3, 8, 5, 16), (3, 2, 11, 16), (3, 2, 11, 16)  # [R, H, T, D], and [R, H', S, D] twice
    inputs = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    mask = torch.zeros(3, 1, 5, 11, dtype=dtype).masked_fill_(torch.rand(3, 1, 5, 11) < 0.4, -torch.inf)  # [R, 1, T, S]
    mask[..., 0] = 0
    layer = torch.nn.Module()
    layer.num_key_value_groups = 4
    results = []
    for out in (attention_of_shared_heads(*inputs, mask, 0.3), sdpa_attention_forward(layer, *inputs, mask, scaling=0.3)[0]):
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)  # [R, T, H, D]
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **({} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}))
