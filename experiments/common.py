"""What the benchmark scripts share: trainings in processes of their own, intervals over seeds."""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # two-sided, n - 1 degrees


def make_parser(doc: str, name: str, seeds: int) -> argparse.ArgumentParser:
    """The flags that all studies of many trainings have; runs go to runs/<name> by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / name)
    return parser


def run_script(*arguments) -> str:
    """stdout of `python ARGUMENTS` in the repository, on one thread: several fit side by side."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )
    if done.returncode:
        raise SystemExit(f"python {' '.join(map(str, arguments))}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def run_training(directory: Path, *flags, script=("train.py",)) -> dict:
    """eval.json of `python train.py FLAGS`, or of another script that takes these flags.

    A directory that holds a finished run already is not trained again.
    """
    if not (directory / "final").exists():
        shutil.rmtree(directory, ignore_errors=True)  # what an interrupted benchmark left
        run_script(*script, "--output-dir", directory.resolve(), *flags)
    print(f"{directory.name}: done", file=sys.stderr, flush=True)
    return json.loads((directory / "eval.json").read_text())


def side_by_side(function, jobs, workers: int) -> dict:
    """job -> function(*job), several at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(lambda job: function(*job), jobs), strict=True))


def interval(values) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95% t interval."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), half


def interval_cell(values) -> str:
    """The interval for a table, "0.70 ± 0.02"; of a single seed the value alone."""
    mean, half = interval(values)
    shown = f"{round(mean, 2) + 0.0:.2f}"  # + 0.0: no -0.00
    return shown if math.isnan(half) else f"{shown} ± {half:.2f}"


def read_lines(path: Path) -> list:
    """The values of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
