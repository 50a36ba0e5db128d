"""files.py: which principles, questions and examples it reads, what it refuses, and whether the refusal tells how to mend it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from helpers import load_questions, refusal, write

from grpo import format_reward
from support.files import (
    Example,
    Principle,
    Question,
    load_examples,
    load_principles,
    save_principles,
)
from support.prompts import build_messages

ROOT = Path(__file__).resolve().parent.parent

GOOD = b'{"principle": "Be brief."}\n'


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
    ("p.jsonl", GOOD + b'{"principle": "x"', 2, ["column 18", "Expecting"]),
    ("p.jsonl", GOOD + b'\n{"principle": oops}', 3, ["column 15"]),
    ("p.jsonl", b"[\n" + GOOD, 1, ["column 2"]),
    ("p.jsonl", b'["Be brief."]', 1, ["['Be brief.']", "object"]),
    ("p.jsonl", b"3", 1, ["3 is not an object"]),
    ("p.jsonl", b"[" * 500_000, 1, ["recursion"]),
    ("p.jsonl", b'{"principle": NaN}', 1, ["principle is nan"]),
    ("p.jsonl", b'{"principle": ' + b"9" * 5000 + b"}", 1, ["4300"]),
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
    ("q.jsonl", '{"question": "a"}\n{"question": "b"', 2, ["column 17"]),
    ("q.jsonl", "\n \n", None, ["no questions"]),
])
def test_questions_refused(tmp_path, name, content, line, parts):
    path = write(tmp_path, name, content)
    message = refusal(load_questions, path)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: "), message
    assert all(part in message for part in parts), f"{message!r} should mention {parts}"


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
