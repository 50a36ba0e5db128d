"""Checkpoints: written whole or not at all, read only when intact, and never run as code.

    RUN/checkpoints/step_N/        the run after N steps; it has this name only once all of it is on the disk
        model.safetensors          the weights that are trained
        optimizer.safetensors      the optimiser's state of each: "exp_avg.<weight>", "exp_avg_sq.<weight>" …
        state.json                 the step, the settings, the evaluations so far, the length of each log, random states
        SHA256SUMS                 of these three (`sha256sum -c SHA256SUMS` checks them too)

What is not in it follows from what is. The questions, principles and random numbers of a step are functions of the seed
and the step, so the position in the data is the step; the learning rate is a function of the settings and the step. The
reference is the model as it was loaded, and can be loaded again: a second copy would make a checkpoint a third larger.
Its checksum is kept instead, and a run whose model has another one since is refused.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import InputError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
LOGS = ("metrics.jsonl", "samples.jsonl")  # of the run: cut to their length at the checkpoint when it is resumed


# ----------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def written_whole(path: Path):
    """A new directory to fill, which is called `path` once the block has ended and all of it is on the disk.

    After a kill or an error there is the `path` that was there before, or none.
    """
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill left
    try:
        aside.mkdir(parents=True)
        yield aside
        for written in (*aside.rglob("*"), aside):
            sync(written)
        remove(path)
        aside.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Renamed first: a kill leaves no half of a directory under its name."""
    gone = path.with_name(f".{path.name}.tmp-old")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        path.rename(gone)
        shutil.rmtree(gone)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(directory: Path, model, optimizer, state: dict, limit: int | None = None) -> Path:
    """Write directory/step_N, N = state["step"], then remove the oldest beyond `limit`. OSError: the disk is full."""
    run_dir, path = directory.parent, directory / f"step_{state['step']}"
    names = {weight: name for name, weight in model.named_parameters()}
    moments = {f"{key}.{names[w]}": value for w, of in optimizer.state.items() for key, value in of.items()}
    logs = [run_dir / name for name in LOGS if (run_dir / name).exists()]
    for file in (run_dir / "config.json", *logs):
        sync(file)
    state = {**state, "logs": {log.name: log.stat().st_size for log in logs}, "random": random_states()}
    with written_whole(path) as aside:
        try:
            save_file({name: weight.detach().contiguous() for name, weight in model.named_parameters()
                       if weight.requires_grad}, aside / "model.safetensors")
            save_file({name: value.contiguous() for name, value in moments.items()}, aside / "optimizer.safetensors")
        except SafetensorError as error:  # what the library makes of an OSError
            raise OSError(f"{path}: {error}") from None
        (aside / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        sums = [f"{sha256(aside / name)}  {name}\n" for name in FILES]
        (aside / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    for old in checkpoints(run_dir)[: -limit if limit else 0]:
        remove(old)
    return path


def random_states() -> dict:
    """Python's and torch's. Nothing in the loop draws from them, but a change of it may."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": [bytes(s.tolist()).hex() for s in (torch.get_rng_state(), *cuda)]}


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model) -> str:
    """Of every weight and its name."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def checkpoints(run_dir: Path) -> list[Path]:
    """Those of a run, the oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def how_to_resume(run_dir: Path) -> str:
    if checkpoints(run_dir):
        return f"go on from {checkpoints(run_dir)[-1].name} with: python train.py --resume {run_dir}"
    return "there is no checkpoint to go on from (--save-steps writes them)"


def find(name: str) -> tuple[Path, Path]:
    """(run, checkpoint) that `--resume name` means: a run's newest, a checkpoint itself, or the newest under runs/."""
    path = Path(name)
    if name == "latest":
        newest = [found[-1] for run in Path("runs").glob("*") if (found := checkpoints(run))]
        if not newest:
            raise InputError("--resume latest: no run in runs/ has a checkpoint; the directory of a run that has one "
                             "is accepted (--save-steps writes them)")
        path = max(newest, key=lambda checkpoint: checkpoint.stat().st_mtime)
    run_dir = path.parent.parent if re.fullmatch(r"step_\d+", path.name) else path
    if not (run_dir / "config.json").is_file():
        raise InputError(f"--resume: {name} is not a run; a run's directory, a checkpoint in it, or latest is accepted")
    if (run_dir / "final").exists():
        raise InputError(f"--resume: {run_dir} is finished, see {run_dir}/final; an unfinished run is accepted")
    if run_dir == path:
        if not checkpoints(run_dir):
            raise InputError(f"--resume: {run_dir} has no complete checkpoint; a run that has one is accepted "
                             "(--save-steps writes them), and this one has to start again")
        path = checkpoints(run_dir)[-1]
    return run_dir, path


@contextlib.contextmanager
def _refused(path: Path):
    """InputError with the way out, for whatever reading a damaged or foreign file of a checkpoint raises."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        older = [c for c in checkpoints(path.parent.parent.parent) if int(c.name[5:]) < int(path.parent.name[5:])]
        hint = f"; the checkpoint before it: --resume {older[-1]}" if older else "; there is no older checkpoint"
        raise InputError(f"{path}: {reason.splitlines()[0]}{hint}") from None


def read_state(path: Path) -> dict:
    """state.json of a checkpoint; raises InputError with the name of the first file that is not as it was written."""
    for name in ("SHA256SUMS", *FILES):
        with _refused(path / name):
            if not (path / name).is_file():  # nor a pipe, which reading would wait for
                raise ValueError("missing")
    with _refused(path / "SHA256SUMS"):
        sums = (path / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    for name in FILES:
        with _refused(path / name):
            if f"{sha256(path / name)}  {name}" not in sums:
                raise ValueError("damaged, its checksum is not that in SHA256SUMS")
    with _refused(path / "state.json"):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not {"step", "settings", "start_sha256", "evals", "logs", "random"} <= set(state):
            raise ValueError("not the state of a run")
        return state


def load(path: Path, model, optimizer, state: dict) -> None:
    """Weights, optimiser and random states of a checkpoint that `read_state` has found intact. Raises InputError."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with _refused(path / "model.safetensors"):
        stored = load_file(path / "model.safetensors")
        with torch.no_grad():
            for name, weight in weights.items():
                _check_like(name, stored[name], weight)
                weight.copy_(stored[name])
    with _refused(path / "optimizer.safetensors"):
        ordered = [weight for group in optimizer.param_groups for weight in group["params"]]
        index = {weight: i for i, weight in enumerate(ordered)}
        moments = defaultdict(dict)
        for key, value in load_file(path / "optimizer.safetensors").items():
            kind, _, name = key.partition(".")
            if value.ndim:  # all but the step count
                _check_like(key, value, weights[name])
            moments[index[weights[name]]][kind] = value
        # The groups hold rates and the like: those of the settings, which may have been changed on purpose.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
    with _refused(path / "state.json"):
        version, numbers, gauss = state["random"]["python"]
        random.setstate((version, tuple(numbers), gauss))
        cpu, *cuda = (torch.tensor(list(bytes.fromhex(s)), dtype=torch.uint8) for s in state["random"]["torch"])  # [n]
        torch.set_rng_state(cpu)
        if cuda and torch.cuda.device_count() == len(cuda):
            torch.cuda.set_rng_state_all(cuda)


def _check_like(name: str, stored, weight) -> None:
    if (stored.shape, stored.dtype) != (weight.shape, weight.dtype):
        raise ValueError(f"{name} is {stored.dtype} {list(stored.shape)}, expected {weight.dtype} {list(weight.shape)}")


def rewind(run_dir: Path, state: dict) -> None:
    """Drop what a run wrote after a checkpoint: later checkpoints, then the lines of its logs. Raises InputError."""
    for name, size in state["logs"].items():
        if not (run_dir / name).exists() or (run_dir / name).stat().st_size < size:
            raise InputError(f"{run_dir / name}: has lost lines since the checkpoint, which knows {size} bytes of it; "
                             "the file as the run wrote it is accepted")
    for path in (run_dir / "checkpoints").glob(".step_*"):  # what a kill left
        shutil.rmtree(path)
    for path in checkpoints(run_dir):
        if int(path.name[5:]) > state["step"]:
            remove(path)
    for name in LOGS:
        if (run_dir / name).exists():
            os.truncate(run_dir / name, state["logs"].get(name, 0))
