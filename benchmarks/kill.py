"""SIGKILL at random moments, then --resume: do all runs end as the one that was never stopped?

    python benchmarks/kill.py --runs 50

A checkpoint after every step, so that many kills fall into the writing of one; the moment is drawn
uniformly between the first line of metrics.jsonl and the end. Equal must be, byte for byte, final
weights, samples.jsonl and eval.json, and metrics.jsonl but for its seconds and tokens per second.
Every checkpoint that a kill leaves must be whole.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from experiments.common import read_lines  # noqa: E402
from support import checkpoint  # noqa: E402
from support.writing import sha256  # noqa: E402

FLAGS = (
    "--num-questions 2 --num-principles 2 --num-generations 2 --max-completion-length 12 --max-steps 6 "
    "--warmup-steps 1 --eval-questions 2 --eval-steps 3 --save-steps 1 --save-total-limit 2"
).split()
processes = multiprocessing.get_context("forkserver")  # imports once; a fork of this process could hang in OpenMP
processes.set_forkserver_preload([
    "train", "matplotlib.pyplot", "torch._dynamo", "transformers.models.llama.modeling_llama",
])


def start(*flags):
    """`python train.py FLAGS` on one thread and in silence."""
    process = processes.Process(target=command, args=(flags,))
    process.start()
    return process


def command(flags) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    train.torch.set_num_threads(1)
    sys.exit(train.main([str(flag) for flag in flags]))


def seconds_to_the_end(process, run_dir: Path, at_most: float | None = None) -> float:
    """Wait for the first step, then the end or `at_most` seconds; returns those since the step."""
    while process.exitcode is None and not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.002)
    begun = time.perf_counter()
    process.join(at_most)
    return time.perf_counter() - begun


def result(run_dir: Path) -> tuple:
    """All of a finished run that must not depend on whether it was killed."""
    lines = read_lines(run_dir / "metrics.jsonl")
    steps = [{name: value for name, value in line.items() if "second" not in name} for line in lines]
    files = ("samples.jsonl", "eval.json", "final/model.safetensors")
    return steps, *(sha256(run_dir / name) for name in files)


def kill_and_resume(run_dir: Path, flags, seconds: float) -> str:
    """Kill a run `seconds` after its first step, then finish it; returns where it was hit.

    Raises AssertionError where it broke.
    """
    process = start(*flags, "--output-dir", run_dir)
    seconds_to_the_end(process, run_dir, seconds)
    process.kill()
    process.join()
    if (run_dir / "final").exists():
        return "at the very end"
    kept = checkpoint.checkpoints(run_dir)
    for path in kept:
        checkpoint.read(path)  # raises unless all of it is as it was written
    hit = "in writing final/" if (run_dir / ".final.tmp").exists() else \
        "in writing a checkpoint" if list(run_dir.glob("checkpoints/.*")) else "elsewhere"
    process = start("--resume", run_dir)
    process.join()
    if not kept:
        assert process.exitcode == 2, f"{run_dir}: no checkpoint, and --resume ended with {process.exitcode}"
        shutil.rmtree(run_dir)
        process = start(*flags, "--output-dir", run_dir)
        process.join()
        hit += ", before the first checkpoint: started again"
    assert process.exitcode == 0, f"{run_dir}: after a kill --resume ended with {process.exitcode}"
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="runs, each killed once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    flags = ["--principles", ROOT / "principles" / "reasoning.txt", *FLAGS]
    rng, hits, same = random.Random(arguments.seed), Counter(), 0
    with tempfile.TemporaryDirectory() as directory:
        never_killed = Path(directory) / "never-killed"
        seconds = seconds_to_the_end(start(*flags, "--output-dir", never_killed), never_killed)
        for number in range(arguments.runs):
            run_dir = Path(directory) / f"run-{number}"
            hits[kill_and_resume(run_dir, flags, rng.uniform(0, seconds))] += 1
            same += result(run_dir) == result(never_killed)
            shutil.rmtree(run_dir)
            print(f"\r{number + 1} killed and resumed, {same} identical", end="", file=sys.stderr, flush=True)
    print(f"\n{arguments.runs} runs killed, {same} ended identical to the one never stopped; no unreadable file. Hit:")
    for where, count in hits.most_common():
        print(f"{count:5} {where}")
    sys.exit(same != arguments.runs)


if __name__ == "__main__":
    main()
