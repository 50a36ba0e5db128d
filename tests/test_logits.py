"""logits.py: one function of hidden states for sampler and scorer, in float32 whatever the products are of."""

import pytest
import torch
from small import PROMPTS, make_completions, make_model, write

from support.logits import Logits, float32_products, logits_of
from support.model import check_model
from support.scoring import completion_logp, token_log_probs, token_states


def test_a_head_that_is_more_than_a_matrix_is_refused():
    model, (tokens, mask) = make_model("llama"), make_completions()
    model.lm_head = torch.nn.Sequential(model.lm_head)  # as an adapter around the head would be: its weight is not all
    with pytest.raises(ValueError, match="head is torch.nn.Linear, got Sequential"):
        completion_logp(model, PROMPTS, tokens, mask, 1.0)
    with pytest.raises(ValueError, match="head is torch.nn.Linear, got Sequential"):
        write(model)


def test_temperature_divides_the_logits():
    model, (tokens, mask) = make_model("llama"), make_completions()
    states, places = token_states(model, PROMPTS, tokens, mask)  # [M, d], [M]
    logits, targets = states @ model.lm_head.weight.T, tokens.flatten()[places]  # [M, V], [M]
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(token_log_probs(model, states, targets, temperature), expected)


def test_softcapped_logits_are_capped():
    model = make_model("gemma3", torch.float32)
    model.config.final_logit_softcapping = 0.5
    check_model(model)
    hidden = torch.randn(5, 32) * 100
    assert logits_of(model, hidden).abs().max() <= 0.5


def test_logits_of_bfloat16_numbers_are_not_rounded_again():
    """A logit of 40 as bfloat16 is off by 0.1. Where a processor has bfloat16, the numbers that enter are rounded."""
    torch.manual_seed(0)
    states, weight = torch.randn(50, 64), 2 * torch.randn(300, 64)  # [r, d], [V, d]
    ours = Logits(1.0, None, 1.0, True)(states, weight)  # [r, V]
    exact = [(s.double() @ w.double().T) for s, w in ((states, weight), (states.bfloat16(), weight.bfloat16()))]
    errors = [(ours - logits).abs().max() for logits in exact]
    assert ours.dtype == torch.float32 and exact[0].abs().max() > 40 and min(errors) < 1e-3
    assert (exact[1].bfloat16() - exact[1]).abs().max() > 0.05, "the test would not see logits rounded to bfloat16"


def test_float32_products_are_restored_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), float32_products("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
