"""Principles, questions, examples and pairs as records, read from files.

    principles   .txt: one a line, lines that begin with # are comments; or .jsonl: principle and,
                 optionally, id and negative
    questions    .jsonl, .parquet, .csv, or a data set of the hub or a folder like one: question and,
                 optionally, answer (CoT-Collection: source, target); other columns are not read
    examples     .jsonl: question, principle, reasoning, answer

A text is what the file has, without the white space around it. A file is the user's to mend: its
first wrong row raises InputError, with file and line. Nobody can mend a row of a data set: wrong
ones are left out, and one line counts them and says what is wrong with one of them.
"""

import json
import re
from dataclasses import dataclass

from support.errors import InputError
from support.rows import (
    answer_of,
    check_file,
    good,
    json_objects,
    lines_of,
    normalised,
    printable,
    refuse_near_names,
    refuse_unknown,
    rows_of,
    short,
    text_of,
)
from support.writing import write_aside


@dataclass(frozen=True)
class Principle:
    id: str
    text: str
    negative: str | None = None


@dataclass(frozen=True)
class Question:
    text: str
    answer: str | None = None


@dataclass(frozen=True)
class Example:
    question: str
    principle: str
    reasoning: str
    answer: str


@dataclass(frozen=True)
class Preference:
    """Two responses to a prompt, of which the first was chosen."""

    prompt: str | list  # text as it stands, or chat messages
    chosen: str  # what the model should write after it
    rejected: str  # what it should not
    answer: str | None = None
    where: str = "a pair"  # file and line, for errors

    @property
    def text(self) -> str:
        """What is asked: the prompt, of messages the last one of the user."""
        if isinstance(self.prompt, str):
            return self.prompt
        asked = [message["content"] for message in self.prompt if message["role"] == "user"]
        return asked[-1] if asked else "\n".join(message["content"] for message in self.prompt)


# --------------------------------------------------------------------------------------------------
# Principles and examples


def load_principles(path) -> list[Principle]:
    """Two or more `Principle`s of a .txt or .jsonl file; the n-th without an `id` is called "p{n}".

    Raises InputError for a file or line it cannot take, for fewer than two principles (SI compares
    them), and for a repeated id or text (texts compared without case and spacing).
    """
    check_file(path, ".txt", ".jsonl")
    if str(path).lower().endswith(".jsonl"):
        return _check_principles(path, json_objects(path))
    texts = [(where, text.strip()) for where, text in lines_of(path)]
    return _check_principles(path, [(where, {"principle": text}) for where, text in texts if text and text[0] != "#"])


def save_principles(path, principles) -> None:
    """Write a .jsonl file that `load_principles` reads back equal (white space around texts aside).

    Raises InputError for what `load_principles` would refuse, and for a file it cannot write.
    """
    check_file(path, ".jsonl")
    rows = [{"id": p.id, "principle": p.text, "negative": p.negative} for p in principles]
    rows = [{key: text for key, text in row.items() if text is not None} for row in rows]
    _check_principles(path, [(f"{printable(path)}:{n}", row) for n, row in enumerate(rows, start=1)])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_aside(path, lambda aside: aside.write_bytes(text.encode()))
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be written ({error.strerror}); a writable file is "
                         "accepted") from None


def _check_principles(path, rows) -> list[Principle]:
    """Principles from (where, dict) pairs."""
    principles, seen = [], {}
    for where, row in rows:
        refuse_unknown(where, row, ("principle", "id", "negative"))
        row = {"id": f"p{len(principles) + 1}", **row}
        text, name = text_of(where, row, "principle"), text_of(where, row, "id")
        negative = text_of(where, row, "negative") if "negative" in row else None
        for field, value, key in ("principle", text, normalised(text)), ("id", name, name):
            first = seen.setdefault((field, key), where)
            if first != where:
                line = first.rpartition(":")[2]
                raise InputError(f"{where}: {field} {short(value)} is on line {line} too; different ones are accepted")
        principles.append(Principle(name, text, negative))
    if len(principles) < 2:
        raise InputError(f"{printable(path)}: has {len(principles)} principle(s); 2 or more are accepted")
    return principles


def load_examples(path) -> list[Example]:
    """`Example`s of a .jsonl file, one or more. Raises InputError for what it cannot take."""
    check_file(path, ".jsonl")
    examples = [example_of(where, row) for where, row in json_objects(path)]
    if not examples:
        raise InputError(f"{printable(path)}: has no example; 1 or more are accepted")
    return examples


def example_of(where, row) -> Example:
    """The `Example` of a dict with the four keys and no other; `answer` may be a number.

    Raises InputError for other keys, and for a tag of the format inside reasoning or answer: the
    turn made of them would not be well-formed.
    """
    keys = ("question", "principle", "reasoning", "answer")
    refuse_unknown(where, row, keys)
    example = Example(*(text_of(where, row, key) for key in keys[:3]), answer_of(where, row, "answer"))
    for key in keys[2:]:
        if tag := re.search(r"</?(reasoning|answer)>", getattr(example, key)):
            raise InputError(f"{where}: {key} contains {tag[0]}; text without tags of the format is accepted")
    return example


# --------------------------------------------------------------------------------------------------
# Questions


def read_questions(source, left_out, question_field=None, answer_field=None, config=None, split="train", seed=0):
    """Yields the distinct `Question`s of a file in its order; of several with one text, the first.

    Any other `source` is a data set of the hub, or a folder like one, in `config` and `split`. It
    is streamed, and shuffled by `seed` in a buffer of SHUFFLE_BUFFER rows (a sorted set is not
    drawn evenly). Fields that are not given are question and answer, or else source and target. The
    answer is optional unless its field is given; see `answer_of`.
    """
    fields = [question_field] if question_field else ["question", "source"]
    fields += [answer_field] if answer_field else ["answer", "target"]
    seen = set()
    for where, row, names in rows_of(source, fields, config, split, seed):
        try:
            question = _question(where, row, names, question_field, answer_field)
        except InputError as error:
            left_out.add(error, not seen)
            continue
        if question.text not in seen:
            seen.add(question.text)
            yield question


def _question(where, row, names, question_field, answer_field) -> Question:
    row = good(row)
    field = question_field or ("source" if "question" not in names and "source" in names else "question")
    answer = answer_field or ("target" if field == "source" else "answer")
    refuse_near_names(where, row, names, [field, answer])
    text = text_of(where, row, field)
    return Question(text, answer_of(where, row, answer) if answer in row or answer_field else None)


# --------------------------------------------------------------------------------------------------
# Writing
