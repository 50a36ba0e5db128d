"""What the experiments share: trainings in processes of their own, intervals, tables."""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.checkpoint import checkpoints  # noqa: E402
from support.writing import write_aside  # noqa: E402

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # two-sided, n - 1 degrees


def make_parser(doc: str, name: str, seeds: int) -> argparse.ArgumentParser:
    """The flags that all studies of many trainings have; runs go to runs/<name> by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / name)
    return parser


def run_script(*arguments, log: Path | None = None) -> str:
    """What `python ARGUMENTS` in the repository prints; on one thread, so that several fit side by side.

    With `log` all of it, warnings and progress too, goes to the end of that file while it runs.
    """
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, "text": True}
    if log:
        with log.open("a") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options)
        reason = log.read_text()
    else:
        done = subprocess.run(command, capture_output=True, **options)
        reason = done.stderr
    if done.returncode:
        last = (reason.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise SystemExit(f"{' '.join(command[1:])}: {last}")
    return done.stdout or ""


def run_training(directory: Path, *flags, script=("train.py",)) -> dict:
    """eval.json of `python train.py FLAGS`, or of another script that takes these flags.

    A finished run is not trained again; one that was stopped goes on from its last checkpoint, where
    it has one (--save-steps, or Ctrl-C). What it prints is in DIRECTORY.log, to be watched; the time
    of all its sittings is in minutes.json.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not (directory / "final").exists():
        stopped = bool(checkpoints(directory))
        if not stopped:
            shutil.rmtree(directory, ignore_errors=True)  # stopped before its first checkpoint
        where = ["--resume", directory.resolve()] if stopped else ["--output-dir", directory.resolve(), *flags]
        log, start = directory.with_name(f"{directory.name}.log"), time.time()
        print(f"{directory.name}: {'goes on' if stopped else 'begins'}, see {log}", file=sys.stderr, flush=True)
        try:
            run_script(*script, *where, log=log)
        finally:
            if directory.exists():
                minutes = training_minutes(directory) + (time.time() - start) / 60
                (directory / "minutes.json").write_text(json.dumps(minutes))
    print(f"{directory.name}: done", file=sys.stderr, flush=True)
    return json.loads((directory / "eval.json").read_text())


def training_minutes(directory: Path) -> float:
    """How long the training in this directory has taken so far; 0 if nobody has noted it."""
    path = directory / "minutes.json"
    return json.loads(path.read_text()) if path.exists() else 0.0


def after(reported: int, make):
    """tiny.make_questions (or make_pairs) whose held-out part has none of the first `reported`'s sums: for choices."""
    def numbers(item):
        return tuple(re.findall(r"\d+", item.text))  # the same sum is asked of other names and things

    def make_others(num, held_out, seed=0):
        if not held_out:
            return make(num, False, seed)
        found = make(reported + 8 * num, True)  # more than enough
        known = {numbers(item) for item in found[:reported]}
        return [item for item in found[reported:] if numbers(item) not in known][:num]

    return make_others


def side_by_side(function, jobs, workers: int) -> dict:
    """job -> function(*job), several at a time. After Ctrl-C or a failure those that run end, and no other begins."""
    failed = []

    def run(job):
        if failed:
            raise SystemExit("not begun, since another has failed")  # never seen: the failed one comes first
        try:
            return function(*job)
        except BaseException:
            failed.append(job)
            raise

    with ThreadPoolExecutor(workers) as pool:
        try:
            return dict(zip(jobs, pool.map(run, jobs), strict=True))
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on from here") from None


def interval(values) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95% t interval."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), half


def interval_cell(values, digits: int = 2) -> str:
    """The interval for a table, "0.70 ± 0.02"; of a single seed the value alone, of none nothing."""
    if not values:
        return ""
    mean, half = interval(values)
    shown = f"{round(mean, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.00
    return shown if math.isnan(half) else f"{shown} ± {half:.{digits}f}"


def read_lines(path: Path) -> list:
    """The values of a .jsonl file."""
    with path.open(encoding="utf-8") as file:  # not splitlines(), which cuts at U+2028 inside a text
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows) -> None:
    """The rows as a .jsonl file, which is there whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def markdown(header, rows) -> str:
    """A table in markdown, of texts."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
