"""What data.py reads, what it refuses, and whether the refusal tells how to mend it."""

import dataclasses
import datetime
import itertools
import json
import os
import random
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from grpo import format_reward
from support import data
from support.data import split_questions
from support.errors import InputError
from support.files import (
    MAX_LINE,
    Example,
    Principle,
    Question,
    load_examples,
    load_principles,
    load_questions,
    save_principles,
)
from support.preferences import load_preferences
from support.prompts import (
    Form,
    build_messages,
    check_lengths,
    encode_prompts,
    prompt_fingerprint,
    render,
    set_date,
)

ROOT = Path(__file__).resolve().parent.parent

GOOD = b'{"principle": "Be brief."}\n'
TURNS = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(function, *args, **kwargs):
    """The message of the InputError that the call must raise, checked for the form that every message has."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, f"`error: ...` must be one line; escape the value: {message!r}"
    assert message.isprintable(), f"control characters must not reach the terminal: {message!r}"
    assert len(message) < 400, f"long values must be shortened: {len(message)} characters"
    assert "; " in message and message.endswith("accepted"), f"say what is accepted, at the end: {message}"
    return message


# Principles

@pytest.mark.parametrize("name, content", [
    ("p.txt", "Be brief.\nShow every step.\n"),
    ("p.txt", b"\xef\xbb\xbfBe brief.\r\nShow every step."),
    ("p.TXT", "# a comment\n\n  # another\n \tBe brief. \n\n\nShow every step.\u00a0\n"),
    ("p.jsonl", '{"principle": "Be brief."}\n\n{"principle": " Show every step. "}\n'),
    ("p.jsonl", b'\xef\xbb\xbf{"principle": "Be brief.", "id": "p1"}\r\n{"principle": "Show every step."}'),
])
def test_principles_load_the_same_from_every_accepted_form(tmp_path, name, content):
    expected = [Principle("p1", "Be brief."), Principle("p2", "Show every step.")]
    assert load_principles(write(tmp_path, name, content)) == expected, (
        "a BOM, CRLF, comments, blank lines and outer white space must not end up in a principle")


def test_principles_keep_ids_negatives_and_line_separators(tmp_path):
    lines = '{"principle": "a\u2028b", "id": "x", "negative": "c"}\n{"principle": "#d"}\n'
    path = write(tmp_path, "p.jsonl", lines)
    assert load_principles(path) == [Principle("x", "a\u2028b", "c"), Principle("p2", "#d")], (
        "U+2028 inside a JSON string is not a line end: do not use str.splitlines")


REFUSED_PRINCIPLES = [  # file, content, line number in the message, what else is in the message
    # JSON
    ("p.jsonl", GOOD + b'{"principle": "x"', 2, ["column 18", "','"]),
    ("p.jsonl", GOOD + b'\n{"principle": oops}', 3, ["column 15", "'oops}'"]),
    ("p.jsonl", b"[\n" + GOOD, 1, ["column 2"]),
    ("p.jsonl", b'["Be brief."]', 1, ["['Be brief.']", "object"]),
    ("p.jsonl", b"3", 1, ["3 is not an object"]),
    ("p.jsonl", b"[" * 500_000, 1, ["nested too deeply"]),
    ("p.jsonl", b'{"principle": NaN}', 1, ["NaN"]),
    ("p.jsonl", b'{"principle": [-Infinity]}', 1, ["-Infinity"]),
    ("p.jsonl", b'{"principle": ' + b"9" * 5000 + b"}", 1, ["4300"]),
    ("p.jsonl", b'{"principle": "a", "id": "b", "principle": "c"}', 1, ["'principle' is repeated"]),
    ("p.jsonl", b'{"principle": {"\\u001b[31m": 1, "\\u001b[31m": 2}}', 1, [r"'\x1b[31m' is repeated"]),
    # Fields
    ("p.jsonl", b'{"principle": "a", "negativ": "b"}', 1, ["'negativ'", "principle, id, negative"]),
    ("p.jsonl", b'{"id": "a"}', 1, ["principle is missing", "'a'", "string"]),
    ("p.jsonl", b'{"principle": 7}', 1, ["principle is 7", "string"]),
    ("p.jsonl", b'{"principle": null}', 1, ["principle is None", "string"]),
    ("p.jsonl", b'{"principle": "a", "id": 1}', 1, ["id is 1", "string"]),
    ("p.jsonl", b'{"principle": "a", "id": ""}', 1, ["id is ''", "non-empty"]),
    ("p.jsonl", b'{"principle": "a", "negative": ["' + b"b" * 900 + b'"]}', 1, ["negative is ['bb"]),
    ("p.jsonl", b'{"principle": " \\n\\u2029 "}', 1, [r"principle is ' \n\u2029 '", "non-empty"]),
    ("p.jsonl", b'{"principle": "a\\u0000b"}', 1, [r"'\x00'", "NUL"]),
    ("p.jsonl", b'{"principle": "a\\ud83d"}', 1, [r"'\ud83d'", "Unicode"]),
    # Repeats
    ("p.txt", "Be brief.\n#\nBe  BRIEF.\n", 3, ["principle 'Be  BRIEF.'", "line 1", "different"]),
    ("p.txt", "Caf\u00e9\nCafe\u0301\n", 2, ["principle 'Cafe", "line 1", "different"]),
    ("p.jsonl", GOOD + b'{"principle": "a", "id": "p1"}', 2, ["id 'p1'", "line 1", "different"]),
    ("p.jsonl", b'{"principle": "a", "id": "p2"}\n' + GOOD, 2, ["id 'p2'", "line 1", "different"]),
    # Bytes
    ("p.txt", b"Be brief.\ncaf\xe9\n", 2, ["byte 4 is 0xe9", "UTF-8"]),
    ("p.txt", "Be brief.\nBe kind.\n".encode("utf-16"), 1, ["byte 1 is 0xff", "UTF-8"]),
    ("p.txt", b"Be brief.\n\x00\n", 2, [r"'\x00'", "NUL"]),
    ("p.txt", b"Be brief.\n" + b"a" * MAX_LINE + b"\n", 2, ["too long", "1000000"]),
    # Whole files
    ("p.txt", b"", None, ["0 principle", "2 or more"]),
    ("p.txt", "# Be brief.\nBe kind.\n", None, ["1 principle", "2 or more"]),
    ("p.jsonl", GOOD, None, ["1 principle", "2 or more"]),
    ("p.json", GOOD, None, ["'.json'", ".txt and .jsonl"]),
    ("p", GOOD, None, ["''", ".txt and .jsonl"]),
    ("p\n\x1b[31m.txt", b"", None, [r"p\n\x1b[31m.txt"]),
]


@pytest.mark.parametrize("name, content, line, parts", REFUSED_PRINCIPLES,
                         ids=[parts[0] for *_, parts in REFUSED_PRINCIPLES])
def test_principles_refused(tmp_path, name, content, line, parts):
    path = write(tmp_path, name, content)
    message = refusal(load_principles, path)
    place = str(path) if name.isprintable() else repr(str(path))
    place = f"{place}: " if line is None else f"{place}:{line}: "
    assert message.startswith(place), f"name the file and the line to open, {place!r}: {message!r}"
    for part in parts:
        assert part in message, f"{message!r} should mention {part!r}"


def test_a_long_value_shows_its_beginning_only(tmp_path):
    path = write(tmp_path, "p.jsonl", json.dumps({"principle": ["abcdef" * 999] * 9}))
    message = refusal(load_principles, path)
    assert "['abcdef" in message and len(message) < len(str(path)) + 100, message


@pytest.mark.parametrize("load", [load_principles, load_questions])
def test_files_that_cannot_be_read(tmp_path, load):
    (tmp_path / "folder.jsonl").mkdir()
    for path, reason in [(tmp_path / "none.jsonl", "No such file"), (tmp_path / "folder.jsonl", "directory")]:
        message = refusal(load, str(path))  # a string works as well as a Path
        assert message.startswith(f"{path}: ") and reason in message, message
    path = write(tmp_path, "secret.jsonl", GOOD)
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads everything
        assert "Permission denied" in refusal(load, path)


def test_permission_errors_are_input_errors(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", denied)
    assert "Permission denied" in refusal(load_principles, tmp_path / "p.txt")


AWKWARD = [
    Principle("emoji", "Be kind 🙂👩\u200d🚀", "Be rude 😠"),
    Principle("rtl", "הצג כל שלב، אظهر"),
    Principle("quotes", 'Say "yes", \\ \'no\' and </answer>'),
    Principle("lines", "one\ntwo\r\nthree\u2028four\tfive\x85six"),
    Principle("p9", "# not a comment"),
]


def test_save_then_load_gives_equal_principles(tmp_path):
    path = tmp_path / "p.jsonl"
    save_principles(path, AWKWARD[:2])
    save_principles(str(path), AWKWARD)  # overwrites
    assert load_principles(path) == AWKWARD
    assert "🙂" in path.read_text("utf-8"), "people read this file: keep it unescaped"
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"], "the file written aside must be gone"


def test_save_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    save_principles(path, AWKWARD)
    before = path.read_bytes()

    def disk_full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", disk_full)
    assert "No space left" in refusal(save_principles, path, AWKWARD[:3])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("name, principles, parts", [
    ("p.txt", AWKWARD, ["'.txt'", ".jsonl"]),
    ("none/p.jsonl", AWKWARD, ["No such file"]),
    ("file/p.jsonl", AWKWARD, ["Not a directory"]),
    ("p.jsonl", AWKWARD[:1], ["1 principle"]),
    ("p.jsonl", [*AWKWARD, Principle("emoji", "x")], [":6: ", "'emoji'", "line 1"]),
    ("p.jsonl", [Principle("a", "x"), Principle("b", "")], [":2: ", "non-empty"]),
    ("p.jsonl", [Principle("a", "x"), Principle("b", "\ud800")], [":2: ", r"'\ud800'"]),
])
def test_save_refuses_what_load_would_refuse(tmp_path, name, principles, parts):
    write(tmp_path, "file", b"")
    message = refusal(save_principles, tmp_path / name, principles)
    assert message.startswith(str(tmp_path / name)), message
    assert all(part in message for part in parts), message
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "a refused save must leave nothing behind"


def test_records_are_frozen():
    for record in Principle("a", "b"), Question("a"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.text = "c"


# Questions

def test_questions_load(tmp_path):
    lines = [
        '{"question": " 2 + 3? ", "answer": 5, "source": {"n": null}}', '{"question": "b", "answer": 2.50}',
        "", '{"question": "c"}',
        '{"question": "2 + 3?", "answer": "6"}', '{"question": "B", "answer": " x "}']
    assert load_questions(write(tmp_path, "q.jsonl", "\r\n".join(lines))) == [
        Question("2 + 3?", "5"), Question("b", "2.5"), Question("c"), Question("B", "x")], (
        "other keys are ignored, the first of several questions with one text is kept")


@pytest.mark.parametrize("name, content, line, parts", [
    ("q.jsonl", '{"question": "a"}\n{"question": "  "}', 2, ["question is '  '", "non-empty string"]),
    ("q.jsonl", '{"questions": "a"}', 1, ["question is missing", "'questions'", "string"]),
    ("q.jsonl", '{"question": ["a"]}', 1, ["question is ['a']", "string"]),
    ("q.jsonl", '{"question": "a", "answer": true}', 1, ["answer is True", "string or a number"]),
    ("q.jsonl", '{"question": "a", "answer": null}', 1, ["answer is None", "string or a number"]),
    ("q.jsonl", '{"question": "a", "answer": -1e999}', 1, ["answer is -inf", "string or a number"]),
    ("q.jsonl", '{"question": "a", "answer": {"x": 1}}', 1, ["answer is {'x': 1}", "string or a number"]),
    ("q.jsonl", '{"question": "a", "answer": ""}', 1, ["answer is ''", "string or a number"]),
    ("q.jsonl", '{"question": "a", "x": Infinity}', 1, ["Infinity"]),
    ("q.jsonl", '{"question": "a"}\n{"question": "b"', 2, ["column 17", "'end of line'"]),
    ("q.jsonl", "\n \n", None, ["no question", '{"question": "2 + 3?"}']),
])
def test_questions_refused(tmp_path, name, content, line, parts):
    path = write(tmp_path, name, content)
    message = refusal(load_questions, path)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: "), message
    assert all(part in message for part in parts), f"{message!r} should mention {parts}"


def test_a_csv_cell_is_the_text_in_the_file(tmp_path, monkeypatch):
    for library in "pandas", "pyarrow", "datasets":
        monkeypatch.setitem(sys.modules, library, None)  # neither needed nor asked
    cells = ["NA", "None", "null", "nan", "007", "2.50", "True", "1e5", "9007199254740993", "18446744073709551617", "1,000"]
    rows = "".join(f'"{n} + ""1""?",ignored,"{cell}"\r\n' for n, cell in enumerate(cells))
    path = write(tmp_path, "q.csv", "\ufeffquestion,note,answer\r\n\r\n" + rows + ',,\r\n"two\nlines, one cell",,\r\n')
    assert load_questions(path) == [
        *(Question(f'{n} + "1"?', cell) for n, cell in enumerate(cells)), Question("two\nlines, one cell")]


@pytest.mark.parametrize("content, line, parts", [
    ("question,answer\n2 + 3?,5\n,7\n", 3, ["question is missing", "'7'"]),
    ("question,answer\n\n2, 3?,5\n", 3, ["3 cells", "the header 2", "comma"]),
    ("question,answer\n2 + 3?\n", 2, ["1 cells"]),
    ('question,answer\n"a\nb",1\n"2 + 3?"x,5\n', 4, ["expected after", "comma"]),
    ('question,answer\na,1\n"2 + 3?,5\n\n', 3, ["unexpected end"]),
    ("question,answer\na,1\n\xe9,5\n".encode("latin-1"), 3, ["0xe9", "UTF-8"]),
    ("question,question\na,1\n", 1, ["two columns 'question'"]),
    ("question,answer\na\0,1\n", 2, [r"'\x00'"]),
    ("Question ,answer\na,1\n", 2, ["has no column 'question'; did you mean 'Question '?"]),
    ("questoin,answer\na,1\n", 2, ["has no column 'question'; did you mean 'questoin'?"]),
    ("question, answer\na,1\n", 2, ["has no column 'answer'; did you mean ' answer'?"]),
    ("question;answer\na;1\n", 2, ["question is missing in {'question;answer': 'a;1'}"]),
    ("question,answer\n", None, ["no question"]),
    ("", None, ["no question"]),
])
def test_a_csv_that_is_refused_names_line_and_reason(tmp_path, content, line, parts):
    path = write(tmp_path, "q.csv", content)
    message = refusal(load_questions, path)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: "), message
    assert all(part in message for part in parts), f"{message!r} should mention {parts}"


def test_a_field_nearly_named_right_is_said_in_every_kind_of_file(tmp_path):
    path = write(tmp_path, "q.jsonl", '{"question": "a", "Answer": 5}')
    assert "did you mean 'Answer'?" in refusal(load_questions, path), "its answers would be lost in silence"
    assert load_questions(path, answer_field="Answer") == [Question("a", "5")]
    path = write(tmp_path, "q.jsonl", '{"question": "a", "answers": ["5"]}')
    assert load_questions(path) == [Question("a")], "another field, not a misspelt one"
    path = write(tmp_path, "p.csv", "prompt,Chosen,rejected\na?,b,c\n")
    assert "has no column 'chosen'; did you mean 'Chosen'?" in refusal(load_preferences, path)
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.table({"Question": ["a"], "answer": ["b"]}), path)
    assert refusal(load_questions, path).startswith(f"{path}:1: has no column 'question'; did you mean 'Question'?")


def test_a_parquet_file_that_is_refused_names_row_and_reason(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.table({"question": ["a", "b", "c"], "answer": [1.0, None, float("nan")]}), path)
    assert refusal(load_questions, path).startswith(f"{path}:3: answer is nan")
    whole = path.read_bytes()
    assert "magic bytes" in refusal(load_questions, write(tmp_path, "q.parquet", whole[:50]))
    assert "No such file" in refusal(load_questions, tmp_path / "none.parquet")


EXAMPLE = {"question": "1 + 1?", "principle": "Be kind.", "reasoning": "1 + 1 = 2.", "answer": 2}


def test_examples_load(tmp_path):
    path = write(tmp_path, "e.jsonl", json.dumps(EXAMPLE))
    assert load_examples(path) == [Example("1 + 1?", "Be kind.", "1 + 1 = 2.", "2")]
    shipped = load_examples(ROOT / "principles" / "examples.jsonl")
    for turn in build_messages("a?", "b", shipped)[1::2]:
        assert format_reward(turn["content"]) == 1, "an example must earn the reward that it is an example of"


@pytest.mark.parametrize("change, parts", [
    ({"reasoning": None}, ["reasoning is None"]), ({"answer": " "}, ["answer is ' '"]), ({"answer": True}, ["answer is True"]),
    ({"id": "x"}, ["unknown 'id'", "question, principle, reasoning, answer"]),
    ({"reasoning": "a</reasoning>b"}, ["reasoning contains </reasoning>"]), ({"answer": "<answer>2"}, ["answer contains <answer>"]),
])
def test_examples_refused(tmp_path, change, parts):
    path = write(tmp_path, "e.jsonl", json.dumps(EXAMPLE) + "\n" + json.dumps(EXAMPLE | change))
    message = refusal(load_examples, path)
    assert message.startswith(f"{path}:2: ") and all(part in message for part in parts), message
    assert "has no example" in refusal(load_examples, write(tmp_path, "e.jsonl", "\n"))
    assert "principle is missing" in refusal(load_examples, write(tmp_path, "e.jsonl", '{"question": "a"}'))


POOL = [Question(f"What is {n} + {n}?", str(2 * n)) for n in range(60)]


def test_split_is_a_partition_that_depends_on_texts_and_seed_only():
    train, held_out = split_questions(POOL, 20, seed=0)
    assert (len(train), len(held_out)) == (40, 20) and set(train) | set(held_out) == set(POOL)
    shuffled = random.Random(1).sample(POOL, len(POOL))
    assert split_questions(shuffled, 20, seed=0) == (train, held_out), "it depends on the file's order"
    assert set(split_questions(POOL, 20, seed=1)[1]) != set(held_out), "another seed, another split"
    assert held_out[:3] == split_questions(POOL, 3, seed=0)[1], "a smaller set is part of a larger one"
    assert split_questions(POOL[:4], 1, seed=7)[1] == [Question("What is 0 + 0?", "0")], (
        "the split changed between versions or platforms: figures measured before no longer compare "
        "(is it Python's salted hash()?)")


def test_split_stays_put_when_questions_are_added():
    train, held_out = split_questions(POOL[:40], 10, seed=0)
    later_train, later_held_out = split_questions(POOL, 10, seed=0)
    assert set(train) <= set(later_train), "a question trained on must never be moved to the held-out set"
    assert set(later_held_out) & set(POOL[:40]) <= set(held_out)


def test_no_text_is_on_both_sides_whatever_its_case_and_spacing():
    spellings = ("Is {} odd?", "is  {} ODD?", " Is {} odd?\n")
    variants = [Question(spelling.format(n)) for n in range(30) for spelling in spellings]
    train, held_out = split_questions(variants + variants, 10, seed=0)
    assert split_questions(variants[::-1] * 2, 10, seed=0) == (train, held_out)
    numbers = [{question.text.split()[1] for question in side} for side in (train, held_out)]
    assert not numbers[0] & numbers[1], "the model would be tested on a question it was trained on"
    assert len(held_out) == len(numbers[1]) == 10, "one question must not be counted twice in an evaluation"


@pytest.mark.parametrize("num_eval", [60, 99, -1])
def test_split_refused(num_eval):
    message = refusal(split_questions, POOL, num_eval, 0)
    assert str(num_eval) in message and "60" in message
    assert split_questions(POOL, 0, 0)[1] == [] and len(split_questions(POOL, 59, 0)[0]) == 1


# Prompts

def tokenizer_with(template, post_bos=False, bos="<s>", specials=()):
    """A byte-level BPE tokenizer of a few hundred tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = ["user model Principle: Write <reasoning></reasoning><answer></answer>."]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|turn|>", "<|end|>", *specials]
    raw.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if post_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token="</s>", chat_template=template)


def chat(question="2 + 3?", principle="Be brief."):
    return build_messages(question, principle)


def test_the_prompt_is_the_one_the_module_shows():
    prompt = "2 + 3?\n\nPrinciple: Be brief.\nWrite <reasoning>…</reasoning><answer>…</answer>."
    assert chat() == [{"role": "user", "content": prompt}]
    shown = prompt.replace("2 + 3?", "{question}").replace("Be brief.", "{principle}")
    assert shown in data.__doc__.replace("\n    ", "\n"), "the module docstring must show the exact prompt"


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

def metaspace_tokenizer(kind=models.BPE, vocabulary=300, template="{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}[model]\n"):
    """As in Llama-2 and Mistral: words begin with a space, a text too, and nothing bounds a token but the vocabulary."""
    texts = ["[user] What is 2 + 3 ?\n\nPrinciple: Be brief.\nWrite <reasoning> how </reasoning><answer> 5 </answer>.\n[model]\n 5 pens"] * 9
    letters = [*map(chr, range(32, 127)), "\n", "\u2581", "\u2026"]
    if kind is models.BPE:
        raw, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False)
    else:
        raw, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, unk_token="<unk>", show_progress=False)
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template)


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


# Lengths

def test_lengths_are_found_in_tokens_with_few_prompts(monkeypatch):
    tokenizer = tokenizer_with(TURNS + OPEN)
    questions = ["How many are left? " * 3, "\u7b97" * 40 + "?", *(f"{n} + 1?" for n in range(60))]
    principles = ["State the given numbers first. " * 2, "\u68c0" * 30 + ".", "Be brief."]
    assert max(questions, key=len) != questions[1] and max(principles, key=len) != principles[1]
    count, encode = [], encode_prompts

    def counted(tokenizer, talks, *rest):
        count.append(len(talks))
        return encode(tokenizer, talks, *rest)

    monkeypatch.setattr("support.prompts.encode_prompts", counted)
    most = len(encode(tokenizer, [chat(questions[1], principles[1])])[0])
    for limit in most, most + 100:
        count.clear()
        assert max(map(len, check_lengths(tokenizer, questions, principles, limit))) == most
    assert sum(count) <= len(questions) + len(principles) + 2, "every pair was encoded"
    message = refusal(check_lengths, tokenizer, questions, principles, most - 1)
    assert "'\u7b97" in message and "'\u68c0" in message and f"{most} tokens" in message, message


@pytest.mark.parametrize("kind, vocabulary", [(models.BPE, 900), (models.Unigram, 150)])
def test_lengths_are_exact_for_tokenizers_without_word_boundaries(kind, vocabulary):
    tokenizer, rng = metaspace_tokenizer(kind, vocabulary), random.Random(0)
    pieces = "What is 2 + 3 ? brief. Principle: Write how 5 pens \n [model] < > answer".split(" ")
    questions, principles = ([" ".join(rng.choices(pieces, k=rng.randint(1, 12))) + "?" for _ in range(n)] for n in (25, 9))
    form = Form((Example("1 + 1?", "Be kind.", "2", "2"),), "<reasoning>")
    lengths = {pair: len(form.encode(tokenizer, [pair])[0]) for pair in itertools.product(questions, principles)}
    most = max(lengths.values())
    assert max(map(len, check_lengths(tokenizer, questions, principles, most, form))) == most
    for limit in range(most - 12, most):
        assert f"at most {limit}" in refusal(check_lengths, tokenizer, questions, principles, limit, form)


def test_a_pair_that_is_longer_than_its_parts_say_is_found(monkeypatch):
    """A tokenizer in which every seam may cost up to two tokens more, or none."""
    tokenizer, rng = tokenizer_with(TURNS), random.Random(0)
    questions, principles = ([f"{name} {n}" for n in range(size)] for name, size in (("q", 12), ("p", 5)))
    for _ in range(50):
        parts = {text: rng.randint(1, 20) for text in questions + principles}
        lengths = {build_messages(q, p)[0]["content"]: parts[q] + parts[p] + rng.randint(0, 2)
                   for q, p in itertools.product(questions, principles)}
        most = max(lengths.values())

        def encode(tokenizer, talks, limit, prefill, lengths=lengths):
            found = [lengths[talk[-1]["content"]] for talk in talks]
            if max(found, default=0) > limit:
                raise InputError("too long")
            return [[0] * length for length in found]

        monkeypatch.setattr("support.prompts.encode_prompts", encode)
        assert max(map(len, check_lengths(tokenizer, questions, principles, most))) == most
        with pytest.raises(InputError):
            check_lengths(tokenizer, questions, principles, most - 1)


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

    monkeypatch.setattr(data.datetime, "date", Clock)
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
    changed += [prompt_fingerprint(make()), prompt_fingerprint(make(), Generation, Form((Example("a", "b", "c", "d"),))),
                prompt_fingerprint(make(), Generation, Form(prefill="<reasoning>"))]
    assert len({same, *changed}) == 1 + len(changed), "something that shapes the prompt is not in it"
