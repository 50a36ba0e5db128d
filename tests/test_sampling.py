"""sampling.py: from which distribution tokens are drawn, where completions end, and what they say."""

import pytest
import torch
from small import PROMPTS, make_model, write

from support import answers, sampling, tiny
from support.answers import cot_mask
from support.model import load_model
from support.prompts import eos_ids
from support.sampling import sample, uniform_numbers


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_sampling_draws_from_the_distribution_that_scoring_scores(name):
    """One token, many samples, against exact probabilities: catches a wrong temperature, position, mask or cache."""
    model = make_model(name, torch.float32)
    model.get_output_embeddings().weight.data *= 3
    draws = 4000
    out = write(model, num=draws, length=1, temperature=1.5)
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
    unended = write(model, num=1, length=20, temperature=1e-4).tokens  # [P, 1, T]
    eos = [2, int(unended[0, 0, 1])]  # a token that the first prompt's completion holds: that row ends early
    out = write(model, num=1, length=20, eos=eos, temperature=1e-4)
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
    out = write(model, num=64, length=30, eos=ends)
    last = out.tokens.gather(-1, (out.mask.sum(-1, keepdim=True) - 1))[..., 0]  # [P, N]
    is_end = torch.isin(out.tokens, torch.tensor(ends)) & out.mask  # [P, N, T]
    assert set(last[~out.truncated].tolist()) == set(ends), "not every one of the end tokens ends a completion"
    assert (is_end.sum(-1) == (~out.truncated).long()).all(), "an end token stands inside a completion"
    assert (out.mask.sum(-1)[out.truncated] == 30).all()
    assert (out.tokens[~out.mask] == 0).all(), "after the end there must be padding"


def test_a_sample_depends_on_its_prompt_and_its_numbers_not_on_the_batch():
    model = make_model("gemma3")  # float64: rounding, which does depend on the batch, cannot move a token
    uniform = uniform_numbers([f"prompt {p}" for p in range(len(PROMPTS))], 5, 20)  # [P, N, T]
    together = sample(model, PROMPTS, uniform, 1.0, [2, 50, 51], 0)
    for p, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], uniform_numbers([f"prompt {p}"], 5, 20), 1.0, [2, 50, 51], 0)
        width = alone.tokens.shape[-1]
        assert torch.equal(together.tokens[p, :, :width], alone.tokens[0])
        assert torch.equal(together.mask[p, :, :width], alone.mask[0]) and not together.mask[p, :, width:].any()


def test_sampling_never_takes_a_token_of_probability_zero():
    """At the two ends of [0, 1): the first and the last token that can come, not the first and the last there are."""
    model = make_model("llama", torch.float32)
    head = model.get_output_embeddings()
    bias = torch.zeros(96).index_fill(0, torch.tensor([0, 1, 95]), -torch.inf)  # [V]
    head.bias = torch.nn.Parameter(bias)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[None, :, None]  # [1, 2, 1]
    assert sample(model, PROMPTS[:1], uniform, 1.0, [2], 0).tokens.flatten().tolist() == [2, 94]


def test_same_seed_same_samples():
    model = make_model("llama", torch.float32)
    assert torch.equal(write(model, 3).tokens, write(model, 3).tokens)
    assert not torch.equal(write(model, 3, num=8).tokens, write(model, 4, num=8).tokens)


def test_what_is_written_has_the_tokens_and_texts_of_sampling_by_the_same_names():
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    ends, pad = eos_ids(model, tokenizer), tokenizer.pad_token_id
    prompts = [[1, *range(20, 20 + n)] for n in (5, 3, 7, 4)]
    out, texts = sampling.write(model, tokenizer, prompts, ["a", "b"], 3, 8, 1.0, "<reasoning>")
    uniform = uniform_numbers(["a", "b"], 2, 3, 8).flatten(0, 1)  # [P, N, T] a name for two prompts
    plain = sample(model, prompts, uniform, 1.0, ends, pad)
    assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.mask, plain.mask)
    ids = out.tokens[3, 2][out.mask[3, 2]].tolist()
    assert [len(row) for row in texts] == [3] * 4
    assert texts[3][2] == "<reasoning>" + tokenizer.decode(ids[:-1] if ids[-1] in ends else ids)


@pytest.mark.parametrize("size", [7, 96, 256, 512, 1000, 5000])
def test_a_token_is_where_the_cumulated_sum_of_all_passes_the_number(size):
    """By blocks of the sum, for vocabularies smaller than a block, a multiple of it, and neither."""
    torch.manual_seed(size)
    probs = (6 * torch.randn(500, size)).softmax(-1)  # [A, V]
    uniform = torch.rand(500, dtype=torch.float64)  # [A]
    passed = probs.double().cumsum(-1)  # [A, V]
    plain = torch.searchsorted(passed, uniform[:, None] * passed[:, -1:], right=True)[:, 0]  # [A]
    token, whole = sampling._passed(probs, uniform)
    assert torch.equal(token, plain)
    torch.testing.assert_close(whole, passed[:, -1])


def test_logits_that_are_no_numbers_end_in_an_error():
    model = make_model("llama", torch.float32)
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="distribution of the next token is not finite"):
        write(model)


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
