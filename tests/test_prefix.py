"""prefix.py: completions behind copies of a prompt's cache, against one plain forward for each."""

import inspect

import pytest
import torch
from small import PROMPTS, make_completions, make_model, write

from support import sampling
from support.prefix import RoomyLayer, _cache_name
from support.sampling import uniform_numbers
from support.scoring import completion_logp, token_log_probs, token_states

TEMPERATURE = 0.7


def plain(model, tokens, mask):
    """Log-probabilities by one unpadded forward per completion, the whole logits, no cache: the definition."""
    logp = torch.zeros(tokens.shape, dtype=torch.float64)  # [P, N, T]
    rows = []
    for p, prompt in enumerate(PROMPTS):
        for n in range(tokens.shape[1]):
            completion = tokens[p, n][mask[p, n]]
            logits = model(torch.tensor([prompt + completion.tolist()])).logits[0] / TEMPERATURE
            steps = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]
            rows.append(torch.nn.functional.pad(steps, (0, tokens.shape[2] - len(steps))))
    return torch.stack(rows).reshape(logp.shape)


def score(model, tokens, mask, **kwargs):
    states, places = token_states(model, PROMPTS, tokens, mask, **kwargs)  # [M, d], [M]
    logp = token_log_probs(model, states, tokens.flatten()[places], TEMPERATURE)  # [M]
    return logp.new_zeros(tokens.numel()).index_copy(0, places, logp).reshape(tokens.shape)  # [P, N, T]


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("rows_at_once", [1, 4, 64])
def test_shared_prefix_equals_the_plain_forward(name, rows_at_once):
    model, (tokens, mask) = make_model(name), make_completions()
    weights = torch.randn(tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))  # [P, N, T]
    ours = score(model, tokens, mask, rows_at_once=rows_at_once)
    theirs = plain(model, tokens, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m: f"values: padding or positions? {m}")
    our_gradient = gradients(model, (ours * weights).sum())
    their_gradient = gradients(model, (theirs * weights).sum())
    error = (our_gradient - their_gradient).norm() / their_gradient.norm()
    assert their_gradient.norm() > 0 and error < 1e-5, f"gradients differ by {error:.1e}: is the cache detached?"


def test_sliding_window_matters_in_that_test():
    model, (tokens, mask) = make_model("gemma3"), make_completions()
    with torch.no_grad():
        narrow = score(model, tokens, mask)
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        model.config.sliding_window = 100
        wide = score(model, tokens, mask)
    assert (narrow - wide).abs().max() > 1e-3, "the window changes nothing, so the Gemma test would not see a wrong one"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_common_beginning_changes_no_score(name):
    """Of 8 tokens, more than Gemma's window: padding between it and the rest of a prompt would move that window."""
    model, (tokens, mask) = make_model(name), make_completions()
    prompts = [list(range(20, 28)) + prompt[1:] for prompt in PROMPTS]
    with torch.no_grad():
        together = completion_logp(model, prompts, tokens, mask, 1.0)  # [P, N, T]
        alone = [completion_logp(model, [p], t[None], m[None], 1.0) for p, t, m in zip(prompts, tokens, mask)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_masked_tokens_change_nothing():
    model, (tokens, mask) = make_model("llama"), make_completions()
    other = torch.where(mask, tokens, (tokens + 1) % 96)
    a, b = score(model, tokens, mask), score(model, other, mask)
    assert torch.equal(a, b) and (a[~mask] == 0).all()
    empty = mask.clone()
    empty[0] = False
    assert torch.isfinite(gradients(model, score(model, tokens, empty).sum())).all()


def test_the_cache_goes_in_under_the_name_that_the_library_has_for_it(recwarn):
    kind = type(make_model("llama").get_decoder())
    assert _cache_name(kind) in inspect.signature(kind.forward).parameters
    write(make_model("llama"))
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]


def test_decoding_in_bfloat16_keeps_the_cache_in_it(monkeypatch):
    """The library's cache promotes bfloat16 values to the float32 of rotated keys; attention rounds both again."""
    model, seen, update = make_model("gemma3", torch.float32), set(), RoomyLayer.update

    def spy(self, *args, **kwargs):
        out = update(self, *args, **kwargs)
        seen.update(states.dtype for states in out)
        return out

    monkeypatch.setattr(RoomyLayer, "update", spy)
    uniform = uniform_numbers(["a", "b", "c"], 16, 12)  # [P, N, T]
    coarse = sampling.sample(model, PROMPTS, uniform, 1.0, [2], 0, bf16=True)
    assert seen == {torch.bfloat16}
    fine = sampling.sample(model, PROMPTS, uniform, 1.0, [2], 0)
    assert (coarse.tokens[..., 0] == fine.tokens[..., 0]).float().mean() > 0.9
