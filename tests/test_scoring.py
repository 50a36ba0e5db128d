"""scoring.py: log-probabilities by blocks of the logits, and completions read after several prompts."""

import math

import pytest
import torch
from small import PROMPTS, make_completions, make_model

from support import scoring
from support.scoring import completion_logp, read_completions, token_log_probs, token_states


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_chunked_log_probs_equal_unchunked_in_value_and_gradient():
    model, (tokens, mask) = make_model("llama"), make_completions()
    states, places = token_states(model, PROMPTS, tokens, mask)  # [M, d], [M]
    states, targets = states.detach().requires_grad_(), tokens.flatten()[places]  # [M, d], [M]
    results = []
    for logits_per_chunk in (1, 7 * 96, 2**24):
        states.grad = None
        logp = token_log_probs(model, states, targets, 0.7, logits_per_chunk)
        gradient = gradients(model, (logp * places).sum())
        results.append((logp.detach(), states.grad.clone(), gradient))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_sampled_log_probs_are_the_exact_log_probability_of_the_text():
    """Over all completions of two tokens the probabilities sum to 1 (the stopping event included)."""
    model = make_model("llama")
    vocabulary = torch.arange(96)
    pairs = torch.cartesian_prod(vocabulary, vocabulary)  # [V·V, 2]
    tokens = pairs[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :, 1] = pairs[:, 0] != 2  # after the end token nothing follows
    keep = mask[0, :, 1] | (pairs[:, 1] == 0)
    with torch.no_grad():
        logp = completion_logp(model, PROMPTS[:1], tokens[:, keep], mask[:, keep], 1.0)
    assert math.isclose(logp.sum(-1).exp().sum().item(), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 9), (3, 9), (3, 2, 1, 9)])
def test_shapes_are_checked(shape):
    model = make_model("llama", torch.float32)
    with pytest.raises(ValueError, match=r"expected tokens and mask \[P=3, N, T\]"):
        completion_logp(model, PROMPTS, torch.ones(shape).long(), torch.ones(shape).bool(), 1.0)


@torch.no_grad()
def test_states_of_picked_tokens_alone_are_those_of_the_whole_reading_and_cost_fewer_tokens(monkeypatch):
    model, torch_rng = make_model("llama"), torch.Generator().manual_seed(3)
    prompts = [PROMPTS[:2], PROMPTS[1:]]  # Q = 2, K = 2
    tokens = torch.randint(3, 96, (2, 2, 3, 6), generator=torch_rng)  # [Q, K, G, T]
    mask = torch.arange(6) < torch.tensor([[6, 4, 1], [5, 6, 2]])[..., None].expand(2, 2, 3, 1)  # [Q, K, G, T]
    picked = torch.tensor([[2, 0, 18], [1, 23, 11]])  # [Q, n] into K·G·T = 36; 23 and 11 are off the mask
    states = {}
    for own_logp in (False, True):
        read, token_states = [], scoring.token_states

        def counted(*arguments, read=read, token_states=token_states, **how):
            read.append(arguments[3].sum())
            return token_states(*arguments, **how)

        monkeypatch.setattr("support.scoring.token_states", counted)
        states[own_logp] = read_completions(model, prompts, tokens, mask, mask, 1.0, 0, picked, own_logp)[1]
        monkeypatch.undo()
        assert read == [48 if own_logp else 3 + 1 + 2]
    torch.testing.assert_close(states[False], states[True])
    assert (states[True][1, 1:] == 0).all() and states[True][0].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("generations", [0, 2, 3])
def test_completions_are_read_after_their_own_prompt_and_the_first_after_all(generations):
    model, rng = make_model("llama"), torch.Generator().manual_seed(4)
    prompts = [PROMPTS, PROMPTS[::-1]]  # Q = 2, K = 3
    tokens = torch.randint(3, 96, (2, 3, 3, 5), generator=rng)  # [Q, K, G, T]
    mask = torch.arange(5) < torch.randint(1, 6, (2, 3, 3, 1), generator=rng)  # [Q, K, G, T]
    cot = mask & (torch.arange(5) < 3)  # [Q, K, G, T]
    logp, states, scores = read_completions(model, prompts, tokens, mask, cot, 1.0, generations)
    assert states is None and (scores is None) == (generations == 0)
    for q, row in enumerate(prompts):
        for j, prompt in enumerate(row):
            every = tokens[q].flatten(0, 1)[None], mask[q].flatten(0, 1)[None]  # [1, K·G, T] both
            plain = completion_logp(model, [prompt], *every, 1.0).reshape(tokens[q].shape)  # [K, G, T]
            torch.testing.assert_close(logp[q, j], plain[j])
            for n in range(generations):
                torch.testing.assert_close(scores[q, n, :, j], (plain * cot[q]).sum(-1)[:, n])
