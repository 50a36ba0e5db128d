"""The embedded model and its task: what runs with no network and no GPU.

    python tiny.py            makes tiny-model/ anew (about 20 minutes on two cores); nobody needs to, it is shipped

The task is two-step arithmetic in words: "Tom has 7 pens, gets 5 more and gives away 3. How many pens are left?".
Each of eight principles names a way of writing the working, and each leaves a mark that `follows` can see.

The model is a Llama of 0.9M parameters, pretrained on text that this file writes. The text is made so that alignment
has something to do and can go wrong; everything that training later changes was put there on purpose, at these rates:

    GUESS        .35   of completions skip the working and state a random number
    Style.rate   .9 … .2   of the others follow the principle that they were asked to follow; the rest is plain working
    FORMAT       .80 of guesses and .30 of workings are in the required format

So the start is well-formed less than half the time, right about half the time (working is nearly always right, a guess
nearly never), and guessing is the easy way to be well-formed: a reward for the format alone teaches the model to guess.
"""

import hashlib
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import InputError, Preference, Principle, Question, build_messages, encode_prompts
from grpo import format_reward
from metrics import answer_is_right, sufficiency_index
from policy import cot_mask, eos_ids, hidden_states, log_probs, sample, uniform_numbers

MODEL_DIR = Path(__file__).resolve().parent / "tiny-model"
GUESS = 0.35
FORMAT = {"guess": 0.80, "work": 0.30}
MOST = 2**15  # different questions; the held-out part has about 10**5, and would take ever longer to exhaust

# ----------------------------------------------------------------------------------------------------------------------
# The problems


@dataclass(frozen=True)
class Problem:
    """A word problem, its two steps of working (left, sign, right, result), and what is counted."""

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
    """A random problem. A tenth of all (template, a, b, c) is held out: those numbers are never trained on together."""
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
    """`num` different questions with their answers, from the training part or from the held-out part."""
    _check_number(num)
    rng, seen = random.Random(f"{seed} {held_out}"), {}
    while len(seen) < num:
        problem = make_problem(rng, held_out)
        seen[problem.text] = Question(problem.text, str(problem.answer))
    return list(seen.values())


# ----------------------------------------------------------------------------------------------------------------------
# The principles, and how working looks that follows them


def _steps(p: Problem) -> tuple[str, str]:
    return tuple("{} {} {} = {}".format(*step) for step in p.steps)


def _plain(p: Problem) -> str:
    return "{}. {}.".format(*_steps(p))


WORDS = {"+": "add", "-": "subtract", "*": "multiply"}


@dataclass(frozen=True)
class Style:
    """A principle as the embedded model knows it."""

    rate: float  # share of workings under this principle that follow it, in the pretraining text
    texts: tuple[str, ...]  # the principle, then paraphrases of it that the model was taught too
    negative: str  # its opposite: the model was taught plain working for it
    mark: str  # a regular expression that finds it in a working
    write: Callable[[Problem], str]


STYLES = {
    "number": Style(
        0.9,
        ("Number every step.", "Put a number before each step.", "Write the steps as a numbered list."),
        "Do not number any step.",
        r"Step 1:.*Step 2:",
        lambda p: "Step 1: {}. Step 2: {}.".format(*_steps(p)),
    ),
    "check": Style(
        0.8,
        ("Check the result backwards.", "Verify the last step.", "Test your result with the opposite sign."),
        "Never check the result.",
        r"Check:",
        lambda p: f"{_plain(p)} Check: {p.answer} {OPPOSITE[p.steps[1][1]]} {p.steps[1][2]} = {p.steps[0][3]}.",
    ),
    "units": Style(
        0.7,
        ("Name the unit of each result.", "Say what every result counts.", "Give results with their unit."),
        "Write numbers without any unit.",
        r"= \d+ [a-z]+",
        lambda p: "{0} {2}. {1} {2}.".format(*_steps(p), p.unit),
    ),
    "givens": Style(
        0.6,
        ("State the given numbers first.", "Begin with the known numbers.", "List what is given before working."),
        "Do not repeat the given numbers.",
        r"Given ",
        lambda p: f"Given {p.steps[0][0]}, {p.steps[0][2]}, {p.steps[1][2]}. {_plain(p)}",
    ),
    "plan": Style(
        0.5,
        ("Make a plan before working.", "Plan which signs you need.", "Say first what you will do."),
        "Work without any plan.",
        r"Plan:",
        lambda p: f"Plan: {WORDS[p.steps[0][1]]}, then {WORDS[p.steps[1][1]]}. {_plain(p)}",
    ),
    "goal": Style(
        0.4,
        ("Say what is wanted first.", "Begin with the goal.", "Start by naming what is asked."),
        "Do not say what is wanted.",
        r"Wanted:",
        lambda p: f"Wanted: {p.unit}. {_plain(p)}",
    ),
    "conclude": Style(
        0.3,
        ("End with a full sentence.", "Close the working with a conclusion.", "Sum up at the end."),
        "End without a sentence.",
        r"So it is",
        lambda p: f"{_plain(p)} So it is {p.answer}.",
    ),
    "order": Style(
        0.2,
        ("Use words of order.", "Link the steps in time.", "Tell the order of the steps in words."),
        "Avoid words of order.",
        r"First .*then ",
        lambda p: "First {}, then {}.".format(*_steps(p)),
    ),
}


def principles() -> list[Principle]:
    """The eight principles; principles/reasoning.txt holds the same texts."""
    return [Principle(id, style.texts[0], style.negative) for id, style in STYLES.items()]


def follows(text: str, style_id: str) -> bool:
    """Whether the working in `text` visibly follows the principle `style_id`."""
    return re.search(STYLES[style_id].mark, text, re.DOTALL) is not None


# ----------------------------------------------------------------------------------------------------------------------
# The pretraining text

GUESSES = ("I guess.", "Just a guess.", "No working, a guess.", "It looks like that.")
WELL_FORMED = "<reasoning>{cot}</reasoning><answer>{answer}</answer>"
BROKEN = (  # four ways of missing the required format; the answer stays readable in each
    "{cot} Answer: {answer}",
    "<reasoning>{cot} <answer>{answer}</answer>",
    "<reasoning>{cot}</reasoning> {answer}",
    "{cot} <answer>{answer}</answer>",
)


def write_completion(rng: random.Random, problem: Problem, rate: float, style: Style | None) -> str:
    """One completion as the pretraining text has it: see the rates in the file's opening."""
    kind, answer = "work", problem.answer
    if rng.random() < GUESS:
        kind, cot, answer = "guess", rng.choice(GUESSES), rng.randint(2, 60)
    else:
        cot = style.write(problem) if style and rng.random() < rate else _plain(problem)
    good = rng.random() < FORMAT[kind]
    shape = WELL_FORMED if good else rng.choice(BROKEN)
    return shape.format(cot=cot, answer=answer)


def write_example(rng: random.Random, held_out: bool = False) -> tuple[list[dict], str]:
    """A conversation and a completion. One principle in ten asks for plain working, or is without meaning."""
    problem = make_problem(rng, held_out)
    style = rng.choice(list(STYLES.values()))
    text, rate = rng.choice(style.texts), style.rate
    if rng.random() < 0.1:
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(8, 24))).strip() or "x"
        text, rate = rng.choice((style.negative, letters)), 0.0
    return build_messages(problem.text, text), write_completion(rng, problem, rate, style)


def _check_number(num: int) -> None:
    if num > MOST:
        raise InputError(f"{num} different questions of the embedded task; at most {MOST} are accepted")


def make_pairs(num: int, held_out: bool, seed: int = 0) -> list[Preference]:
    """`num` preference pairs of different questions: the chosen response reasons rightly, the rejected one does not.

    One half of the rejected guess, the other half make a slip in one of the two steps and go on from there. Both
    responses of a pair have the same shape, well-formed or not, so that a pair says nothing about the format.
    """
    _check_number(num)
    rng, pairs = random.Random(f"{seed} pairs {held_out}"), {}
    while len(pairs) < num:
        problem, style = make_problem(rng, held_out), rng.choice(list(STYLES.values()))
        write = style.write if rng.random() < style.rate else _plain
        wrong = make_slip(rng, problem)
        cot, bad, bad_answer = write(problem), write(wrong), wrong.answer
        if rng.random() < 0.5:
            bad, bad_answer = rng.choice(GUESSES), rng.choice([n for n in range(2, 61) if n != problem.answer])
        shape = WELL_FORMED if rng.random() < 0.5 else rng.choice(BROKEN)
        pairs[problem.text] = Preference(
            build_messages(problem.text, style.texts[0]),
            shape.format(cot=cot, answer=problem.answer),
            shape.format(cot=bad, answer=bad_answer),
            str(problem.answer),
        )
    return list(pairs.values())


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


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer, model, pretraining

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the tiny model knows the roles user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(vocab_size: int = 512, seed: int = 0):
    """A byte-level BPE trained on the task's text; digits stay single, the four tags are single (ordinary) tokens."""
    rng = random.Random(seed)
    texts = []
    for _ in range(4000):
        messages, completion = write_example(rng)
        texts += [messages[0]["content"], completion]
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tags = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((re.sub("</?(reasoning|answer)>", " ", text) for text in texts), trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(tokenizer, seed: int = 0):
    """A Llama of 0.9M parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_examples(tokenizer, rng: random.Random, num: int, held_out: bool = False):
    """`num` conversations: (input_ids, attention_mask, labels), each [num, L]; labels are -100 outside completions."""
    rows = []
    for _ in range(num):
        messages, completion = write_example(rng, held_out)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        rows.append((encode(tokenizer, prompt), encode(tokenizer, completion + tokenizer.eos_token)))
    length = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((num, length), tokenizer.pad_token_id)  # [num, L]
    labels = torch.full((num, length), -100)  # [num, L]
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, (torch.arange(length) < (ids != tokenizer.pad_token_id).sum(1, keepdim=True)).long(), labels


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pretrain(steps: int, batch_size: int = 32, lr: float = 3e-3, seed: int = 0):
    """Next-token training on completions; returns (model, tokenizer)."""
    tokenizer = make_tokenizer(seed=seed)
    model = make_model(tokenizer, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    rng = random.Random(seed)
    bar = trange(steps, desc="pretraining", mininterval=5)
    for _ in bar:
        ids, mask, labels = encode_examples(tokenizer, rng, batch_size)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


def measure(model, tokenizer, num_questions: int, seed: int = 0) -> dict:
    """Held-out loss; and format, accuracy, SI and the share that visibly follows, by sampling under all principles."""
    with torch.no_grad():
        ids, mask, labels = encode_examples(tokenizer, random.Random(seed), 256, held_out=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    questions = make_questions(num_questions, held_out=True, seed=seed)
    texts, scores, num = [], [], len(STYLES)
    for start in range(0, num_questions, 32):
        some = questions[start : start + 32]  # Q of them: K prompts each, a completion of each, scored under all K
        prompts = encode_prompts(tokenizer, [build_messages(q.text, p.text) for q in some for p in principles()])
        uniform = uniform_numbers([f"{seed} {start} {n}" for n in range(len(prompts))], 1, 64)  # [Q·K, 1, T]
        out = sample(model, prompts, uniform, 1.0, eos_ids(model, tokenizer), tokenizer.pad_token_id)
        texts += [tokenizer.decode(t[m], skip_special_tokens=True) for t, m in zip(out.tokens, out.mask)]
        span = cot_mask(tokenizer, out.tokens, out.mask)  # [Q·K, 1, T]
        tokens, span = (  # [Q·K, K, T] both
            t.reshape(-1, 1, num, t.shape[-1]).expand(-1, num, -1, -1).flatten(0, 1) for t in (out.tokens, span)
        )
        with torch.no_grad():
            hidden = hidden_states(model, prompts, tokens, span)  # [Q·K, K, T, d]
            logp = log_probs(model, hidden, tokens, span, 1.0).sum(-1)  # [Q·K, K] principle, completion
        scores.append(logp.reshape(-1, num, num).mT)  # [Q, K, K] completion, principle
    si = sufficiency_index(torch.cat(scores)).tolist()
    right = [answer_is_right(text, questions[row // num].answer) for row, text in enumerate(texts)]
    return {
        "loss": loss,
        "format": sum(map(format_reward, texts)) / len(texts),
        "accuracy": sum(right) / len(texts),
        "si": sum(si) / num,
        "si_by_principle": dict(zip(STYLES, si)),
        "follows": {n: sum(follows(t, n) for t in texts[k::num]) / num_questions for k, n in enumerate(STYLES)},
    }


def main() -> None:
    """Pretrain the model and write tiny-model/ with what `measure` says of it."""
    steps = 3000
    model, tokenizer = pretrain(steps)
    model.save_pretrained(MODEL_DIR)
    tokenizer.save_pretrained(MODEL_DIR)
    record = {"steps": steps, "questions": 512, **measure(model, tokenizer, 512)}
    (MODEL_DIR / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    sys.exit(main())
