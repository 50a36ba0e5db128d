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
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

import checkpoint
import memory
import parallel
import policy
import tiny
from data import InputError, check_lengths, load_preferences, load_principles, save_principles, split_questions
from metrics import information, sufficiency
from preferences import Pairs, encode_pairs, with_reference
from settings import Config, Parser, flag

PATIENCE = 5  # steps in a row that show a sign of trouble before it is a warning


@dataclass
class Step:
    """What a step has so far. The log is written from it; after a failure it is what is kept."""

    number: int = 0
    tasks: list = field(default_factory=list)  # train.Tasks
    batch: object = None  # train.Batch
    pairs: Pairs | None = None
    passes: list = field(default_factory=list)  # of each pass over the batch: its terms, by name
    scores: list = field(default_factory=list)  # of each micro-batch: [q, N, K, K]
    terms: dict = field(default_factory=dict)  # what else is logged, by name
    clock: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Log the seconds since the last lap under `name`."""
        now = time.perf_counter()
        self.terms[name], self.clock = now - self.clock, now


class Run:
    """A run on disk and on the terminal. Under torchrun only process 0 writes and prints."""

    def __init__(self, directory: Path, config, model, tokenizer, optimizer, schedule, data):
        """Start the directory; with --resume, restore everything from the checkpoint instead."""
        self.directory, self.config, self.writer = directory, config, parallel.rank() == 0
        self.model, self.tokenizer, self.optimizer, self.data = model, tokenizer, optimizer, data
        self.state = checkpoint.start_state(config, model, tokenizer)
        self.step, self.signals, self.streaks, self.bar = Step(), [], Counter(), None
        if config.resume:
            checkpoint.resume(directory, config, model, optimizer, schedule, self.state)
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
            except policy.NotFinite as error:
                raise policy.NotFinite(f"{error}; {keep_failure(self, error)}") from None
            except (OSError, SafetensorError) as error:
                how = checkpoint.how_to_resume(self.directory)
                raise InputError(f"{self.directory}: cannot be written: {error}; {how}") from None

    def steps(self):
        """A Step for each that is left, with a progress bar."""
        first, total = self.state["step"], self.config.max_steps
        left, hidden = range(first, total), not self.writer
        self.bar = tqdm(left, "training", total, initial=first, dynamic_ncols=True, disable=hidden)
        for number in self.bar:
            self.step = Step(number)
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
        checkpoint.write_json(self.directory / "eval.json", evals)
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
        terms = {name: sum(one[name] for one in step.passes) / len(step.passes) for name in step.passes[0]}
        terms |= step.terms
        if step.batch:
            terms |= batch_terms(step.batch, terms, self.config)
            for row in sample_rows(step.batch, step.scores or [step.batch.scores]):
                checkpoint.append_json(self.directory / "samples.jsonl", {"step": step.number + 1, **row})
        if "mi_row" in terms:
            terms["mi_ceiling"] = math.log(self.config.num_principles)
            terms["si"] = sufficiency(terms["mi_row"], self.config.num_principles)
        checkpoint.append_json(self.directory / "metrics.jsonl", {"step": step.number + 1, **terms})
        shown = ("reward", "format", "si", "loss_ot", "pair_margin", "pair_accuracy")
        self.bar.set_postfix({name: f"{terms[name]:.2f}" for name in shown if name in terms})
        for line in signs_of_trouble(terms, self.streaks, self.config) if self.writer else ():
            self.bar.write(f"warning: {line}", file=sys.stderr)

    def finish(self) -> None:
        """Write the trained model, and only then the report and the plot, which may fail."""
        if not self.writer:
            return
        policy.save(self.model, self.tokenizer, self.directory, model_card(self))
        report(self.directory, self.state["evals"])
        if path := checkpoint.write_plot(self.directory / "curves.png", lambda plt: draw_run(plt, self.directory)):
            print(f"plot {path}")


def batch_terms(batch, terms: dict, config) -> dict:
    """What is logged of the batch of all processes beside its losses."""
    spread = batch.rewards.amax(-1) - batch.rewards.amin(-1)  # [Q, K]
    means = {
        "reward": batch.rewards.mean().item(),
        "zero_variance_groups": (spread == 0).float().mean().item(),
        "completion_length": batch.mask.sum(-1).float().mean().item(),
        "truncated": batch.truncated.float().mean().item(),
        "entropy": batch.entropy.mean().item(),
    }
    if batch.scores is not None:
        means["format"] = batch.formats.mean().item()
        means["mi_row"] = information(batch.scores.flatten(0, 1)).mean().item()
    share = len(batch) / config.num_questions  # of the batch that this process has
    tokens = parallel.total({"tokens": batch.mask.sum().item()})["tokens"]
    speed = {f"tokens_per_second_{phase}": tokens / terms[f"seconds_{phase}"] for phase in ("sampling", "training")}
    return parallel.total({name: share * value for name, value in means.items()}) | speed


def sample_rows(batch, scores) -> list[dict]:
    """One completion of the first question under each of its principles, for samples.jsonl."""
    task, rows = batch.tasks[0], []
    for i, principle in enumerate(task.principles):
        row = {"question": task.question.text, "principle": principle.text, "completion": batch.texts[0][i][0]}
        under = [] if scores[0] is None else scores[0][0, 0, i].tolist()  # K
        by_principle = {p.id: round(score, 3) for p, score in zip(task.principles, under)}
        rows.append({**row, "reward": batch.rewards[0, i, 0].item(), "scores": by_principle or None})
    return rows


# --------------------------------------------------------------------------------------------------
# The directory, and the data


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


@dataclass
class Data:
    """What a run trains and evaluates on; what it does not use is empty or None."""

    principles: list
    questions: list
    held_out: list
    pairs: Pairs | None  # in the order they are taken, with the reference's log-probabilities
    held_out_pairs: Pairs | None
    longest_prompts: list  # two lists of token ids, which memory is planned for

    def next_pairs(self, step: int, num: int) -> Pairs | None:
        """This process's share of a step's `num` pairs, taken in order, round and round."""
        if not self.pairs:
            return None
        first = step * num % len(self.pairs)
        pairs = self.pairs[first : first + num]
        return pairs[parallel.share(len(pairs))]


def load_data(model, tokenizer, config) -> Data:
    """Read and split the data, and refuse what a later step would stumble over."""
    data = Data([], [], [], None, None, [])
    if config.principles:
        data.principles = load_principles(config.principles)
        if config.num_principles > (most := len(data.principles)):
            raise InputError(f"--num-principles: got {config.num_principles}, and {config.principles} has {most} "
                             f"principles; 2 to {most} are accepted")
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
        data.longest_prompts = check_prompts(model, tokenizer, data.principles, data.questions + data.held_out, config)
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


def check_prompts(model, tokenizer, principles, questions, config) -> list:
    """The two longest prompts. Raises InputError for a question or principle that does not fit."""
    limit = policy.prompt_limit(model, config.max_completion_length)
    return check_lengths(tokenizer, [q.text for q in questions], [p.text for p in principles], limit, config.form)


def leave_out(model, tokenizer, principles, questions, config) -> list:
    """The questions of a hub data set that fit, in any order; a line says how many do not."""
    kept, refused, longest = [], [], max(principles, key=lambda principle: len(principle.text))
    pieces = [questions[start : start + 256] for start in range(0, len(questions), 256)]
    for piece in pieces:  # those of a piece that is refused follow at the end, one by one
        try:
            check_prompts(model, tokenizer, [longest], piece, config)
            kept += piece
        except InputError as error:
            if len(piece) == 1:
                refused.append(error)
            else:
                pieces += [[question] for question in piece]
    if not kept:
        raise refused[0]
    if refused:
        counts = f"{len(refused)} of {len(questions)} questions are left out"
        print(f"{config.dataset}: {counts}, one of them: {refused[0]}", flush=True)
    return kept


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
    checkpoint.write_json(directory / "config.json", {
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


def example_prompt(tokenizer, data: Data, config) -> str:
    """The first question under the first principle, as the model reads it."""
    pair = data.questions[0].text, data.principles[0].text
    return tokenizer.decode(config.form.encode(tokenizer, [pair])[0])


def git_commit() -> str | None:
    """That of the code; None without git, or outside a repository."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None


def make_schedule(optimizer, config):
    """The learning rate by steps. Raises InputError where the library refuses these settings."""
    steps = {"num_warmup_steps": config.warmup_steps, "num_training_steps": config.max_steps}
    try:
        return transformers.get_scheduler(config.lr_scheduler_type, optimizer, **steps)
    except (ValueError, TypeError) as error:
        raise InputError(f"--lr-scheduler-type: {config.lr_scheduler_type}: {error}; linear works always") from None


# --------------------------------------------------------------------------------------------------
# What a run says


NO_FORMAT = (
    "{:.2f} of the completions keep the format before training, so there is next to no reward to learn from. What "
    "helps, the most effective first: --examples FILE with --prefill, which show and begin the form; --temperature "
    "0.7; a longer --max-completion-length; a larger model"
)


def draw_run(pyplot, run_dir: Path):
    """The figure of a run, from its metrics.jsonl and eval.json."""
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    points = {0: evals["start"], **{int(k): v for k, v in evals["steps"].items()}, len(steps): evals["end"]}
    panels = (
        ("format", "reward", "format"), ("accuracy", None, "accuracy"), ("sufficiency index", "si", "si"),
        ("drift (Sinkhorn)", "loss_ot", "sinkhorn"), ("entropy, nats per token", "entropy", None),
        ("completion length, tokens", "completion_length", "completion_length"),
    )
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
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
    return figure


def before_and_after(evals) -> list:
    """A row (name, start, end) for each metric, the values as text: "mean [low, high]"."""
    def cell(value):
        shown = [round(value[key], 2) + 0.0 for key in ("mean", "low", "high")]  # + 0.0: no -0.00
        return "{:.2f} [{:5.2f}, {:5.2f}]".format(*shown)

    names = [name for name in evals["start"] if name not in ("questions", "example")]
    return [(name, cell(evals["start"][name]), cell(evals["end"][name])) for name in names]


def model_card(run: Run) -> str:
    """README.md of final/: how to prompt the model as in training, and what training changed."""
    config, evals = run.config, run.state["evals"]
    base = "the embedded model" if config.model == "tiny" else config.model
    is_hub_id = config.model != "tiny" and not Path(config.model).exists()
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [enigma, grpo, alignment]"]
    lines = [*head, *([f"base_model: {config.model}"] if is_hub_id else []), "---", "", f"# {run.directory.name}", ""]
    lines += [f"{base}, trained with ENIGMA for {config.max_steps} steps, seed {config.seed}.", ""]
    if run.data.principles:
        lines += ["## Principles", "", *(f"- {principle.text}" for principle in run.data.principles), ""]
        lines += ["## Prompt", "", "One exactly as the model was trained on it, up to where its answer begins:", ""]
        lines += ["````text", example_prompt(run.tokenizer, run.data, config), "````", ""]
        lines += [f"Sampled at temperature {config.temperature}, without top-k or top-p.", ""]
    lines += [f"## Before and after, on {evals['start']['questions']} held-out questions", ""]
    lines += ["| | start | end |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in before_and_after(evals)]) + "\n"


def report(run_dir, evals) -> None:
    """Print the table of before and after, one example, and where everything is."""
    print(f"\n{'held-out questions: ' + str(evals['start']['questions']):30}{'start':>22}{'end':>22}")
    for name, start, end in before_and_after(evals):
        print(f"{name:30}{start:>22}{end:>22}")
    print()
    for name, text in evals["start"]["example"].items():
        if name != "completion":
            print(f"{name + ':':10} {text}")
    for when in ("start", "end"):
        print(f"{when:10} {evals[when]['example']['completion']!r}")
    print(f"\nmodel {run_dir}/final, figures {run_dir}/eval.json, steps {run_dir}/metrics.jsonl, "
          f"completions {run_dir}/samples.jsonl")


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


def signs_of_trouble(terms: dict, streaks: Counter, config) -> list[str]:
    """Warnings, each once, for what lasts PATIENCE steps; `streaks` counts the steps."""
    reward, truncated = terms.get("format", terms.get("reward", 0.0)), terms.get("truncated", 0.0)
    no_spread = terms.get("zero_variance_groups", 0.0) >= 0.9
    signs = {
        f"no completion ends within {config.max_completion_length} tokens, and a cut one earns nothing; raise "
        "--max-completion-length": truncated == 1,
        "no completion has earned a reward, so the GRPO term has nothing to learn from; give --examples and --prefill, "
        "which show and begin the form": no_spread and reward == 0 and truncated < 1,
        "nearly every completion has earned the full reward, so the GRPO term has nothing left to teach; the run can "
        "end here, unless the other terms are to go on alone": reward >= 0.99,
        "in nearly every group all completions earn the same, so the GRPO term teaches next to nothing; raise "
        "--num-generations or --temperature": no_spread and 0 < reward < 0.99 and truncated < 1,
        "Sinkhorn has not converged, so the OT term and its gradient are off; raise --ot-eps":
            terms.get("sinkhorn_converged", 1.0) < 1,
    }
    lines = []
    for sign, holds in signs.items():
        streaks[sign] = streaks[sign] + 1 if holds else min(0, streaks[sign])
        if streaks[sign] == PATIENCE:
            lines.append(f"for {PATIENCE} steps, {sign}")
            streaks[sign] = -math.inf  # and stays there
    return lines


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
    with checkpoint.written_whole(run.directory / name) as aside:
        (aside / "batch.json").write_text(json.dumps(failure, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if config.num_iterations == 1:  # else the weights may have moved since the step began
            checkpoint.save(aside, run.model, run.optimizer, run.state)
    where = f"the batch is in {run.directory}/{name}/batch.json; "
    if config.num_iterations == 1:
        return where + f"to replay it: python train.py --resume {run.directory}/{name}/step_{run.state['step']}"
    if checkpoint.checkpoints(run.directory):
        return where + f"this leads to it again: python train.py --resume {run.directory}"
    return where + "the same command with another --output-dir leads to it again"


# --------------------------------------------------------------------------------------------------
# The command line


def parse(argv=None) -> Config:
    """The settings of a command line; with --resume those of the run, with the flags on top."""
    parser = Parser(Config, Config.__doc__)
    config = Config(**vars(parser.parse_args(argv)))
    if config.resume:
        parser.set_defaults(**dict.fromkeys(vars(config)))  # None, to see which flags are given
        given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
        config = checkpoint.resume_config(Config, given)
    config.check()
    return config


def outcome(command) -> int:
    """Run `command` and return the exit status; unless it is 0, one line on stderr says why.

    2: unusable input; 1: a failed training; 128 + its number: a signal, as shells count.
    """
    warnings.filterwarnings("ignore", "Sinkhorn stopped")  # signs_of_trouble says it once
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
    try:
        command()
        parallel.stop()
        return 0
    except (InputError, OSError) as error:
        line, status = str(error), 2
    except FloatingPointError as error:
        line, status = f"training has broken down: {error}; a lower --learning-rate may help", 1
    except torch.OutOfMemoryError:
        hint = f"--gradient-checkpointing with a low --micro-batch needs the least; else {memory.ADVICE}"
        line, status = f"the GPU's memory does not suffice; {hint}", 1
    except RuntimeError as error:
        if parallel.world() == 1:
            raise
        line, status = f"process {parallel.rank()}: {str(error).splitlines()[0]}: another process has ended", 1
    except KeyboardInterrupt:
        line, status = "stopped before the training began", 128 + signal.SIGINT
    print(f"error: {line}", file=sys.stderr)
    return status
