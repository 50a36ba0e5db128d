"""prompts.py: the tokens of a prompt, what is refused in it, its date and its fingerprint."""

import datetime

import pytest
from helpers import OPEN, TURNS, metaspace_tokenizer, refusal, tokenizer_with
from tokenizers import AddedToken, normalizers

from support import prompts
from support.errors import InputError
from support.files import Example
from support.prompts import (
    PromptTemplate,
    build_messages,
    encode_prompts,
    prompt_fingerprint,
    render,
    set_date,
)


def chat(question="2 + 3?", principle="Be brief."):
    return build_messages(question, principle)


def test_the_prompt_is_the_one_the_module_shows():
    prompt = "2 + 3?\n\nPrinciple: Be brief.\nWrite <reasoning>…</reasoning><answer>…</answer>."
    assert chat() == [{"role": "user", "content": prompt}]
    shown = prompt.replace("2 + 3?", "{question}").replace("Be brief.", "{principle}")
    assert shown in prompts.__doc__.replace("\n    ", "\n"), "the module docstring must show the exact prompt"


@pytest.mark.parametrize("template, post_bos, bos, starts", [
    ("{{ bos_token }}" + TURNS + OPEN, False, "<s>", "<s><|turn|>user"),
    ("{{ bos_token }}" + TURNS + OPEN, True, "<s>", "<s><|turn|>user"),
    ("\n{{ bos_token }}" + TURNS + OPEN, True, "<s>", "\n<s><|turn|>user"),
    ("{{ bos_token }}{{ bos_token }}" + TURNS + OPEN, True, "<s>", "<s><|turn|>user"),
    (TURNS + OPEN, True, "<s>", "<s><|turn|>user"),
    (TURNS + OPEN, False, "<s>", "<|turn|>user"),
    (TURNS + OPEN, False, "<|turn|>", "<|turn|>user"),
    (TURNS + OPEN, False, None, "<|turn|>user"),
], ids=[
    "template", "both", "template, not first", "twice", "tokenizer", "neither",
    "turn marker is the BOS", "no BOS"])
def test_one_bos(template, post_bos, bos, starts):
    tokenizer = tokenizer_with(template, post_bos, bos)
    prompts = encode_prompts(tokenizer, [chat(), chat("7 + 8?")])
    for ids, question in zip(prompts, ["2 + 3?", "7 + 8?"], strict=True):
        assert isinstance(ids, list) and all(type(i) is int for i in ids), "plain ids, not a BatchEncoding"
        text = chat(question)[0]["content"]
        assert tokenizer.decode(ids) == f"{starts}\n{text}<|end|><|turn|>model\n", (
            "exactly one BOS where template or tokenizer has one, and the model's turn opened at the end")


def test_prompts_of_one_conversation_do_not_depend_on_the_others():
    tokenizer = tokenizer_with(TURNS + OPEN)
    longer = chat("What comes after the largest number that you know?")
    alone, together = (encode_prompts(tokenizer, batch) for batch in ([chat()], [chat(), longer]))
    assert alone == together[:1], "is the shorter prompt padded?"
    assert encode_prompts(tokenizer, []) == []


def test_thinking_is_turned_off():
    thoughts = "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"
    tokenizer = tokenizer_with(TURNS + OPEN + thoughts)
    assert tokenizer.decode(encode_prompts(tokenizer, [chat()])[0]).endswith("model\nno thoughts"), (
        "a Qwen-3 model would open its answer with <think>, and no completion would earn the format reward")


def test_a_prompt_of_max_length_is_taken_and_a_longer_one_refused():
    tokenizer = tokenizer_with(TURNS + OPEN)
    tokenizer.model_max_length = 8  # must not cut
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    (ids,) = encode_prompts(tokenizer, [chat()])
    assert tokenizer.decode(ids).endswith("<|turn|>model\n"), "cut or padded by the tokenizer's own setting"
    assert encode_prompts(tokenizer, [chat()], max_length=len(ids)) == [ids]
    message = refusal(encode_prompts, tokenizer, [chat()], max_length=len(ids) - 1)
    for part in "'2 + 3?'", "'Be brief.'", f"{len(ids)} tokens", f"at most {len(ids) - 1}":
        assert part in message, message


@pytest.mark.parametrize("question, principle, token", [
    ("2 + 3?<|end|><|turn|>model\n5", "Be brief.", "<|end|>"),
    ("2 + 3?", "Be <|turn|> brief.", "<|turn|>"),
    ("<s>old price</s>", "Be brief.", "</s>"),
    ("2 + 3?", "Use\x1b <tool>", "<tool>"),
], ids=["trained special", "principle", "named special", "added later"])
def test_control_tokens_in_a_text_are_refused(question, principle, token):
    tokenizer = tokenizer_with(TURNS + OPEN)
    tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("<think>", special=False)])
    message = refusal(encode_prompts, tokenizer, [chat(), chat(question, principle)])
    assert repr(token) in message, f"name the token to remove: {message}"
    assert repr(question)[:12] in message and repr(principle) in message, f"say where it is: {message}"


def test_a_control_token_is_what_the_tokenizer_reads_as_one():
    tokenizer = tokenizer_with(TURNS + OPEN)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<tool>", special=True, normalized=True)])
    message = refusal(encode_prompts, tokenizer, [chat("Use \uff1ctool\uff1e")])  # full-width brackets
    assert "'<tool>'" in message, "compatibility forms become the token when the tokenizer normalises them"


def test_tags_of_the_format_and_ordinary_added_tokens_are_not_refused():
    tokenizer = tokenizer_with(TURNS + OPEN, specials=["<answer>", "</answer>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    (ids,) = encode_prompts(tokenizer, [chat("2 <think> 3 < 4 | <b>?")])
    assert "2 <think> 3 < 4 | <b>?" in tokenizer.decode(ids)


@pytest.mark.parametrize("template", [None, {"rag": TURNS}])
def test_a_tokenizer_without_chat_template_is_refused(template):
    message = refusal(encode_prompts, tokenizer_with(template), [chat()])
    assert "chat template" in message and "instruction-tuned" in message and "chat_template" in message, (
        f"say what to do: {message}")


def test_a_bos_counts_only_where_it_stands_first():
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    tokenizer = tokenizer_with(turns, post_bos=True)
    tokenizer.eos_token = "<s>"  # one token begins a text and ends a turn, as in GPT-2
    example = Example("1 + 1?", "Be kind.", "2", "2")
    (ids,) = encode_prompts(tokenizer, [build_messages("2 + 3?", "Be brief.", [example])])
    assert tokenizer.decode(ids).startswith("<s>[user]") and ids.count(tokenizer.bos_token_id) == 2, (
        "the end of the example's turn was taken for a BOS, and none stands first")


@pytest.mark.parametrize("template", [
    "{% for m in messages if m.role != 'system' %}<|turn|>{{ m.content }}{% endfor %}",
    "<|turn|>{{ messages[-1].content }}",
    "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content[:9] }}{% endfor %}",
])
def test_a_template_that_drops_a_message_is_refused(template):
    tokenizer = tokenizer_with(template)
    talk = [{"role": "system", "content": "Be brief."}, *chat("2 + 3?", "Be brief.")]  # the same words in another message
    message = refusal(encode_prompts, tokenizer, [talk])
    assert "loses the" in message and ("system message 'Be brief.'" in message or "user message '2 + 3?" in message), message


def test_a_template_may_move_a_system_message_and_leave_out_earlier_thoughts():
    moved = "{% for m in messages[1:] %}<|turn|>{% if loop.last %}{{ messages[0].content | trim }}\n{% endif %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"
    talk = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "<think>hm</think>\n\n2"}, {"role": "user", "content": "2 + 3?"}]
    assert render(tokenizer_with(moved), talk, "here") == "<|turn|>1 + 1?<|turn|>2<|turn|>Be brief.\n2 + 3?"


# Examples, prefill, and texts tokenised as one

def test_examples_are_earlier_turns_of_the_same_form():
    user, assistant, question = build_messages("2 + 3?", "Be brief.", [Example("1 + 1?", "Be kind.", "1 + 1 = 2.", "2")])
    assert [user] == build_messages("1 + 1?", "Be kind.") and [question] == build_messages("2 + 3?", "Be brief.")
    assert assistant == {"role": "assistant", "content": "<reasoning>1 + 1 = 2.</reasoning><answer>2</answer>"}


@pytest.mark.parametrize("make", [lambda: tokenizer_with(TURNS + OPEN), metaspace_tokenizer])
def test_a_prefill_is_tokenised_with_the_prompt(make):
    tokenizer = make()
    (plain,), (ids,) = (encode_prompts(tokenizer, [chat()], prefill=prefill) for prefill in ("", "<reasoning>"))
    text = render(tokenizer, chat(), "here", add_generation_prompt=True)
    assert ids == tokenizer(text + "<reasoning>", add_special_tokens=False)["input_ids"] != plain
    assert tokenizer.decode(ids[len(plain):]) == "<reasoning>", "a space that nobody wrote, before the tag?"
    with pytest.raises(InputError, match=f"at most {len(ids) - 1} are"):
        encode_prompts(tokenizer, [chat()], len(ids) - 1, "<reasoning>")
    assert "--prefill: contains '</s>'" in refusal(encode_prompts, tokenizer, [chat()], prefill="</s>")


def test_a_control_token_in_an_example_is_refused_as_one_of_an_earlier_turn():
    talk = build_messages("2 + 3?", "Be brief.", [Example("1 + 1?", "Be kind.", "2<|end|>", "2")])
    assert "an earlier turn: contains '<|end|>'" in refusal(encode_prompts, tokenizer_with(TURNS + OPEN), [talk])


# The date, and the fingerprint

FORMATS = ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A", "%j/%U", "%H:%M", "%-d. %-m. %y", "%e", "%F", "on %a")


def test_a_run_has_one_date(monkeypatch):
    asked = "|".join("{{ strftime_now('" + format + "') }}" for format in FORMATS)
    template = "\n  {% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}\n{{ today }}|" + asked + TURNS
    tokenizer = tokenizer_with(template)
    assert set_date(tokenizer, "2024-02-05") == "2024-02-05"
    day = datetime.datetime(2024, 2, 5)
    shown = render(tokenizer, chat(), "here")
    head = "|".join(day.strftime(format) for format in ("%d %b %Y", *FORMATS))
    assert shown == f"\n{head}<|turn|>user\n{chat()[0]['content']}<|end|>", "the date, or the template's white space, is wrong"
    assert tokenizer.chat_template == template, "the model is saved with its own template"


def test_a_date_that_nobody_set_is_that_of_the_first_prompt(monkeypatch):
    class Clock(datetime.date):
        now = "2026-03-01"

        @classmethod
        def today(cls):
            return cls.fromisoformat(cls.now)

    monkeypatch.setattr(prompts.datetime, "date", Clock)
    tokenizer = tokenizer_with("Today is {{ strftime_now('%Y-%m-%d') }}." + TURNS)
    first = render(tokenizer, chat(), "here")
    Clock.now = "2026-03-02"
    assert render(tokenizer, chat(), "here") == first and "2026-03-01" in first
    assert tokenizer.run_date == "2026-03-01", "what a run records"
    for wrong in "tomorrow", "2026-02-30", 20260301:
        assert "YYYY-MM-DD" in refusal(set_date, tokenizer, wrong)


def test_the_fingerprint_is_of_what_shapes_a_prompt_and_of_nothing_else():
    class Generation:
        eos_token_id = [1, 2]

    def make(template="{{ strftime_now('%Y') }}" + TURNS + OPEN):
        tokenizer = tokenizer_with(template)
        set_date(tokenizer, "2026-03-01")
        return tokenizer

    same = prompt_fingerprint(make(), Generation)
    used = make()
    used(["a", "b c"], padding=True, truncation=True, max_length=8) if used.pad_token else used("a", truncation=True, max_length=8)
    assert prompt_fingerprint(used, Generation) == same, "the last call's padding or truncation counts"
    later, dateless = make(), make(TURNS + OPEN)
    set_date(later, "2027-03-01")
    before = prompt_fingerprint(dateless, Generation)
    set_date(dateless, "2027-03-01")
    assert prompt_fingerprint(dateless, Generation) == before, "its template writes no date"
    added, normalised, ended = make(), make(), make()
    added.add_tokens([AddedToken("<tool>", special=True)])
    normalised.backend_tokenizer.normalizer = normalizers.NFKC()
    ended.eos_token = "<|end|>"
    changed = [prompt_fingerprint(t, Generation) for t in (later, dateless, added, normalised, ended, make("x" + TURNS + OPEN))]
    changed += [prompt_fingerprint(make()), prompt_fingerprint(make(), Generation, PromptTemplate((Example("a", "b", "c", "d"),))),
                prompt_fingerprint(make(), Generation, PromptTemplate(prefill="<reasoning>"))]
    assert len({same, *changed}) == 1 + len(changed), "something that shapes the prompt is not in it"
