"""model.py: what is refused at loading, the frozen copy, and what ends a completion."""

import pytest
import torch
from small import PROMPTS, make_completions, make_model

from support import model as loading
from support import tiny
from support.model import check_model, frozen_copy
from support.prompts import eos_ids
from support.scoring import token_log_probs, token_states


def test_a_model_that_scales_its_logits_unknown_to_us_is_refused():
    model = make_model("llama", torch.float32)
    check_model(model)
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits / 8
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match="LlamaForCausalLM gives other samples or scores .* by [0-9.]+ nats"):
        check_model(model)


def test_end_tokens_come_from_generation_config_tokenizer_and_template():
    model, tokenizer = make_model("llama"), tiny.make_tokenizer()
    model.generation_config.eos_token_id = [1, 90]
    assert eos_ids(model, tokenizer) == sorted({1, 90, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tokenizer) == [tokenizer.eos_token_id]
    # as in models whose base lists <eos> alone, and whose turns end with another token
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert eos_ids(model, tokenizer) == sorted({tokenizer.eos_token_id, turn_end})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} and a word{% endfor %}"
    assert eos_ids(model, tokenizer) == [tokenizer.eos_token_id], "what follows the text is no control token"
    tokenizer.chat_template = "{{ raise_exception('no assistant') }}"
    assert eos_ids(model, tokenizer) == [tokenizer.eos_token_id]


def coarse(function):
    """The product of inputs of 10 bits, rounded otherwise for another shape, unless float32 is to be whole."""

    def rounded(input, weight, bias=None):
        if torch.get_float32_matmul_precision() != "highest":
            scale = 1 + input.numel() / 1e4
            input = ((input.mul(scale).view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) / scale
        return function(input, weight, bias)

    return rounded


def test_a_model_is_checked_in_whole_float32_numbers_where_products_are_coarser(monkeypatch):
    model, before = make_model("llama", torch.float32), torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.nn.functional, "linear", coarse(torch.nn.functional.linear))
    torch.set_float32_matmul_precision("high")
    try:
        check_model(model)
        assert torch.get_float32_matmul_precision() == "high", "not restored"
        assert loading._distance_from_plain(model, [11, 4])[0] > 1e-3, "the patched product is as fine as ever"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_frozen_copy_in_bfloat16_computes_the_same_numbers_in_less_memory(name):
    model, (tokens, mask) = make_model(name, torch.float32), make_completions()
    frozen, results = frozen_copy(model, bf16=True), []
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in frozen.parameters()} == {torch.float32, torch.bfloat16}
    assert frozen.get_output_embeddings().weight.dtype == torch.float32
    for one in (model, frozen):
        states, places = token_states(one, PROMPTS, tokens, mask, bf16=True)
        results.append([states, token_log_probs(one, states, tokens.flatten()[places], 1.0, bf16=True)])
    assert all(torch.equal(a, b) for a, b in zip(*results)), "not what the weights in float32 give"
    assert sum(p.nbytes for p in frozen.parameters()) < 0.8 * sum(p.nbytes for p in model.parameters())
