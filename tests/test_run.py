"""run.py and settings.py: a run's directory, what is optional, what the prompt is made of, and --help."""

import datetime
import importlib.util
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

import train
from support import settings, tiny
from support.data import Data
from support.errors import InputError
from support.files import load_principles
from support.prompts import Form
from support.run import Run, choose_directory, write_start

ROOT = Path(__file__).resolve().parent.parent
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
QUESTIONS = str(ROOT / "tests" / "questions.jsonl")  # a few: to check the embedded task's 4096 takes a second
SMALL = (
    f"--dataset {QUESTIONS} --num-questions 1 --num-principles 2 --num-generations 2 --max-steps 2 --eval-questions 1 "
    "--eval-steps 0 --warmup-steps 1 --max-completion-length 8"
).split()
EXAMPLES = [
    {"question": "1 + 1?", "principle": "Be kind.", "reasoning": "Dear reader, it is 2.", "answer": 2},
    {"question": "2 + 2?", "principle": "Be brief.", "reasoning": "4.", "answer": 4},
]


def run(tmp_path, *flags):
    return train.main(["--principles", PRINCIPLES, *SMALL, "--output-dir", str(tmp_path / "run"), *flags])


def write_examples(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    return str(path)


# ------------------------------------------------------------------------------------------------ the directory


def test_of_two_runs_in_one_directory_the_second_is_refused(tmp_path):
    configs = [train.parse(["--principles", PRINCIPLES, "--output-dir", str(tmp_path / "run"), "--seed", s]) for s in "01"]
    both = [choose_directory(config) for config in configs]  # as two runs that start together do
    empty = Data(load_principles(PRINCIPLES), [], [], None, None, [])
    write_start(both[0], configs[0], empty, torch.device("cpu"))
    with pytest.raises(InputError, match="just been taken by another run"):
        write_start(both[1], configs[1], empty, torch.device("cpu"))
    assert json.loads((both[0] / "config.json").read_text())["settings"]["seed"] == 0


def test_two_runs_without_a_directory_get_two():
    config, found = train.parse(["--principles", PRINCIPLES]), []
    for _ in range(3):
        found.append(choose_directory(config))
        time.sleep(0.002)
    assert len(set(found)) == 3 and {path.parent for path in found} == {Path("runs")}


# ------------------------------------------------------------------------------------------------ what is optional


@pytest.mark.parametrize("lost", ["git", "LaTeX", "backend"])
def test_what_is_not_the_result_never_costs_it(lost, tmp_path, monkeypatch, capsys):
    if lost == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        matplotlib = pytest.importorskip("matplotlib")
        setting = {"LaTeX": ("text.usetex", True), "backend": ("figure.figsize", [1e9, 1e9])}[lost]
        monkeypatch.setitem(matplotlib.rcParams, *setting)
        monkeypatch.setenv("PATH", str(tmp_path))  # where there is no latex either
    assert run(tmp_path) == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    if lost == "git":
        assert json.loads((tmp_path / "run" / "config.json").read_text())["git_commit"] is None
        assert (tmp_path / "run" / "curves.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    if lost == "LaTeX":
        assert "no plot: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the schedule


def test_a_schedule_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, capsys):
    assert run(tmp_path, "--lr-scheduler-type", "polynomial", "--learning-rate", "1e-7") == 2
    assert "--lr-scheduler-type: polynomial" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ the prompt


def test_the_embedded_model_has_its_own_prompt_and_a_real_one_examples_and_a_prefill(tmp_path):
    own = train.parse(["--principles", PRINCIPLES]).form
    real = train.parse(["--principles", PRINCIPLES, "--model", "some/model"]).form
    assert own == Form() and real.prefill == "<reasoning>" and len(real.examples) >= 1
    assert train.parse(["--principles", PRINCIPLES, "--model", "m", "--examples", "none", "--prefill", "False"]).form == own
    given = train.parse(["--principles", PRINCIPLES, "--examples", write_examples(tmp_path), "--prefill"]).form
    assert [example.answer for example in given.examples] == ["2", "4"] and given.prefill == "<reasoning>"


def test_a_run_shows_its_prompt_and_its_card_says_how_to_use_the_model(tmp_path):
    assert run(tmp_path, "--examples", write_examples(tmp_path), "--prefill") == 0
    prompt = (tmp_path / "run" / "prompt.txt").read_text(encoding="utf-8")
    assert prompt.endswith("<|assistant|><reasoning>") and prompt.count("<|user|>") == 3
    assert "<reasoning>Dear reader, it is 2.</reasoning><answer>2</answer><|end|>" in prompt
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert prompt in card and "- Number every step." in card and "| format |" in card and card.startswith("---\n")
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["completion"].startswith("<reasoning>"), "the prefill counts as written"


def test_without_any_reward_at_the_start_the_run_says_what_helps(tmp_path, capsys):
    assert run(tmp_path, "--max-completion-length", "2") == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning: 0.00 of the completions keep" in line]
    assert len(warned) == 1 and warned[0].index("--examples") < warned[0].index("--temperature")


def test_a_run_has_one_date(tmp_path, monkeypatch):
    model = Path(shutil.copytree(tiny.MODEL_DIR, tmp_path / "model"))
    template = (model / "chat_template.jinja").read_text()
    dated = template.replace("+ message['content']", "+ strftime_now('%d %b %Y') + message['content']")
    (model / "chat_template.jinja").write_text(dated)
    flags = ["--model", str(model), "--examples", "none", "--prefill", "False"]
    assert run(tmp_path, *flags, "--date", "2026-03-01") == 0
    assert "01 Mar 2026" in (tmp_path / "run" / "prompt.txt").read_text()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["date"]
    assert stored == "2026-03-01"
    today = train.parse(["--principles", PRINCIPLES, *flags])
    train.load(today)
    assert today.date == datetime.date.today().isoformat()


def test_another_chat_template_is_refused_by_resume(tmp_path, monkeypatch, capsys):
    model = Path(shutil.copytree(tiny.MODEL_DIR, tmp_path / "model"))
    monkeypatch.setattr(Run, "log", lambda run, step, log=Run.log: [log(run, step), run.signals.append(15)])
    with pytest.raises(SystemExit):
        run(tmp_path, "--model", str(model))
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<|assistant|>'", "<|assistant|> '"))
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run")]) == 2
    assert "has another chat template" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the log


def test_an_evaluation_is_not_in_the_seconds_of_the_step_after_it(tmp_path, monkeypatch):
    evaluate, clock, passed = train.evaluate, time.perf_counter, [0.0]

    def slow(*arguments):
        passed[0] += 1000
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    assert run(tmp_path) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["seconds_sampling"] < 500


# ------------------------------------------------------------------------------------------------ --help


def test_help_shows_each_flag_once_in_groups_and_both_spellings_work(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    for name in settings.Config.__dataclass_fields__:
        assert text.count(f"\n  {settings.flag(name)} ") == 1, name
        assert f"--{name} " not in text or "_" not in name
    for title in ("data:", "model:", "optimisation:", "losses:", "the run:"):
        assert f"\n{title}\n" in text
    config = train.parse(["--principles", PRINCIPLES, "--num_questions", "7", "--bf16"])
    assert config.num_questions == 7 and config.bf16 is True
