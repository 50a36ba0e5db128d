"""Principles, questions and examples, read from files and data sets."""

import csv
import difflib
import json
import math
import os
import re
import reprlib
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.errors import InputError
from support.writing import write_aside

MAX_LINE = 1_000_000  # bytes; a longer line means that the wrong file was named
SHUFFLE_BUFFER = 10_000  # rows of a hub data set from which the next one is drawn
FILE_KINDS = (".jsonl", ".parquet", ".csv")  # else a data set of the hub, or a folder like one


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


def load_principles(path):
    """Two or more `Principle`s of a .txt or .jsonl file; the n-th without an `id` is called "p{n}".

    Raises InputError for a file or line it cannot take, for fewer than two principles (SI compares
    them), and for a repeated id or text (texts compared without case and spacing).
    """
    if not str(path).lower().endswith(".txt"):
        return _check_principles(path, _json_rows(path, ".txt", ".jsonl"))
    lines = [(where, text.strip()) for where, text in _lines(path, ".txt")]
    return _check_principles(path, [(where, {"principle": text}) for where, text in lines if text and text[0] != "#"])


def save_principles(path, principles):
    """Write a .jsonl file that `load_principles` reads back equal (white space around texts aside).

    Raises InputError for what `load_principles` would refuse, and for a file it cannot write.
    """
    _check_file(path, ".jsonl")
    rows = [{"id": p.id, "principle": p.text, "negative": p.negative} for p in principles]
    rows = [{key: text for key, text in row.items() if text is not None} for row in rows]
    _check_principles(path, [(f"{printable(path)}:{n}", row) for n, row in enumerate(rows, start=1)])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_aside(path, lambda aside: aside.write_bytes(text.encode()))
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be written ({error.strerror}); a writable file is accepted") from None


def load_examples(path):
    """`Example`s of a .jsonl file, each with the four keys and no other; `answer` may be a number.

    Raises InputError for a file or line it cannot take, for a tag of the format inside reasoning or
    answer (the turn made of them would not be well-formed), and for a file without an example.
    """
    examples, keys = [], ("question", "principle", "reasoning", "answer")
    for where, row in _json_rows(path):
        if unknown := sorted(row.keys() - set(keys)):
            raise InputError(f"{where}: unknown {short(unknown[0])}; {', '.join(keys)} are accepted")
        example = Example(*(text_of(where, row, key) for key in keys[:3]), answer_of(where, row, "answer"))
        for key in keys[2:]:
            if tag := re.search(r"</?(reasoning|answer)>", getattr(example, key)):
                raise InputError(f"{where}: {key} contains {tag[0]}; text without tags of the format is accepted")
        examples.append(example)
    if not examples:
        raise InputError(f"{printable(path)}: has no example; 1 or more are accepted")
    return examples


def load_questions(source, question_field=None, answer_field=None, config=None, split="train", limit=None, seed=0):
    """Distinct `Question`s of a .jsonl, .parquet or .csv file, in its order; the first of equals.

    Any other `source` is a data set of the hub, or a folder like one, in `config` and `split`. It
    is streamed, and shuffled by `seed` in a buffer of SHUFFLE_BUFFER rows (a sorted set is not
    drawn evenly), only until `limit` questions are found.

    Fields: `question` and `answer`, else `source` and `target` (CoT-Collection); others are
    ignored. The answer is optional unless its field is named; a number becomes its Python text (5
    -> "5", 2.50 -> "2.5"), and of GSM8K's "working #### 5" the 5 is taken. Raises InputError for a
    source or row it cannot take, a field under nearly the right name, a source without questions.
    """
    questions, is_file = {}, Path(source).suffix.lower() in FILE_KINDS
    for where, row, names in rows_of(source, config, split, seed):
        question = question_field or ("source" if "question" not in names and "source" in names else "question")
        answer = answer_field or ("target" if question == "source" else "answer")
        refuse_near_names(where, row, names, [question, *filter(None, [answer_field])], [answer])
        text = text_of(where, row, question)
        found = answer_of(where, row, answer) if answer in row or answer_field else None
        questions.setdefault(text, Question(text, found))
        if not is_file and len(questions) == limit:
            break
    if not questions:
        raise InputError(f'{printable(source)}: has no question; rows like {{"question": "2 + 3?"}} are accepted')
    return list(questions.values())


def _check_principles(path, rows):
    """Principles from (where, dict) pairs."""
    principles, seen = [], {}
    for where, row in rows:
        if unknown := sorted(row.keys() - {"principle", "id", "negative"}):
            raise InputError(f"{where}: unknown {short(unknown[0])}; principle, id, negative are accepted")
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


def text_of(where, row, field, accepted="a non-empty string"):
    """The stripped text of a field."""
    value = row.get(field)
    if field not in row:
        raise InputError(f"{where}: {field} is missing in {short(row)}; {accepted} is accepted")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {field} is {short(value)}; {accepted} is accepted")
    if bad := re.search("[\0\ud800-\udfff]", value):  # JSON can spell lone surrogates, UTF-8 cannot
        raise InputError(f"{where}: {field} contains {bad[0]!r}; Unicode text without NUL is accepted")
    return value.strip()


def answer_of(where, row, field):
    """The text of an answer; of GSM8K's "working #### 5" the 5."""
    value = row.get(field)
    if type(value) is int or (type(value) is float and math.isfinite(value)):  # 1e999 parses as inf
        row = row | {field: str(value)}
    text = text_of(where, row, field, "a non-empty string or a number")
    return text.rpartition("####")[2].strip() or text


def refuse_near_names(where, row, names, required, optional):
    """Raises InputError for a field that is missing where a name nearly the same is there.

    For an optional one only case and spaces may differ: a data set may well have `answers` too.
    """
    for field in {**dict.fromkeys(required), **dict.fromkeys(optional)}:
        if field in names:
            continue
        near = [name for name in names if name.strip().casefold() == field.casefold()]
        if not near and field in required:
            near = difflib.get_close_matches(field, names, 1, 0.75)
        if near:
            raise InputError(f"{where}: has no column {field!r}; did you mean {short(near[0])}? {field} is missing in "
                             f"{short(row)}; a non-empty string under that name is accepted")


def rows_of(source, config=None, split="train", seed=None):
    """(where, row, names) of each row of a file, or of a data set of the hub.

    A cell of a table without a value is left out of its row; `names` are those of all its columns.
    """
    _check_file(source)
    ending, readers = Path(source).suffix.lower(), {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    rows = readers[ending](source) if ending in readers else _hub_rows(source, config, split, seed)
    number = 0
    try:
        for where, row in rows:
            number += 1
            filled = {name: value for name, value in row.items() if value is not None or ending == ".jsonl"}
            yield where, filled, row.keys()
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{printable(source)}: needs the library {error.name} (pip install {error.name}); a .jsonl or "
                         ".csv file is accepted without it") from None
    except Exception as error:  # of a library, the hub or the network
        if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
            error = error.__cause__  # it says what went wrong
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = " ".join(lines[:2])  # the second may list the choices
        wrong = "cannot be read" + (f" after row {number}" if number else "")
        raise InputError(f"{printable(source)}: {wrong} ({reason}); a .jsonl, .parquet or .csv file or a data set of the "
                         "hub is accepted") from None


def _csv_rows(path):
    """(where, row), of one or more lines, each cell as it stands, or None for an empty one."""
    csv.field_size_limit(MAX_LINE)
    reader, names, line = csv.reader((text for _, text in _lines(path, ".csv")), strict=True), None, 1
    try:
        for cells in reader:
            where, line = f"{printable(path)}:{line}", reader.line_num + 1
            if not any(cells):  # a blank line, or one of commas alone
                continue
            if names is None:
                names = cells
                if twice := [name for name, count in Counter(names).items() if name and count > 1]:
                    raise InputError(f"{where}: has two columns {short(twice[0])}; different names are accepted")
            elif len(cells) != len(names):
                raise InputError(f'{where}: has {len(cells)} cells, and the header {len(names)}; as many, with "…" '
                                 "around a cell that holds a comma, are accepted")
            else:
                yield where, {name: cell or None for name, cell in zip(names, cells) if name}
    except csv.Error as error:
        raise InputError(f'{printable(path)}:{line}: {error}; cells between commas, with "…" around one that holds a '
                         "comma or a line break, are accepted") from None


def _parquet_rows(path):
    import pyarrow.parquet as parquet  # only here: a heavy import, and not everywhere installed

    with parquet.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{printable(path)}:{number}", row


def _hub_rows(source, config, split, seed):
    """(where, row) of a data set of the hub; with a seed it is streamed and shuffled."""
    import datasets  # as pyarrow

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # rows_of reports errors
    arguments = {"path": str(source), "name": config, "split": split, "streaming": seed is not None}
    try:
        rows = datasets.load_dataset(**arguments)
    except RuntimeError as error:  # an older set, with a loading script: the hub's conversion
        if "scripts are no longer supported" not in str(error):
            raise
        rows = datasets.load_dataset(**arguments, revision="refs/convert/parquet")
    if seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    for number, row in enumerate(rows, start=1):
        yield f"{printable(source)}:{number}" if seed is None else f"{printable(source)}: a row", row


def _json_rows(path, *endings):
    """Yield ("file:number", dict) of each line that is not blank."""
    for where, text in _lines(path, *endings or [".jsonl"]):
        if text := text.rstrip():
            yield where, _json_object(where, text)


def _lines(path, *endings):
    """Yield ("file:number", text) of each line, with its end, of a file with one of the endings."""
    _check_file(path, *endings)
    where = printable(path)
    try:
        with open(path, "rb") as file:  # not str.splitlines: U+2028 ends no line
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                where = f"{printable(path)}:{number}"
                if len(raw) > MAX_LINE:
                    raise InputError(f"{where}: the line is too long; at most {MAX_LINE} bytes are accepted")
                yield where, raw.decode().lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is {raw[error.start]:#04x}; UTF-8 is accepted") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); a text file is accepted") from None


def _json_object(where, text):
    """The dict on a line, without NaN, Infinity and repeated keys, which Python would let pass."""
    def refuse_constant(name):
        raise ValueError(f"{name} is not a JSON value")

    def refuse_repeats(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            raise ValueError(f"key {short(Counter(key for key, _ in pairs).most_common(1)[0][0])} is repeated")
        return row

    try:
        value = json.loads(text, object_pairs_hook=refuse_repeats, parse_constant=refuse_constant)
        if isinstance(value, dict):
            return value
        wrong = f"{short(value)} is not an object"
    except json.JSONDecodeError as error:
        rest = text[error.pos:] or "end of line"
        wrong = f"JSON breaks at column {error.colno}, {short(rest)} ({error.msg})"
    except RecursionError:
        wrong = "JSON is nested too deeply"
    except ValueError as error:  # of the two above, or Python's for over 4300 digits
        wrong = str(error)
    raise InputError(f"{where}: {wrong}; one JSON object a line is accepted")


def _check_file(path, *endings):
    """Raises InputError for another ending, and for a pipe or a device, which may never end."""
    if endings and not str(path).lower().endswith(endings):
        accepted = " and ".join(endings)
        raise InputError(f"{printable(path)}: ends in {Path(path).suffix!r}; {accepted} files are accepted")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{printable(path)}: is a pipe or a device; a file is accepted")


def normalised(text):
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def printable(path):
    return str(path) if str(path).isprintable() else repr(str(path))


def short(value):
    """`value` on one line, in 40 characters."""
    shown = repr(value[:40]) if isinstance(value, str) else reprlib.repr(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"
