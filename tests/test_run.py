"""run.py and settings.py: a run's directory, signals, faults, what is optional, the prompt, and --help."""

import datetime
import errno
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from support import checkpoint, settings, tiny
from support.data import Data
from support.errors import InputError
from support.files import load_principles
from support.run import ONE_REQUEST, Run, choose_directory, write_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import kill  # noqa: E402

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
    write_config(both[0], configs[0], empty, torch.device("cpu"))
    with pytest.raises(InputError, match="just been taken by another run"):
        write_config(both[1], configs[1], empty, torch.device("cpu"))
    assert json.loads((both[0] / "config.json").read_text())["settings"]["seed"] == 0


def test_two_runs_without_a_directory_get_two():
    config, found = train.parse(["--principles", PRINCIPLES]), []
    for _ in range(3):
        found.append(choose_directory(config))
        time.sleep(0.002)
    assert len(set(found)) == 3 and {path.parent for path in found} == {Path("runs")}


def test_only_the_batch_of_this_training_is_shared_among_the_processes(monkeypatch):
    monkeypatch.setattr("support.parallel.world", lambda: 8)
    flags = "--eval-questions 8 --output-dir never/made --num-questions"
    for what, accepted in (["--principles", PRINCIPLES], "8"), (["--preferences", "tiny"], "4"):
        monkeypatch.setattr("support.parallel.gather", lambda value: [value])
        assert choose_directory(train.parse([*what, *flags.split(), accepted])) == Path("never/made")
    with pytest.raises(InputError, match="--num-questions: got 4 with 8 processes"):
        choose_directory(train.parse(["--principles", PRINCIPLES, *flags.split(), "4"]))


# ------------------------------------------------------------------------------------------------ signals


def after(function, call, action):
    """`function`, and in its call number `call` the action: before what it does, whatever that is."""
    calls = []

    def patched(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            action()
        return function(*arguments, **options)

    return patched


MOMENTS = {  # -> function of train.py, the number of its call in which the signal comes, steps that are done and saved
    "in the first evaluation": ("sample", 1, 0),
    "while the third step samples": ("sample", 4, 2),
    "while the third step reads": ("losses", 3, 2),
    "in the evaluation after step 3": ("evaluate", 2, 3),
    "in the last evaluation": ("evaluate", 3, 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_is_served_at_once_and_nothing_is_lost(moment, flags, never_stopped, tmp_path, monkeypatch, capsys):
    """What a signal interrupts is not finished first: the run is resumed from the step before and is the same."""
    name, call, done = MOMENTS[moment]
    directory, number = tmp_path / "run", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][call % 3]
    before = signal.getsignal(number)
    monkeypatch.setattr("support.run.write_plot", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(train, name, after(getattr(train, name), call, lambda: os.kill(os.getpid(), number)))
        with pytest.raises(SystemExit) as ended:
            train.main([*flags, "--save-steps", "0", "--output-dir", str(directory)])
    assert ended.value.code == 128 + number and signal.getsignal(number) is before
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [f"step_{done}.pt"]
    assert f"stopped after step {done}; go on from step_{done} with: python train.py --resume" in capsys.readouterr().err
    assert train.main(["--resume", str(directory)]) == 0
    assert kill.result(directory) == kill.result(never_stopped)


def test_once_the_weights_have_changed_the_step_is_finished_and_one_ctrl_c_may_arrive_twice(
        flags, tmp_path, monkeypatch, capsys):
    """`timeout`, or a terminal with a pipe, sends a signal to the process and to its group."""
    monkeypatch.chdir(tmp_path)
    twice = lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", after(torch.optim.AdamW.zero_grad, 1, twice))
    with pytest.raises(SystemExit) as ended:
        train.main([*flags, "--save-steps", "0", "--output-dir", "runs/here"])
    assert ended.value.code == 130 and "python train.py --resume runs/here" in capsys.readouterr().err
    (tmp_path / "runs" / "newer").mkdir()  # has no checkpoint
    assert train.parse(["--resume", "latest"]).resume == "runs/here/checkpoints/step_1.pt"


def signals_while_saving(number, flags):
    """In a process: a signal in step 2, and another one a second later, from within the saving that it asks for."""
    stop = lambda: os.kill(os.getpid(), number)  # noqa: E731
    train.sample = after(train.sample, 3, stop)

    def second(path):
        if "step_1" in str(path):
            time.sleep(ONE_REQUEST + 0.1)
            stop()

    checkpoint.sync = second
    kill.command(flags)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGXCPU])
def test_a_second_signal_stops_at_once_and_leaves_no_half_checkpoint_under_its_name(number, flags, tmp_path):
    """But for SIGXCPU, which the kernel sends again at every second past the limit."""
    flags = [*flags, "--save-steps", "0", "--output-dir", str(tmp_path / "run")]
    process = kill.processes.Process(target=signals_while_saving, args=(number, flags))
    process.start()
    process.join()
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    if number == signal.SIGXCPU:
        assert process.exitcode == 128 + number and left.name == "step_1.pt"
    else:
        assert process.exitcode == -number
        assert left.name.startswith(".step_1.pt.") and not checkpoint.checkpoints(tmp_path / "run")


@pytest.mark.parametrize("moment", ["training", "writing final/"])
def test_what_need_not_stop_a_run_does_not(moment, tmp_path, monkeypatch):
    """A terminal that closes; Ctrl-C when all that is left is to write the model."""
    monkeypatch.setattr("support.run.write_plot", lambda *_: None)
    if moment == "training":
        monkeypatch.setattr(train, "sample", after(train.sample, 2, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    else:
        monkeypatch.setattr("support.run.save_model", after(
            __import__("support.run").run.save_model, 1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert run(tmp_path) == 0 and (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_ctrl_c_before_the_training_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_model", after(train.load_model, 1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert train.main(flags) == 130 and capsys.readouterr().err == "error: stopped by Ctrl-C\n"


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("where", ["checkpoint.sync", "run.append_json", "run.write_json", "run.save_model"])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(where, stopped, tmp_path, monkeypatch, one_line):
    directory = Path(shutil.copytree(stopped, tmp_path / "run"))
    with monkeypatch.context() as patch:
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(f"support.{where}", full)
        assert train.main(["--resume", str(directory), "--save-steps", "9"] if "model" in where else
                          ["--resume", str(directory)]) == 2
    error = one_line()
    assert "No space left on device" in error and f"from step_3 with: python train.py --resume {directory}" in error
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step_2.pt", "step_3.pt"]


@pytest.mark.parametrize("more, told, step", [
    ("--lambda-mi 1e38", "the gradient norm is", 1),
    ("--lambda-mi 1e39", "the loss is", 1),
    ("--learning-rate 1e39 --warmup-steps 0", "the distribution of the next token is not finite", 2),
])
def test_numbers_that_are_not_finite_are_one_line_with_the_step_and_the_same_command_leads_there_again(
        more, told, step, flags, tmp_path, one_line):
    for name in "ab":
        assert train.main([*flags, *more.split(), "--output-dir", str(tmp_path / name)]) == 1
        error = one_line()
        assert f"training has broken down at step {step}: {told}" in error and "the same command leads here" in error


def test_a_wrong_shape_in_a_loss_is_a_traceback_and_no_advice_on_the_learning_rate(tmp_path, monkeypatch):
    """Someone who changes a loss is to see the line."""
    def reward_of_the_wrong_shape(*_):
        raise ValueError("scores: got [3, 4], expected [..., K, K]")

    monkeypatch.setattr(train, "losses", reward_of_the_wrong_shape)
    with pytest.raises(ValueError, match="^scores: got"):
        run(tmp_path)


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


def test_a_run_shows_its_prompt_and_its_card_says_how_to_use_the_model(tmp_path):
    assert run(tmp_path, "--examples", write_examples(tmp_path), "--prefill") == 0
    prompt = (tmp_path / "run" / "prompt.txt").read_text(encoding="utf-8")
    assert prompt.endswith("<|assistant|><reasoning>") and prompt.count("<|user|>") == 3
    assert "<reasoning>Dear reader, it is 2.</reasoning><answer>2</answer><|end|>" in prompt
    stored = json.loads((tmp_path / "run" / "final" / "prompt.json").read_text())
    assert stored["prefill"] == "<reasoning>" and [example["answer"] for example in stored["examples"]] == ["2", "4"]
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert prompt in card and "- Number every step." in card and "| format |" in card and card.startswith("# run\n")
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
    monkeypatch.setattr(Run, "log", lambda run, step, log=Run.log: [log(run, step), os.kill(os.getpid(), 15)])
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
