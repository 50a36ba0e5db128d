"""What a run reads (principles, questions, preference pairs), and the prompts made of it.

Files are UTF-8 (a byte-order mark and CRLF are accepted), one item a line of up to 1 MB, blank
lines skipped; questions and preferences also .parquet, or .csv (commas, a header, an empty cell
missing):

    principles.txt      a principle; lines that start with `#` are comments
    principles.jsonl    {"principle": "Show the steps.", "id": "steps", "negative": "Skip them."}
                        `id` and `negative` are optional, other keys refused
    questions.jsonl     {"question": "2 + 3?", "answer": 5}      optional answer; see load_questions
    preferences.jsonl   {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}    see load_preferences
    examples.jsonl      {"question": "2 + 3?", "principle": "Brief.", "reasoning": "5", "answer": 5}

The prompt is a single user message, because some chat templates refuse a system role:

    {question}

    Principle: {principle}
    Write <reasoning>…</reasoning><answer>…</answer>.

Each example stands before it as a user message of the same form and the assistant's answer to it;
a prefill (see Form) begins the assistant's turn. To copy: it imports the standard library only.
"""

import contextlib
import csv
import datetime
import difflib
import hashlib
import json
import math
import os
import re
import reprlib
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MAX_LINE = 1_000_000  # bytes; a longer line means that the wrong file was named
SHUFFLE_BUFFER = 10_000  # rows of a hub data set from which the next one is drawn
SEAM = 8  # tokens by which a prompt may be longer or shorter than its parts; see check_lengths
FORMAT_INSTRUCTION = "Write <reasoning>…</reasoning><answer>…</answer>."
TURN = "<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"  # in an example
FILE_KINDS = (".jsonl", ".parquet", ".csv")  # else a data set of the hub, or a folder like one


class InputError(ValueError):
    """A user's mistake, as one line: `{file}:{line}: {what is wrong}; {what is accepted}`."""

    def __str__(self):
        text = super().__str__()
        return text if text.isprintable() else repr(text)[1:-1]  # of a name with a newline, say


@dataclass(frozen=True)
class Principle:
    id: str
    text: str
    negative: str | None = None


@dataclass(frozen=True)
class Question:
    text: str
    answer: str | None = None


@dataclass(frozen=True)
class Example:
    question: str
    principle: str
    reasoning: str
    answer: str


@dataclass(frozen=True)
class Preference:
    prompt: str | list  # text as it stands, or chat messages
    chosen: str  # what the model should write after it
    rejected: str  # what it should not
    answer: str | None = None
    where: str = "a pair"  # file and line, for errors

    @property
    def text(self):
        """The prompt as one text."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(m["content"] for m in self.prompt)


# --------------------------------------------------------------------------------------------------
# Reading and splitting


def load_principles(path):
    """Two or more `Principle`s of a .txt or .jsonl file; the n-th without an `id` is called "p{n}".

    Raises InputError for a file or line it cannot take, for fewer than two principles (SI compares
    them), and for a repeated id or text (texts compared without case and spacing).
    """
    if not str(path).lower().endswith(".txt"):
        return _check_principles(path, _json_rows(path, ".txt", ".jsonl"))
    lines = [(where, text.strip()) for where, text in _lines(path, ".txt")]
    return _check_principles(path, [(where, {"principle": text}) for where, text in lines if text and text[0] != "#"])


def save_principles(path, principles):
    """Write a .jsonl file that `load_principles` reads back equal (white space around texts aside).

    Raises InputError for what `load_principles` would refuse, and for a file it cannot write.
    """
    _check_file(path, ".jsonl")
    rows = [{"id": p.id, "principle": p.text, "negative": p.negative} for p in principles]
    rows = [{key: text for key, text in row.items() if text is not None} for row in rows]
    _check_principles(path, [(f"{_name(path)}:{n}", row) for n, row in enumerate(rows, start=1)])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_aside(path, lambda aside: aside.write_bytes(text.encode()))
    except OSError as error:
        raise InputError(f"{_name(path)}: cannot be written ({error.strerror}); a writable file is accepted") from None


def write_aside(path, write):
    """`write(aside)`, then move `aside` to `path`: a crash leaves the old file or the new one."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def load_examples(path):
    """`Example`s of a .jsonl file, each with the four keys and no other; `answer` may be a number.

    Raises InputError for a file or line it cannot take, for a tag of the format inside reasoning or
    answer (the turn made of them would not be well-formed), and for a file without an example.
    """
    examples, keys = [], ("question", "principle", "reasoning", "answer")
    for where, row in _json_rows(path):
        if unknown := sorted(row.keys() - set(keys)):
            raise InputError(f"{where}: unknown {_short(unknown[0])}; {', '.join(keys)} are accepted")
        example = Example(*(_text(where, row, key) for key in keys[:3]), _answer(where, row, "answer"))
        for key in keys[2:]:
            if tag := re.search(r"</?(reasoning|answer)>", getattr(example, key)):
                raise InputError(f"{where}: {key} contains {tag[0]}; text without tags of the format is accepted")
        examples.append(example)
    if not examples:
        raise InputError(f"{_name(path)}: has no example; 1 or more are accepted")
    return examples


def load_questions(source, question_field=None, answer_field=None, config=None, split="train", limit=None, seed=0):
    """Distinct `Question`s of a .jsonl, .parquet or .csv file, in its order; the first of equals.

    Any other `source` is a data set of the hub, or a folder like one, in `config` and `split`. It
    is streamed, and shuffled by `seed` in a buffer of SHUFFLE_BUFFER rows (a sorted set is not
    drawn evenly), only until `limit` questions are found.

    Fields: `question` and `answer`, else `source` and `target` (CoT-Collection); others are
    ignored. The answer is optional unless its field is named; a number becomes its Python text (5
    -> "5", 2.50 -> "2.5"), and of GSM8K's "working #### 5" the 5 is taken. Raises InputError for a
    source or row it cannot take, a field under nearly the right name, a source without questions.
    """
    questions, is_file = {}, Path(source).suffix.lower() in FILE_KINDS
    for where, row, names in _rows(source, config, split, seed):
        question = question_field or ("source" if "question" not in names and "source" in names else "question")
        answer = answer_field or ("target" if question == "source" else "answer")
        _refuse_near_names(where, row, names, [question, *filter(None, [answer_field])], [answer])
        text = _text(where, row, question)
        found = _answer(where, row, answer) if answer in row or answer_field else None
        questions.setdefault(text, Question(text, found))
        if not is_file and len(questions) == limit:
            break
    if not questions:
        raise InputError(f'{_name(source)}: has no question; rows like {{"question": "2 + 3?"}} are accepted')
    return list(questions.values())


def load_preferences(source):
    """`Preference`s from a .jsonl, .parquet or .csv file, or from a hub id's train split.

    TRL's formats: `prompt`, `chosen`, `rejected`, each a string, used as it stands, or each a list
    of {"role", "content"} messages, one of the assistant as the response. Without `prompt` it is
    the common beginning of the two. `answer` is optional, as for questions; other keys are ignored.
    Raises InputError for a row it cannot take, or a source it cannot read.
    """
    pairs = []
    for where, row, names in _rows(source):
        _refuse_near_names(where, row, names, ["chosen", "rejected"], ["prompt", "answer"])
        pairs.append(_preference(where, row))
    if not pairs:
        raise InputError(f"{_name(source)}: has no pair; rows with prompt, chosen and rejected are accepted")
    return pairs


def split_questions(questions, num_eval, seed):
    """Split `Question`s or `Preference`s into (train, held_out), `num_eval` of them held out.

    A hash of `seed` and each text (of a pair, its prompt) decides, and orders both parts: the order
    of the file does not matter, and adding questions never moves one from train to held_out. Texts
    equal but for case and spacing fall on one side; held_out keeps one of them, the first by text.
    Raises InputError when nothing would be left to train on.
    """
    same = {}
    for question in sorted(questions, key=lambda question: question.text):
        same.setdefault(_normalised(question.text), []).append(question)
    if not 0 <= num_eval < len(same):
        raise InputError(f"--eval-questions (num_eval) is {num_eval}, of {len(same)} distinct questions; "
                         "0 up to one less than the number of questions is accepted")
    keys = sorted(same, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    train = [question for key in keys[num_eval:] for question in same[key]]
    return train, [same[key][0] for key in keys[:num_eval]]


# --------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Form:
    """How a question and a principle become a prompt, everywhere in a run.

    The prefill, such as "<reasoning>", is part of the prompt. Rewards, samples and evaluation count
    it as written by the completion (policy.decode puts it first); scores leave it out.
    """

    examples: tuple = ()  # of Example: earlier turns
    prefill: str = ""

    def encode(self, tokenizer, pairs, max_length=None):
        """Token ids of each (question, principle), two texts. Raises as encode_prompts."""
        conversations = [build_messages(*pair, self.examples) for pair in pairs]
        return encode_prompts(tokenizer, conversations, max_length, self.prefill)


def build_messages(question_text, principle_text, examples=()):
    """The prompt as chat messages: two for each `Example`, then the question's."""
    messages = []
    for example in examples:
        messages += build_messages(example.question, example.principle)
        answer = TURN.format(reasoning=example.reasoning, answer=example.answer)
        messages.append({"role": "assistant", "content": answer})
    content = f"{question_text}\n\nPrinciple: {principle_text}\n{FORMAT_INSTRUCTION}"
    return [*messages, {"role": "user", "content": content}]


def encode_prompts(tokenizer, conversations, max_length=None, prefill=""):
    """Token ids, a list of int, of each conversation (chat messages) up to the model's turn.

    They go on through the `prefill`, as tokens of the joint text, and start with one BOS where the
    chat template or the tokenizer writes one; never with two. Raises InputError, naming question
    and principle, for a tokenizer without chat template, a prompt of more than `max_length` tokens
    (a cut could lose its principle), and a text with a control token such as "<end_of_turn>", which
    would forge a turn. (No escape suits every tokenizer.) Tags of the format are text: rewards and
    scores read completions only.
    """
    places = [_place(conversation) for conversation in conversations]
    _refuse_control(tokenizer, [("--prefill", prefill)])
    prompts = encode_texts(tokenizer, [text + prefill for text in _render_prompts(tokenizer, conversations, places)])
    for where, ids in zip(places, prompts):
        if max_length is not None and len(ids) > max_length:
            raise InputError(f"{where}: the prompt has {len(ids)} tokens; at most {max_length} are accepted")
    return prompts


def check_lengths(tokenizer, questions, principles, max_length, form=Form()):
    """The two longest prompts, as tokens, of Q questions under K principles, all texts.

    Raises InputError for what `encode_prompts` refuses, before the first step. All questions are
    encoded under the first principle, and the longest of these under all principles; for the rest

        length(q, p) = length(q, first p) + length(longest q, p) - length(longest q, first p)

    may be off by a token or two where no fixed boundary of tokens lies between the two texts (as in
    SentencePiece): each pair that comes within SEAM tokens of the limit is encoded too.
    """
    def lengths(pairs):
        blocks = [pairs[start : start + 512] for start in range(0, len(pairs), 512)]
        return [len(ids) for block in blocks for ids in form.encode(tokenizer, block, max_length)]

    of_questions = lengths([(question, principles[0]) for question in questions])  # [Q]
    most = max(of_questions)
    longest = questions[of_questions.index(most)]
    of_principles = lengths([(longest, principle) for principle in principles])  # [K]
    near = [(question, principle) for question, a in zip(questions, of_questions)
            for principle, b in zip(principles, of_principles) if a + b - most > max_length - SEAM]
    hard = [(longest, principle) for principle in principles] + near
    hard = sorted(zip(of_principles + lengths(near), hard))[-2:]
    return form.encode(tokenizer, [pair for _, pair in hard], max_length)


def encode_preferences(tokenizer, pairs, end, max_length=None):
    """(prompt, chosen, rejected) token ids of each pair; both responses end with the token `end`.

    Messages become a prompt as in `encode_prompts`; strings stay as they are, control tokens too
    (their author's own chat format), after one BOS if the tokenizer writes one. Prompt and response
    are tokenised as one text, as in TRL; where a token reaches over the seam, the prompt ends
    before it. Raises InputError, naming file and line, for what `encode_prompts` refuses, for a
    control token in a response, and for a pair of more than `max_length` tokens.
    """
    _refuse_control(tokenizer, [(f"{pair.where}: {side} {_short(text)}", text) for pair in pairs
                                for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))])
    chats = [pair for pair in pairs if not isinstance(pair.prompt, str)]
    rendered = iter(_render_prompts(tokenizer, [pair.prompt for pair in chats], [pair.where for pair in chats]))
    prompts = [pair.prompt if isinstance(pair.prompt, str) else next(rendered) for pair in pairs]
    alone = encode_texts(tokenizer, prompts)
    chosen = encode_texts(tokenizer, [prompt + pair.chosen for prompt, pair in zip(prompts, pairs)])
    rejected = encode_texts(tokenizer, [prompt + pair.rejected for prompt, pair in zip(prompts, pairs)])
    encoded = []
    for pair, *ids in zip(pairs, alone, chosen, rejected):
        shared = len(os.path.commonprefix(ids))  # it takes lists too
        prompt, *responses = ids[0][:shared], *([*joint[shared:], end] for joint in ids[1:])
        length = shared + max(map(len, responses))
        if shared < 2 or (max_length is not None and length > max_length):
            raise InputError(f"{pair.where}: {_short(pair.text)} and its longer response have {length} tokens, the "
                             f"prompt {shared}; a prompt of 2 or more and {max_length} in all are accepted")
        encoded.append((prompt, *responses))
    return encoded


def encode_texts(tokenizer, texts):
    """Token ids of rendered texts, with one BOS first where text or tokenizer has one.

    One of the template's counts where only white space stands before it: further in it is a marker
    of turns, or the end of one where one token is both.
    """
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    encoded = []
    for ids in _encode(tokenizer, texts):  # without special tokens: a BOS in it is the text's
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if adds_bos and (bos not in ids or tokenizer.decode(ids[: ids.index(bos)]).strip()):
            ids = [bos, *ids]
        encoded.append(ids)
    return encoded


def encode_after(tokenizer, context, text):
    """Token ids of `text` where it follows the text `context`: what tokenising both together adds.

    (Alone, SentencePiece would begin `text` with a space.) Where one token spans the seam, as
    GPT-2's "><", the model has read the context already, and `text` is as after a line break or
    full stop.
    """
    for before in (context, "\n", "."):
        alone, joint = _encode(tokenizer, [before, before + text])
        if joint[: len(alone)] == alone:
            return joint[len(alone) :]
    return _encode(tokenizer, [text])[0]


def render(tokenizer, conversation, where, **options):
    """The text that the chat template makes of a conversation, on the run's date (see set_date).

    Raises InputError, with `where`, where it makes none, and where it drops a message.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r}: has no chat template; one from an "
                         "instruction-tuned model, or with chat_template set, is accepted") from None
    if "strftime_now" in template:
        template = _date_macro(getattr(tokenizer, "run_date", None) or set_date(tokenizer)) + template
    # Thinking is off for Qwen-3 (other templates ignore it): with a <think> block first, no
    # completion would earn the format reward.
    options = {"chat_template": template, "tokenize": False, "enable_thinking": False} | options
    try:
        text = tokenizer.apply_chat_template(conversation, **options)
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(f"{where}: the chat template refuses it ({error}); roles and an order of turns that it knows "
                         "are accepted") from None
    left = text  # without the messages found in it: two equal ones must be there twice
    for message in sorted(conversation, key=lambda message: -len(message["content"])):
        content = message["content"].strip()
        if message["role"] == "assistant":  # Qwen-3 leaves out the thoughts of earlier turns
            content = content.rpartition("</think>")[2].strip()
        if content not in left:
            raise InputError(f"{where}: the chat template loses the {message['role']} message {_short(content)}; one "
                             "that writes every message is accepted")
        left = left.replace(content, "\n", 1)
    return text


def set_date(tokenizer, date=None):
    """Fix (and return) the date that chat templates read: `date` (YYYY-MM-DD), or today's.

    Llama-3.2's, among others, writes it into every prompt. A run has one date, after a resume too;
    it is kept as `tokenizer.run_date`, which is never saved with the tokenizer.
    """
    try:
        tokenizer.run_date = datetime.date.fromisoformat(date or datetime.date.today().isoformat()).isoformat()
    except (TypeError, ValueError):
        raise InputError(f"date: got {_short(date)}; YYYY-MM-DD is accepted") from None
    return tokenizer.run_date


def prompt_fingerprint(tokenizer, generation_config=None, form=Form()):
    """A sha256 of what shapes a prompt and ends a completion; a resumed run must find the same.

    Chat template, tokenizer (vocabulary, added tokens, normaliser), special and end tokens, and the
    tokens of one prompt, in which examples, prefill and the run's date show.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else {
        "vocabulary": tokenizer.get_vocab(), "added": {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    }
    for last_call in "truncation", "padding":  # of the last call, not of the tokenizer
        state.pop(last_call, None)
    prompt = form.encode(tokenizer, [("2 + 3?", "Be brief.")])[0]
    end = getattr(generation_config, "eos_token_id", None)
    parts = [tokenizer.chat_template, state, tokenizer.special_tokens_map, prompt, end]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _date_macro(date):
    """A template's `strftime_now` that always gives `date`; a macro, since no function is taken."""
    day = datetime.datetime.fromisoformat(date)
    codes = {f"%{code}": day.strftime(f"%{code}") for code in "aAbBcdHIjmMpSUwWxXyYzZ"} | {
        "%-d": str(day.day), "%e": f"{day.day:2}", "%-m": str(day.month), "%F": date, "%T": "00:00:00",
    }
    replaced = "".join(f" | replace({code!r}, {text!r})" for code, text in codes.items())
    macro = "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}"
    return macro + "\n"  # jinja's trim_blocks takes it away


def _render_prompts(tokenizer, conversations, places):
    """The texts of prompts, up to the model's turn, without a control token in any message."""
    placed = list(zip(places, conversations))
    _refuse_control(tokenizer, [(where if turn is turns[-1] else f"{where}, an earlier turn", turn["content"])
                                for where, turns in placed for turn in turns])
    return [render(tokenizer, turns, where, add_generation_prompt=True) for where, turns in placed]


def _place(conversation):
    question, _, rest = conversation[-1]["content"].partition("\n\nPrinciple: ")
    principle = rest.partition("\n")[0]
    return f"question {_short(question)}, principle {_short(principle)}"


def _encode(tokenizer, texts):
    """Token ids of each text as it stands, in one call, which a fast tokenizer parallelises."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def _refuse_control(tokenizer, texts):
    """Raises InputError for the first of (where, text) that holds a control token."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    harmless = {tokenizer.unk_token_id, *_encode(tokenizer, [FORMAT_INSTRUCTION])[0]}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}  # GPT-2's unknown token is one
    special = special - harmless | ends
    places = {}
    for where, text in texts:  # an example is in every prompt: once is enough
        places.setdefault(text, where)
    for where, ids in zip(places.values(), _encode(tokenizer, places)):
        if found := special.intersection(ids):
            token = min(tokenizer.convert_ids_to_tokens(list(found)))
            raise InputError(f"{where}: contains {token!r}, a control token of the tokenizer; "
                             "text without control tokens is accepted")


# --------------------------------------------------------------------------------------------------
# Rows of files and data sets


def _check_principles(path, rows):
    """Principles from (where, dict) pairs."""
    principles, seen = [], {}
    for where, row in rows:
        if unknown := sorted(row.keys() - {"principle", "id", "negative"}):
            raise InputError(f"{where}: unknown {_short(unknown[0])}; principle, id, negative are accepted")
        row = {"id": f"p{len(principles) + 1}", **row}
        text, name = _text(where, row, "principle"), _text(where, row, "id")
        negative = _text(where, row, "negative") if "negative" in row else None
        for field, value, key in ("principle", text, _normalised(text)), ("id", name, name):
            first = seen.setdefault((field, key), where)
            if first != where:
                line = first.rpartition(":")[2]
                raise InputError(f"{where}: {field} {_short(value)} is on line {line} too; different ones are accepted")
        principles.append(Principle(name, text, negative))
    if len(principles) < 2:
        raise InputError(f"{_name(path)}: has {len(principles)} principle(s); 2 or more are accepted")
    return principles


def _preference(where, row):
    chosen, rejected = _conversation(where, row, "chosen"), _conversation(where, row, "rejected")
    prompt = None if row.get("prompt") is None else _conversation(where, row, "prompt")
    if len({type(value) for value in (chosen, rejected, prompt) if value is not None}) > 1:
        raise InputError(f"{where}: prompt, chosen and rejected mix text and messages; one kind is accepted")
    if chosen == rejected:
        raise InputError(f"{where}: chosen and rejected are the same, {_short(chosen)}; different ones are accepted")
    if prompt is None:  # as TRL reads it: the common beginning, but for a space at its end
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        same -= isinstance(chosen, str) and chosen[:same].endswith(" ")
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if isinstance(chosen, list):
        for field, value in ("chosen", chosen), ("rejected", rejected):
            if len(value) != 1 or value[0]["role"] != "assistant":
                raise InputError(f"{where}: {field} is {_short(value)} after the prompt; one assistant message is "
                                 "accepted")
        chosen, rejected = chosen[0]["content"], rejected[0]["content"]
    for field, value in ("prompt", prompt), ("chosen", chosen), ("rejected", rejected):
        if not value or (isinstance(value, str) and not value.strip()):
            raise InputError(f"{where}: {field} is empty; text or messages are accepted (without the key prompt, "
                             "chosen and rejected must begin alike and then differ)")
    answer = None if row.get("answer") is None else _answer(where, row, "answer")
    return Preference(prompt, chosen, rejected, answer, where)


def _conversation(where, row, field):
    """row[field]: text as it stands, or messages, of which role and content are kept."""
    accepted = 'text or a list of {"role", "content"} messages'
    if not isinstance(row.get(field), list):
        _text(where, row, field, accepted)
        return row[field]
    for message in row[field]:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f"{where}: {field} holds {_short(message)}; {accepted} is accepted")
        _text(where, message, "content")
        if not re.fullmatch(r"\w+", _text(where, message, "role")):  # a template may write it as is
            raise InputError(f"{where}: role is {_short(message['role'])}; a word such as user is accepted")
    return [{"role": message["role"], "content": message["content"]} for message in row[field]]


def _text(where, row, field, accepted="a non-empty string"):
    """The stripped text of a field."""
    value = row.get(field)
    if field not in row:
        raise InputError(f"{where}: {field} is missing in {_short(row)}; {accepted} is accepted")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {field} is {_short(value)}; {accepted} is accepted")
    if bad := re.search("[\0\ud800-\udfff]", value):  # JSON can spell lone surrogates, UTF-8 cannot
        raise InputError(f"{where}: {field} contains {bad[0]!r}; Unicode text without NUL is accepted")
    return value.strip()


def _answer(where, row, field):
    """The text of an answer; of GSM8K's "working #### 5" the 5."""
    value = row.get(field)
    if type(value) is int or (type(value) is float and math.isfinite(value)):  # 1e999 parses as inf
        row = row | {field: str(value)}
    text = _text(where, row, field, "a non-empty string or a number")
    return text.rpartition("####")[2].strip() or text


def _refuse_near_names(where, row, names, required, optional):
    """Raises InputError for a field that is missing where a name nearly the same is there.

    For an optional one only case and spaces may differ: a data set may well have `answers` too.
    """
    for field in {**dict.fromkeys(required), **dict.fromkeys(optional)}:
        if field in names:
            continue
        near = [name for name in names if name.strip().casefold() == field.casefold()]
        if not near and field in required:
            near = difflib.get_close_matches(field, names, 1, 0.75)
        if near:
            raise InputError(f"{where}: has no column {field!r}; did you mean {_short(near[0])}? {field} is missing in "
                             f"{_short(row)}; a non-empty string under that name is accepted")


def _rows(source, config=None, split="train", seed=None):
    """(where, row, names) of each row of a file, or of a data set of the hub.

    A cell of a table without a value is left out of its row; `names` are those of all its columns.
    """
    _check_file(source)
    ending, readers = Path(source).suffix.lower(), {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    rows = readers[ending](source) if ending in readers else _hub_rows(source, config, split, seed)
    number = 0
    try:
        for where, row in rows:
            number += 1
            filled = {name: value for name, value in row.items() if value is not None or ending == ".jsonl"}
            yield where, filled, row.keys()
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{_name(source)}: needs the library {error.name} (pip install {error.name}); a .jsonl or "
                         ".csv file is accepted without it") from None
    except Exception as error:  # of a library, the hub or the network
        if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
            error = error.__cause__  # it says what went wrong
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = " ".join(lines[:2])  # the second may list the choices
        wrong = "cannot be read" + (f" after row {number}" if number else "")
        raise InputError(f"{_name(source)}: {wrong} ({reason}); a .jsonl, .parquet or .csv file or a data set of the "
                         "hub is accepted") from None


def _csv_rows(path):
    """(where, row), of one or more lines, each cell as it stands, or None for an empty one."""
    csv.field_size_limit(MAX_LINE)
    reader, names, line = csv.reader((text for _, text in _lines(path, ".csv")), strict=True), None, 1
    try:
        for cells in reader:
            where, line = f"{_name(path)}:{line}", reader.line_num + 1
            if not any(cells):  # a blank line, or one of commas alone
                continue
            if names is None:
                names = cells
                if twice := [name for name, count in Counter(names).items() if name and count > 1]:
                    raise InputError(f"{where}: has two columns {_short(twice[0])}; different names are accepted")
            elif len(cells) != len(names):
                raise InputError(f'{where}: has {len(cells)} cells, and the header {len(names)}; as many, with "…" '
                                 "around a cell that holds a comma, are accepted")
            else:
                yield where, {name: cell or None for name, cell in zip(names, cells) if name}
    except csv.Error as error:
        raise InputError(f'{_name(path)}:{line}: {error}; cells between commas, with "…" around one that holds a '
                         "comma or a line break, are accepted") from None


def _parquet_rows(path):
    import pyarrow.parquet as parquet  # only here: a heavy import, and not everywhere installed

    with parquet.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{_name(path)}:{number}", row


def _hub_rows(source, config, split, seed):
    """(where, row) of a data set of the hub; with a seed it is streamed and shuffled."""
    import datasets  # as pyarrow

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # _rows reports errors
    arguments = {"path": str(source), "name": config, "split": split, "streaming": seed is not None}
    try:
        rows = datasets.load_dataset(**arguments)
    except RuntimeError as error:  # an older set, with a loading script: the hub's conversion
        if "scripts are no longer supported" not in str(error):
            raise
        rows = datasets.load_dataset(**arguments, revision="refs/convert/parquet")
    if seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    for number, row in enumerate(rows, start=1):
        yield f"{_name(source)}:{number}" if seed is None else f"{_name(source)}: a row", row


def _json_rows(path, *endings):
    """Yield ("file:number", dict) of each line that is not blank."""
    for where, text in _lines(path, *endings or [".jsonl"]):
        if text := text.rstrip():
            yield where, _json_object(where, text)


def _lines(path, *endings):
    """Yield ("file:number", text) of each line, with its end, of a file with one of the endings."""
    _check_file(path, *endings)
    where = _name(path)
    try:
        with open(path, "rb") as file:  # not str.splitlines: U+2028 ends no line
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                where = f"{_name(path)}:{number}"
                if len(raw) > MAX_LINE:
                    raise InputError(f"{where}: the line is too long; at most {MAX_LINE} bytes are accepted")
                yield where, raw.decode().lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is {raw[error.start]:#04x}; UTF-8 is accepted") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); a text file is accepted") from None


def _json_object(where, text):
    """The dict on a line, without NaN, Infinity and repeated keys, which Python would let pass."""
    def refuse_constant(name):
        raise ValueError(f"{name} is not a JSON value")

    def refuse_repeats(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            raise ValueError(f"key {_short(Counter(key for key, _ in pairs).most_common(1)[0][0])} is repeated")
        return row

    try:
        value = json.loads(text, object_pairs_hook=refuse_repeats, parse_constant=refuse_constant)
        if isinstance(value, dict):
            return value
        wrong = f"{_short(value)} is not an object"
    except json.JSONDecodeError as error:
        rest = text[error.pos:] or "end of line"
        wrong = f"JSON breaks at column {error.colno}, {_short(rest)} ({error.msg})"
    except RecursionError:
        wrong = "JSON is nested too deeply"
    except ValueError as error:  # of the two above, or Python's for over 4300 digits
        wrong = str(error)
    raise InputError(f"{where}: {wrong}; one JSON object a line is accepted")


def _check_file(path, *endings):
    """Raises InputError for another ending, and for a pipe or a device, which may never end."""
    if endings and not str(path).lower().endswith(endings):
        accepted = " and ".join(endings)
        raise InputError(f"{_name(path)}: ends in {Path(path).suffix!r}; {accepted} files are accepted")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{_name(path)}: is a pipe or a device; a file is accepted")


def _normalised(text):
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _name(path):
    return str(path) if str(path).isprintable() else repr(str(path))


def _short(value):
    """`value` on one line, in 40 characters."""
    shown = repr(value[:40]) if isinstance(value, str) else reprlib.repr(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"
