"""Around the loop of train.py: what a run reads and leaves, how it stops and goes on, and what it says.

In order: the run's directory, the data, memory, going on with a stopped run, plot and report, signals, warnings,
failures.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import signal
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import checkpoint
import parallel
import tiny
from commands import pyplot
from data import (
    InputError,
    build_messages,
    encode_prompts,
    load_preferences,
    load_principles,
    save_principles,
    split_questions,
    write_aside,
)
from policy import ROWS_PER_FORWARD, block_side, forward_bytes, prompt_limit
from preferences import Pairs, encode_pairs, with_reference


def check_parts(config) -> None:
    """Raises InputError where there are more processes than questions or pairs to share."""
    for name in ("num_questions", "num_pairs", "eval_questions"):
        if getattr(config, name) < parallel.world():
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: got {getattr(config, name)} with {parallel.world()} processes; one for each of "
                             "them, or more, is accepted")


def choose_run_dir(config) -> Path:
    """The run's directory, not made yet; raises InputError where there is something already."""
    if config.resume:
        return Path(config.output_dir)
    run_dir = Path(config.output_dir or Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S"))
    if (run_dir.exists() or run_dir.is_symlink()) and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"--output-dir: {run_dir} exists and is not empty; a new or empty directory is accepted")
    return run_dir


@dataclass
class Data:
    """What a run trains and evaluates on; the parts of a kind it does not use are empty or None."""

    principles: list
    questions: list
    held_out: list
    pairs: Pairs | None  # in the order they are taken, with the reference's log-probabilities
    held_out_pairs: Pairs | None


def load_data(model, tokenizer, config) -> Data:
    """Read, split and check everything before anything is written."""
    data = Data([], [], [], None, None)
    if config.principles:
        data.principles = load_principles(config.principles)
        if config.num_principles > len(data.principles):
            raise InputError(
                f"--num-principles: got {config.num_principles}, and {config.principles} has {len(data.principles)} "
                f"principles; 2 to {len(data.principles)} are accepted"
            )
        if config.dataset:
            needed = config.max_steps * config.num_questions + config.eval_questions
            questions = config.load_questions(needed, config.seed)
            if config.is_hub_set:
                questions = leave_out(model, tokenizer, data.principles, questions, config)
            data.questions, data.held_out = split_questions(questions, config.eval_questions, config.seed)
        else:
            if config.model != "tiny":
                print(f"--model {config.model} without --dataset: the questions are the embedded task's", flush=True)
            data.questions = tiny.make_questions(4096, False, config.seed)
            data.held_out = tiny.make_questions(config.eval_questions, True)
        check_prompts(model, tokenizer, data.principles, data.questions + data.held_out, config)
    if config.preferences:
        needed = config.max_steps * config.num_pairs
        if config.preferences == "tiny":
            train = tiny.make_pairs(min(needed, 8192), False, config.seed)
            held_out = tiny.make_pairs(config.eval_questions, True)
        else:
            train, held_out = split_questions(load_preferences(config.preferences), config.eval_questions, config.seed)
        data.pairs, data.held_out_pairs = (
            with_reference(model, encode_pairs(model, tokenizer, pairs), config.temperature)
            for pairs in (train[:needed], held_out)
        )
    return data


def check_prompts(model, tokenizer, principles, questions, config) -> None:
    """Raises InputError for a question or principle that a step would stumble over hours later."""
    limit = prompt_limit(model, config.max_completion_length)
    if limit < 2:
        raise InputError(
            f"--max-completion-length: got {config.max_completion_length}; fewer tokens than the model's context of "
            f"{config.max_completion_length + limit} are accepted, less those of the prompt"
        )
    longest_question = max((q.text for q in questions), key=len)
    longest_principle = max((p.text for p in principles), key=len)
    pairs = [(longest_question, p.text) for p in principles] + [(q.text, longest_principle) for q in questions]
    encode_prompts(tokenizer, [build_messages(*pair) for pair in pairs], limit)


def leave_out(model, tokenizer, principles, questions, config) -> list:
    """The questions that `check_prompts` accepts. Nobody can mend a hub's rows: a line tells how many are left out."""
    kept, refused, longest = [], [], max(principles, key=lambda principle: len(principle.text))
    pieces = [questions[start : start + 256] for start in range(0, len(questions), 256)]
    while pieces:
        piece = pieces.pop(0)
        try:
            check_prompts(model, tokenizer, [longest], piece, config)
            kept += piece
        except InputError as error:
            if len(piece) > 1:
                pieces[:0] = [[question] for question in piece]
            else:
                refused.append(error)
    if not kept:
        raise refused[0]
    if refused:
        print(f"{config.dataset}: {len(refused)} of {len(questions)} questions are left out, one of them: {refused[0]}",
              flush=True)
    return kept


def start_run(run_dir, config, data: Data, device) -> None:
    """Make the run's directory with config.json and principles.jsonl; say what a step is."""
    run_dir.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    write_json(run_dir / "config.json", {
        "settings": asdict(config),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "git_commit": git.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPUs",
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
    })
    a_step = []
    if data.principles:
        save_principles(run_dir / "principles.jsonl", data.principles)
        rows = config.num_questions * config.num_principles * config.num_generations
        a_step.append(f"{config.num_questions} questions x {config.num_principles} of {len(data.principles)} "
                      f"principles x {config.num_generations} completions = {rows} completions")
    if data.pairs:
        a_step.append(f"{config.num_pairs} preference pairs")
    print(f"{run_dir}: a step is {', and '.join(a_step)}", flush=True)


def estimate_memory(model, tokenizer, data: Data, config) -> dict[str, float]:
    """Bytes by part, were every completion --max-completion-length long (the cache is of sampling)."""
    per_token, cache_per_token = forward_bytes(model)
    vocabulary, width = model.get_output_embeddings().weight.shape
    passes, cache = [], 0  # with gradient: (completions, tokens of one, prompts, tokens of one)
    if data.principles:
        texts = [max((item.text for item in items), key=len) for items in (data.questions, data.principles)]
        prompt = len(encode_prompts(tokenizer, [build_messages(*texts)])[0])
        questions = min(config.num_questions, max(1, config.micro_batch // config.rows_of_a_question))
        passes.append((questions * config.rows_of_a_question, config.max_completion_length,
                       questions * config.num_principles, prompt))
        sampled = max(config.num_questions * config.num_principles * config.num_generations,
                      min(config.eval_rows, config.eval_questions * config.num_principles))
        cache = cache_per_token * sampled * (prompt + config.max_completion_length)
    if data.pairs:
        pairs = min(config.num_pairs, max(1, config.micro_batch // 2))
        passes.append((2 * pairs, data.pairs.tokens.shape[-1], pairs, max(map(len, data.pairs.prompts))))
    at_once = min(config.micro_batch, ROWS_PER_FORWARD) if config.gradient_checkpointing else math.inf
    weights, side = sum(p.nbytes for p in model.parameters()), block_side(model.device)
    return {
        "weights": weights,
        "bfloat16 copies": weights / 2 if config.bf16 and not config.lora_rank else 0,
        "gradients and optimiser": 12 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        "reference": weights if data.principles and not config.lora_rank else 0,
        "activations": per_token * max(min(at_once, rows) * length + prompts * prompt
                                       for rows, length, prompts, prompt in passes),
        "hidden states": max(3 * 4 * rows * length * width for rows, length, _, _ in passes),
        "logits": 3 * 4 * min(side, vocabulary) * min(side, max(rows * length for rows, length, _, _ in passes)) +
        (0 if config.lora_rank else 4 * vocabulary * width),  # and the head's gradient before it is added to the others
        "cache": cache,
    }


def memory_line(parts, config, device) -> str:
    """The estimate on one line; on a GPU with what to do where it is more than there is."""
    training = parts["activations"] + parts["hidden states"] + parts["logits"]
    total = sum(parts.values()) - min(training, parts["cache"])  # the cache is gone when training begins
    line = f"memory: about {total / 1e9:.2g} GB at most: "
    line += ", ".join(f"{name} {size / 1e9:.2g}" for name, size in parts.items() if size >= 5e6)
    if device.type == "cuda":
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
        line += f"; the GPU has {room / 1e9:.3g}"
        if total > room:
            line += f": it will not fit. {memory_advice(config)}"
    return line


def memory_advice(config) -> str:
    """What to lower where memory does not suffice, what costs least first."""
    ways = ["--bf16"] if not config.bf16 else []
    ways += [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
    ways += [] if config.micro_batch == 1 else [f"--micro-batch {min(ROWS_PER_FORWARD, config.micro_batch) // 2}"]
    ways += [] if config.lora_rank else ["--lora-rank 16"]
    return f"Try, one after the other: {', '.join([*ways, 'lower --max-completion-length, --num-generations'])}"


def fingerprint(config) -> dict:
    """The settings that the rest of a run depends on, and of a file its content too."""
    settings = asdict(config)
    for name in ("output_dir", "save_steps", "save_total_limit", "resume"):
        del settings[name]
    for name in ("principles", "preferences", "dataset"):
        if settings[name] and os.path.isfile(settings[name]):
            settings[name] += f" (sha256 {checkpoint.sha256(settings[name])})"
    return settings


def resume_config(kind: type, given: dict):
    """The settings, a `kind`, of the run that --resume names, with the flags of this command line, `given`, on top.

    Raises InputError where a setting is not what it was at the checkpoint, in config.json or by the content of a file,
    unless its flag is given now: then the change is meant.
    """
    run_dir, path = checkpoint.find(given["resume"])
    if "output_dir" in given:
        raise InputError("--output-dir: not accepted with --resume; a run goes on in its own directory")
    state = checkpoint.read_state(path)
    try:
        stored = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        config = kind(**{**stored["settings"], **given, "output_dir": str(run_dir), "resume": str(path)})
        meant = [past["changed"] for past in stored.get("resumed", []) if past["step"] == state["step"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run_dir}/config.json: damaged ({error}); as the run wrote it, it is accepted") from None
    for name, now in fingerprint(config).items():
        accepted = [values[name] for values in (state["settings"], *meant) if name in values]
        if name not in given and accepted and now not in accepted:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: was {accepted[0]} at {path} and is {now} now; say {flag} again to mean a change")
    return config


def resume_run(run_dir, config, model, optimizer, schedule, state: dict) -> None:
    """Bring everything to where the checkpoint config.resume was written; record what has been changed since."""
    path = Path(config.resume)
    stored = checkpoint.read_state(path)
    if stored["start_sha256"] != state["start_sha256"]:
        raise InputError(f"--model: {config.model} has other weights than the model that {run_dir} started from, which "
                         "is its reference; that model is accepted")
    checkpoint.load(path, model, optimizer, stored)
    parallel.gather(None)  # all have read
    if parallel.rank() == 0:
        checkpoint.rewind(run_dir, stored)
    if stored["step"]:
        before = {"last_epoch": stored["step"] - 1, "_step_count": stored["step"] + 1}
        schedule.load_state_dict({**schedule.state_dict(), **before})
        schedule.step()  # sets the learning rate of the next step
    changed = {name: now for name, now in state["settings"].items() if stored["settings"].get(name, now) != now}
    record = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    record["settings"] = {**asdict(config), "resume": None}
    record.setdefault("resumed", []).append({
        "step": stored["step"], "time": datetime.datetime.now().isoformat(timespec="seconds"), "changed": changed,
    })
    write_json(run_dir / "config.json", record)
    state |= {"step": stored["step"], "evals": stored["evals"]}
    told = "".join(f"; --{name.replace('_', '-')} was {stored['settings'][name]} and is {now} from here on"
                   for name, now in changed.items())
    print(f"{run_dir}: going on after step {state['step']} of {config.max_steps}{told}", flush=True)


def write_json(path: Path, value) -> None:
    """A reader never sees half a file. Process 0 writes, here and below."""
    if parallel.rank():
        return
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def append_json(path: Path, value) -> None:
    if parallel.rank():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def summary(values) -> str:
    told = "format", "accuracy", "si", "sinkhorn", "pair_accuracy", "pair_logratio_margin"
    names = [n for n in told if n in values]
    return f"{values['questions']} held-out questions, " + ", ".join(f"{n} {values[n]['mean']:.2f}" for n in names)


def plot_run(run_dir: Path) -> Path | None:
    """Write curves.png into a run's directory and return its path; None where matplotlib is not installed."""
    plt = pyplot()
    if plt is None:
        return None
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    points = {0: evals["start"], **{int(k): v for k, v in evals["steps"].items()}, len(steps): evals["end"]}
    panels = (
        ("format", "reward", "format"), ("accuracy", None, "accuracy"), ("sufficiency index", "si", "si"),
        ("drift (Sinkhorn)", "loss_ot", "sinkhorn"), ("entropy, nats per token", "entropy", None),
        ("completion length, tokens", "completion_length", "completion_length"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axis, (title, step_key, eval_key) in zip(axes.flat, panels, strict=True):
        if step_key in steps[0]:
            x, y = zip(*((s["step"], s[step_key]) for s in steps))
            axis.plot(x, y, color="0.7", lw=1, label="training batch")
        if eval_key in evals["start"]:
            mean, low, high = ([p[eval_key][k] for p in points.values()] for k in ("mean", "low", "high"))
            axis.plot(list(points), mean, "o-", color="C0", ms=4, label="held out, 95%")
            axis.fill_between(list(points), low, high, color="C0", alpha=0.2)
        axis.set(title=title, xlabel="step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(run_dir / "curves.png", dpi=120)
    plt.close(figure)
    return run_dir / "curves.png"


def report(run_dir, evals, plot) -> None:
    """The table of before and after, one example, and where everything lies."""
    print(f"\n{'held-out questions: ' + str(evals['start']['questions']):30}{'start':>22}{'end':>22}")
    for name, start in evals["start"].items():
        if name not in ("questions", "example"):
            cells = (start, evals["end"][name])
            shown = [[round(c[key], 2) + 0.0 for key in ("mean", "low", "high")] for c in cells]  # + 0.0: no -0.00
            print(f"{name:30}" + "".join("{:8.2f} [{:5.2f}, {:5.2f}]".format(*numbers) for numbers in shown))
    print()
    for name, text in evals["start"]["example"].items():
        if name != "completion":
            print(f"{name + ':':10} {text}")
    for when in ("start", "end"):
        print(f"{when:10} {evals[when]['example']['completion']!r}")
    print(f"\nmodel {run_dir}/final, figures {run_dir}/eval.json, steps {run_dir}/metrics.jsonl, "
          f"completions {run_dir}/samples.jsonl, " + (f"plot {plot}" if plot else "no plot: pip install matplotlib"))


@contextlib.contextmanager
def stop_signals():
    """Yields a list that the first Ctrl-C or SIGTERM puts its number into; a second one ends the process at once."""
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def stop(number, _):
        stopped.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nfinishing the step, then saving; a second signal stops at once\n")  # print() is not reentrant

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


PATIENCE = 5  # steps running that a thing is so before it is said


def signs_of_trouble(stats, streaks: Counter, config) -> list[str]:
    """What has been so for PATIENCE steps and should be known, each sign told once; `streaks` counts the steps."""
    reward, truncated = stats.get("reward", 0.0), stats.get("truncated", 0.0)
    signs = {
        f"no completion ends within {config.max_completion_length} tokens, and a cut one earns nothing; raise "
        "--max-completion-length": truncated == 1,
        "nearly every completion has earned the full reward, so the GRPO term has nothing left to teach; the run can "
        "end here, unless the other terms are to go on alone": reward >= 0.99,
        "in nearly every group all completions earn the same, so the GRPO term teaches next to nothing; raise "
        "--num-generations or --temperature":
            stats.get("zero_variance_groups", 0.0) >= 0.9 and reward < 0.99 and truncated < 1,
        "Sinkhorn has not converged, so the OT term and its gradient are off; raise --ot-eps":
            stats.get("sinkhorn_converged", 1.0) < 1,
    }
    told = []
    for sign, so in signs.items():
        streaks[sign] = streaks[sign] + 1 if so else min(0, streaks[sign])
        if streaks[sign] == PATIENCE:
            told.append(f"for {PATIENCE} steps running, {sign}")
            streaks[sign] = -math.inf  # and stays there
    return told


def keep_failure(run_dir, error, config, model, optimizer, state, drawn, batch, pairs) -> str:
    """Write failure/ with the batch that came to a number that is not finite; returns how to replay it."""
    failure = {
        "error": str(error),
        "steps_done": state["step"],
        "terms": {name: str(value) for name, value in getattr(error, "terms", {}).items()},  # JSON knows no nan
        "settings": asdict(config),
    }
    if batch:
        failure["batch"] = [
            {"question": q.text, "principle": p.text, "prompt": batch.prompts[i][k], "completions": batch.texts[i][k],
             "tokens": [ids[m].tolist() for ids, m in zip(batch.tokens[i, k], batch.mask[i, k])],
             "rewards": batch.rewards[i, k].tolist()}
            for i, q in enumerate(batch.questions) for k, p in enumerate(batch.principles[i])
        ]
    elif drawn:  # it broke in sampling
        failure["batch"] = [{"question": q.text, "principle": p.text} for q, ps in zip(*drawn) for p in ps]
    if pairs:
        failure["pairs"] = [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, (chosen, rejected) in zip(
                pairs.prompts, ([ids[m].tolist() for ids, m in zip(*both)] for both in zip(pairs.tokens, pairs.mask)))
        ]
    name = f"failure_{parallel.rank()}" if parallel.rank() else "failure"  # more than one process may fail at once
    with checkpoint.written_whole(run_dir / name) as aside:
        (aside / "batch.json").write_text(json.dumps(failure, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if config.num_iterations == 1:  # else the weights may have moved since the step began
            checkpoint.save(aside, model, optimizer, state)
    told = f"the batch is in {run_dir}/{name}/batch.json; "
    if config.num_iterations == 1:
        return told + f"to replay it: python train.py --resume {run_dir}/{name}/step_{state['step']}"
    if checkpoint.checkpoints(run_dir):
        return told + f"this leads to it again: python train.py --resume {run_dir}"
    return told + "the same command with another --output-dir leads to it again"


