"""--resume: which run it means, whether that run may go on, and with which settings.

The reference is the model as it was loaded: its checksum is stored instead of a copy, and a run
whose model has changed since is refused. So is one whose held-out questions are not those that it
was measured on when it started: before and after would be of different questions.
"""

import datetime
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from support import checkpoint, parallel
from support.checkpoint import checkpoints, is_checkpoint
from support.errors import InputError
from support.prompts import prompt_fingerprint
from support.settings import flag
from support.writing import sha256, write_json

KEPT = {  # setting that a run cannot change -> what it decides
    **dict.fromkeys((
        "dataset", "dataset_config", "dataset_train_split", "question_field", "answer_field", "preferences",
        "eval_questions", "seed",
    ), "which questions are held out"),
    **dict.fromkeys(("examples", "prefill", "date"), "how the model is asked"),
    "lora_rank": "which weights are trained",
}
REFUSED = {  # checksum of what must be as it was when the run started -> why it is refused otherwise
    "weights": "--model: {model} has other weights than the model that {run} started from, which is its reference; "
               "that model is accepted",
    "prompt": "--model: {model} has another chat template, tokenizer or end token than when {run} started; the folder "
              "as it was is accepted",
    "held_out": "--dataset: the held-out questions are not those that {run} was measured on when it started; the data "
                "as they were are accepted",
}


def how_to_resume(run_dir: Path) -> str:
    if checkpoints(run_dir):
        return f"go on from {checkpoints(run_dir)[-1].stem} with: python train.py --resume {run_dir}"
    return "there is no checkpoint to go on from (--save-steps writes them)"


def find(name: str) -> tuple[Path, Path]:
    """(run, checkpoint) of `--resume name`: a run, a checkpoint of one, or latest, in runs/."""
    path = Path(name)
    if name == "latest":
        newest = [found[-1] for run in Path("runs").glob("*") if (found := checkpoints(run))]
        if not newest:
            raise InputError("--resume latest: no run in runs/ has a checkpoint; the directory of a run that has one "
                             "is accepted (--save-steps writes them)")
        path = max(newest, key=lambda path: path.stat().st_mtime)
    run_dir = path.parent.parent if is_checkpoint(path) else path
    if not (run_dir / "config.json").is_file():
        raise InputError(f"--resume: {name} is not a run; a run's directory, a checkpoint in it, or latest is accepted")
    if (run_dir / "final").exists():
        raise InputError(f"--resume: {run_dir} is finished, see {run_dir}/final; an unfinished run is accepted")
    if run_dir == path and not checkpoints(run_dir):
        raise InputError(f"--resume: {run_dir} has no complete checkpoint; a run that has one is accepted "
                         "(--save-steps writes them), and this one has to start again")
    return run_dir, checkpoints(run_dir)[-1] if run_dir == path else path


def start_state(config, model, tokenizer, data) -> dict:
    """The state of a run before its first step; resuming compares the checksums."""
    pairs = data.held_out_pairs
    held_out = [data.held_out, pairs and (pairs.prompts, pairs.tokens.tolist(), pairs.answers)]
    return {
        "step": 0,
        "settings": fingerprint(config),
        "checksums": {
            "weights": weights_sha256(model),
            "prompt": prompt_fingerprint(tokenizer, model.generation_config, data.template),
            "held_out": hashlib.sha256(repr(held_out).encode()).hexdigest(),
        },
        "evals": {"start": None, "steps": {}},
    }


def weights_sha256(model) -> str:
    """A checksum of all weights and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
    checkpoint, unless its flag is given now: then the change is meant. What decides the held-out
    questions cannot change.
    """
    run_dir, path = find(given["resume"])
    if "output_dir" in given:
        raise InputError("--output-dir: not accepted with --resume; a run goes on in its own directory")
    stored = checkpoint.read(path)
    try:
        record = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        unknown = ", ".join(sorted(set(record["settings"]) - set(kind.__dataclass_fields__)))
        meant = [past["changed"] for past in record.get("resumed", []) if past["step"] == stored["step"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run_dir}/config.json: damaged ({error}); expected the file as the run wrote it") from None
    if unknown:
        raise InputError(f"{run_dir}/config.json: has settings that this version does not know ({unknown}); the "
                         f"version that wrote it, commit {record.get('git_commit')}, can go on with it")
    config = kind(**{**record["settings"], **given, "output_dir": str(run_dir), "resume": str(path)})
    for name, value in fingerprint(config).items():
        accepted = [settings[name] for settings in (stored["settings"], *meant) if name in settings]
        if value in accepted or not accepted:
            continue
        change = f"{flag(name)}: was {accepted[0]} at {path} and is {value} now"
        if name in KEPT:
            raise InputError(f"{change}; it decides {KEPT[name]}, and is accepted as it was")
        if name not in given:
            raise InputError(f"{change}; give {flag(name)} again to mean a change")
    if config.max_steps < stored["step"]:
        raise InputError(f"--max-steps: got {config.max_steps}, and {path} is after step {stored['step']}; that or "
                         "more is accepted")
    return config


def go_on(run_dir: Path, config, weights: dict, optimizer, state: dict) -> None:
    """Restore everything from the checkpoint config.resume, and record which settings have changed.

    state: that of `start_state`; its step and evaluations become those of the checkpoint.
    """
    path = Path(config.resume)
    stored = checkpoint.read(path)
    for name, why in REFUSED.items():
        if stored["checksums"][name] != state["checksums"][name]:
            raise InputError(why.format(model=config.model, run=run_dir))
    checkpoint.restore(stored, weights, optimizer)
    parallel.gather(None)  # all have read
    if parallel.rank() == 0:
        checkpoint.rewind(run_dir, stored)
    step, past = stored["step"], stored["settings"]
    changed = {name: value for name, value in state["settings"].items() if past.get(name, value) != value}
    record = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    record["settings"] = {**asdict(config), "resume": None}
    time = datetime.datetime.now().isoformat(timespec="seconds")
    record.setdefault("resumed", []).append({"step": step, "time": time, "changed": changed})
    write_json(run_dir / "config.json", record)
    state |= {"step": step, "evals": stored["evals"]}
    changes = [f"; {flag(name)} was {past[name]}, is {value} now" for name, value in changed.items()]
    print(f"{run_dir}: going on after step {step} of {config.max_steps}{''.join(changes)}", flush=True)
