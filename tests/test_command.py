"""command.py, display.py and support/__init__.py: what the commands share at their beginning and at their end."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import geometry
import si
import train
from support import display
from support.command import exit_status
from support.errors import InputError, NotFinite

ROOT = Path(__file__).resolve().parent.parent
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
SMALL = (
    f"--principles {PRINCIPLES} --dataset {ROOT / 'tests' / 'questions.jsonl'} --num-questions 1 --num-principles 2 "
    "--num-generations 2 --max-steps 2 --eval-questions 1 --eval-steps 0 --warmup-steps 1 --max-completion-length 8"
).split()
SCRIPTS = [path.relative_to(ROOT) for folder in (".", "benchmarks", "experiments", "tiny-model") for path in
           sorted((ROOT / folder).glob("*.py")) if "__main__" in path.read_text()]


# ------------------------------------------------------------------------------------------------ an error is one line


@pytest.mark.parametrize("error, status, line", [
    (InputError("--x: got 1; 2 is accepted"), 2, "error: --x: got 1; 2 is accepted"),
    (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
    (NotFinite("training has broken down at step 3: the loss is nan"), 1, "error: training has broken down at step 3"),
    (torch.OutOfMemoryError("CUDA"), 1, "error: the GPU's memory does not suffice"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"), 1,
     "error: the memory does not suffice"),
    (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C"),
    (RuntimeError("gloo/transport/tcp/pair.cc:1: Connection closed by peer"), 1, "error: process 0: gloo"),
])
def test_an_error_that_is_expected_is_one_line_and_a_status(error, status, line, capsys):
    def command():
        raise error

    assert exit_status(command) == status
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_a_command_computes_without_denormals_and_leaves_them_as_they_were():
    """A CPU multiplies them many times slower, and a saturated InfoNCE has hardly any other gradients."""
    tiny, found = torch.tensor([1e-40]), []
    assert exit_status(lambda: found.append((tiny * 0.5).item())) == 0
    assert found == [0.0] and (tiny * 0.5).item() > 0


@pytest.mark.parametrize("error", [ValueError("scores: got [3, 4]"), RuntimeError("size mismatch"), TypeError("x")])
def test_a_fault_of_the_program_stays_a_traceback(error):
    with pytest.raises(type(error)):
        exit_status(lambda: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("module, flags", [
    (si, ["--num-questions", "2"]), (geometry, ["--base", "tiny", "--trained", "tiny", "--num-questions", "1"]),
])
def test_ctrl_c_is_one_line_in_every_command(module, flags, monkeypatch, capsys):
    monkeypatch.setattr("support.sampling.sample", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert module.main(["--principles", PRINCIPLES, "--max-completion-length", "4", *flags]) == 130
    assert capsys.readouterr().err.endswith("error: stopped by Ctrl-C\n")


# ------------------------------------------------------------------------------------------------ what is shown may get lost


class Gone(io.StringIO):
    """A terminal that has been closed, or a pipe that nobody reads, after some characters."""

    def __init__(self, number=errno.EPIPE, characters=0):
        super().__init__()
        self.number, self.left = number, characters

    def write(self, text):
        self.left -= len(text)
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return len(text)

    def flush(self):
        self.write("")


@pytest.mark.parametrize("stream", [
    None, Gone(), Gone(errno.EIO, 300), Gone(errno.EBADF), Gone(errno.ENOSPC, 500), Gone(errno.EAGAIN),
], ids=lambda stream: "no stream" if stream is None else errno.errorcode[stream.number])
def test_a_run_that_cannot_show_anything_is_the_same_run(stream, tmp_path, monkeypatch):
    monkeypatch.setattr("support.run.write_plot", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert train.main([*SMALL, "--output-dir", str(tmp_path / "run")]) == 0
    assert sys.stdout is stream and (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_si_writes_its_files_before_it_cannot_show_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone(characters=10))
    files = ["--json", str(tmp_path / "si.json"), "--out", str(tmp_path / "best.jsonl")]
    flags = ["--principles", PRINCIPLES, "--num-questions", "2", "--max-completion-length", "4"]
    assert si.main([*flags, *files]) == 0 and {"si.json", "best.jsonl"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("shell", [
    "{python} -c '{code}' | true", "{python} -c '{code}' 2>&1 | true", "{python} -c '{code}' >&-",
    "{python} -c '{code}' >&- 2>&- <&-", "{python} -c '{code}' > /dev/full 2>&1",
])
def test_python_does_not_end_with_an_error_for_what_it_could_not_show(shell):
    """Python flushes its streams last of all, and exits with 120 where that fails."""
    code = (
        "import sys, time; from support import display\n"
        "with display.optional():\n"
        "    time.sleep(0.3); print(\"x\" * 10); print(\"y\" * 100000, file=sys.stderr)\n"
        "sys.exit(0)"
    )
    command = shell.format(python=sys.executable, code=code)
    process = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True)
    assert process.returncode == 0 and b"Error" not in process.stderr


def test_what_is_opened_while_a_stream_is_closed_does_not_get_its_messages(tmp_path):
    code = f"import os, support; file = open({str(tmp_path / 'f')!r}, 'w'); os.write(1, b'lost'); print('lost'); os.write(2, b'lost')"
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" >&- 2>&-'], cwd=ROOT, check=True)
    assert (tmp_path / "f").read_text() == ""


def test_what_a_terminal_cannot_spell_is_written_in_escapes(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with display.optional():
        print("café")
    assert ascii_only.buffer.getvalue() == b"caf\\xe9\n"


# ------------------------------------------------------------------------------------------------ before torch is loaded


STOP_AT_TORCH = """
import os, runpy, sys
class Stop:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers", "datasets", "trl"):  # the others load torch
            os.write(1, os.environ.get("GOMP_SPINCOUNT", "nothing").encode())
            os._exit(0)
sys.meta_path.insert(0, Stop())
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="imported")
"""


@pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import sys; sys.exit('torch' in sys.modules)"]).returncode != 0,
    reason="this interpreter loads torch when it starts",
)
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_threads_do_not_spin_for_long_in_any_script(script):
    """What OpenMP is told must stand before torch is loaded."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", STOP_AT_TORCH, str(ROOT / script)]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.stdout == "10000", process.stderr


@pytest.mark.parametrize("given, found", [
    ({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
])
def test_a_users_own_setting_wins(given, found):
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, support; print(os.environ.get('GOMP_SPINCOUNT'))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | given, capture_output=True, text=True)
    assert process.stdout.strip() == found


def test_ctrl_c_while_libraries_are_imported_is_one_line():
    code = "import os, signal, support; os.kill(os.getpid(), signal.SIGINT)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 130 and process.stderr == "error: stopped by Ctrl-C\n"
