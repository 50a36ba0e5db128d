"""What a run trains and evaluates on: read, split, and taken step by step.

    held out          is_held_out(text): a hash of the text alone, below HELD_OUT of all values
    evaluated         the first --eval-questions of the held-out ones
    step s of n each  places s·n … (s+1)·n - 1 of epoch after epoch; each epoch is a new order

All of it holds for questions and preference pairs alike. Nothing depends on the order of a file, but for the
order among pairs of one prompt, and which of them is evaluated: the first.
"""

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass, field

import torch

from grpo import TAGS
from support import parallel, tiny
from support.errors import InputError
from support.files import Principle, Question, load_examples, load_principles, read_questions
from support.prompts import SEAM, PromptTemplate, prompt_limit, try_prompts
from support.rows import LeftOut, is_file, normalised
from support.settings import EXAMPLES

HELD_OUT = 1 / 5  # share of all texts; see is_held_out
BLOCK = 512  # questions or pairs that are encoded together


@dataclass
class Data:
    """What a run trains and evaluates on; what it does not use is empty or None."""

    template: PromptTemplate
    principles: list[Principle] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)  # to train on
    held_out: list[Question] = field(default_factory=list)
    longest_prompts: list[list[int]] = field(default_factory=list)  # two, which memory is planned for
    pairs: object = None  # preferences.Pairs to train on, with the reference's log-probabilities
    held_out_pairs: object = None


def load_data(model, tokenizer, config) -> Data:
    """Read and split principles and questions, and refuse what a later step would stumble over."""
    data = Data(make_template(config))
    if not config.principles:
        return data
    print(data.template.describe(), flush=True)
    data.principles = load_principles(config.principles)
    if config.num_principles > (most := len(data.principles)):
        raise InputError(f"--num-principles: got {config.num_principles}, and {config.principles} has {most} "
                         f"principles; 2 to {most} are accepted")
    left_out = LeftOut(config.dataset or "the embedded task")
    limit = prompt_limit(model, config.max_completion_length)
    fitting = Fitting(tokenizer, data.template, [p.text for p in data.principles], limit, left_out)
    if config.dataset:
        found = fitting.of(questions_of(config, left_out))
        needed = None if is_file(config.dataset) else config.max_steps * config.num_questions
        data.questions, data.held_out = split(found, config.eval_questions, needed)
    else:
        if tiny.model_path(config.model) != str(tiny.MODEL_DIR):
            print(f"--model {config.model} without --dataset: the questions are the embedded task's", flush=True)
        data.questions = list(fitting.of(tiny.make_questions(4096, False, config.seed)))
        data.held_out = list(fitting.of(tiny.make_questions(config.eval_questions, True)))
    left_out.tell(fitting.taken, "questions")
    check_sides(data.questions, data.held_out, config.eval_questions, "questions")
    data.longest_prompts = fitting.longest_prompts()
    return data


def questions_of(config, left_out):
    """Yields the `Question`s of --dataset; see files.read_questions."""
    fields, part = (config.question_field, config.answer_field), (config.dataset_config, config.dataset_train_split)
    return read_questions(config.dataset, left_out, *fields, *part, config.seed)


def pick_questions(model, tokenizer, principles: list[str], template, config) -> list[Question]:
    """--num-questions of --dataset, or of the embedded task's held-out part, that fit under all principles."""
    left_out = LeftOut(config.dataset or "the embedded task")
    if config.dataset is None:
        questions = tiny.make_questions(config.num_questions, held_out=True, seed=config.seed)
    else:
        questions = questions_of(config, left_out)
        if is_file(config.dataset):
            questions = sorted(questions, key=lambda question: (question.text, question.answer or ""))
            random.Random(f"{config.seed} questions").shuffle(questions)
    limit = prompt_limit(model, config.max_completion_length)
    fitting = Fitting(tokenizer, template, principles, limit, left_out)
    picked = list(itertools.islice(fitting.of(questions), config.num_questions))
    left_out.tell(len(picked), "questions")
    return picked


# --------------------------------------------------------------------------------------------------
# The prompt


def make_template(config, *models: str) -> PromptTemplate:
    """The template that --examples and --prefill ask for; where they do not say, the model's own.

    A model that was trained by train.py carries its template in its folder, and so does the embedded
    one. Of `models` (or else --model) the first that has one counts. Any other model is shown the
    examples of principles/examples.jsonl, and its answer is begun: without them it rarely writes the
    format. Raises InputError for examples that cannot be read.
    """
    folders = (PromptTemplate.of_folder(tiny.model_path(name)) for name in models or (config.model,))
    own = next((template for template in folders if template), None)
    if own is None and (config.examples is None or config.prefill is None):
        own = PromptTemplate(tuple(load_examples(EXAMPLES)), TAGS[0], "the default for a model without prompt.json")
    if config.examples is None and config.prefill is None:
        return own
    examples = own.examples if config.examples is None else ()
    if config.examples not in (None, "none"):
        examples = tuple(load_examples(config.examples))
    prefill = own.prefill if config.prefill is None else TAGS[0] * config.prefill
    return PromptTemplate(examples, prefill, "by --examples and --prefill")


def example_prompt(tokenizer, data: Data) -> str:
    """The first question under the first principle, as the model reads it."""
    pair = data.questions[0].text, data.principles[0].text
    return tokenizer.decode(data.template.encode(tokenizer, [pair])[0])


class Fitting:
    """Sorts out the questions that do not fit into the model's context under every principle.

    A question is encoded once, under the longest principle. Under another one its prompt may be
    longer than that, by a token or two where no fixed boundary of tokens lies between question and
    principle (as in SentencePiece): SEAM tokens are kept free for it.
    """

    def __init__(self, tokenizer, template: PromptTemplate, principles: list[str], limit: int, left_out: LeftOut):
        self.tokenizer, self.template, self.limit, self.left_out = tokenizer, template, limit - SEAM, left_out
        lengths = map(len, template.encode(tokenizer, [("2 + 3?", text) for text in principles]))
        self.principles = [text for _, text in sorted(zip(lengths, principles))]  # the longest last
        self.taken, self.longest = 0, (0, "")  # how many fit; the tokens of the longest prompt, and its question

    def of(self, questions):
        """Yields the questions that fit; those that do not are left out, see LeftOut."""
        questions, none_taken = iter(questions), True
        while block := list(itertools.islice(questions, BLOCK)):
            messages = self.template.messages([(question.text, self.principles[-1]) for question in block])
            prompts = try_prompts(self.tokenizer, messages, self.limit, self.template.prefill)
            none_taken = none_taken and all(isinstance(prompt, InputError) for prompt in prompts)
            for question, prompt in zip(block, prompts):
                if isinstance(prompt, InputError):
                    self.left_out.add(prompt, none_taken)
                else:
                    self.taken += 1
                    self.longest = max(self.longest, (len(prompt), question.text))
                    yield question

    def longest_prompts(self) -> list[list[int]]:
        """The two longest prompts, the longest last."""
        return self.template.encode(self.tokenizer, [(self.longest[1], text) for text in self.principles[-2:]])


# --------------------------------------------------------------------------------------------------
# The split


def is_held_out(text: str) -> bool:
    """Whether a question is kept from training: a threshold on a hash of its text alone.

    So a text never changes sides: not with --seed or --eval-questions, not when rows are added to
    its file, not between questions and the prompts of preference pairs. Case and spacing do not
    count, nor does a principle that follows the question as in our own prompts. The price is that
    a share is held out, not a number: of few questions it may be none, and then the run is refused.
    """
    question = normalised(text.partition("\n\nPrinciple: ")[0])
    digest = hashlib.sha256(f"held out: {question}".encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT * 2**64


def split(items, num_eval: int, needed: int | None = None) -> tuple[list, list]:
    """(to train on, held out for evaluation) of `Question`s or `Preference`s; see `is_held_out`.

    Both in the order of a hash, whatever that of the file; of held-out texts that are equal but for
    case and spacing the first by text (of pairs of one prompt, the first in the file), and of all these
    the first `num_eval`. With `needed` items is a stream: it is read until `needed` are found to train
    on and `num_eval` held out. The first held out count, so that a longer training reads on and is
    evaluated on the same.
    """
    train, held_out = {}, {}
    for item in items:
        key = normalised(item.text)
        if not is_held_out(item.text):
            train.setdefault(key, []).append(item)
        elif needed is None or len(held_out) < num_eval and key not in held_out:
            held_out.setdefault(key, []).append(item)
        if needed is not None and len(train) >= needed and len(held_out) >= num_eval:
            break

    def in_order(side):
        return sorted(side, key=lambda key: hashlib.sha256(key.encode()).digest())

    trained = [item for key in in_order(train) for item in sorted(train[key], key=lambda item: item.text)]
    return trained, [min(held_out[key], key=lambda item: item.text) for key in in_order(held_out)[:num_eval]]


def check_sides(train, held_out, num_eval: int, what: str) -> None:
    """Raises InputError where a side of a split is empty; says where few are held out."""
    total = len(train) + len(held_out)
    if not train or len(held_out) < parallel.world():
        raise InputError(f"of {total} {what} {len(held_out)} are held out, by a hash of each text (one in "
                         f"{1 / HELD_OUT:.0f} on average), and {len(train)} are left to train on; a larger set, with "
                         "one or more on either side for each process, is accepted")
    if len(held_out) < num_eval:
        print(f"{len(held_out)} of {total} {what} are held out; --eval-questions asks for {num_eval}", flush=True)


# --------------------------------------------------------------------------------------------------
# Which items a step takes


def items_of_step(total: int, step: int, size: int, seed: int) -> list[int]:
    """The `size` indices below `total` that a step takes: a function of seed and step alone.

    All are taken equally often, up to one time, after any step. A step that crosses the end of an
    epoch goes on in the next one; none takes an item twice unless it takes more than there are.
    """
    places = [divmod(index, total) for index in range(step * size, (step + 1) * size)]
    epochs = _epochs(total, size, seed)
    return [epochs.order(epoch)[place] for epoch, place in places]


class Epochs:
    """The order of each epoch. One follows from that before it, and two are kept."""

    def __init__(self, total: int, size: int, seed: int):
        self.total, self.size, self.seed, self.kept = total, size, seed, {}

    def order(self, epoch: int) -> list[int]:
        """A new random order, in which the step that began in the epoch before meets no item again."""
        if epoch not in self.kept:
            first = max((known + 1 for known in self.kept if known < epoch), default=0)
            for number in range(first, epoch + 1):
                order = self.shuffled(number)
                begun = number * self.total % self.size  # items of the epoch before that its last step takes
                if begun and self.total >= self.size:
                    before = set(self.kept[number - 1][-begun:])
                    fresh = [item for item in order if item not in before][: self.size - begun]
                    taken = set(fresh)
                    order = fresh + [item for item in order if item not in taken]
                self.kept = {n: o for n, o in self.kept.items() if n == number - 1} | {number: order}
        return self.kept[epoch]

    def shuffled(self, epoch: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed} epoch {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return torch.randperm(self.total, generator=generator).tolist()


_epochs = functools.lru_cache(maxsize=8)(Epochs)  # a step must not cost what its epoch does
