"""What a real model needs: its questions from real data sets, its precision, its memory, other architectures, LoRA."""

import json
from pathlib import Path

import pytest

import data
from data import InputError, Question, load_questions

ROOT = Path(__file__).resolve().parent.parent
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")


# ------------------------------------------------------------------------------------------------ data sets

datasets = pytest.importorskip("datasets")
GSM8K = [{"question": f"{n} + 1000?", "answer": f"We add.\n{n} + 1000 = <<{n}+1000=1,{n:03}>>\n#### 1,{n:03}"} for n in range(300)]
OTHER = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]
COT = [{"source": f"{n} + 1?", "target": str(n + 1), "rationale": "We add.", "task": "sums"} for n in range(3)]


@pytest.fixture(scope="module")
def hub_like(tmp_path_factory):
    """A folder laid out as on the hub: two configurations of parquet files, one of them with two splits."""
    folder = tmp_path_factory.mktemp("hub") / "gsm8k"
    for name, rows in ("main/train-00000-of-00002", GSM8K[:150]), ("main/train-00001-of-00002", GSM8K[150:]), \
            ("main/test-00000-of-00001", OTHER), ("socratic/train-00000-of-00001", GSM8K[:1]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    (folder / "README.md").write_text("""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
""")
    return str(folder)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """The library sleeps for seconds at the end of a stream (apache/arrow issue 45214)."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("rows, first", [(GSM8K, Question("0 + 1000?", "1,000")), (COT, Question("0 + 1?", "1"))])
def test_questions_of_files(ending, rows, first, tmp_path):
    path = tmp_path / f"questions.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{ending}")(path)
    questions = load_questions(path, limit=2)
    assert questions[0] == first and len(questions) == len(rows), "a file is read whole: a wrong line is told"


def test_named_fields_and_cells_without_a_value(tmp_path):
    path = tmp_path / "questions.parquet"
    datasets.Dataset.from_list([{"Q": "a?", "best": "b", "answer": "x"}, {"Q": "c?", "best": None, "answer": "y"}]).to_parquet(path)
    with pytest.raises(InputError, match=r"questions.parquet:1: question is missing"):
        load_questions(path)
    with pytest.raises(InputError, match=r"questions.parquet:2: best is missing"):
        load_questions(path, "Q", "best")
    assert load_questions(path, "Q") == [Question("a?", "x"), Question("c?", "y")]
    datasets.Dataset.from_list([{"question": "a?", "answer": None}, {"question": "c?", "answer": 2}]).to_parquet(path)
    assert load_questions(path) == [Question("a?"), Question("c?", "2")]


def test_a_hub_set_is_streamed_shuffled_and_read_no_further_than_needed(hub_like, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 20)
    taken = load_questions(hub_like, config="main", limit=10, seed=0)
    assert len(set(taken)) == 10 and taken == load_questions(hub_like, config="main", limit=10, seed=0)
    assert taken != load_questions(hub_like, config="main", limit=10, seed=1)
    assert [q.text for q in taken] != [row["question"] for row in GSM8K[:10]], "not shuffled"
    everything = load_questions(hub_like, config="main")
    assert sorted(q.text for q in everything) == sorted(row["question"] for row in GSM8K)
    assert {q.answer for q in load_questions(hub_like, config="main", split="test")} == {"1", "2", "3"}


def test_a_hub_set_is_not_downloaded_to_take_a_few_rows(hub_like, monkeypatch):
    read = []
    real = datasets.load_dataset

    def counted(*args, **kwargs):
        rows = real(*args, **kwargs)
        assert isinstance(rows, datasets.IterableDataset), "not streamed: a hub set would be downloaded whole"
        return rows.map(lambda row: read.append(1) or row)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 5)
    load_questions(hub_like, config="main", limit=10)
    assert 10 <= len(read) < 100


def test_a_set_with_a_loading_script_is_read_from_the_hubs_conversion(hub_like, monkeypatch):
    """github.com/huggingface/datasets/issues/8012: the script is refused, the branch with its parquet files is not."""
    real = datasets.load_dataset

    def scripted(revision=None, **kwargs):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found CoT_Collection.py")
        return real(**kwargs)

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    assert len(load_questions(hub_like, config="main", limit=4)) == 4


@pytest.mark.parametrize("arguments, told", [
    ({}, "['main', 'socratic']"),
    ({"config": "none"}, "main"),
    ({"config": "main", "split": "validation"}, "validation"),
    ({"config": "main", "question_field": "prompt"}, "prompt is missing"),
])
def test_a_wrong_choice_in_a_hub_set_is_told_in_a_line(hub_like, arguments, told):
    with pytest.raises(InputError) as caught:
        load_questions(hub_like, **arguments)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_library_a_line_says_what_to_install(hub_like, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_questions(hub_like)
