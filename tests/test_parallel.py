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

import parallel

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--principles principles/reasoning.txt --preferences tiny --num-questions 3 --num-principles 2 --num-generations 2 "
    "--num-pairs 3 --max-steps 3 --num-iterations 2 --eval-questions 5 --eval-steps 2 --warmup-steps 0 "
    "--max-completion-length 24 --micro-batch 8 --save-steps 3"
).split()  # three questions on two processes: the shares differ


def start(processes, script, *flags):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, str(script), *flags], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def lines(path):
    exempt = ("seconds", "tokens_per", "sinkhorn_iterations")  # the last: of the slowest question of a micro-batch
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(exempt)} for row in rows]


def numbers(tree):
    """Every number in nested lists and dicts, in order."""
    if isinstance(tree, dict | list):
        return [n for value in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process and by two."""
    folders = {n: tmp_path_factory.mktemp("runs") / str(n) for n in (1, 2)}
    started = {n: start(n, "train.py", *FLAGS, "--output-dir", str(folder)) for n, folder in folders.items()}
    printed = {}
    for n, process in started.items():
        printed[n], errors = process.communicate()
        assert process.returncode == 0, errors
    return folders, printed


def test_two_processes_take_the_steps_of_one(runs):
    one, two = runs[0][1], runs[0][2]
    ours, theirs = (lines(run / "metrics.jsonl") for run in (one, two))
    for rows in (ours, theirs):
        rows[0].pop("pair_accuracy")  # the margins are 0 but for rounding before the first step: so is their sign
    assert len(ours) == 3 and [set(row) for row in ours] == [set(row) for row in theirs]
    torch.testing.assert_close(torch.tensor(numbers(theirs)), torch.tensor(numbers(ours)), rtol=1e-5, atol=1e-5)
    evals = [json.loads((run / "eval.json").read_text()) for run in (one, two)]
    for each in evals:
        each["start"].pop("pair_accuracy")
    torch.testing.assert_close(torch.tensor(numbers(evals[1])), torch.tensor(numbers(evals[0])), rtol=1e-5, atol=1e-5)
    assert evals[0]["end"]["example"] == evals[1]["end"]["example"]
    weights = [load_file(run / "final" / "model.safetensors") for run in (one, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_one_process_writes_and_speaks(runs):
    folders, printed = runs
    files = [sorted(str(f.relative_to(run)) for f in run.rglob("*")) for run in folders.values()]
    assert files[0] == files[1] and "checkpoints/step_3/state.json" in files[1]
    assert lines(folders[2] / "samples.jsonl")[0]["completion"] == lines(folders[1] / "samples.jsonl")[0]["completion"]
    assert printed[2].count("held-out questions: 5") == 1


def test_a_process_that_dies_ends_the_other_with_the_reason(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys, parallel, train\n"
        "update = train.update\n"
        "def dies(*args):\n"
        "    if parallel.rank() == 1:\n"
        "        os._exit(9)\n"
        "    return update(*args)\n"
        "train.update = dies\n"
        "sys.exit(train.main())\n"
    )
    begun = time.time()
    process = start(2, script, *FLAGS, "--output-dir", str(tmp_path / "run"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "exitcode" in errors and "9" in errors and "dies.py" in errors, errors
    assert "Traceback (most recent call last):\n  File \"" + str(script) not in errors, "the survivor tells one line"
    assert time.time() - begun < 110, "a minute, and the start of three interpreters on a busy machine"


def test_parts_cover_everything_once(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setattr(parallel, "world", lambda world=world: world)
        parts = []
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            parts += list(range(10))[parallel.share(10)]
        assert parts == list(range(10))
