"""What a run trains and evaluates on: read, split, measured."""

import hashlib
import random
from dataclasses import dataclass

from support import tiny
from support.errors import InputError
from support.files import load_principles, normalised
from support.preferences import Pairs, add_reference, encode_pairs, load_preferences
from support.prompts import check_lengths, prompt_limit


def split_questions(questions, num_eval, seed):
    """Split `Question`s or `Preference`s into (train, held_out), `num_eval` of them held out.

    A hash of `seed` and each text (of a pair, its prompt) decides, and orders both parts: the order
    of the file does not matter, and adding questions never moves one from train to held_out. Texts
    equal but for case and spacing fall on one side; held_out keeps one of them, the first by text.
    Raises InputError when nothing would be left to train on.
    """
    same = {}
    for question in sorted(questions, key=lambda question: question.text):
        same.setdefault(normalised(question.text), []).append(question)
    if not 0 <= num_eval < len(same):
        raise InputError(f"--eval-questions (num_eval) is {num_eval}, of {len(same)} distinct questions; "
                         "0 up to one less than the number of questions is accepted")
    keys = sorted(same, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    train = [question for key in keys[num_eval:] for question in same[key]]
    return train, [same[key][0] for key in keys[:num_eval]]


@dataclass
class Data:
    """What a run trains and evaluates on; what it does not use is empty or None."""

    principles: list
    questions: list
    held_out: list
    pairs: Pairs | None  # in the order they are taken, with the reference's log-probabilities
    held_out_pairs: Pairs | None
    longest_prompts: list  # two lists of token ids, which memory is planned for


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
            add_reference(model, encode_pairs(model, tokenizer, pairs), config.temperature, **config.how_read)
            for pairs in (train, held_out)
        )
    return data


def check_prompts(model, tokenizer, principles, questions, config) -> list:
    """The two longest prompts. Raises InputError for a question or principle that does not fit."""
    limit = prompt_limit(model, config.max_completion_length)
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


def example_prompt(tokenizer, data: Data, config) -> str:
    """The first question under the first principle, as the model reads it."""
    pair = data.questions[0].text, data.principles[0].text
    return tokenizer.decode(config.form.encode(tokenizer, [pair])[0])


def pick_questions(config) -> list:
    """--num-questions of --dataset, or of the embedded task's held-out part."""
    if config.dataset is None:
        return tiny.make_questions(config.num_questions, held_out=True, seed=config.seed)
    questions = config.load_questions(config.num_questions, config.seed)
    return random.Random(f"{config.seed} questions").sample(questions, min(config.num_questions, len(questions)))
