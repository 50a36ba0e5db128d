"""policy.py: the shared prefix, chunks, sampling and spans, against the plain way of doing each."""

import inspect
import math

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support import answers, prefix, sampling, scoring, tiny
from support.answers import cot_mask
from support.model import check_model, load_model
from support.prefix import RoomyLayer, _cache_name
from support.prompts import eos_ids
from support.sampling import uniform_numbers
from support.scoring import hidden_states, log_probs, score_matrix

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
PROMPTS = [[1, *range(10, 10 + n)] for n in (11, 4, 7)]  # different lengths: all but the first are padded on the left
TEMPERATURE = 0.7


def make_model(name, dtype=torch.float64):
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:  # a window of 5 tokens, shorter than the prompts: two sliding layers and a full one
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=kinds))
    for parameter in model.parameters():  # away from the initial symmetry, so that attention matters
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def make_completions(lengths=((6, 3), (1, 9), (4, 4))):
    lengths = torch.tensor(lengths)  # [P, N]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 96, (*lengths.shape, 9), generator=generator)  # [P, N, T]
    return tokens, torch.arange(9) < lengths[..., None]  # [P, N, T] both


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
    hidden = hidden_states(model, PROMPTS, tokens, mask, **kwargs)
    return log_probs(model, hidden, tokens, mask, TEMPERATURE)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("rows_per_forward", [1, 4, 64])
def test_shared_prefix_equals_the_plain_forward(name, rows_per_forward):
    model, (tokens, mask) = make_model(name), make_completions()
    weights = torch.randn(tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))  # [P, N, T]
    ours = score(model, tokens, mask, rows_per_forward=rows_per_forward)
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
        together = hidden_states(model, prompts, tokens, mask)  # [P, N, T, d]
        alone = [hidden_states(model, [p], t[None], m[None]) for p, t, m in zip(prompts, tokens, mask)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_chunked_log_probs_equal_unchunked_in_value_and_gradient():
    model, (tokens, mask) = make_model("llama"), make_completions()
    hidden = hidden_states(model, PROMPTS, tokens, mask).detach().requires_grad_()
    results = []
    for logits_per_chunk in (1, 7 * 96, 2**24):
        hidden.grad = None
        logp = log_probs(model, hidden, tokens, mask, TEMPERATURE, logits_per_chunk)
        gradient = gradients(model, (logp * torch.arange(9)).sum())
        results.append((logp.detach(), hidden.grad.clone(), gradient))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_head_that_is_more_than_a_matrix_is_refused():
    model, (tokens, mask) = make_model("llama"), make_completions()
    hidden = hidden_states(model, PROMPTS, tokens, mask)
    model.lm_head = torch.nn.Sequential(model.lm_head)  # as an adapter around the head would be: its weight is not all
    with pytest.raises(ValueError, match="head is torch.nn.Linear, got Sequential"):
        log_probs(model, hidden, tokens, mask, TEMPERATURE)


def test_masked_tokens_change_nothing():
    model, (tokens, mask) = make_model("llama"), make_completions()
    other = torch.where(mask, tokens, (tokens + 1) % 96)
    a, b = score(model, tokens, mask), score(model, other, mask)
    assert torch.equal(a, b) and (a[~mask] == 0).all()
    empty = mask.clone()
    empty[0] = False
    assert torch.isfinite(gradients(model, score(model, tokens, empty).sum())).all()


def test_temperature_divides_the_logits():
    model, (tokens, mask) = make_model("llama"), make_completions()
    hidden = hidden_states(model, PROMPTS, tokens, mask)
    logits = prefix.head(model, hidden)
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        ours = log_probs(model, hidden, tokens, mask, temperature)
        torch.testing.assert_close(ours[mask], expected[mask], rtol=1e-5, atol=1e-6)


def sample(model, seed=0, prompts=PROMPTS, num=2, length=12, eos=(2,), temperature=1.0):
    uniform = uniform_numbers([f"{seed} {n}" for n in range(len(prompts))], num, length)  # [P, N, T]
    return sampling.sample(model, prompts, uniform, temperature, list(eos), 0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_sampling_draws_from_the_distribution_that_scoring_scores(name):
    """One token, many samples, against exact probabilities: catches a wrong temperature, position, mask or cache."""
    model = make_model(name, torch.float32)
    model.get_output_embeddings().weight.data *= 3
    draws = 4000
    out = sample(model, num=draws, length=1, temperature=1.5)
    for p, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            exact = (model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)  # [V]
        seen = torch.bincount(out.tokens[p, :, 0], minlength=96) / draws  # [V]
        sigma = (exact * (1 - exact) / draws).sqrt()  # [V]
        assert ((seen - exact).abs() < 5 * sigma + 1e-3).all(), f"prompt {p}: frequencies are not the probabilities"
        entropy = -(exact * exact.log()).sum()
        assert torch.allclose(out.entropy[p], entropy, atol=1e-3), "the entropy logged is that of another distribution"


def test_greedy_limit_agrees_with_the_librarys_generate():
    """Near temperature 0 sampling is greedy decoding, and rows that leave the batch must not disturb the others."""
    model = make_model("gemma3", torch.float32)
    unended = sample(model, num=1, length=20, temperature=1e-4).tokens  # [P, 1, T]
    eos = [2, int(unended[0, 0, 1])]  # a token that the first prompt's completion holds: that row ends early
    out = sample(model, num=1, length=20, eos=eos, temperature=1e-4)
    lengths = set()
    for p, prompt in enumerate(PROMPTS):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=eos, pad_token_id=0
        )[0, len(prompt) :].tolist()
        ours = out.tokens[p, 0][out.mask[p, 0]].tolist()
        assert ours == theirs, f"prompt {p}"
        lengths.add(len(ours))
    assert len(lengths) > 1, "all rows end together: this test no longer sees rows leaving the batch"


def test_any_end_token_ends_a_completion_and_counts_as_its_last_token():
    model, ends = make_model("llama", torch.float32), (2, 50, 51)
    out = sample(model, num=64, length=30, eos=ends)
    last = out.tokens.gather(-1, (out.mask.sum(-1, keepdim=True) - 1))[..., 0]  # [P, N]
    is_end = torch.isin(out.tokens, torch.tensor(ends)) & out.mask  # [P, N, T]
    assert set(last[~out.truncated].tolist()) == set(ends), "not every one of the end tokens ends a completion"
    assert (is_end.sum(-1) == (~out.truncated).long()).all(), "an end token stands inside a completion"
    assert (out.mask.sum(-1)[out.truncated] == 30).all()
    assert (out.tokens[~out.mask] == 0).all(), "after the end there must be padding"


def test_a_sample_depends_on_its_prompt_and_its_numbers_not_on_the_batch():
    model = make_model("gemma3")  # float64: rounding, which does depend on the batch, cannot move a token
    uniform = uniform_numbers([f"prompt {p}" for p in range(len(PROMPTS))], 5, 20)  # [P, N, T]
    together = sampling.sample(model, PROMPTS, uniform, 1.0, [2, 50, 51], 0)
    for p, prompt in enumerate(PROMPTS):
        alone = sampling.sample(model, [prompt], uniform_numbers([f"prompt {p}"], 5, 20), 1.0, [2, 50, 51], 0)
        width = alone.tokens.shape[-1]
        assert torch.equal(together.tokens[p, :, :width], alone.tokens[0])
        assert torch.equal(together.mask[p, :, :width], alone.mask[0]) and not together.mask[p, :, width:].any()


def test_decoding_in_bfloat16_keeps_the_cache_in_it(monkeypatch):
    """The library's cache promotes bfloat16 values to the float32 of rotated keys; attention rounds both again."""
    model, seen, update = make_model("gemma3", torch.float32), set(), RoomyLayer.update
    model.bf16 = True

    def spy(self, *args, **kwargs):
        out = update(self, *args, **kwargs)
        seen.update(states.dtype for states in out)
        return out

    monkeypatch.setattr(RoomyLayer, "update", spy)
    uniform = uniform_numbers(["a", "b", "c"], 16, 12)  # [P, N, T]
    coarse = sampling.sample(model, PROMPTS, uniform, 1.0, [2], 0)
    assert seen == {torch.bfloat16}
    model.bf16 = False
    fine = sampling.sample(model, PROMPTS, uniform, 1.0, [2], 0)
    assert (coarse.tokens[..., 0] == fine.tokens[..., 0]).float().mean() > 0.9


def test_sampling_never_takes_a_token_of_probability_zero():
    """At the two ends of [0, 1): the first and the last token that can come, not the first and the last there are."""
    model = make_model("llama", torch.float32)
    head = model.get_output_embeddings()
    bias = torch.zeros(96).index_fill(0, torch.tensor([0, 1, 95]), -torch.inf)  # [V]
    head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[None, :, None]  # [1, 2, 1]
    assert sampling.sample(model, PROMPTS[:1], uniform, 1.0, [2], 0).tokens.flatten().tolist() == [2, 94]


def test_same_seed_same_samples():
    model = make_model("llama", torch.float32)
    assert torch.equal(sample(model, 3).tokens, sample(model, 3).tokens)
    assert not torch.equal(sample(model, 3, num=8).tokens, sample(model, 4, num=8).tokens)


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
        hidden = hidden_states(model, PROMPTS[:1], tokens[:, keep], mask[:, keep], rows_per_forward=4096)
        logp = log_probs(model, hidden, tokens[:, keep], mask[:, keep], 1.0)
    assert math.isclose(logp.sum(-1).exp().sum().item(), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize(
    "text, cot",
    [
        ("<reasoning>1 + 1 = 2.</reasoning><answer>2</answer>", "<reasoning>1 + 1 = 2.</reasoning>"),
        ("1 + 1 = 2. Answer: 2", "1 + 1 = 2. Answer: 2"),
        ("<reasoning>a</reasoning> b</reasoning> c", "<reasoning>a</reasoning>"),
        ("</reasoning>", "</reasoning>"),
        ("a</reason", "a</reason"),
    ],
)
def test_the_chain_of_thought_ends_with_its_tag(text, cot):
    tokenizer = tiny.make_tokenizer()
    for pad in (0, 3):
        ids = torch.tensor([tiny.encode(tokenizer, text) + [0] * pad])  # [1, T]
        mask = torch.arange(ids.shape[1])[None] < ids.shape[1] - pad  # [1, T]
        span = cot_mask(tokenizer, ids, mask)
        assert tokenizer.decode(ids[span]) == cot
    empty = cot_mask(tokenizer, ids, torch.zeros_like(mask))
    assert not empty.any()


def test_a_tag_of_several_tokens_ends_the_span_with_its_last_token():
    tokenizer = tiny.make_tokenizer()
    ids = torch.tensor([[t for c in "ab</reasoning>c" for t in tiny.encode(tokenizer, c)]])  # [1, T] one a character
    span = cot_mask(tokenizer, ids, torch.ones_like(ids, dtype=torch.bool))
    assert tokenizer.decode(ids[span]) == "ab</reasoning>"


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


def test_a_text_loses_its_end_token_and_nothing_else():
    """What stands behind the answer must reach the format check: padding or a new turn that the model wrote is text."""
    tokenizer = tiny.make_tokenizer()
    eos, pad, user = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    answer = "<reasoning>a</reasoning><answer>1</answer>"
    body = tiny.encode(tokenizer, answer)
    rows = [body + [eos], body, body + [pad, eos], body + [user] * 3, body + [eos, eos], []]
    tokens = torch.full((2, 3, len(body) + 3), pad)  # [2, 3, T]
    mask = torch.zeros_like(tokens, dtype=torch.bool)  # [2, 3, T]
    for n, row in enumerate(rows):
        tokens[n // 3, n % 3, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[n // 3, n % 3, : len(row)] = True
    pad, user, eos_text = (tokenizer.convert_ids_to_tokens(t) for t in (pad, user, eos))
    assert answers.decode(tokenizer, tokens, mask, [eos]) == [
        [answer, answer, answer + pad], [answer + user * 3, answer + eos_text, ""]
    ]


def test_the_cache_goes_in_under_the_name_that_the_library_has_for_it(recwarn):
    kind = type(make_model("llama").get_decoder())
    assert _cache_name(kind) in inspect.signature(kind.forward).parameters
    sample(make_model("llama"))
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]


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


def test_softcapped_logits_are_capped():
    model = make_model("gemma3", torch.float32)
    model.config.final_logit_softcapping = 0.5
    check_model(model)
    hidden = torch.randn(5, 32) * 100
    assert prefix.head(model, hidden).abs().max() <= 0.5


@pytest.mark.parametrize("shape", [(2, 2, 9), (3, 9), (3, 2, 1, 9)])
def test_shapes_are_checked(shape):
    model = make_model("llama", torch.float32)
    with pytest.raises(ValueError, match=r"expected tokens and mask \[P=3, N, T\]"):
        hidden_states(model, PROMPTS, torch.ones(shape).long(), torch.ones(shape).bool())


@torch.no_grad()
def test_states_of_the_cloud_alone_are_those_of_the_whole_reading_and_cost_fewer_tokens(monkeypatch):
    model, torch_rng = make_model("llama"), torch.Generator().manual_seed(3)
    prompts = [PROMPTS[:2], PROMPTS[1:]]  # Q = 2, K = 2
    tokens = torch.randint(3, 96, (2, 2, 3, 6), generator=torch_rng)  # [Q, K, G, T]
    mask = torch.arange(6) < torch.tensor([[6, 4, 1], [5, 6, 2]])[..., None].expand(2, 2, 3, 1)  # [Q, K, G, T]
    cloud = torch.tensor([[2, 0, 18], [1, 23, 11]])  # [Q, n] into K·G·T = 36; 23 and 11 are off the mask
    states = {}
    for own_logp in (False, True):
        read, token_states = [], scoring.token_states

        def counted(*arguments, read=read, token_states=token_states):
            read.append(arguments[3].sum())
            return token_states(*arguments)

        monkeypatch.setattr("support.scoring.token_states", counted)
        states[own_logp] = score_matrix(model, prompts, tokens, mask, mask, 1.0, 0, cloud, own_logp)[1]
        monkeypatch.undo()
        assert read == [48 if own_logp else 3 + 1 + 2]
    torch.testing.assert_close(states[False], states[True])
    assert (states[True][1, 1:] == 0).all() and states[True][0].abs().sum() > 0


def test_what_is_written_has_the_tokens_and_texts_of_sampling_by_the_same_names():
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    ends, pad = eos_ids(model, tokenizer), tokenizer.pad_token_id
    prompts = [[1, *range(20, 20 + n)] for n in (5, 3, 7, 4)]
    out, texts = sampling.write(model, tokenizer, prompts, ["a", "b"], 3, 8, 1.0, "<reasoning>")
    uniform = uniform_numbers(["a", "b"], 2, 3, 8).flatten(0, 1)  # [P, N, T] a name for two prompts
    plain = sampling.sample(model, prompts, uniform, 1.0, ends, pad)
    assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.mask, plain.mask)
    ids = out.tokens[3, 2][out.mask[3, 2]].tolist()
    assert [len(row) for row in texts] == [3] * 4
    assert texts[3][2] == "<reasoning>" + tokenizer.decode(ids[:-1] if ids[-1] in ends else ids)
