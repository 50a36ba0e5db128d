"""Checkpoints: one file each, never seen half written, read as data and never run as code.

    RUN/checkpoints/step_N.pt    the run after N steps: the weights that are trained, the optimiser's
                                 state, settings, evaluations, checksums, and how long the logs were

What can be derived is not stored. The questions, principles and random numbers of a step are
functions of the seed and the step, the learning rate of the settings and the step.
"""

import os
import re
import zipfile
from pathlib import Path

import torch

from support.errors import InputError
from support.writing import sync, write_aside

LOGS = ("metrics.jsonl", "samples.jsonl")  # of the run; resuming cuts them back to the checkpoint
CONTENT = {"step", "settings", "checksums", "evals", "logs", "weights", "optimizer"}


def save(run_dir: Path, weights: dict, optimizer, state: dict, limit: int | None = None) -> Path:
    """Write step_N.pt for N = state["step"], then remove the oldest beyond `limit`."""
    path = run_dir / "checkpoints" / f"step_{state['step']}.pt"
    path.parent.mkdir(exist_ok=True)
    logs = [run_dir / name for name in LOGS if (run_dir / name).exists()]
    for file in (run_dir / "config.json", *logs):
        sync(file)
    lengths = {log.name: log.stat().st_size for log in logs}
    weights = {name: weight.detach() for name, weight in weights.items()}
    content = {**state, "logs": lengths, "weights": weights, "optimizer": optimizer.state_dict()["state"]}

    def write(aside):
        with aside.open("wb") as file:  # with a name alone, torch would not say that the disk is full
            torch.save(content, file)
        sync(aside)

    write_aside(path, write)
    sync(path.parent)
    for old in checkpoints(run_dir)[: -limit if limit else 0]:
        old.unlink()
    return path


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*.pt") if is_checkpoint(path)]
    return sorted(found, key=step_of)


def is_checkpoint(path: Path) -> bool:
    return bool(re.fullmatch(r"step_\d+\.pt", path.name))


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def read(path: Path) -> dict:
    """The content of a checkpoint. Raises InputError, with a way out, if a byte of it has changed."""
    try:
        if not path.is_file():  # reading a pipe would wait
            raise ValueError("is no file")
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums in it
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if missing := CONTENT - set(content):
            raise ValueError(f"has no {min(missing)}")
        return content
    except Exception as error:  # what a damaged file may raise is documented nowhere
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        older = [c for c in checkpoints(path.parent.parent) if is_checkpoint(path) and step_of(c) < step_of(path)]
        hint = f"the checkpoint before it: --resume {older[-1]}" if older else "there is no older checkpoint"
        raise InputError(f"{path}: damaged, or not a checkpoint ({reason}); {hint}") from None


def restore(stored: dict, weights: dict, optimizer) -> None:
    """Give weights and optimiser the values of a checkpoint."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored["weights"][name])
    groups = optimizer.state_dict()["param_groups"]  # the rates are those of the present settings
    optimizer.load_state_dict({"state": stored["optimizer"], "param_groups": groups})


def rewind(run_dir: Path, stored: dict) -> None:
    """Drop what a run wrote after a checkpoint. Raises InputError if its logs have lost lines."""
    for name, size in stored["logs"].items():
        if not (run_dir / name).exists() or (run_dir / name).stat().st_size < size:
            raise InputError(f"{run_dir / name}: has lost lines since the checkpoint, which knows {size} bytes of it; "
                             "the file as the run wrote it is accepted")
    for path in (run_dir / "checkpoints").glob(".step_*"):  # what a kill left
        path.unlink()
    for path in checkpoints(run_dir):
        if step_of(path) > stored["step"]:
            path.unlink()
    for name in LOGS:
        if (run_dir / name).exists():
            os.truncate(run_dir / name, stored["logs"].get(name, 0))
