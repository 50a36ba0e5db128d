"""What surrounds the loop of train.py: a run's directory, data, logs, signals, failures and report.

    config.json, principles.jsonl    the settings and principles of the run
    prompt.txt                       one prompt, as the model reads it
    metrics.jsonl, samples.jsonl     of each step: a line of figures; some completions
    eval.json                        the evaluations: at the start, on the way, at the end
    checkpoints/                     see checkpoint.py
    final/, curves.png               the trained model; the plot of metrics.jsonl and eval.json
    failure/                         the batch that led to a number that is not finite
"""

import contextlib
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from metrics import information, sufficiency
from support import checkpoint, parallel
from support.data import Data, example_prompt
from support.errors import InputError, NotFinite
from support.files import append_json, save_principles, write_json, written_whole
from support.model import has_bf16, save_model
from support.prompts import set_date
from support.report import NO_FORMAT, draw_run, model_card, report, signs_of_trouble, write_plot
from support.settings import DEFAULT_BETA, flag
from support.steps import COUNTS, combine, learning_rates

SMALL_MODEL = 10_000_000  # parameters; below it a model learns at a higher rate, and bfloat16 on a CPU saves nothing


@dataclass
class Step:
    """What a step has so far; the log is written from it."""

    number: int = 0
    learning_rate: float = 0.0
    passes: list = field(default_factory=list)  # of each step of the optimiser: its figures, see steps.combine
    scores: list = field(default_factory=list)  # of each micro-batch: [q, N, K, K], or None
    figures: dict = field(default_factory=dict)  # what else is logged, by name
    samples: list = field(default_factory=list)  # rows of samples.jsonl
    clock: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Log the seconds since the last lap under `name`."""
        now = time.perf_counter()
        self.figures[name], self.clock = now - self.clock, now

    def add_batch(self, batch, rewards, scores=None) -> None:
        """Log what train.Batch and train.Rewards hold; scores: [Q, G, K, K] of --mi-reward."""
        figures = batch_figures(batch, rewards, scores)
        self.figures |= combine(parallel.gather(figures))
        shown = [scores, *self.scores][scores is None]
        self.samples = sample_rows(batch, rewards, shown)


class Run:
    """A run on disk and on the terminal. Under torchrun only process 0 writes and prints."""

    def __init__(self, directory: Path, config, model, reference, tokenizer, optimizer, data):
        """Start the directory; with --resume, restore everything from the checkpoint instead."""
        self.directory, self.config, self.writer = directory, config, parallel.rank() == 0
        self.model, self.reference, self.tokenizer = model, reference, tokenizer
        self.optimizer, self.data, self.rates = optimizer, data, learning_rates(config)
        self.state = checkpoint.start_state(config, model, tokenizer)
        self.step, self.signals, self.streaks, self.bar = Step(), [], Counter(), None
        if config.resume:
            checkpoint.resume(directory, config, model, optimizer, self.state)
        elif self.writer:
            write_start(directory, config, data, model.device)
            if data.principles:
                (directory / "prompt.txt").write_text(example_prompt(tokenizer, data, config), encoding="utf-8")

    @contextlib.contextmanager
    def guarded(self):
        """Inside, a signal ends the run after its step, and NotFinite leaves failure/ behind.

        Raises InputError, with how to go on, where the disk refuses a file.
        """
        with stop_signals() as self.signals:
            try:
                yield
            except NotFinite as error:
                raise NotFinite(f"{error}; {keep_failure(self, error)}") from None
            except (OSError, SafetensorError) as error:
                how = checkpoint.how_to_resume(self.directory)
                raise InputError(f"{self.directory}: cannot be written: {error}; {how}") from None

    def steps(self):
        """A Step for each that is left, with a progress bar."""
        first, total = self.state["step"], self.config.max_steps
        left, hidden = range(first, total), not self.writer
        self.bar = tqdm(left, "training", total, initial=first, dynamic_ncols=True, disable=hidden)
        for number in self.bar:
            self.step = Step(number, self.rates[number])
            yield self.step

    def evaluation_due(self) -> bool:
        """Before the first step and every --eval-steps, unless a resumed run has it already."""
        done, every, evals = self.state["step"], self.config.eval_steps, self.state["evals"]
        if done == 0:
            return not evals["start"]
        return bool(every) and done % every == 0 and str(done) not in evals["steps"]

    def record_evaluation(self, values: dict) -> None:
        """Write eval.json, print a line; at the start, warn if there is no reward to learn from."""
        done, evals = self.state["step"], self.state["evals"]
        if 0 < done < self.config.max_steps:
            evals["steps"][str(done)] = values
        else:
            evals["start" if done == 0 else "end"] = values
        write_json(self.directory / "eval.json", evals)
        if self.writer and done < self.config.max_steps:
            names = "format", "accuracy", "si", "sinkhorn", "pair_accuracy", "pair_logratio_margin"
            means = "".join(f", {name} {round(values[name]['mean'], 2) + 0.0:.2f}" for name in names if name in values)
            where = f"step {done}" if done else "start"
            self.bar.write(f"{where}: {values['questions']} held-out questions{means}")
        if self.writer and done == 0 and values.get("format", {"mean": 1})["mean"] < 0.02:
            self.bar.write(f"warning: {NO_FORMAT.format(values['format']['mean'])}", file=sys.stderr)
        self.step.clock = time.perf_counter()  # the step that is due begins now

    def end_step(self, step: Step) -> None:
        """Log the step; write a checkpoint if one is due; end the run if a signal asked for it."""
        self.log(step)
        done = self.state["step"] = step.number + 1
        stop = max(parallel.gather(self.signals[0] if self.signals else 0))  # any process's signal stops them all
        every, limit = self.config.save_steps, self.config.save_total_limit
        if self.writer and (stop or (every and done % every == 0)):
            checkpoint.save(self.directory / "checkpoints", self.model, self.optimizer, self.state, limit)
        if stop:
            self.bar.close()
            if self.writer:
                print(f"stopped after step {done}; {checkpoint.how_to_resume(self.directory)}", file=sys.stderr)
            raise SystemExit(128 + stop)

    def log(self, step: Step) -> None:
        """Write to metrics.jsonl and samples.jsonl; update the progress bar; print warnings."""
        step.lap("seconds_training")
        terms = combine(step.passes) | step.figures
        if step.samples:
            for phase in ("sampling", "training"):
                terms[f"tokens_per_second_{phase}"] = terms["tokens"] / terms[f"seconds_{phase}"]
        terms = {name: value for name, value in terms.items() if name not in COUNTS}
        terms["learning_rate"] = step.learning_rate
        for row in step.samples:
            append_json(self.directory / "samples.jsonl", {"step": step.number + 1, **row})
        if "mi_row" in terms:
            terms["mi_ceiling"] = math.log(self.config.num_principles)
            terms["si"] = sufficiency(terms["mi_row"], self.config.num_principles)
        append_json(self.directory / "metrics.jsonl", {"step": step.number + 1, **terms})
        shown = ("reward", "format", "si", "loss_ot", "pair_margin", "pair_accuracy")
        self.bar.set_postfix({name: f"{terms[name]:.2f}" for name in shown if name in terms})
        for line in signs_of_trouble(terms, self.streaks, self.config) if self.writer else ():
            self.bar.write(f"warning: {line}", file=sys.stderr)

    def finish(self) -> None:
        """Write the trained model, and only then the report and the plot, which may fail."""
        if not self.writer:
            return
        save_model(self.model, self.tokenizer, self.directory, model_card(self))
        report(self.directory, self.state["evals"])
        if path := write_plot(self.directory / "curves.png", lambda plt: draw_run(plt, self.directory)):
            print(f"plot {path}")


def batch_figures(batch, rewards, scores=None) -> dict:
    """What is logged of this process's completions beside their losses; see steps.combine."""
    spread = rewards.values.amax(-1) - rewards.values.amin(-1)  # [Q, K]
    lengths = batch.mask.sum(-1)  # [Q, K, G]
    figures = {
        "items": len(batch.tasks),
        "tokens": lengths.sum().item(),
        "reward": rewards.values.mean().item(),
        "zero_variance_groups": (spread == 0).float().mean().item(),
        "completion_length": lengths.float().mean().item(),
        "truncated": batch.truncated.float().mean().item(),
        "entropy": ((batch.entropy * lengths).sum() / lengths.sum()).item(),
    }
    if scores is not None:
        figures["format"] = rewards.formats.mean().item()
        figures["mi_row"] = information(scores.flatten(0, 1)).mean().item()
    return figures


def sample_rows(batch, rewards, scores=None) -> list[dict]:
    """One completion of the first question under each of its principles, for samples.jsonl."""
    task, rows = batch.tasks[0], []
    for i, principle in enumerate(task.principles):
        row = {"question": task.question.text, "principle": principle.text, "completion": batch.texts[0][i][0]}
        under = [] if scores is None else scores[0, 0, i].tolist()  # K
        by_principle = {p.id: round(score, 3) for p, score in zip(task.principles, under)}
        rows.append({**row, "reward": rewards.values[0, i, 0].item(), "scores": by_principle or None})
    return rows


def settle(config, model, tokenizer) -> None:
    """Give every setting that was left out its value, but for the two that memory.fit decides.

    A default may hang on other flags, on the machine, or on the size of the model.
    """
    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    if config.learning_rate is None:
        config.learning_rate = (7e-4 if config.principles else 1e-4) if small else 1e-5
    if config.bf16 is None:  # a small model does not gain by it on a CPU
        config.bf16 = has_bf16(model.device) and (model.device.type == "cuda" or not small)
    if config.mi_generations is None:
        config.mi_generations = config.num_generations
    if config.beta is None:
        config.beta = DEFAULT_BETA if config.preferences else 0.0
    if config.epsilon_high is None:
        config.epsilon_high = config.epsilon
    config.date = set_date(tokenizer, parallel.gather(set_date(tokenizer, config.date))[0])  # of process 0


def choose_directory(config) -> Path:
    """The run's directory, not made yet.

    Raises InputError where it is not empty, or where there are too many processes for the batch.
    """
    for name in ("num_questions", "num_pairs", "eval_questions"):
        if getattr(config, name) < parallel.world():
            raise InputError(f"{flag(name)}: got {getattr(config, name)} with {parallel.world()} processes; one for "
                             "each of them, or more, is accepted")
    if config.resume:
        return Path(config.output_dir)
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]  # milliseconds: two runs get two names
    directory = Path(config.output_dir or f"runs/{now}")
    if (directory.exists() or directory.is_symlink()) and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"--output-dir: {directory} exists and is not empty; expected a new or empty directory")
    return parallel.gather(directory)[0]  # process 0's, as their clocks differ


def write_start(directory: Path, config, data: Data, device) -> None:
    """Write config.json and the principles, and print what a step is.

    The directory belongs to whoever creates its config.json: of two runs started together the
    second is refused with an InputError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").open("x").close()
    except FileExistsError:
        raise InputError(f"--output-dir: {directory} has just been taken by another run; expected a new or empty "
                         "directory") from None
    write_json(directory / "config.json", {
        "settings": asdict(config),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPUs",
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
    })
    parts = []
    if data.principles:
        save_principles(directory / "principles.jsonl", data.principles)
        questions, num, generations = config.num_questions, config.num_principles, config.num_generations
        parts.append(f"{questions} questions x {num} of {len(data.principles)} principles x {generations} completions "
                     f"= {questions * num * generations} completions")
    if data.pairs:
        parts.append(f"{config.num_pairs} preference pairs")
    print(f"{directory}: a step is {', and '.join(parts)}", flush=True)


def git_commit() -> str | None:
    """That of the code; None without git, or outside a repository."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True).stdout.strip() or None


@contextlib.contextmanager
def stop_signals():
    """A list that the first Ctrl-C or SIGTERM is put into; the second ends the process at once."""
    stopped, before = [], {}

    def stop(number, _):
        stopped.append(number)
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nfinishing the step, then saving; a second signal stops at once\n")  # print() is not reentrant

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_failure(run: Run, error) -> str:
    """Write failure/ with the batch of a number that is not finite; returns how to replay it."""
    config, batch, pairs = run.config, run.step.batch, run.step.pairs
    failure = {
        "error": str(error),
        "steps_done": run.state["step"],
        "terms": {name: str(value) for name, value in error.terms.items()},  # JSON has no nan
        "settings": asdict(config),
    }
    for q, task in enumerate(run.step.tasks):
        for k, principle in enumerate(task.principles):
            row = {"question": task.question.text, "principle": principle.text}
            if batch:  # there is none where sampling failed
                row |= {"prompt": batch.prompts[q][k], "completions": batch.texts[q][k]}
                row["tokens"] = [ids[mask].tolist() for ids, mask in zip(batch.tokens[q, k], batch.mask[q, k])]
                row["rewards"] = None if batch.rewards is None else batch.rewards[q, k].tolist()
            failure.setdefault("batch", []).append(row)
    for prompt, tokens, masks in zip(pairs.prompts, pairs.tokens, pairs.mask) if pairs else ():
        chosen, rejected = (ids[mask].tolist() for ids, mask in zip(tokens, masks))
        failure.setdefault("pairs", []).append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    name = f"failure_{parallel.rank()}" if parallel.rank() else "failure"  # several processes may fail at once
    with written_whole(run.directory / name) as aside:
        (aside / "batch.json").write_text(json.dumps(failure, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if config.num_iterations == 1:  # else the weights may have moved since the step began
            checkpoint.save(aside, run.model, run.optimizer, run.state)
    where = f"the batch is in {run.directory}/{name}/batch.json; "
    if config.num_iterations == 1:
        return where + f"to replay it: python train.py --resume {run.directory}/{name}/step_{run.state['step']}"
    if checkpoint.checkpoints(run.directory):
        return where + f"this leads to it again: python train.py --resume {run.directory}"
    return where + "the same command with another --output-dir leads to it again"
