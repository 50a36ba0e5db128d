"""Settings: a dataclass is a command line, and the bounds of a setting stand at its field.

    num_questions: int = option(4, "questions in a step", at_least=1)

`Config` has the settings of train.py; those of si.py and geometry.py are in these files. All share
`DatasetConfig`. A flag that TRL has too is named as there; its help says so where its meaning
differs.
"""

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers
from transformers.hf_argparser import string_to_bool

from support.errors import InputError

EXAMPLES = Path(__file__).parent.parent / "principles" / "examples.jsonl"

MAX_SEED = 2**32 - 1
DEFAULT_BETA = 0.1  # of pairs: the best of experiments/preference.py, for InfoPO and within noise for DPO


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

    dataset: str | None = option(
        None, "questions: a .jsonl, .parquet or .csv file or a hub id (default: those of the embedded task)"
    )
    dataset_config: str | None = option(None, "configuration of a hub data set, such as main of openai/gsm8k")
    dataset_train_split: str = option("train", "split of a hub data set; the held-out questions come from it too")
    question_field: str | None = option(None, "name of the field of questions, if it is neither question nor source")
    answer_field: str | None = option(
        None, "name of the field of answers, if it is neither answer nor target; answers are optional and never "
        "rewarded"
    )
    examples: str | None = option(
        None, "worked examples shown before each question: .jsonl of question, principle, reasoning, answer; or none "
        "(default: those the model was trained with, else principles/examples.jsonl)"
    )
    prefill: bool | None = option(
        None, "let the prompt begin the answer with <reasoning> (default: as the model was trained, else True)"
    )


@dataclass
class Config(DatasetConfig):
    """ENIGMA: train a language model to reason by your principles: no reward model, no labels."""

    GROUPS = {
        "dataset": "data", "model": "model", "num_questions": "a batch: questions x principles x generations",
        "max_steps": "optimisation", "lambda_mi": "losses", "output_dir": "the run",
    }

    principles: str | None = option(None, "file of principles, .txt (one a line) or .jsonl")
    preferences: str | None = option(
        None, "train on preference pairs instead: a .jsonl, .parquet or .csv file, a hub id, or tiny (the embedded "
        "task)"
    )

    model: str = option("tiny", "tiny (the embedded model), a folder, or a Hugging Face hub id")
    bf16: bool | None = option(
        None, "bfloat16 matrix products with float32 weights (default: on a GPU; on a CPU with AMX, for models "
        "above 10M parameters)"
    )
    lora_rank: int = option(
        0, "train LoRA adapters of this rank, with alpha twice the rank; 0 trains all weights", at_least=0
    )
    gradient_checkpointing: bool | None = option(
        None, "recompute activations in the backward pass: a third slower, far less memory (default: where it is short)"
    )
    micro_batch: int | None = option(
        None, "completions in one forward and backward pass; the result is the same. Without --gradient-checkpointing "
        "one pass takes all of a question at least (default: as many as fit, up to 256)", at_least=1
    )

    num_questions: int = option(4, "questions in a step", at_least=1)
    num_principles: int = option(4, "K: principles drawn for each question", at_least=2)
    num_generations: int = option(4, "G: completions of each question under each principle", at_least=1)
    max_completion_length: int = option(64, "in tokens; a longer completion is cut and earns nothing", at_least=1)
    temperature: float = option(1.0, "temperature of sampling, and of every log-probability", above=0)
    num_pairs: int = option(16, "preference pairs in a step", at_least=1)

    max_steps: int = option(70, "number of batches that are sampled (TRL counts optimiser steps)", at_least=1)
    num_iterations: int = option(
        1, "optimiser steps on each batch; the ratio differs from 1 only after the first", at_least=1
    )
    learning_rate: float | None = option(
        None, "AdamW's, after the warm-up (default: 1e-5; below 10M parameters 7e-4, 1e-4 on pairs; about 1e-6 suits "
        "a model of 1B parameters)", above=0
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = option("linear", "how the learning rate falls after the warm-up")
    warmup_steps: int = option(
        5, "steps until the full learning rate; the first has 1 / (warmup_steps + 1) of it", at_least=0
    )
    max_grad_norm: float = option(1.0, "a gradient with a larger norm is scaled down to it", above=0)

    lambda_mi: float = option(0.012, "weight of the InfoNCE term", at_least=0)
    mi_temperature: float = option(1.0, "divides the scores inside the InfoNCE term, not in the metrics", above=0)
    mi_generations: int | None = option(
        None, "how many of the G completions take part in the InfoNCE term (default: all)", at_least=1
    )
    mi_reward: float = option(
        0.0, "reward of each nat that a completion says about its principle, if it keeps the format; the format "
        "itself earns 1", at_least=0
    )
    lambda_ot: float = option(0.002, "weight of the Sinkhorn term", at_least=0)
    ot_eps: float = option(0.1, "eps of the Sinkhorn term, as a share of the mean squared distance", above=0)
    ot_tokens: int = option(128, "completion tokens of each question that the Sinkhorn term compares", at_least=1)
    epsilon: float = option(0.1, "the ratio is clipped below 1 - epsilon", at_least=0, at_most=1)
    epsilon_high: float | None = option(
        None, "the ratio is clipped above 1 + epsilon_high (default: epsilon)", at_least=0
    )
    importance_sampling_level: Literal["sequence", "token"] = option("sequence", "what one ratio covers")
    loss_type: Literal["grpo", "bnpo", "dr_grpo"] = option(
        "dr_grpo", "how the policy loss is averaged over the tokens of a question (TRL's bnpo averages over the batch)"
    )
    scale_rewards: Literal["none", "group"] = option(
        "none", "group divides advantages by the standard deviation of their group"
    )
    beta: float | None = option(
        None, "weight of the KL to the frozen reference in the GRPO loss (default: 0); of pairs, the reward per nat of "
        "log-ratio (default: 0.1)", at_least=0
    )
    preference_loss: Literal["infopo", "dpo"] = option("infopo", "loss of --preferences")

    output_dir: str | None = option(None, "a new or empty directory (default: runs/<time>)")
    seed: int = option(0, "seed of everything random", at_least=0, at_most=MAX_SEED)
    date: str | None = option(None, "date, YYYY-MM-DD, for a chat template that writes today's (default: today)")
    eval_steps: int = option(35, "evaluate every so many steps; 0 evaluates only before and after training", at_least=0)
    eval_questions: int = option(128, "held-out questions in an evaluation", at_least=1)
    save_steps: int = option(
        0, "write a checkpoint every so many steps; 0 writes one only when Ctrl-C or SIGTERM stops the run", at_least=0
    )
    save_total_limit: int | None = option(None, "keep only so many of the newest checkpoints", at_least=1)
    resume: str | None = option(
        None, "go on with a run: its directory, one of its checkpoints, or latest; flags beside it change its settings"
    )

    def check(self) -> None:
        """Raises InputError for an unusable value, or for two settings that do not go together."""
        check_bounds(self)
        if not (self.principles or self.preferences):
            raise InputError("--principles: missing; expected a file of principles, or --preferences with pairs")
        if self.principles and self.preferences:
            raise InputError("--preferences: not accepted beside --principles; a run trains on one of the two")
        if self.mi_generations is not None and self.mi_generations > self.num_generations:
            raise InputError(f"--mi-generations: got {self.mi_generations}; expected 1 to --num-generations, "
                             f"{self.num_generations}")
        if self.scale_rewards == "group" and self.num_generations == 1:
            raise InputError("--num-generations: got 1; expected 2 or more with --scale-rewards group")
        if self.preferences and self.beta == 0:
            raise InputError("--beta: got 0.0; expected a number above 0 with --preferences")

    @property
    def needs_reference(self) -> bool:
        """Whether a loss needs the frozen reference."""
        return bool(self.lambda_ot or self.beta)

    @property
    def scored_generations(self) -> int:
        """Completions of each prompt that are read under all principles, for the InfoNCE loss."""
        return (self.mi_generations or self.num_generations) if self.lambda_mi else 0

    @property
    def rows_per_question(self) -> int:
        """Completions read with gradient: all under their own principle, some under the others."""
        return self.num_principles * (self.num_generations + (self.num_principles - 1) * self.scored_generations)

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
        completions = self.num_questions * self.num_principles * self.num_generations
        return min(256, self.num_pairs if self.preferences else completions) if self.gradient_checkpointing else 256
