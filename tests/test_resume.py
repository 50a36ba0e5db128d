"""checkpoint.py, and what train.py does when it is killed, stopped, resumed, or comes to numbers that are not finite."""

import errno
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from support import (
    checkpoint,  # noqa: E402
    files,  # noqa: E402
)
from support.errors import InputError  # noqa: E402
from support.files import remove, sha256, written_whole  # noqa: E402
from support.model import load_model  # noqa: E402
from support.report import PATIENCE, signs_of_trouble  # noqa: E402
from support.run import Run  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ROOT / "tests" / "questions.jsonl"  # a few: to check the embedded task's 4096 takes a second
sys.path.insert(0, str(ROOT / "benchmarks"))
import kill  # noqa: E402


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of all four terms: 5 steps, an evaluation after the third, a checkpoint after the second and the fourth."""
    principles = shutil.copy(ROOT / "principles" / "reasoning.txt", tmp_path_factory.mktemp("data") / "p.txt")
    return (
        f"--principles {principles} --dataset {QUESTIONS} --preferences tiny --num-pairs 2 --num-questions 2 "
        "--num-principles 2 --num-generations 2 --max-steps 5 --warmup-steps 1 --max-completion-length 12 "
        "--eval-questions 2 --eval-steps 3 --save-steps 2"
    ).split()


@pytest.fixture(autouse=True, scope="module")
def no_plot():
    """Drawing one takes longer than a small run; test_run.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.run.write_plot", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def never_stopped(flags, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "never-stopped"
    assert train.main([*flags, "--output-dir", str(run_dir)]) == 0
    return run_dir


def signals_after(step, *numbers):
    """Run.log, which then sends this process signals: they arrive in the middle of the loop."""
    log = Run.log

    def patched(run, done):
        log(run, done)
        if done.number + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return patched


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The same run, sent a SIGTERM in its third step."""
    run_dir = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", signals_after(3, signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            train.main([*flags, "--output-dir", str(run_dir)])
    assert ended.value.code == 128 + signal.SIGTERM == 143
    return run_dir


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run, to spoil."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def one_line(capsys):
    error = capsys.readouterr().err.splitlines()[-1:]
    assert error and error[0].startswith("error: "), error
    return error[0]


# ------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_run_is_the_run_that_was_never_stopped(run, never_stopped, capsys):
    assert names(run / "checkpoints") == ["step_2", "step_3"], "SIGTERM: the step is finished, and saved"
    assert not (run / "final").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.1}\n{"step": 5, "lo')  # a kill: a later line, and half of one
    (run / "checkpoints" / ".step_4.tmp").mkdir()
    assert train.main(["--resume", str(run)]) == 0
    assert "going on after step 3 of 5" in capsys.readouterr().out
    assert kill.outcome(run) == kill.outcome(never_stopped)
    assert names(run / "checkpoints") == ["step_2", "step_3", "step_4"] and names(run) == names(never_stopped)
    assert json.loads((run / "config.json").read_text())["resumed"][0]["changed"] == {}
    assert train.main(["--resume", str(run)]) == 2
    assert "finished" in one_line(capsys)


def test_an_older_checkpoint_drops_what_came_after_it(run, never_stopped):
    """Also where the newest is damaged, as the error for that says."""
    assert train.main(["--resume", str(run / "checkpoints" / "step_2")]) == 0
    assert kill.outcome(run) == kill.outcome(never_stopped) and names(run / "checkpoints") == ["step_2", "step_4"]


def killed(function, place, flags):
    """In a process: a run, until checkpoint.py's `function` is called for `place`."""
    whole = getattr(checkpoint, function)

    def patched(*arguments):
        if place in str(arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(checkpoint, function, patched)
    train.main(flags)


@pytest.mark.parametrize("function, place, left", [
    ("append_json", "'step': 4, 'loss'", "checkpoints/step_2"),  # in a step: its samples are logged, its figures not
    ("sync", ".step_4.tmp", "checkpoints/.step_4.tmp"),
    ("sync", ".final.tmp", ".final.tmp"),
], ids=["a step", "a checkpoint", "the model"])
def test_a_kill_in_the_middle_of(function, place, left, flags, never_stopped, tmp_path):
    """`python benchmarks/kill.py` kills from outside, at fifty random moments."""
    run = tmp_path / "run"
    process = kill.processes.Process(target=killed, args=(function, place, [*flags, "--output-dir", str(run)]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (run / left).exists() and not (run / "final").exists()
    assert train.main(["--resume", str(run)]) == 0
    assert kill.outcome(run) == kill.outcome(never_stopped) and names(run) == names(never_stopped)


def twice_while_saving(flags):
    """In a process: a signal after step 2, and another one from within the saving that it asks for."""
    Run.log = signals_after(2, signal.SIGINT)
    sync = files.sync

    def patched(path):
        if "step_2" in str(path):
            os.kill(os.getpid(), signal.SIGINT)
        sync(path)

    files.sync = patched
    kill.command(flags)


def test_a_second_signal_stops_at_once_and_what_was_saved_stays_whole(flags, tmp_path):
    process = kill.processes.Process(
        target=twice_while_saving, args=([*flags, "--save-steps", "1", "--output-dir", str(tmp_path / "run")],))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGINT
    assert names(tmp_path / "run" / "checkpoints") == [".step_2.tmp", "step_1"]
    assert train.parse(["--resume", str(tmp_path / "run")]).resume.endswith("step_1")


def test_ctrl_c_without_save_steps_saves_too_and_latest_finds_it(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", signals_after(1, signal.SIGINT))
        with pytest.raises(SystemExit) as ended:
            train.main([*flags, "--save-steps", "0", "--output-dir", "runs/here"])
    assert ended.value.code == 130 and "python train.py --resume runs/here" in capsys.readouterr().err
    (tmp_path / "runs" / "newer").mkdir()  # has no checkpoint
    assert train.parse(["--resume", "latest"]).resume == "runs/here/checkpoints/step_1"
    assert signal.getsignal(signal.SIGINT) is before


def test_with_lora_only_the_adapters_are_stored_and_the_run_is_the_same(flags, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    flags = [*flags, "--lora-rank", "2", "--max-steps", "2", "--eval-steps", "0", "--save-steps", "0"]
    assert train.main([*flags, "--output-dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", signals_after(1, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main([*flags, "--output-dir", str(tmp_path / "stopped")])
    stored = load_file(tmp_path / "stopped" / "checkpoints" / "step_1" / "model.safetensors")
    assert stored and all("lora" in name for name in stored)
    assert train.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert kill.outcome(tmp_path / "stopped") == kill.outcome(tmp_path / "whole")


def test_what_a_checkpoint_restores(run, tmp_path):
    """Random states too, though nothing in the loop needs them; weights that are not trained are not stored."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(run / "checkpoints", model, optimizer, {**checkpoint.read_state(run / "checkpoints/step_3"),
                                                                   "step": 7})
    assert set(load_file(path / "model.safetensors")) == {"1.weight", "1.bias"}
    drawn = random.random(), torch.rand(3).tolist()
    weights = model[1].weight.tolist()
    other = torch.nn.Sequential(model[0], torch.nn.Linear(3, 1))
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    checkpoint.load(path, other, fresh, checkpoint.read_state(path))
    assert (random.random(), torch.rand(3).tolist()) == drawn
    assert other[1].weight.tolist() == weights and fresh.param_groups[0]["lr"] == 0.5
    for key, value in optimizer.state[model[1].weight].items():
        assert torch.equal(fresh.state[other[1].weight][key], value), key
    other[1] = torch.nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"model.safetensors: 1.weight .* \[2, 3\]"):
        checkpoint.load(path, other, torch.optim.AdamW(other.parameters()), checkpoint.read_state(path))


def test_only_the_newest_are_kept_and_half_removed_ones_are_not_seen(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    (tmp_path / "config.json").write_text("{}")
    for step in (9, 10, 11):
        checkpoint.save(tmp_path / "checkpoints", model, optimizer, {"step": step}, limit=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_10", "step_11"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill before anything is deleted
        remove(tmp_path / "checkpoints" / "step_10")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_11"]


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    for content in ("old", "new"):
        with written_whole(tmp_path / "final") as aside:
            (aside / "file").write_text(content)
            assert (tmp_path / "final").exists() == (content == "new")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "final") as aside:
        (aside / "file").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["final"] and (tmp_path / "final" / "file").read_text() == "new"


@pytest.mark.parametrize("where", ["save", "append"])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(where, run, never_stopped, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, {"save": "sync", "append": "append_json"}[where], full)
        assert train.main(["--resume", str(run)]) == 2
    error = one_line(capsys)
    assert "No space left on device" in error and f"from step_3 with: python train.py --resume {run}" in error
    assert names(run / "checkpoints") == ["step_2", "step_3"]


# ------------------------------------------------------------------------------------------------ refusals


def damages():
    """(name, file, what happens to its bytes)"""
    for file in (*checkpoint.FILES, "SHA256SUMS"):
        for share in (0, 0.001, 0.3, 0.7, 0.99):
            yield f"truncated at {share}", file, lambda content, share=share: content[: int(share * len(content))]
        for share in (0.0, 0.2, 0.5, 0.9):
            yield f"a bit flipped at {share}", file, lambda content, share=share: flip(content, int(share * len(content)))
        yield "missing", file, None
        yield "a pickle", file, lambda content: pickle.dumps(Malicious())
        yield "binary", file, lambda content: bytes(range(256))


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


class Malicious:
    def __reduce__(self):
        return os.abort, ()


def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(run):
    path = run / "checkpoints" / "step_3"
    for name, file, damage in damages():
        content = (path / file).read_bytes()
        (path / file).unlink()
        if damage:
            (path / file).write_bytes(damage(content))
        with pytest.raises(InputError) as refused:
            checkpoint.read_state(path)
        (path / file).write_bytes(content)
        message = str(refused.value)
        assert message.count("\n") == 0 and str(path) in message, f"{name}: {message}"
        assert file in message, f"{file}, {name}: {message}"
        assert f"--resume {run}/checkpoints/step_2" in message, "a way out"
    checkpoint.read_state(path)


def test_a_pickle_with_the_right_checksum_is_never_run(run, capsys):
    path = run / "checkpoints" / "step_3"
    (path / "model.safetensors").write_bytes(pickle.dumps(Malicious()))
    sums = [f"{sha256(path / name)}  {name}\n" for name in checkpoint.FILES]
    (path / "SHA256SUMS").write_text("".join(sums))
    before = (run / "metrics.jsonl").read_bytes()
    assert train.main(["--resume", str(run)]) == 2
    assert "step_3/model.safetensors" in one_line(capsys) and (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("spoil, told", [
    (lambda run: shutil.rmtree(run / "checkpoints"), ["no complete checkpoint", "--save-steps"]),
    (lambda run: (run / "config.json").unlink(), ["is not a run"]),
    (lambda run: (run / "config.json").write_text("{"), ["config.json", "damaged"]),
    (lambda run: edit(run, cuda_graphs=False), ["config.json", "cuda_graphs", "version that wrote it"]),
    (lambda run: (run / "checkpoints/step_3").rename(run / "checkpoints/.step_3.tmp"), None),
    (lambda run: [shutil.rmtree(run / "checkpoints/step_3"), (run / "checkpoints/step_3").symlink_to("step_3")],
     ["step_3/SHA256SUMS", "step_2"]),
    (lambda run: [(run / "checkpoints/step_3/state.json").unlink(), os.mkfifo(run / "checkpoints/step_3/state.json")],
     ["step_3/state.json", "step_2"]),
])
def test_a_run_that_cannot_go_on_is_one_line(spoil, told, run, capsys):
    spoil(run)
    if told is None:
        assert train.parse(["--resume", str(run)]).resume.endswith("step_2")
        return
    assert train.main(["--resume", str(run)]) == 2
    error = one_line(capsys)
    assert all(part in error for part in told), error


def test_latest_without_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "latest"]) == 2
    assert "runs/" in one_line(capsys)


def test_lost_lines_are_refused(run, capsys):
    os.truncate(run / "metrics.jsonl", 10)
    assert train.main(["--resume", str(run)]) == 2
    assert "metrics.jsonl: has lost lines" in one_line(capsys) and names(run / "checkpoints") == ["step_2", "step_3"]


# ------------------------------------------------------------------------------------------------ changed settings


def edit(run, **settings):
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= settings
    (run / "config.json").write_text(json.dumps(config))


def test_an_edited_setting_is_refused_by_name_unless_it_is_said(run):
    edit(run, learning_rate=0.001, temperature="hot")
    with pytest.raises(InputError, match="--learning-rate: was 0.0007 at .*step_3 and is 0.001 now"):
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


def test_a_reference_that_has_changed_is_refused(run, monkeypatch, capsys):
    load = load_model

    def changed(*args):
        model, tokenizer = load(*args)
        next(model.parameters()).data.view(-1)[0] += 1e-3
        return model, tokenizer

    monkeypatch.setattr("support.model.load_model", changed)
    assert train.main(["--resume", str(run)]) == 2
    assert "--model: tiny has other weights" in one_line(capsys)


def test_ctrl_c_before_the_training_is_one_line(flags, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("support.model.load_model", interrupted)
    assert train.main(flags) == 130 and capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ numbers that go wrong


@pytest.mark.parametrize("more, told, step", [
    ("--lambda-mi 1e38", "the gradient norm is", 0),
    ("--lambda-mi 1e39", "the loss is", 0),
    ("--learning-rate 1e39 --warmup-steps 0", "the distribution of the next token is not finite", 1),
])
def test_a_failure_is_kept_and_its_replay_fails_alike(more, told, step, flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*flags, *more.split(), "--output-dir", str(run)]) == 1
    error = one_line(capsys)
    replay = f"--resume {run}/failure/step_{step}"
    assert told in error and replay in error
    kept = json.loads((run / "failure" / "batch.json").read_text())
    assert kept["settings"]["num_pairs"] == 2 and len(kept["batch"]) == 4 and told in kept["error"]
    if step == 0:
        assert kept["terms"]["loss_grpo"] and len(kept["batch"][0]["tokens"]) == 2 and len(kept["pairs"]) == 2
    assert train.main(replay.split()) == 1
    assert one_line(capsys) == error
    assert json.loads((run / "failure" / "batch.json").read_text())["terms"] == kept["terms"]
    if step == 0:
        assert train.main([*replay.split(), "--lambda-mi", "0.01", "--max-steps", "1"]) == 0, "and it can be mended"


def test_with_several_iterations_the_run_itself_leads_to_the_failure(flags, tmp_path, capsys):
    more = "--num-iterations 2 --learning-rate 1e30 --warmup-steps 0 --output-dir".split()
    assert train.main([*flags, *more, str(tmp_path / "a")]) == 1
    assert "the same command" in one_line(capsys) and names(tmp_path / "a" / "failure") == ["batch.json"]
    assert train.main([*flags, *more, str(tmp_path / "b")]) == 1
    kept = [json.loads((tmp_path / run / "failure" / "batch.json").read_text()) for run in "ab"]
    assert kept[0]["error"] == kept[1]["error"] and kept[0]["batch"] == kept[1]["batch"]


@pytest.mark.parametrize("stats, told", [
    ({"reward": 0.0, "zero_variance_groups": 1.0, "truncated": 1.0}, "--max-completion-length"),
    ({"reward": 1.0, "zero_variance_groups": 1.0, "truncated": 0.0}, "nothing left to teach"),
    ({"reward": 0.0, "zero_variance_groups": 1.0, "truncated": 0.2}, "--examples"),
    ({"reward": 0.5, "zero_variance_groups": 0.95, "truncated": 0.2}, "--num-generations"),
    ({"reward": 0.5, "zero_variance_groups": 0.2, "truncated": 0.2, "sinkhorn_converged": 0.5}, "--ot-eps"),
])
def test_what_goes_on_for_some_steps_is_said_once(stats, told, flags):
    config, streaks = train.parse(flags), Counter()
    good = {"reward": 0.5, "zero_variance_groups": 0.5, "truncated": 0.2, "sinkhorn_converged": 1.0}
    for each in [stats] * (PATIENCE - 1) + [good] + [stats] * (PATIENCE - 1):
        assert not signs_of_trouble(each, streaks, config), "not in a row"
    (told_line,) = signs_of_trouble(stats, streaks, config)
    assert told in told_line
    for each in [stats] * 20 + [good] + [stats] * 20 + [{"pair_margin": 0.1}] * 20:
        assert not signs_of_trouble(each, streaks, config), "said twice"
