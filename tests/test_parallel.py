"""torchrun: two processes take the steps of one, and one that dies takes the other with it. On the CPU, through gloo."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from support import parallel

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--principles principles/reasoning.txt --dataset tests/questions.jsonl --num-questions 3 "
    "--num-principles 2 --num-generations 2 --max-steps 2 --num-iterations 2 --eval-questions 5 "
    "--eval-steps 1 --warmup-steps 0 --max-completion-length 24 --micro-batch 8 --save-steps 2 --seed 1 --bf16 False"
).split()  # three questions on two processes: the shares differ


def start_two(script, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(script), *flags], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def lines(path):
    exempt = ("seconds", "tokens_per")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(exempt)} for row in rows]


def numbers(tree):
    """Every number in nested lists and dicts, in order."""
    if isinstance(tree, dict | list):
        return [n for value in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process, which is this one, and by two; and what the two print."""
    folders = {n: tmp_path_factory.mktemp("runs") / str(n) for n in (1, 2)}
    two = start_two("train.py", *FLAGS, "--output-dir", str(folders[2]))
    printed, errors = two.communicate()
    assert two.returncode == 0, errors
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train.main([*FLAGS, "--output-dir", str(folders[1])]) == 0
    return folders, printed


def test_two_processes_take_the_steps_of_one(runs):
    one, two = runs[0][1], runs[0][2]
    ours, theirs = (lines(run / "metrics.jsonl") for run in (one, two))
    assert len(ours) == 2 and [set(row) for row in ours] == [set(row) for row in theirs]
    torch.testing.assert_close(torch.tensor(numbers(theirs)), torch.tensor(numbers(ours)), rtol=1e-5, atol=1e-5)
    evals = [json.loads((run / "eval.json").read_text()) for run in (one, two)]
    torch.testing.assert_close(torch.tensor(numbers(evals[1])), torch.tensor(numbers(evals[0])), rtol=1e-5, atol=1e-5)
    assert evals[0]["end"]["example"] == evals[1]["end"]["example"]
    weights = [load_file(run / "final" / "model.safetensors") for run in (one, two)]
    nearly = 2e-4 if torch.cuda.is_available() else 1e-5  # a GPU adds up in another order, and Adam's first steps show it
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=nearly, msg=lambda m, n=name: f"{n}: {m}")


def test_one_process_writes_and_speaks(runs):
    folders, printed = runs
    files = [sorted(str(f.relative_to(run)) for f in run.rglob("*")) for run in folders.values()]
    assert files[0] == files[1] and "checkpoints/step_2.pt" in files[1]
    assert lines(folders[2] / "samples.jsonl")[0]["completion"] == lines(folders[1] / "samples.jsonl")[0]["completion"]
    assert printed.count("held-out questions: 4") == 1


def test_a_process_that_dies_ends_the_other_with_the_reason(tmp_path):
    script = tmp_path / "dies.py"  # without the training around it, which takes twice as long to import
    script.write_text(
        "import os, sys\n"
        "from support import parallel\n"
        "from support.command import exit_status\n"
        "def command():\n"
        "    parallel.start()\n"
        "    parallel.gather({'steps': 1})\n"
        "    if parallel.rank() == 1:\n"
        "        os._exit(9)\n"
        "    parallel.gather({'steps': 2})\n"
        "sys.exit(exit_status(command))\n"
    )
    begun = time.time()
    process = start_two(script)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "exitcode" in errors and "9" in errors and "dies.py" in errors, errors
    assert "Traceback (most recent call last):\n  File \"" + str(script) not in errors, "the survivor tells one line"
    assert time.time() - begun < 110, "a minute, and the start of three interpreters on a busy machine"


def test_parts_cover_everything_once(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setattr("support.parallel.world", lambda world=world: world)
        parts = []
        for rank in range(world):
            monkeypatch.setattr("support.parallel.rank", lambda rank=rank: rank)
            parts += list(range(10))[parallel.share(10)]
        assert parts == list(range(10))


@pytest.mark.parametrize("alone", ["RANK", "WORLD_SIZE"])
def test_half_of_what_torchrun_sets_starts_nothing(monkeypatch, alone):
    """Schedulers set one of the two by themselves; then this is the only process."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(alone, "1")
    parallel.start()
    assert (parallel.rank(), parallel.world()) == (0, 1)


def test_two_processes_take_pairs_in_the_steps_of_one(tmp_path):
    """Of nine pairs a few are held out: steps of four go over the ends of epochs, and no process is left without a pair."""
    rows = [{"prompt": f"Tom has {n} pens and gets 2 more. How many pens?", "chosen": f" {n + 2}", "rejected": f" {n - 2}"} for n in range(5, 14)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--preferences {tmp_path}/pairs.jsonl --num-pairs 4 --max-steps 3 --eval-steps 0 --max-completion-length 8 --bf16 False --output-dir".split()
    two = start_two("train.py", *flags, str(tmp_path / "two"))
    _, errors = two.communicate()
    assert two.returncode == 0, errors
    assert train.main([*flags, str(tmp_path / "one")]) == 0
    ours, theirs = ([row["pair_margin"] for row in lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert len(ours) == 3
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-4, atol=1e-4)
