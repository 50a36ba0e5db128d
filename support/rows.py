"""Rows of files and data sets: read one by one, each value as the file has it, and checked.

    .jsonl .csv            read here: a number is that of the file, and a cell "NA" is those two letters
    .parquet, a data set   by the library `datasets`, streamed; only the columns that are asked for

A file is the user's to mend: its first wrong row raises InputError, with file and line. Nobody can
mend a row of a data set of the hub, or of a folder like one: wrong ones are left out, and one line
counts them and says what is wrong with one of them (LeftOut).
"""

import csv
import json
import math
import os
import random
import re
import reprlib
import unicodedata
from decimal import Decimal
from pathlib import Path

import numpy

from support.errors import InputError, TooLong

SHUFFLE_BUFFER = 10_000  # rows of a data set from which the next one is drawn
MAX_WRONG = 1000  # wrong rows before the first right one: then the set is the wrong one
MAX_TEXT = 1_000_000  # characters; a longer text means that the wrong file was named
FILE_KINDS = (".jsonl", ".parquet", ".csv")  # any other name is that of a data set


def is_file(source) -> bool:
    """Whether a source is a single file; otherwise it is a data set of the hub, or a folder like one."""
    return Path(source).suffix.lower() in FILE_KINDS


class LeftOut:
    """Counts the rows of a source that cannot be used, and keeps the reason for the first."""

    def __init__(self, source):
        self.source, self.count, self.first = source, 0, None

    def add(self, error: InputError, none_taken: bool = False) -> None:
        """Leave out a row. Raises its error where the user can mend it: a wrong row of a file.

        A text that is too long is left out of a file too. A data set without a single row that can
        be used (`none_taken`) is given up after MAX_WRONG rows.
        """
        self.count, self.first = self.count + 1, self.first or error
        if is_file(self.source) and not isinstance(error, TooLong) or none_taken and self.count >= MAX_WRONG:
            raise error

    def tell(self, taken: int, what: str) -> None:
        """Print how many of the rows were left out. Raises InputError where none was taken."""
        if not taken:
            raise self.first or InputError(f"{printable(self.source)}: has no {what}; rows with {what} are accepted")
        if self.count:
            total = self.count + taken
            print(f"{printable(self.source)}: {self.count} of {total} {what} are left out, one of them: {self.first}",
                  flush=True)


def rows_of(source, fields, config=None, split="train", seed=None):
    """Yields (where, row, names): a dict of the `fields` that a row has, and all names of its source.

    A row that cannot be read is an InputError in place of the dict; see `good`. A cell of a table
    that has no value, or NaN, is not in the dict.
    """
    check_file(source)
    try:
        if is_file(source) and not str(source).lower().endswith(".parquet"):
            with open(source, "rb") as file:
                yield from _text_rows(file, source)
        else:
            rows = _set_rows(source, fields, config, split, seed)
            yield from rows if seed is None or is_file(source) else _shuffled(rows, seed)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{printable(source)}: needs the library {error.name} (pip install {error.name}); a .jsonl or "
                         ".csv file is accepted without it") from None
    except Exception as error:  # of the disk, a library, the hub or the network
        lines = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()
        reason = " ".join(lines[:2])  # the second may list the choices
        raise InputError(f"{printable(source)}: cannot be read ({reason}); a .jsonl, .parquet or .csv file or a data "
                         "set of the hub is accepted") from None


def good(row) -> dict:
    """The row; raises the InputError that stands for one that cannot be read."""
    if isinstance(row, InputError):
        raise row
    return row


def _set_rows(source, fields, config, split, seed):
    """Rows of a .parquet file, or of a data set of the hub, streamed; see `rows_of`."""
    import datasets  # only here: it takes seconds to import, and is not installed everywhere

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # rows_of reports errors
    if is_file(source):
        os.stat(source)  # raises with a better reason than the library
        builder = datasets.load_dataset_builder("parquet", data_files=str(source))
    else:
        try:
            builder = datasets.load_dataset_builder(str(source), config)
        except RuntimeError as error:  # an older set, with a loading script: the hub's conversion
            if "scripts are no longer supported" not in str(error):
                raise
            builder = datasets.load_dataset_builder(str(source), config, revision="refs/convert/parquet")
    files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
    if files and all(file.lower().endswith((".csv", ".jsonl")) for file in files):
        yield from _text_files(files, fields, seed)
        return
    if seed is not None and not is_file(source):  # not by the library's shuffle, which ends with five seconds of sleep
        random.Random(seed).shuffle((builder.config.data_files or {}).get(split, []))
    rows = builder.as_streaming_dataset(split)
    types = dict(rows.features or {})
    if wanted := [name for name in fields if name in types]:  # the others may be large, or need a library
        if hasattr(builder.config, "columns"):
            builder.config.columns = wanted
            rows = builder.as_streaming_dataset(split)
        rows = rows.select_columns(wanted)
    for number, row in enumerate(rows, start=1):
        where = f"{printable(source)}:{number}" if is_file(source) else f"{printable(source)}: a row"
        cells = {name: _as_written(value, getattr(types.get(name), "dtype", None)) for name, value in row.items()}
        yield where, {name: value for name, value in cells.items() if value is not None}, types or row.keys()


def _text_files(files, fields, seed):
    """Rows of the .csv or .jsonl files of a data set, of which the library would guess the types.

    It reads "NA" as no value, and rounds an integer above 2^53 that stands beside an empty cell.
    """
    import fsspec  # comes with datasets; it opens files of the hub too

    if seed is not None:
        random.Random(seed).shuffle(files)
    for file in files:
        with fsspec.open(file, "rb") as opened:
            for where, row, names in _text_rows(opened, file):
                if isinstance(row, dict):  # the other fields may be large
                    row = {name: row[name] for name in fields if row.get(name) is not None}
                yield where, row, list(names)


def _as_written(value, dtype):
    """A cell of a typed column as people write it: 0.1 of a float32, 2.50 of a decimal, None for NaN."""
    if isinstance(value, float):
        narrow = {"float32": numpy.float32, "float16": numpy.float16}.get(dtype)
        value = float(str(narrow(value))) if narrow else value
        return None if math.isnan(value) else value
    return str(value) if isinstance(value, Decimal) else value


def _shuffled(rows, seed):
    """The rows in random order: each is drawn from the next SHUFFLE_BUFFER."""
    rng, buffer = random.Random(seed), []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        place = rng.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = row
    rng.shuffle(buffer)
    yield from buffer


def _text_rows(file, name):
    """Rows of an open .csv or .jsonl file."""
    kind = _csv_rows if str(name).lower().endswith(".csv") else _json_rows
    yield from kind(_lines(file, name))


def _lines(file, name):
    """Yields ("name:number", bytes) of each line of an open file; U+2028 ends no line."""
    for number, line in enumerate(file, start=1):
        yield f"{printable(name)}:{number}", line


def _decoded(where, line: bytes, errors="strict") -> str:
    try:
        return line.decode(errors=errors).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is {line[error.start]:#04x}; UTF-8 is accepted") from None


def lines_of(path):
    """Yields ("path:number", text) of each line of a text file."""
    try:
        with open(path, "rb") as file:
            for where, line in _lines(file, path):
                yield where, _decoded(where, line)
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read ({error.strerror}); a text file is accepted") from None


def json_objects(path):
    """Yields ("path:number", dict) of each line of a .jsonl file that is not blank."""
    for where, text in lines_of(path):
        if text.strip():
            yield where, _json_object(where, text)


def _csv_rows(lines):
    """Each cell as it stands; an empty one is not in the row, and a row of empty ones is no row."""
    where, names = None, None  # the line in which the present row begins; the header

    def texts():
        nonlocal where
        for place, line in lines:
            where = where or place
            yield _decoded(place, line, "surrogateescape" if names else "strict")  # a bad byte: see text_of

    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(texts(), strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield where, InputError(f'{where}: {error}; cells between commas, with "…" around one that holds a comma '
                                    "or a line break, are accepted"), names or ()
            cells = []
        if cells is None:
            return
        if any(cells) and not names:
            names = cells
        elif any(cells):
            row = {name: cell for name, cell in zip(names, cells) if cell}
            if len(cells) != len(names):
                row = InputError(f'{where}: has {len(cells)} cells, and the header {len(names)}; as many, with "…" '
                                 "around a cell that holds a comma, are accepted")
            yield where, row, names
        where = None


def _json_rows(lines):
    for where, line in lines:
        try:
            text = _decoded(where, line)
            row = _json_object(where, text) if text.strip() else None
        except InputError as error:
            row = error
        if row is not None:
            yield where, row, row.keys() if isinstance(row, dict) else ()


def _json_object(where, text) -> dict:
    try:
        row = json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: JSON breaks at column {error.colno} ({error.msg}); one JSON object a line is "
                         "accepted") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise InputError(f"{where}: {error}; one JSON object a line is accepted") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: {short(row)} is not an object; one JSON object a line is accepted")
    return row


def check_file(path, *endings) -> None:
    """Raises InputError for another ending, and for a pipe or a device, which may never end."""
    if endings and not str(path).lower().endswith(endings):
        accepted = " and ".join(endings)
        raise InputError(f"{printable(path)}: ends in {Path(path).suffix!r}; {accepted} files are accepted")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{printable(path)}: is a pipe or a device; a file is accepted")


# --------------------------------------------------------------------------------------------------
# Fields


def text_of(where, row, field, accepted="a non-empty string") -> str:
    """The stripped text of a field."""
    value = row.get(field)
    if field not in row:
        raise InputError(f"{where}: {field} is missing in {short(row)}; {accepted} is accepted")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {field} is {short(value)}; {accepted} is accepted")
    if bad := re.search("[\udc80-\udcff]", value):  # how a byte that is not UTF-8 has been decoded
        raise InputError(f"{where}: {field} contains the byte {ord(bad[0]) - 0xdc00:#04x}; UTF-8 is accepted")
    if len(value) > MAX_TEXT:  # its tokens would take minutes to count
        raise TooLong(f"{where}: {field} has {len(value)} characters; at most {MAX_TEXT} are accepted")
    if bad := re.search("[\0\ud800-\udfff]", value):  # JSON can spell lone surrogates, UTF-8 cannot
        raise InputError(f"{where}: {field} contains {bad[0]!r}; Unicode text without NUL is accepted")
    return value.strip()


def answer_of(where, row, field) -> str:
    """The text of an answer: of a number Python's (5, 2.5), of GSM8K's "working #### 5" the 5."""
    value = row.get(field)
    if type(value) is int or (type(value) is float and math.isfinite(value)):  # 1e999 is read as inf
        row = row | {field: str(value)}
    text = text_of(where, row, field, "a non-empty string or a number")
    return text.rpartition("####")[2].strip() or text


def refuse_near_names(where, row, names, fields) -> None:
    """Raises InputError where a field is missing, and a name is there that differs in case or spaces only."""
    for field in fields:
        near = [name for name in names if name.strip().casefold() == field.casefold()]
        if near and field not in names:
            raise InputError(f"{where}: has no column {field!r}; did you mean {short(near[0])}? {field} is missing in "
                             f"{short(row)}; a non-empty string under that name is accepted")


def refuse_unknown(where, row, fields) -> None:
    """Raises InputError for a field that is not one of `fields`."""
    if unknown := sorted(row.keys() - set(fields)):
        raise InputError(f"{where}: unknown {short(unknown[0])}; {', '.join(fields)} are accepted")


def normalised(text: str) -> str:
    """A text without differences of case, spacing and Unicode composition."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def printable(path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))


def short(value) -> str:
    """`value` on one line, in 40 characters."""
    shown = repr(value[:40]) if isinstance(value, str) else reprlib.repr(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"
