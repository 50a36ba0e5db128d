"""resume.py: a run that was killed or stopped goes on as if it had not been, or says in one line why it cannot."""

import importlib
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from support import checkpoint, preferences, resume, tiny
from support.data import Data
from support.errors import InputError
from support.model import load_model
from support.prompts import PromptTemplate
from support.run import Run
from support.settings import Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import kill  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def no_plot():
    """Drawing one takes longer than a small run; test_run.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.run.write_plot", lambda *_: None)
        yield


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------------------------ going on


def test_a_resumed_run_is_the_run_that_was_never_stopped(run, never_stopped, capsys, one_line):
    assert names(run / "checkpoints") == ["step_2.pt", "step_3.pt"], "SIGTERM: the step is finished, and saved"
    assert not (run / "final").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.1}\n{"step": 5, "lo')  # a kill: a later line, and half of one
    (run / "checkpoints" / ".step_4.pt.123.tmp.pt").write_text("half")
    assert train.main(["--resume", str(run)]) == 0
    assert "going on after step 3 of 5" in capsys.readouterr().out
    assert kill.result(run) == kill.result(never_stopped)
    assert names(run / "checkpoints") == ["step_2.pt", "step_3.pt", "step_4.pt"] and names(run) == names(never_stopped)
    assert json.loads((run / "config.json").read_text())["resumed"][0]["changed"] == {}
    assert train.main(["--resume", str(run)]) == 2
    assert "finished" in one_line()


def test_an_older_checkpoint_drops_what_came_after_it(run, never_stopped):
    """Also where the newest is damaged, as the error for that says."""
    assert train.main(["--resume", str(run / "checkpoints" / "step_2.pt")]) == 0
    assert kill.result(run) == kill.result(never_stopped) and names(run / "checkpoints") == ["step_2.pt", "step_4.pt"]


def killed(function, place, flags):
    """In a process: a run, until `function` is called for `place`."""
    module, _, name = function.rpartition(".")
    module = importlib.import_module(module)
    whole = getattr(module, name)

    def patched(*arguments):
        if place in str(arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(module, name, patched)
    train.main(flags)


@pytest.mark.parametrize("function, place, left", [
    ("support.run.append_json", "'step': 4, 'loss'", "checkpoints/step_2.pt"),  # its samples are logged, its figures not
    ("support.checkpoint.sync", ".step_4.pt", "checkpoints/.step_4.pt.*"),
    ("support.writing.sync", ".final.tmp", ".final.tmp"),
], ids=["a step", "a checkpoint", "the model"])
def test_a_kill_in_the_middle_of(function, place, left, flags, never_stopped, tmp_path):
    """`python benchmarks/kill.py` kills from outside, at fifty random moments."""
    run = tmp_path / "run"
    process = kill.processes.Process(target=killed, args=(function, place, [*flags, "--output-dir", str(run)]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list(run.glob(left)) and not (run / "final").exists()
    assert train.main(["--resume", str(run)]) == 0
    assert kill.result(run) == kill.result(never_stopped) and names(run) == names(never_stopped)


def test_with_lora_only_the_adapters_are_stored_and_the_run_is_the_same(flags, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    flags = [*flags, "--lora-rank", "2", "--max-steps", "2", "--eval-steps", "0", "--save-steps", "0"]
    assert train.main([*flags, "--output-dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", lambda run, step, log=Run.log: [log(run, step), os.kill(os.getpid(), signal.SIGTERM)])
        with pytest.raises(SystemExit):
            train.main([*flags, "--output-dir", str(tmp_path / "stopped")])
    stored = checkpoint.read(tmp_path / "stopped" / "checkpoints" / "step_1.pt")["weights"]
    assert stored and all("lora" in name for name in stored)
    assert train.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert kill.result(tmp_path / "stopped") == kill.result(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ refusals


def spoil_newest(run, make):
    path = run / "checkpoints/step_3.pt"
    path.unlink()
    make(path)


@pytest.mark.parametrize("spoil, told", [
    (lambda run: shutil.rmtree(run / "checkpoints"), ["no complete checkpoint", "--save-steps"]),
    (lambda run: (run / "config.json").unlink(), ["is not a run"]),
    (lambda run: (run / "config.json").write_text("{"), ["config.json", "damaged"]),
    (lambda run: edit(run, cuda_graphs=False), ["config.json", "cuda_graphs", "version that wrote it"]),
    (lambda run: (run / "checkpoints/step_3.pt").rename(run / "checkpoints/.step_3.pt.1.tmp.pt"), None),
    (lambda run: spoil_newest(run, lambda path: path.symlink_to("step_3.pt")), ["step_3.pt: damaged", "step_2.pt"]),
    (lambda run: spoil_newest(run, os.mkfifo), ["step_3.pt: damaged", "step_2.pt"]),
    (lambda run: spoil_newest(run, lambda path: path.write_bytes(b"half")), ["step_3.pt: damaged", "step_2.pt"]),
])
def test_a_run_that_cannot_go_on_is_one_line(spoil, told, run, one_line):
    spoil(run)
    if told is None:
        assert train.parse(["--resume", str(run)]).resume.endswith("step_2.pt")
        return
    assert train.main(["--resume", str(run)]) == 2
    error = one_line()
    assert all(part in error for part in told), error


def test_latest_without_any_run(tmp_path, monkeypatch, one_line):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "latest"]) == 2
    assert "runs/" in one_line()


def test_lost_lines_are_refused(run, one_line):
    os.truncate(run / "metrics.jsonl", 10)
    assert train.main(["--resume", str(run)]) == 2
    assert "metrics.jsonl: has lost lines" in one_line() and names(run / "checkpoints") == ["step_2.pt", "step_3.pt"]


# ------------------------------------------------------------------------------------------------ changed settings


def edit(run, **settings):
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= settings
    (run / "config.json").write_text(json.dumps(config))


def test_an_edited_setting_is_refused_by_name_unless_it_is_said(run):
    edit(run, learning_rate=0.001, temperature="hot")
    with pytest.raises(InputError, match="--learning-rate: was 0.0007 at .*step_3.pt and is 0.001 now"):
        train.parse(["--resume", str(run), "--temperature", "1"])
    config = train.parse(["--resume", str(run), "--temperature", "1", "--learning-rate", "0.002"])
    assert config.learning_rate == 0.002 and config.max_steps == 5 and config.output_dir == str(run)
    with pytest.raises(InputError, match="--output-dir"):
        train.parse(["--resume", str(run), "--output-dir", "elsewhere"])


def test_a_changed_file_is_refused_by_name_unless_it_is_said(run, flags):
    principles = Path(flags[1])
    content = principles.read_bytes()
    try:
        principles.write_bytes(content + b"Use few words.\n")
        with pytest.raises(InputError, match="--principles: was .*sha256"):
            train.parse(["--resume", str(run)])
        train.parse(["--resume", str(run), "--principles", str(principles)])
    finally:
        principles.write_bytes(content)


@pytest.mark.parametrize("name", ["principles", "preferences", "dataset", "examples"])
def test_a_file_is_known_by_its_content(name, tmp_path):
    found = set()
    for content in "ab":
        (tmp_path / "file").write_text(content)
        found.add(resume.fingerprint(Config(**{name: str(tmp_path / "file")}))[name])
    assert len(found) == 2


def test_a_setting_said_again_changes_the_run_from_there_on_and_is_recorded(run, never_stopped, capsys):
    assert train.main(["--resume", str(run), "--learning-rate", "0.001", "--max-steps", "4", "--save-steps", "9"]) == 0
    assert "--learning-rate was 0.0007, is 0.001 now" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["learning_rate"] == 0.001
    assert config["resumed"][0]["changed"] == {"learning_rate": 0.001, "max_steps": 4}
    steps = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    # warm-up of 1 of 4 steps, then linear: at index 3 a third of the peak is left
    assert math.isclose(steps[3], 0.001 / 3)
    shutil.rmtree(run / "final")  # what a kill would have left
    assert train.parse(["--resume", str(run)]).learning_rate == 0.001, "a recorded change need not be said twice"


def test_other_principles_from_here_on_are_those_in_the_run_s_directory(run, tmp_path):
    (tmp_path / "other.txt").write_text("Be brief.\nBe long.\n")
    assert train.main(["--resume", str(run), "--principles", str(tmp_path / "other.txt")]) == 0
    texts = [json.loads(line)["principle"] for line in (run / "principles.jsonl").read_text().splitlines()]
    assert texts == ["Be brief.", "Be long."] and "Be brief." in (run / "prompt.txt").read_text()


def test_fewer_steps_than_are_done_are_refused(run, one_line):
    assert train.main(["--resume", str(run), "--max-steps", "2"]) == 2
    assert "--max-steps: got 2, and " in (error := one_line()) and "is after step 3" in error
    assert train.parse(["--resume", str(run), "--max-steps", "3"]).max_steps == 3


def test_what_a_default_follows_may_change(run):
    """--mi-generations is as many as --num-generations, also where a resumed run has more or fewer."""
    for number in (1, 4):
        assert train.parse(["--resume", str(run), "--num-generations", str(number)]).scored_generations == number


def test_lora_cannot_begin_in_the_middle(run, one_line):
    assert train.main(["--resume", str(run), "--lora-rank", "2"]) == 2
    assert "--lora-rank: was 0 at " in (error := one_line()) and "which weights are trained" in error


@pytest.mark.parametrize("value", ["2", None])
def test_an_edited_number_of_steps_is_refused_whatever_it_is(value, run, one_line):
    record = json.loads((run / "config.json").read_text())
    record["settings"]["max_steps"] = value
    (run / "config.json").write_text(json.dumps(record))
    assert train.main(["--resume", str(run)]) == 2
    assert "--max-steps: was 5 at " in one_line()


def test_the_checksum_of_held_out_pairs_is_of_their_responses_too():
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    pairs = tiny.make_pairs(3, True)
    others = [replace(pairs[0], chosen=pairs[0].rejected, rejected=pairs[0].chosen), *pairs[1:]]
    checksums = []
    for some in (pairs, others, [replace(pairs[0], answer="-1"), *pairs[1:]], pairs):
        data = Data(PromptTemplate(), held_out_pairs=preferences.encode_pairs(model, tokenizer, some))
        checksums.append(resume.start_state(Config(), model, tokenizer, data)["checksums"]["held_out"])
    assert checksums[0] == checksums[3] and len(set(checksums)) == 3


def test_a_reference_that_has_changed_is_refused(run, monkeypatch, one_line):
    load = train.load_model

    def changed(*args):
        model, tokenizer = load(*args)
        next(model.parameters()).data.view(-1)[0] += 1e-3
        return model, tokenizer

    monkeypatch.setattr("train.load_model", changed)
    assert train.main(["--resume", str(run)]) == 2
    assert "--model: tiny has other weights" in one_line()


@pytest.mark.parametrize("change", [
    "--seed 1", "--eval-questions 3", "--eval-questions 1", "--question-field prompt", "--answer-field solution",
    "--dataset-train-split test", "--dataset-config main", "--dataset OTHER",
])
def test_what_decides_the_held_out_questions_cannot_change(change, run, tmp_path, one_line):
    """Else what was trained on would be held out, and before and after would be of different questions."""
    (tmp_path / "other.jsonl").write_text('{"question": "1 + 1?"}\n')
    before = (run / "metrics.jsonl").read_bytes()
    change = change.replace("OTHER", str(tmp_path / "other.jsonl")).split()
    assert train.main(["--resume", str(run), *change]) == 2
    assert f"{change[0]}: was " in (error := one_line()) and "held out" in error
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["--examples none", "--prefill True", "--date 2001-01-01"])
def test_a_run_is_asked_in_one_way(change, run, one_line):
    """Said of the flag, not of the model's template, which would be refused for it."""
    assert train.main(["--resume", str(run), *change.split()]) == 2
    assert f"{change.split()[0]}: was " in (error := one_line()) and "how the model is asked" in error


def test_the_same_value_is_no_change(run):
    assert train.parse(["--resume", str(run), "--seed", "0", "--eval-questions", "2"]).seed == 0


def test_other_held_out_questions_under_the_same_settings_are_refused(run, monkeypatch, one_line):
    """A data set of the hub may change; a file is compared by its checksum, before anything is loaded."""
    load = train.load_data

    def changed(*arguments):
        data = load(*arguments)
        data.held_out[0], data.questions[0] = data.questions[0], data.held_out[0]
        return data

    monkeypatch.setattr(train, "load_data", changed)
    assert train.main(["--resume", str(run)]) == 2
    assert "--dataset: the held-out questions are not those" in one_line()
