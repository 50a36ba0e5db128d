"""Checkpoints: written whole or not at all, read only when intact, and never run as code.

    RUN/checkpoints/step_N/     the run after N steps; named so once all of it is on the disk
        model.safetensors       the weights that are trained
        optimizer.safetensors   the optimiser's state of each: "exp_avg.<weight>", ...
        state.json              step, settings, evaluations, lengths of the logs, random states
        SHA256SUMS              of these three (`sha256sum -c SHA256SUMS` checks them too)

What can be derived is not stored. The questions, principles and random numbers of a step are
functions of the seed and the step, the learning rate of the settings and the step. The reference
is the model as it was loaded: its checksum is stored instead of a copy, and a run whose model has
changed since is refused.

At the end of the file: writing numbers and plots.
"""

import contextlib
import datetime
import hashlib
import json
import os
import random
import re
import shutil
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support import parallel
from support.errors import InputError
from support.files import remove, sha256, sync, write_json, written_whole
from support.prompts import prompt_fingerprint
from support.settings import flag

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
LOGS = ("metrics.jsonl", "samples.jsonl")  # of the run; resuming cuts them back to the checkpoint


def save(directory: Path, model, optimizer, state: dict, limit: int | None = None) -> Path:
    """Write directory/step_N for N = state["step"], then remove the oldest beyond `limit`."""
    run_dir, path = directory.parent, directory / f"step_{state['step']}"
    weights = {name: w.detach().contiguous() for name, w in model.named_parameters() if w.requires_grad}
    names = {weight: name for name, weight in model.named_parameters()}
    moments = {
        f"{kind}.{names[weight]}": value.contiguous()
        for weight, values in optimizer.state.items() for kind, value in values.items()
    }
    logs = [run_dir / name for name in LOGS if (run_dir / name).exists()]
    for file in (run_dir / "config.json", *logs):
        sync(file)
    state = {**state, "logs": {log.name: log.stat().st_size for log in logs}, "random": random_states()}
    with written_whole(path) as aside:
        try:
            save_file(weights, aside / "model.safetensors")
            save_file(moments, aside / "optimizer.safetensors")
        except SafetensorError as error:  # how the library reports an OSError
            raise OSError(f"{path}: {error}") from None
        (aside / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        sums = [f"{sha256(aside / name)}  {name}\n" for name in FILES]
        (aside / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    for old in checkpoints(run_dir)[: -limit if limit else 0]:
        remove(old)
    return path


def random_states() -> dict:
    """Python's and torch's, for a changed loop: the one in train.py draws nothing from them."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": [bytes(s.tolist()).hex() for s in (torch.get_rng_state(), *cuda)]}


def weights_sha256(model) -> str:
    """A checksum of all weights and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def how_to_resume(run_dir: Path) -> str:
    if checkpoints(run_dir):
        return f"go on from {checkpoints(run_dir)[-1].name} with: python train.py --resume {run_dir}"
    return "there is no checkpoint to go on from (--save-steps writes them)"


def find(name: str) -> tuple[Path, Path]:
    """(run, checkpoint) of `--resume name`: a run, a checkpoint of one, or latest, in runs/."""
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
    if run_dir == path and not checkpoints(run_dir):
        raise InputError(f"--resume: {run_dir} has no complete checkpoint; a run that has one is accepted "
                         "(--save-steps writes them), and this one has to start again")
    return run_dir, checkpoints(run_dir)[-1] if run_dir == path else path


@contextlib.contextmanager
def _refused(path: Path):
    """InputError, with a way out, for what reading a damaged or foreign file raises."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        older = [c for c in checkpoints(path.parent.parent.parent) if int(c.name[5:]) < int(path.parent.name[5:])]
        hint = f"; the checkpoint before it: --resume {older[-1]}" if older else "; there is no older checkpoint"
        raise InputError(f"{path}: {reason.splitlines()[0]}{hint}") from None


def read_state(path: Path) -> dict:
    """state.json of a checkpoint. Raises InputError for the first file that is not as written."""
    for name in ("SHA256SUMS", *FILES):
        with _refused(path / name):
            if not (path / name).is_file():  # reading a pipe would wait
                raise ValueError("missing")
            if name == "SHA256SUMS":
                sums = (path / name).read_text(encoding="utf-8").splitlines()
            elif f"{sha256(path / name)}  {name}" not in sums:
                raise ValueError("damaged, its checksum is not that in SHA256SUMS")
    with _refused(path / "state.json"):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not {"step", "settings", "start_sha256", "evals", "logs", "random"} <= set(state):
            raise ValueError("not the state of a run")
        return state


def load(path: Path, model, optimizer, state: dict) -> None:
    """Load weights, optimiser and random states of a checkpoint. Raises InputError.

    `state` is from `read_state`, which has found the files intact.
    """
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
        groups = optimizer.state_dict()["param_groups"]  # the rates are those of the present settings
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
    """Drop what a run wrote after a checkpoint. Raises InputError if its logs have lost lines."""
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


def start_state(config, model, tokenizer) -> dict:
    """The state of a run before its first step; its checksums are what resuming compares with."""
    return {
        "step": 0,
        "settings": fingerprint(config),
        "start_sha256": weights_sha256(model),
        "prompt_sha256": prompt_fingerprint(tokenizer, model.generation_config, config.form),
        "evals": {"start": None, "steps": {}},
    }


def fingerprint(config) -> dict:
    """The settings that the rest of a run depends on; of a file, its checksum too."""
    settings = asdict(config)
    for name in ("output_dir", "save_steps", "save_total_limit", "resume"):
        del settings[name]
    for name in ("principles", "preferences", "dataset", "examples"):
        if settings[name] and os.path.isfile(settings[name]):
            settings[name] += f" (sha256 {sha256(settings[name])})"
    return settings


def resume_config(kind: type, given: dict):
    """The settings, a `kind`, of the run that --resume names, with `given`, today's flags, on top.

    Raises InputError where a setting, or the content of a file, is not what it was at the
    checkpoint, unless its flag is given now: then the change is meant.
    """
    run_dir, path = find(given["resume"])
    if "output_dir" in given:
        raise InputError("--output-dir: not accepted with --resume; a run goes on in its own directory")
    state = read_state(path)
    try:
        stored = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        unknown = ", ".join(sorted(set(stored["settings"]) - set(kind.__dataclass_fields__)))
        meant = [past["changed"] for past in stored.get("resumed", []) if past["step"] == state["step"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run_dir}/config.json: damaged ({error}); expected the file as the run wrote it") from None
    if unknown:
        raise InputError(f"{run_dir}/config.json: has settings that this version does not know ({unknown}); the "
                         f"version that wrote it, commit {stored.get('git_commit')}, can go on with it")
    config = kind(**{**stored["settings"], **given, "output_dir": str(run_dir), "resume": str(path)})
    for name, now in fingerprint(config).items():
        accepted = [values[name] for values in (state["settings"], *meant) if name in values]
        if name not in given and accepted and now not in accepted:
            raise InputError(f"{flag(name)}: was {accepted[0]} at {path} and is {now} now; give {flag(name)} again to "
                             "mean a change")
    return config


def resume(run_dir, config, model, optimizer, state: dict) -> None:
    """Restore everything from the checkpoint config.resume, and record which settings have changed.

    state: that of `start_state`; its step and evaluations become those of the checkpoint.
    """
    path = Path(config.resume)
    stored = read_state(path)
    if stored["start_sha256"] != state["start_sha256"]:
        raise InputError(f"--model: {config.model} has other weights than the model that {run_dir} started from, which "
                         "is its reference; that model is accepted")
    if stored.get("prompt_sha256", state["prompt_sha256"]) != state["prompt_sha256"]:
        raise InputError(f"--model: {config.model} has another chat template, tokenizer or end token than when "
                         f"{run_dir} started; the folder as it was is accepted")
    load(path, model, optimizer, stored)
    parallel.gather(None)  # all have read
    if parallel.rank() == 0:
        rewind(run_dir, stored)
    step = stored["step"]
    changed = {name: now for name, now in state["settings"].items() if stored["settings"].get(name, now) != now}
    record = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    record["settings"] = {**asdict(config), "resume": None}
    now = datetime.datetime.now().isoformat(timespec="seconds")
    record.setdefault("resumed", []).append({"step": step, "time": now, "changed": changed})
    write_json(run_dir / "config.json", record)
    state |= {"step": step, "evals": stored["evals"]}
    changes = [f"; {flag(name)} was {stored['settings'][name]}, is {now} now" for name, now in changed.items()]
    print(f"{run_dir}: going on after step {step} of {config.max_steps}{''.join(changes)}", flush=True)
