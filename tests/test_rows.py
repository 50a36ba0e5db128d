"""rows.py: every value as the file has it, whatever the kind of file; wrong rows refused, or left out and counted."""

import decimal
import sys

import pytest
from helpers import load_questions, refusal, write

from support import rows
from support.errors import InputError
from support.files import Question, read_questions
from support.preferences import load_preferences


def test_a_csv_cell_is_the_text_in_the_file(tmp_path, monkeypatch):
    for library in "pandas", "pyarrow", "datasets":
        monkeypatch.setitem(sys.modules, library, None)  # neither needed nor asked
    cells = ["NA", "None", "null", "nan", "007", "2.50", "True", "1e5", "9007199254740993", "18446744073709551617", "1,000"]
    lines = "".join(f'"{n} + ""1""?",ignored,"{cell}"\r\n' for n, cell in enumerate(cells))
    path = write(tmp_path, "q.csv", "\ufeffquestion,note,answer\r\n\r\n" + lines + ',,\r\n"two\nlines, one cell",,\r\n')
    assert load_questions(path) == [
        *(Question(f'{n} + "1"?', cell) for n, cell in enumerate(cells)), Question("two\nlines, one cell")]


@pytest.mark.parametrize("content, line, parts", [
    ("question,answer\n2 + 3?,5\n,7\n", 3, ["question is missing", "'7'"]),
    ("question,answer\n\n2, 3?,5\n", 3, ["3 cells", "the header 2", "comma"]),
    ("question,answer\n2 + 3?\n", 2, ["1 cells"]),
    ('question,answer\n"a\nb",1\n"2 + 3?"x,5\n', 4, ["expected after", "comma"]),
    ('question,answer\na,1\n"2 + 3?,5\n\n', 3, ["unexpected end"]),
    ("question,answer\na,1\n\xe9,5\n".encode("latin-1"), 3, ["0xe9", "UTF-8"]),
    ("question,answer\na\0,1\n", 2, [r"'\x00'"]),
    ("Question ,answer\na,1\n", 2, ["has no column 'question'; did you mean 'Question '?"]),
    ("questoin,answer\na,1\n", 2, ["question is missing in {'", "questoin"]),
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
    parquet.write_table(pyarrow.table({"question": ["a", "b"], "answer": [True, None]}), path)
    assert refusal(load_questions, path).startswith(f"{path}:1: answer is True")
    whole = path.read_bytes()
    assert "magic bytes" in refusal(load_questions, write(tmp_path, "q.parquet", whole[:50]))
    assert "No such file" in refusal(load_questions, tmp_path / "none.parquet")


@pytest.mark.parametrize("place", ["file", "folder"])
def test_numbers_of_typed_columns_are_those_that_people_write(place, tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "train.parquet"
    columns = {
        "float32": pyarrow.array([0.1, None, float("nan")], pyarrow.float32()), "float16": pyarrow.array([0.1, None, None], pyarrow.float16()),
        "float64": pyarrow.array([0.1, 2.5, float("nan")]), "int64": pyarrow.array([2**53 + 1, None, 7]),
        "decimal": pyarrow.array([decimal.Decimal("2.50"), None, decimal.Decimal("1e3")], pyarrow.decimal128(7, 2)),
    }
    parquet.write_table(pyarrow.table({"question": ["a", "b", "c"], **columns}), path)
    for name, expected in {
        "float32": ["0.1"], "float16": ["0.1"], "float64": ["0.1", "2.5"], "int64": [str(2**53 + 1), "7"], "decimal": ["2.50", "1000.00"],
    }.items():
        renamed = parquet.read_table(path).select(["question", name]).rename_columns(["question", "answer"])
        (tmp_path / name).mkdir()
        parquet.write_table(renamed, tmp_path / name / "train.parquet")
        source = tmp_path / name / "train.parquet" if place == "file" else tmp_path / name
        answers = {q.text: q.answer for q in load_questions(source)}
        assert len(answers) == 3, "a gap is a question without an answer"
        assert [answers[text] for text in "abc" if answers[text]] == expected, name


# Sets that nobody can edit

def folder(tmp_path, **files):
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        write(tmp_path / "set", name.replace("_", "."), content)
    return str(tmp_path / "set")


def test_a_folder_of_csv_or_jsonl_keeps_every_value_as_it_stands(tmp_path):
    pytest.importorskip("datasets")
    source = folder(tmp_path, train_csv="question,answer\na?,NA\nb?,None\nc?,9007199254740993\nd?,\ne?,007\n")
    assert {q.text: q.answer for q in load_questions(source)} == {"a?": "NA", "b?": "None", "c?": "9007199254740993", "d?": None, "e?": "007"}
    (tmp_path / "set" / "train.csv").unlink()
    write(tmp_path / "set", "train.jsonl", '{"question": "a?", "answer": 5}\n{"question": "b?", "answer": 0.25}\n{"question": "c?", "answer": "x"}\n')
    assert {q.text: q.answer for q in load_questions(source)} == {"a?": "5", "b?": "0.25", "c?": "x"}


WRONG = {  # what is said of each
    '{"question": ""}': "question is ''", '{"question": 5}': "question is 5", '{"text": "a?"}': "question is missing", "{": "JSON breaks",
    "[]": "not an object", '{"question": "a?", "answer": [5]}': "answer is [5]", '{"question": "a\\ud800"}': "Unicode",
}


@pytest.mark.parametrize("row", WRONG)
def test_a_wrong_row_ends_the_reading_of_a_file_and_is_left_out_of_a_folder(row, tmp_path, capsys):
    pytest.importorskip("datasets")
    lines = "\n".join(['{"question": "b?", "answer": 1}', row, '{"question": "c?", "answer": null}']) + "\n"
    source = folder(tmp_path, train_jsonl=lines)
    assert {q.text for q in load_questions(source)} == {"b?", "c?"}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{source}: 1 of 3 questions are left out") and "train.jsonl:2: " in line and WRONG[row] in line, line
    path = f"{source}/train.jsonl"
    assert refusal(load_questions, path).startswith(f"{path}:2: ") and WRONG[row] in refusal(load_questions, path)


@pytest.mark.parametrize("row, told", [
    (b"caf\xe9?,1", "byte 0xe9"), (b"b, or c?,1", "3 cells"), (b"b?", "1 cells"), (b'"b?"x,1', "expected after"), (b",1", "question is missing"),
])
def test_a_wrong_row_of_a_csv_is_left_out_of_a_folder_and_refused_in_a_file(row, told, tmp_path, capsys):
    pytest.importorskip("datasets")
    source = folder(tmp_path, train_csv=b"question,answer\na?,1\n" + row + b"\nd?,2\n")
    assert {q.text for q in load_questions(source)} == {"a?", "d?"}
    line = capsys.readouterr().out
    assert line.startswith(f"{source}: 1 of 3 questions are left out") and "train.csv:3: " in line and told in line, line
    path = f"{source}/train.csv"
    assert refusal(load_questions, path).startswith(f"{path}:3: ")


def test_a_folder_without_one_right_row_tells_the_first_reason_and_is_not_read_to_its_end(tmp_path):
    pytest.importorskip("datasets")
    source = folder(tmp_path, train_jsonl='{"Question": "a?"}\n' * 5000)
    assert "did you mean 'Question'?" in refusal(load_questions, source)
    left_out = rows.LeftOut(source)
    with pytest.raises(InputError):
        list(read_questions(source, left_out))
    assert left_out.count == rows.MAX_WRONG


@pytest.mark.parametrize("place", ["file", "folder"])
def test_only_the_columns_that_are_asked_for_are_read(place, tmp_path):
    """An image beside each question needs no decoder."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    types = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()})
    images = pyarrow.array([{"bytes": b"no picture", "path": None}] * 3, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    table = pyarrow.table({"question": ["a", "b", "c"], "answer": ["1"] * 3, "image": images})
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table.replace_schema_metadata(types.arrow_schema.metadata), tmp_path / "set" / "train.parquet")
    questions = load_questions(tmp_path / "set" / "train.parquet" if place == "file" else tmp_path / "set")
    assert sorted(q.text for q in questions) == ["a", "b", "c"]


def test_parquet_without_the_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"q.parquet: needs the library datasets \(pip install datasets\)"):
        load_questions(write(tmp_path, "q.parquet", b"PAR1"))
