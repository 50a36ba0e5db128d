"""New principles: the model rewrites and joins the given ones; where it cannot, their texts are joined."""

import itertools
import random
import re

import torch

from grpo import TAGS
from support import sampling
from support.errors import InputError
from support.files import Principle
from support.prompts import build_messages, encode_prompts, prompt_limit

REPEAT = "Repeat this sentence and write nothing else: {}"
REWRITE = (
    "This is a principle for how to reason: {}\nWrite a different principle with the same purpose, more concrete, as "
    "one short instruction. Write that sentence and nothing else."
)
COMBINE = (
    "These are two principles for how to reason:\n- {}\n- {}\nWrite one new principle that joins the best of both, as "
    "one short instruction. Write that sentence and nothing else."
)
MAX_WORDS = 40  # of a created principle
ROUNDS = 4  # of sampling, before what is missing is joined from the texts


def propose(model, tokenizer, principles, num: int, config) -> list[tuple[Principle, str]]:
    """Up to `num` new principles, each with where it came from; all differ in letters or digits.

    The model writes them if it can repeat half of the given ones when asked to. Where it cannot, or
    too few of its texts are usable, two given texts are joined with "and". Fewer than `num` come
    where no more pairs exist.
    """
    rng = random.Random(f"{config.seed} propose")
    known, ids, found = {_essence(p.text) for p in principles}, {p.id for p in principles}, []
    candidates = itertools.chain(
        written_principles(model, tokenizer, principles, num, config, rng), joined_principles(principles, rng)
    )
    for name, text, source in candidates:
        if _essence(text) in known:
            continue
        while name in ids:
            name += "'"
        known.add(_essence(text))
        ids.add(name)
        found.append((Principle(name, text), source))
        if len(found) == num:
            break
    return found


def written_principles(model, tokenizer, principles, num: int, config, rng):
    """Yields (id, text, source) of usable texts of the model; none if it cannot even repeat."""
    repeated = _ask(model, tokenizer, [REPEAT.format(p.text) for p in principles], 0.01, f"{config.seed} repeat")
    if sum(_essence(a) == _essence(p.text) for a, p in zip(repeated, principles)) * 2 < len(principles):
        return
    for turn in range(ROUNDS):
        requests = [  # id, source, text of the request
            (f"{p.id}*", f"{p.id} rewritten by {config.model}", REWRITE.format(p.text))
            for p in rng.choices(principles, k=num)
        ] + [
            (f"{a.id}*{b.id}", f"{a.id} and {b.id} combined by {config.model}", COMBINE.format(a.text, b.text))
            for a, b in (rng.sample(principles, 2) for _ in range(num))
        ]
        texts = _ask(model, tokenizer, [request for *_, request in requests], 1.0, f"{config.seed} round {turn}")
        written = list(zip(requests, texts))
        rng.shuffle(written)
        yield from ((name, text, source) for (name, source, _), text in written if _is_usable(tokenizer, text))


def joined_principles(principles, rng):
    """Yields (id, text, source) of pairs of the given texts, joined, in random order."""
    pairs = list(itertools.combinations(principles, 2))
    rng.shuffle(pairs)
    for a, b in pairs:
        second = b.text if b.text[1:2].isupper() else b.text[:1].lower() + b.text[1:]  # "SI units" keeps its capitals
        text = f"{a.text.rstrip(' .!;')} and {second}"
        if len(text.split()) <= MAX_WORDS:
            yield f"{a.id}+{b.id}", text, f"{a.id} and {b.id} joined by their texts"


@torch.no_grad()
def _ask(model, tokenizer, requests: list[str], temperature: float, key: str) -> list[str]:
    """The first line of the model's reply to each request, without bullets and quotes."""
    conversations = [[{"role": "user", "content": request}] for request in requests]
    prompts = encode_prompts(tokenizer, conversations, prompt_limit(model, 80))
    names = [f"{key} {n}" for n in range(len(prompts))]
    _, texts = sampling.write(model, tokenizer, prompts, names, 1, 80, temperature)
    lines = [(text.strip().splitlines() or [""])[0] for (text,) in texts]
    return [re.sub(r"^[\s\-*•\d.)\"“']+|[\s\"”'*]+$", "", line) for line in lines]


def _is_usable(tokenizer, text: str) -> bool:
    """Whether it is a whole sentence of 3 to MAX_WORDS words, without tags and control tokens."""
    if not (3 <= len(text.split()) <= MAX_WORDS and text[-1] in ".!" and text.isprintable()):
        return False
    try:
        return not any(tag in text for tag in TAGS) and bool(encode_prompts(tokenizer, [build_messages("?", text)]))
    except InputError:  # a control token of the tokenizer
        return False


def _essence(text: str) -> str:
    """Letters and digits without case: what has to differ between two principles."""
    return " ".join(re.findall(r"\w+", text.casefold()))
