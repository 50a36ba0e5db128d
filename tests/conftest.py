"""What the tests share. They take the processor for one without bfloat16: what a machine has must not decide them."""

import support  # isort: skip  # noqa: F401  (before torch: see there)

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send Ctrl-C; what is started in the background ignores it


@pytest.fixture(scope="session", autouse=True)
def processor_without_bf16():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        if torch.cuda.is_available():
            patch.setattr("support.run.has_bf16", lambda device: False)
        yield


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """A run of all terms: 5 steps, an evaluation after the third, a checkpoint after the second and the fourth."""
    principles = tmp_path_factory.mktemp("data") / "p.txt"
    principles.write_bytes((ROOT / "principles" / "reasoning.txt").read_bytes())  # a copy: a test changes it
    questions = ROOT / "tests" / "questions.jsonl"  # a few: to check the embedded task's 4096 takes a second
    return (
        f"--principles {principles} --dataset {questions} --num-questions 2 --num-principles 2 --num-generations 2 "
        "--max-steps 5 --warmup-steps 1 --max-completion-length 12 --eval-questions 2 --eval-steps 3 --save-steps 2 "
        "--bf16 False"  # in other processes too
    ).split()


@pytest.fixture
def one_line(capsys):
    """A function: the error that a command has printed, which is its last line."""
    def read():
        error = capsys.readouterr().err.splitlines()[-1:]
        assert error and error[0].startswith("error: "), error
        return error[0]

    return read


@pytest.fixture(scope="session")
def never_stopped(flags, tmp_path_factory):
    """The directory of that run."""
    import train  # here: a test of one concept alone need not wait for the libraries

    run_dir = tmp_path_factory.mktemp("runs") / "never-stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.run.write_plot", lambda *_: None)
        assert train.main([*flags, "--output-dir", str(run_dir)]) == 0
    return run_dir


@pytest.fixture(scope="session")
def stopped(flags, tmp_path_factory):
    """The same run, sent a SIGTERM in its third step, when the weights have changed."""
    import train
    from support.run import Run

    run_dir, log = tmp_path_factory.mktemp("runs") / "stopped", Run.log

    def log_and_signal(run, step):
        log(run, step)
        if step.number + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_and_signal)
        with pytest.raises(SystemExit) as ended:
            train.main([*flags, "--output-dir", str(run_dir)])
    assert ended.value.code == 128 + signal.SIGTERM == 143
    return run_dir


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run, to spoil."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))
