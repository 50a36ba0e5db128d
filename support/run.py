"""A run on the disk and on the terminal: its directory, logs, evaluations, signals, faults.

    config.json, principles.jsonl    the settings and principles of the run
    prompt.txt                       one prompt, as the model reads it
    metrics.jsonl, samples.jsonl     of each step: a line of figures; some completions
    eval.json                        the evaluations: at the start, on the way, at the end
    checkpoints/                     see checkpoint.py
    final/, curves.png               the trained model; the plot of metrics.jsonl and eval.json

A signal is served soon. Between two steps the run is whole, so while a step samples or an evaluation
runs the work at hand is dropped, and what the last step left is saved: a step is a function of the
seed, and --resume takes it again. Once the optimiser has changed a weight, the step is finished first.
"""

import contextlib
import datetime
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from metrics import share_of_ceiling
from support import checkpoint, parallel, resume
from support.data import Data, example_prompt
from support.errors import InputError, NotFinite
from support.files import save_principles
from support.model import has_bf16, save_model
from support.prompts import set_date
from support.report import NO_FORMAT, draw_run, model_card, report, warnings_for, write_plot
from support.settings import DEFAULT_BETA, flag
from support.steps import COUNTS, Step, combine, learning_rates
from support.writing import append_json, write_json

SMALL_MODEL = 10_000_000  # parameters; below it a model learns at a higher rate, and bfloat16 on a CPU saves nothing
STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # Ctrl-C; containers; schedulers of clusters
REPEATED = getattr(signal, "SIGXCPU", None)  # the kernel sends it again at every second past the limit
ONE_REQUEST = 1.0  # seconds; what comes within them of the first signal is the same request, sent to a group as well


class Stopped(BaseException):
    """The signal of this number asks the run to stop. It is no Exception, so nothing takes it for an error."""


class Run:
    """A run on disk and on the terminal. Under torchrun only process 0 writes and prints."""

    def __init__(self, directory: Path, config, model, reference, tokenizer, optimizer, data):
        self.directory, self.config, self.writer = directory, config, parallel.rank() == 0
        self.model, self.reference, self.tokenizer = model, reference, tokenizer
        self.optimizer, self.data, self.rates = optimizer, data, learning_rates(config)
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.state = resume.start_state(config, model, tokenizer, data)
        self.step, self.streaks, self.bar = Step(), Counter(), None
        self.signal, self.signal_time, self.between_steps, self.saved = 0, 0.0, False, None
        optimizer.register_step_pre_hook(lambda *_: self._leave_the_last_step())

    @contextlib.contextmanager
    def catching(self):
        """Start the run. Inside, a signal saves and ends it, and an error says where it was and how to go on.

        Raises SystemExit after a signal, NotFinite with the number of the step, and InputError where
        the disk refuses a file.
        """
        with catch_signals(self._take_signal), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sinkhorn stopped")  # warnings_for says it once
            try:
                try:
                    self._start()
                    yield
                except Stopped as stopped:
                    self._stop(*stopped.args)
            except FloatingPointError as error:
                raise NotFinite(f"training has broken down at step {self.step.number + 1}: {error}; a step is a "
                                "function of the seed, so the same command leads here again; a lower --learning-rate "
                                "may help") from None
            except (OSError, SafetensorError) as error:
                how = resume.how_to_resume(self.directory)
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
        """Keep an evaluation of the present weights, in eval.json too, and show its means."""
        done, evals = self.state["step"], self.state["evals"]
        if 0 < done < self.config.max_steps:
            evals["steps"][str(done)] = values
        else:
            evals["start" if done == 0 else "end"] = values
        write_json(self.directory / "eval.json", evals)
        if self.writer and done < self.config.max_steps:
            self._show_evaluation(done, values)

    def _show_evaluation(self, done: int, values: dict) -> None:
        names = "format", "accuracy", "si", "sinkhorn", "pair_accuracy", "pair_logratio_margin"
        means = "".join(f", {name} {round(values[name]['mean'], 2) + 0.0:.2f}" for name in names if name in values)
        where = f"step {done}" if done else "start"
        self.bar.write(f"{where}: {values['questions']} held-out questions{means}")
        if self.config.principles and done == 0 and values["format"]["mean"] < 0.02:  # no reward to learn from
            self.bar.write(f"warning: {NO_FORMAT.format(values['format']['mean'])}", file=sys.stderr)

    def end_step(self, step: Step) -> None:
        """Log the step, write a checkpoint if one is due, and stop here if a signal asks for it."""
        self.between_steps = False
        self.log(step)
        self.state["step"] = step.number + 1
        if self.config.save_steps and self.state["step"] % self.config.save_steps == 0:
            self.save()
        self._enter_the_next_step()

    def log(self, step: Step) -> None:
        """Write to metrics.jsonl and samples.jsonl; update the progress bar; print warnings."""
        step.log_seconds("seconds_training")
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
            terms["si"] = share_of_ceiling(terms["mi_row"], self.config.num_principles)
        append_json(self.directory / "metrics.jsonl", {"step": step.number + 1, **terms})
        shown = ("reward", "format", "si", "loss_ot", "pair_margin", "pair_accuracy")
        self.bar.set_postfix({name: f"{terms[name]:.2f}" for name in shown if name in terms})
        for line in warnings_for(terms, self.streaks, self.config) if self.writer else ():
            self.bar.write(f"warning: {line}", file=sys.stderr)

    def save(self) -> None:
        """Write a checkpoint of what the last step left."""
        if self.writer and self.saved != self.state["step"]:
            limit = self.config.save_total_limit
            checkpoint.save(self.directory, self.weights, self.optimizer, self.state, limit)
            self.saved = self.state["step"]

    def finish(self) -> None:
        """Write the trained model, and only then the report and the plot, which may fail."""
        self.between_steps = False  # a signal changes nothing any more: what is left is soon written
        if not self.writer:
            return
        save_model(self.model, self.tokenizer, self.data.template, self.directory, model_card(self))
        report(self.directory, self.state["evals"])
        if path := write_plot(self.directory / "curves.png", lambda plt: draw_run(plt, self.directory)):
            print(f"plot {path}")

    def _start(self) -> None:
        """Write the directory's first files; with --resume, restore the rest from the checkpoint."""
        if self.config.resume:
            resume.go_on(self.directory, self.config, self.weights, self.optimizer, self.state)
        elif self.writer:
            write_config(self.directory, self.config, self.data, self.model.device)
        if self.writer and self.data.principles:
            save_principles(self.directory / "principles.jsonl", self.data.principles)
            prompt = example_prompt(self.tokenizer, self.data)
            (self.directory / "prompt.txt").write_text(prompt, encoding="utf-8")
        self._enter_the_next_step()

    def _enter_the_next_step(self) -> None:
        """The run is whole. A signal that has come to any process stops all of them here, after the same step."""
        self.between_steps = True
        if number := max(parallel.gather(self.signal)):
            raise Stopped(number)

    def _leave_the_last_step(self) -> None:
        """The optimiser is about to change the weights: a signal waits until the step is whole."""
        self.between_steps = False

    def _take_signal(self, number: int, _) -> None:
        """The first signal stops the run at the next moment that is safe, a later one at once."""
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
            with contextlib.suppress(OSError):  # not print(), which cannot be entered twice
                os.write(2, b"\nsaving, then stopping; a second signal, in a second or later, stops at once\n")
            if self.between_steps and self.writer:  # the other processes go on until the step's end
                raise Stopped(number)
        elif number != REPEATED and time.monotonic() > self.signal_time + ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _stop(self, number: int) -> None:
        """Save, say how to go on, and exit as shells expect of a signal."""
        self.between_steps = False
        self.save()
        if self.bar:
            self.bar.close()
        if self.writer:
            how = resume.how_to_resume(self.directory)
            print(f"stopped after step {self.state['step']}; {how}", file=sys.stderr)
        raise SystemExit(128 + number)


@contextlib.contextmanager
def catch_signals(handler):
    """Inside, the signals that ask a program to stop call `handler(number, frame)`.

    Under torchrun a closed terminal is one of them: it ends torchrun, which ends its processes.
    """
    names = (*STOPPING, "SIGHUP") if parallel.world() > 1 else STOPPING
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has two
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def settle(config, model, tokenizer) -> None:
    """Give every setting that was left out its value, but for the two that memory.fit decides.

    A default may hang on other flags, on the machine, or on the size of the model.
    """
    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    if config.learning_rate is None:
        config.learning_rate = (7e-4 if config.principles else 1e-4) if small else 1e-5
    if config.bf16 is None:  # a small model does not gain by it on a CPU
        config.bf16 = has_bf16(model.device) and (model.device.type == "cuda" or not small)
    if config.beta is None:
        config.beta = DEFAULT_BETA if config.preferences else 0.0
    config.date = set_date(tokenizer, parallel.gather(set_date(tokenizer, config.date))[0])  # of process 0


def choose_directory(config) -> Path:
    """The run's directory, not made yet.

    Raises InputError where it is not empty, or where there are too many processes for the batch.
    """
    for name in ("num_questions" if config.principles else "num_pairs", "eval_questions"):
        if getattr(config, name) < parallel.world():
            raise InputError(f"{flag(name)}: got {getattr(config, name)} with {parallel.world()} processes; one for "
                             "each of them, or more, is accepted")
    if config.resume:
        return Path(config.output_dir)
    time_now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]  # milliseconds: two runs get two names
    directory = Path(config.output_dir or f"runs/{time_now}")
    if (directory.exists() or directory.is_symlink()) and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"--output-dir: {directory} exists and is not empty; expected a new or empty directory")
    return parallel.gather(directory)[0]  # process 0's, as their clocks differ


def write_config(directory: Path, config, data: Data, device) -> None:
    """Write config.json, and print what a step is.

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
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        return done.stdout.strip() or None
