"""The embedded task and its model: what runs with no network and no GPU.

The task is two-step arithmetic in words: "Tom has 7 pens, gets 5 more and gives away 3. How many
pens are left?". Each of eight principles is a way of writing the working, with a mark that
`follows` finds.

The model, a Llama of 0.9M parameters, lies in tiny-model/, beside the script that made it from text
about this task. A third of its completions skip the working and guess, and guesses are well-formed
far more often than workings: a reward for the format alone teaches it to guess. tiny-model/build.py
sets the rates, and record.json has those measured.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.errors import InputError
from support.files import Preference, Principle, Question
from support.prompts import build_messages

MODEL_DIR = Path(__file__).resolve().parent.parent / "tiny-model"
MOST = 2**15  # different questions at a time; the held-out part has about 10**5


def model_path(name: str) -> str:
    """The embedded model's folder for the name "tiny"; any other name as it is."""
    return str(MODEL_DIR) if name == "tiny" else name


def make_tokenizer():
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer  # only here: the task alone needs no library

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --------------------------------------------------------------------------------------------------
# The problems


@dataclass(frozen=True)
class Problem:
    """A word problem, its two steps (left, sign, right, result), and the unit of its numbers."""

    text: str
    steps: tuple[tuple[int, str, int, int], tuple[int, str, int, int]]
    unit: str

    @property
    def answer(self) -> int:
        return self.steps[1][3]


NAMES = "Tom Mia Ann Ben Eva Max Zoe Sam Lea Tim".split()
UNITS = "pens apples cards coins shells books balls stamps".split()
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
OPPOSITE = {"+": "-", "-": "+"}
# text, first sign, second sign, ranges of a, b, c
TEMPLATES = (
    ("{n} has {a} {u}, gets {b} more and gives away {c}. How many {u} are left?", "+", "-", (5, 30), (2, 15), (2, 12)),
    ("{n} buys {a} boxes of {b} {u} and finds {c} more. How many {u} in all?", "*", "+", (2, 9), (2, 9), (2, 20)),
    ("{n} fills {a} bags with {b} {u} each and sells {c}. How many {u} are left?", "*", "-", (2, 9), (2, 9), (2, 20)),
    ("{n} had {a} {u}, lost {b} and then won {c}. How many {u} now?", "-", "+", (12, 40), (2, 11), (2, 20)),
)


def make_problem(rng: random.Random, held_out: bool = False) -> Problem:
    """A random problem. A tenth of all (template, a, b, c) are held out from training."""
    while True:
        template, sign1, sign2, *ranges = rng.choice(TEMPLATES)
        a, b, c = (rng.randint(*r) for r in ranges)
        first = SIGNS[sign1](a, b)
        second = SIGNS[sign2](first, c)
        digest = hashlib.sha256(f"{template} {a} {b} {c}".encode()).digest()
        if second > 0 and (digest[0] % 10 == 0) == held_out:
            unit = rng.choice(UNITS)
            text = template.format(n=rng.choice(NAMES), u=unit, a=a, b=b, c=c)
            return Problem(text, ((a, sign1, b, first), (first, sign2, c, second)), unit)


def make_questions(num: int, held_out: bool, seed: int = 0) -> list[Question]:
    """`num` different questions with their answers, of the training or the held-out part."""
    rng = random.Random(f"{seed} {held_out}")
    return _distinct(num, held_out, rng, lambda problem: Question(problem.text, str(problem.answer)))


def _distinct(num: int, held_out: bool, rng: random.Random, make: Callable) -> list:
    """make(problem) of `num` different problems."""
    if num > MOST:
        raise InputError(f"{num} different questions of the embedded task; at most {MOST} are accepted")
    made = {}
    while len(made) < num:
        problem = make_problem(rng, held_out)
        made[problem.text] = make(problem)
    return list(made.values())


# --------------------------------------------------------------------------------------------------
# The principles, and working that follows them


WORDS = {"+": "add", "-": "subtract", "*": "multiply"}


def _steps(p: Problem) -> tuple[str, str]:
    return tuple("{} {} {} = {}".format(*step) for step in p.steps)


def plain_working(p: Problem) -> str:
    """The working that follows no principle."""
    return "{}. {}.".format(*_steps(p))


@dataclass(frozen=True)
class Style:
    """A principle, and what the embedded model was taught about it."""

    rate: float  # share of workings under this principle that follow it, in the pretraining text
    mark: str  # a regular expression that finds it in a working
    negative: str  # its opposite, taught with plain working
    texts: tuple[str, ...]  # the principle, then paraphrases of it
    write: Callable[[Problem], str]  # the working that follows it


STYLES = {
    "number": Style(
        0.9, r"Step 1:.*Step 2:", "Do not number any step.",
        ("Number every step.", "Put a number before each step.", "Write the steps as a numbered list."),
        lambda p: "Step 1: {}. Step 2: {}.".format(*_steps(p)),
    ),
    "check": Style(
        0.8, r"Check:", "Never check the result.",
        ("Check the result backwards.", "Verify the last step.", "Test your result with the opposite sign."),
        lambda p: f"{plain_working(p)} Check: {p.answer} {OPPOSITE[p.steps[1][1]]} {p.steps[1][2]} = {p.steps[0][3]}.",
    ),
    "units": Style(
        0.7, r"= \d+ [a-z]+", "Write numbers without any unit.",
        ("Name the unit of each result.", "Say what every result counts.", "Give results with their unit."),
        lambda p: "{0} {2}. {1} {2}.".format(*_steps(p), p.unit),
    ),
    "givens": Style(
        0.6, r"Given ", "Do not repeat the given numbers.",
        ("State the given numbers first.", "Begin with the known numbers.", "List what is given before working."),
        lambda p: f"Given {p.steps[0][0]}, {p.steps[0][2]}, {p.steps[1][2]}. {plain_working(p)}",
    ),
    "plan": Style(
        0.5, r"Plan:", "Work without any plan.",
        ("Make a plan before working.", "Plan which signs you need.", "Say first what you will do."),
        lambda p: f"Plan: {WORDS[p.steps[0][1]]}, then {WORDS[p.steps[1][1]]}. {plain_working(p)}",
    ),
    "goal": Style(
        0.4, r"Wanted:", "Do not say what is wanted.",
        ("Say what is wanted first.", "Begin with the goal.", "Start by naming what is asked."),
        lambda p: f"Wanted: {p.unit}. {plain_working(p)}",
    ),
    "conclude": Style(
        0.3, r"So it is", "End without a sentence.",
        ("End with a full sentence.", "Close the working with a conclusion.", "Sum up at the end."),
        lambda p: f"{plain_working(p)} So it is {p.answer}.",
    ),
    "order": Style(
        0.2, r"First .*then ", "Avoid words of order.",
        ("Use words of order.", "Link the steps in time.", "Tell the order of the steps in words."),
        lambda p: "First {}, then {}.".format(*_steps(p)),
    ),
}


def principles() -> list[Principle]:
    """The eight principles; principles/reasoning.txt holds the same texts."""
    return [Principle(id, style.texts[0], style.negative) for id, style in STYLES.items()]


def follows(text: str, style_id: str) -> bool:
    """Whether the working in `text` has the mark of the principle `style_id`."""
    return re.search(STYLES[style_id].mark, text, re.DOTALL) is not None


# --------------------------------------------------------------------------------------------------
# Completions, and preference pairs of them

GUESSES = ("I guess.", "Just a guess.", "No working, a guess.", "It looks like that.")
WELL_FORMED = "<reasoning>{cot}</reasoning><answer>{answer}</answer>"
BROKEN = (  # four ways of missing the format; a reader still finds the answer
    "{cot} Answer: {answer}",
    "<reasoning>{cot} <answer>{answer}</answer>",
    "<reasoning>{cot}</reasoning> {answer}",
    "{cot} <answer>{answer}</answer>",
)


def make_pairs(num: int, held_out: bool, seed: int = 0) -> list[Preference]:
    """`num` preference pairs of different questions: only the chosen response reasons correctly.

    Half of the rejected responses guess, half have a wrong result in one step and go on from there.
    Both responses of a pair have one shape, well-formed or not: pairs say nothing about the format.
    """
    rng = random.Random(f"{seed} pairs {held_out}")
    return _distinct(num, held_out, rng, lambda problem: _pair(rng, problem))


def _pair(rng: random.Random, problem: Problem) -> Preference:
    style = rng.choice(list(STYLES.values()))
    write = style.write if rng.random() < style.rate else plain_working
    wrong = make_slip(rng, problem)
    cot, bad, bad_answer = write(problem), write(wrong), wrong.answer
    if rng.random() < 0.5:
        bad, bad_answer = rng.choice(GUESSES), rng.choice([n for n in range(2, 61) if n != problem.answer])
    shape = WELL_FORMED if rng.random() < 0.5 else rng.choice(BROKEN)
    chosen, rejected = shape.format(cot=cot, answer=problem.answer), shape.format(cot=bad, answer=bad_answer)
    return Preference(build_messages(problem.text, style.texts[0]), chosen, rejected, str(problem.answer))


def make_slip(rng: random.Random, problem: Problem) -> Problem:
    """The same problem with one result wrong by 1 to 9, and what follows from it."""
    (a, sign, b, first), (_, sign2, c, second) = problem.steps
    error = rng.choice([-1, 1]) * rng.randint(1, 9)
    if rng.random() < 0.5:
        first = max(1, first + error)
        second = SIGNS[sign2](first, c)
    else:
        second += error
    if second == problem.answer or second < 0:
        return make_slip(rng, problem)
    return Problem(problem.text, ((a, sign, b, first), (first, sign2, c, second)), problem.unit)
