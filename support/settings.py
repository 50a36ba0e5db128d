"""Settings: a dataclass is a command line, and the bounds of a setting stand at its field.

    num_questions: int = option(4, "questions in a step", at_least=1)

`Config` has the settings of train.py; those of si.py and geometry.py are in these files. All share
`DatasetConfig`. A flag that TRL has too is named as there; its help says so where its meaning
differs.
"""

import argparse
import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers
from transformers.hf_argparser import string_to_bool

from grpo import TAGS
from support.errors import InputError
from support.files import FILE_KINDS, load_examples, load_questions
from support.prompts import Form

EXAMPLES = Path(__file__).parent.parent / "principles" / "examples.jsonl"

MAX_SEED = 2**32 - 1


def option(default, help, *, at_least=None, above=None, at_most=None):
    """A field of a dataclass, with its line of --help and its bounds; a value of None passes."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def flag(name: str) -> str:
    """The flag of a setting: --num-questions of num_questions."""
    return f"--{name.replace('_', '-')}"


def check_bounds(config) -> None:
    """Raises InputError for the first setting that is empty text or outside its bounds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and (not value.strip() or re.search("[\0\ud800-\udfff]", value)):
            raise InputError(f"{flag(field.name)}: got {value!r}; expected Unicode text, not empty")
        low, above, high = (field.metadata.get(name) for name in ("at_least", "above", "at_most"))
        if value is None or (low is None and above is None):
            continue
        if above is not None and not max(above, 1e-9) <= value < math.inf:  # 1e-300 is 0 in float32
            raise InputError(f"{flag(field.name)}: got {value}; expected a number above {above} (1e-9 or more)")
        if low is not None and not low <= value < math.inf:
            raise InputError(f"{flag(field.name)}: got {value}; expected {low} or more")
        if high is not None and value > high:
            raise InputError(f"{flag(field.name)}: got {value}; expected {low} to {high}")


class _Help(argparse.HelpFormatter):
    """--help names each flag once, with dashes; --num_questions is accepted as well."""

    def _format_action_invocation(self, action):
        dashed = [name for name in action.option_strings if "_" not in name]
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(dashed) + value


class Parser(transformers.HfArgumentParser):
    """The command line of a dataclass; `GROUPS` of it maps the first field of a group to its title.

    An unusable command line is an InputError, where argparse would exit.
    """

    def __init__(self, kind, description: str):
        self.titles, self.group = getattr(kind, "GROUPS", {}), None  # the group that fields are added to
        super().__init__(kind, description=description, usage="%(prog)s [--flag VALUE ...]", formatter_class=_Help)

    def add_argument(self, *names, at_least=None, above=None, at_most=None, **options):
        # HfArgumentParser passes all of a field's metadata; check_bounds uses the bounds.
        if options.get("type") is string_to_bool:
            options = {"nargs": "?", "const": True} | options  # --bf16 alone is --bf16 True
        title = self.titles.get(names[0].lstrip("-"))
        self.group = self.add_argument_group(title) if title else self.group
        return self.group.add_argument(*names, **options) if self.group else super().add_argument(*names, **options)

    def error(self, message):
        raise InputError(f"{message}; --help lists what is accepted")


@dataclass(kw_only=True)
class DatasetConfig:
    """The flags that say where questions come from."""

    dataset: str | None = option(None, "questions: .jsonl, .parquet, .csv or a hub id; else the embedded task's")
    dataset_config: str | None = option(None, "configuration of a hub data set, such as main of openai/gsm8k")
    dataset_train_split: str = option("train", "split of a hub data set; the held-out questions are of it too")
    question_field: str | None = option(None, "where it is not question or source")
    answer_field: str | None = option(None, "where it is not answer, or target beside source; optional, never rewarded")
    examples: str | None = option(
        None, "earlier turns of the conversation, .jsonl of question, principle, reasoning, answer; none for none; "
        "else principles/examples.jsonl, and none for the embedded model"
    )
    prefill: bool | None = option(
        None, "the prompt begins the answer with <reasoning>; else so, but not for the embedded model"
    )

    @property
    def is_hub_set(self) -> bool:
        """Whether --dataset is a hub id, not a file."""
        return self.dataset is not None and Path(self.dataset).suffix.lower() not in FILE_KINDS

    @functools.cached_property
    def form(self) -> Form:
        """The form of prompts; sets its defaults. Raises InputError for unreadable --examples."""
        real = self.model != "tiny"
        self.examples = self.examples or (str(EXAMPLES) if real else "none")
        self.prefill = real if self.prefill is None else self.prefill
        examples = () if self.examples == "none" else tuple(load_examples(self.examples))
        return Form(examples, TAGS[0] if self.prefill else "")

    def load_questions(self, limit, seed):
        """See files.load_questions; the run can use `limit` questions."""
        fields = self.question_field, self.answer_field
        return load_questions(self.dataset, *fields, self.dataset_config, self.dataset_train_split, limit, seed)


@dataclass
class Config(DatasetConfig):
    """ENIGMA: train a language model to reason by your principles: no reward model, no labels."""

    GROUPS = {
        "dataset": "data", "model": "model", "num_questions": "a batch: questions x principles x generations",
        "max_steps": "optimisation", "lambda_mi": "losses", "output_dir": "the run",
    }

    principles: str | None = option(None, "file of principles: .txt (one a line) or .jsonl")
    preferences: str | None = option(None, "pairs: .jsonl, .parquet, .csv, a hub id, or tiny (the embedded task's)")

    model: str = option("tiny", "the embedded model, a folder, or a Hugging Face hub id")
    bf16: bool | None = option(
        None, "bfloat16 matrix products, float32 weights; else on a GPU, and on a CPU that has them, but for the "
        "embedded model"
    )
    lora_rank: int = option(0, "train LoRA adapters of this rank (alpha twice it); 0: all weights", at_least=0)
    gradient_checkpointing: bool | None = option(
        None, "recompute activations in the backward pass: a third slower, far less memory; else as memory asks for"
    )
    micro_batch: int | None = option(
        None, "completions in one forward and backward pass: memory against speed, same result; without "
        "--gradient-checkpointing all of one question's at least; else as many as fit, up to 256", at_least=1
    )

    num_questions: int = option(4, "questions in a step", at_least=1)
    num_principles: int = option(4, "K: principles drawn for each question", at_least=2)
    num_generations: int = option(4, "G: completions of each question under each principle", at_least=1)
    max_completion_length: int = option(64, "tokens; longer completions are cut and earn nothing", at_least=1)
    temperature: float = option(1.0, "of sampling, and of every log-probability", above=0)
    num_pairs: int = option(16, "preference pairs in a step", at_least=1)

    max_steps: int = option(70, "batches sampled (TRL counts optimiser steps)", at_least=1)
    num_iterations: int = option(1, "optimiser steps on each batch; above 1 the ratio leaves 1", at_least=1)
    learning_rate: float | None = option(
        None, "of AdamW, after the warm-up; else 1e-5, and for the embedded model 7e-4, on pairs alone 1e-4 (a 1B: "
        "about 1e-6)", above=0
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = option("linear", "the learning rate after the warm-up")
    warmup_steps: int = option(5, "steps of linear warm-up", at_least=0)
    weight_decay: float = option(0.0, "of AdamW, on all weights (TRL spares norms and biases)", at_least=0)
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm", above=0)

    lambda_mi: float = option(0.012, "weight of the InfoNCE term", at_least=0)
    mi_temperature: float = option(1.0, "divides the scores in the InfoNCE term (not in the metrics)", above=0)
    mi_generations: int | None = option(
        None, "how many of the G completions take part in the InfoNCE term; else all", at_least=1
    )
    mi_reward: float = option(
        0.0, "what a nat of information about its principle earns a completion that keeps the format, beside the 1 for "
        "the format", at_least=0
    )
    lambda_ot: float = option(0.002, "weight of the Sinkhorn term", at_least=0)
    ot_eps: float = option(0.1, "eps of the Sinkhorn term, relative to the mean squared distance", above=0)
    ot_tokens: int = option(128, "completion tokens of a question that its Sinkhorn term compares", at_least=1)
    epsilon: float = option(0.1, "the ratio is clipped below 1 - epsilon", at_least=0, at_most=1)
    epsilon_high: float | None = option(None, "the ratio is clipped above 1 + epsilon_high; else epsilon", at_least=0)
    importance_sampling_level: Literal["sequence", "token"] = option("sequence", "what one ratio covers")
    loss_type: Literal["grpo", "bnpo", "dr_grpo"] = option(
        "dr_grpo", "how the policy loss is averaged over tokens: of one question at a time (TRL's bnpo: of a batch)"
    )
    scale_rewards: Literal["none", "group"] = option("none", "group: divide advantages by the group's std")
    beta: float | None = option(
        None, "with --preferences: reward per nat of log-ratio, else 0.1; without: weight of the KL to the frozen "
        "start inside the GRPO term, else 0", at_least=0
    )
    preference_loss: Literal["infopo", "dpo"] = option("infopo", "what --preferences trains with")
    lambda_pref: float = option(0.03, "weight of the preference loss beside the three terms; alone it is 1", at_least=0)

    output_dir: str | None = option(None, "new or empty; runs/<time> if not given")
    seed: int = option(0, "of everything random", at_least=0, at_most=MAX_SEED)
    date: str | None = option(None, "YYYY-MM-DD: what a chat template that writes the date takes for today; else today")
    eval_steps: int = option(35, "evaluate every so many steps; 0: only before and after", at_least=0)
    eval_questions: int = option(128, "held-out questions in an evaluation", at_least=1)
    save_steps: int = option(
        0, "write a checkpoint every so many steps; 0: only when stopped by Ctrl-C or SIGTERM", at_least=0
    )
    save_total_limit: int | None = option(None, "keep only so many of the newest checkpoints", at_least=1)
    resume: str | None = option(
        None, "go on with a run: its directory, one of its checkpoints, or latest; other flags change its settings"
    )

    def check(self) -> None:
        """Set defaults that depend on other settings. Raises InputError for an unusable value."""
        check_bounds(self)
        if not (self.principles or self.preferences):
            raise InputError("--principles: missing; expected a file of principles, or --preferences with pairs")
        _ = self.form  # refuses --examples that cannot be read
        if self.learning_rate is None:
            embedded = 7e-4 if self.principles else 1e-4
            self.learning_rate = embedded if self.model == "tiny" else 1e-5
        if self.mi_generations is None:
            self.mi_generations = self.num_generations
        if self.mi_generations > self.num_generations:
            raise InputError(f"--mi-generations: got {self.mi_generations}; expected 1 to --num-generations, "
                             f"{self.num_generations}")
        if self.scale_rewards == "group" and self.num_generations == 1:
            raise InputError("--num-generations: got 1; expected 2 or more with --scale-rewards group")
        if self.preferences and self.beta == 0:
            raise InputError("--beta: got 0.0; expected a number above 0 with --preferences")

    @property
    def kl_weight(self) -> float:
        """Weight of the KL in the GRPO term: --beta, unless it belongs to --preferences."""
        return 0.0 if self.preferences else self.beta or 0.0

    @property
    def needs_start(self) -> bool:
        """Whether a loss needs the frozen start."""
        return bool(self.lambda_ot or self.kl_weight)

    @property
    def rows_of_a_question(self) -> int:
        """Completions read with gradient: all under their own principle, some under the others."""
        others = (self.num_principles - 1) * self.mi_generations if self.lambda_mi else 0
        return self.num_principles * (self.num_generations + others)

    @property
    def rows_at_once(self) -> int:
        """Completions in one forward and backward pass; memory.fit chooses the default."""
        return self.micro_batch or 256

    @property
    def how_read(self) -> dict:
        """Arguments with which completions are read, see scoring.token_states."""
        return {"bf16": bool(self.bf16), "recompute_rows": self.rows_at_once if self.gradient_checkpointing else None}

    @property
    def eval_rows(self) -> int:
        """Completions sampled together in an evaluation; as in a step if memory is short."""
        in_step = self.num_questions * self.num_principles * self.num_generations
        return min(256, in_step) if self.gradient_checkpointing else 256
