"""Principles, questions and prompts: what a run reads, and errors that say how to mend it.

Files are UTF-8 (a byte-order mark and CRLF are accepted), one item a line of up to 1 MB, blank lines skipped:

    principles.txt      a principle; lines that start with `#` are comments
    principles.jsonl    {"principle": "Show every step.", "id": "steps", "negative": "Skip the steps."}
                        `id` and `negative` are optional, other keys refused
    questions.jsonl     {"question": "2 + 3?", "answer": 5}      optional answer; see load_questions
    preferences.jsonl   {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}       TRL's formats, see load_preferences

The prompt is a single user message, because some chat templates refuse a system role:

    {question}

    Principle: {principle}
    Write <reasoning>…</reasoning><answer>…</answer>.

To copy: the standard library is all it imports; `encode_prompts` is handed a Hugging Face tokenizer.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import reprlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

MAX_LINE = 1_000_000  # bytes; a longer line means that the wrong file was named
SHUFFLE_BUFFER = 10_000  # rows of a hub data set from which the next one is drawn
FORMAT_INSTRUCTION = "Write <reasoning>…</reasoning><answer>…</answer>."


class InputError(ValueError):
    """A user's mistake, told in one line: `{file}:{line}: {what is wrong}; {what is accepted}`."""

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
class Preference:
    prompt: str | list  # text as it stands, or chat messages
    chosen: str  # what the model should write after it
    rejected: str  # what it should not
    answer: str | None = None
    where: str = "a pair"  # file and line, for errors

    @property
    def text(self):
        """The prompt as one text: what `split_questions` splits by."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(m["content"] for m in self.prompt)


def load_principles(path):
    """Two or more `Principle`s from a .txt or .jsonl file; the n-th without an `id` is called "p{n}".

    Raises InputError for a file or line it cannot take, for fewer than two principles (one alone cannot be
    told apart from anything), and for a repeated id or text (texts compared without case and spacing).
    """
    lines = _lines(path, ".txt", ".jsonl")
    if str(path).lower().endswith(".txt"):
        rows = [(where, {"principle": text}) for where, text in lines if not text.lstrip().startswith("#")]
    else:
        rows = [(where, _json_object(where, text)) for where, text in lines]
    return _check_principles(path, rows)


def save_principles(path, principles):
    """Write a .jsonl file that `load_principles` reads back equal (but for white space around a text).

    Raises InputError for what `load_principles` would refuse, and for a file it cannot write.
    """
    _check_ending(path, ".jsonl")
    rows = [{"id": p.id, "principle": p.text} | ({} if p.negative is None else {"negative": p.negative})
            for p in principles]
    _check_principles(path, [(f"{_name(path)}:{n}", row) for n, row in enumerate(rows, start=1)])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_aside(path, lambda aside: aside.write_bytes(text.encode()))
    except OSError as error:
        wrong = f"cannot be written ({error.strerror})"
        raise InputError(f"{_name(path)}: {wrong}; a file in a writable folder is accepted") from None


def write_aside(path, write):
    """`write(aside)`, then `aside` is moved to `path`: a crash leaves the old file or the new one, never half."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def load_questions(source, question_field=None, answer_field=None, config=None, split="train", limit=None, seed=0):
    """Distinct `Question`s of a .jsonl, .parquet or .csv file, in its order; of several with one text the first stays.

    Any other `source` is a data set of the hub, or a folder laid out like one, in `config` and `split`. It is streamed
    through a shuffled buffer, and only until `limit` questions are found: of millions of rows few are downloaded. The
    buffer holds SHUFFLE_BUFFER rows of up to ten of its files: a set that is sorted, say by task, is not drawn evenly.

    Fields: `question` and `answer`, else `source` and `target` (CoT-Collection); others are ignored. The answer is
    optional unless its field is named; a number becomes its Python text (5 -> "5", 2.50 -> "2.5"), and of GSM8K's
    "working #### 5" the 5 is taken.
    Raises InputError for a source or row it cannot take, and for a source without questions.
    """
    questions, is_file = {}, Path(source).suffix.lower() in FILE_KINDS
    for where, row in _rows(source, config, split, None if is_file else seed):
        question = question_field or ("source" if "question" not in row and "source" in row else "question")
        answer = answer_field or ("target" if question == "source" else "answer")
        text = _text(where, row, question)
        found = _answer(where, row, answer) if answer in row or answer_field else None
        questions.setdefault(text, Question(text, found))
        if not is_file and len(questions) == limit:
            break
    if not questions:
        raise InputError(f'{_name(source)}: has no question; rows like {{"question": "2 + 3?"}} are accepted')
    return list(questions.values())


def option(default, help):
    """A field of the dataclass that a command line is made from (transformers.HfArgumentParser)."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class DatasetConfig:
    """The flags that say where questions come from: train.py and metrics.py share them."""

    dataset: str | None = option(None, "questions: .jsonl, .parquet, .csv or a hub id; else the embedded task's")
    dataset_config: str | None = option(None, "configuration of a hub data set, such as main of openai/gsm8k")
    dataset_train_split: str = option("train", "split of a hub data set; the held-out questions are of it too")
    question_field: str | None = option(None, "where it is not question or source")
    answer_field: str | None = option(None, "where it is not answer, or target beside source; optional, never rewarded")

    @property
    def is_hub_set(self):
        return self.dataset is not None and Path(self.dataset).suffix.lower() not in FILE_KINDS

    def load_questions(self, limit, seed):
        """See the function; `limit` is how many questions the run can use."""
        fields = self.question_field, self.answer_field
        return load_questions(self.dataset, *fields, self.dataset_config, self.dataset_train_split, limit, seed)


def load_preferences(source):
    """`Preference`s from a .jsonl file, or through `datasets` from a .parquet or .csv file or a hub id's train split.

    TRL's preference formats: `prompt`, `chosen`, `rejected`, each a string, or each a list of {"role", "content"}
    messages with one assistant message as the response. Without `prompt` the common beginning of chosen and rejected
    is the prompt. Strings are used as they stand; messages go through the chat template. `answer` is optional, as for
    questions; other keys, of a message too, are ignored.
    Raises InputError for a row it cannot take, or a source it cannot read.
    """
    pairs = [_preference(where, row) for where, row in _rows(source)]
    if not pairs:
        raise InputError(f"{_name(source)}: has no pair; rows with prompt, chosen and rejected are accepted")
    return pairs


def split_questions(questions, num_eval, seed):
    """Split into (train, held_out), exactly `num_eval` of them held out, each in an order drawn from `seed`.

    Takes `Question`s, or `Preference`s, which it splits by their prompts (of several with one prompt in held_out the
    first by its text is kept).

    Decided by a hash of every text: the order of the file does not matter, and adding questions never moves
    one from train to held_out. Texts equal but for case and spacing fall on one side; held_out keeps one.
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


def build_messages(question_text, principle_text):
    """The prompt (see the top of this file) as a list of one chat message."""
    content = f"{question_text}\n\nPrinciple: {principle_text}\n{FORMAT_INSTRUCTION}"
    return [{"role": "user", "content": content}]


def encode_prompts(tokenizer, conversations, max_length=None, places=None):
    """Token ids, a list of int for each conversation (a list of chat messages), up to the model's turn.

    They start with one BOS where the chat template or the tokenizer writes one; never with two.
    Raises InputError for a tokenizer without chat template, a prompt of more than `max_length` tokens (a cut
    could lose its principle), and a text in which the tokenizer reads a control token such as "<end_of_turn>", which
    would forge a turn. Refused, not escaped: the model should read what the file says, and no escape suits every
    tokenizer. Anything else is text: a tag such as </reasoning> too, for reward and scores read completions only.
    An error names the conversation by its question and principle, or by its place in `places`.
    """
    control = _control_tokens(tokenizer)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    prompts = []
    for number, conversation in enumerate(conversations):
        content = "\n".join(message["content"] for message in conversation)
        question, _, rest = content.partition("\n\nPrinciple: ")
        principle = rest.partition("\n")[0]
        where = places[number] if places else f"question {_short(question)}, principle {_short(principle)}"
        _refuse_control(where, tokenizer, control, tokenizer(content, add_special_tokens=False)["input_ids"])
        text = render(tokenizer, conversation, where, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # so a BOS in it is the template's
        if adds_bos and bos not in ids:
            ids = [bos, *ids]
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if max_length is not None and len(ids) > max_length:
            raise InputError(f"{where}: the prompt has {len(ids)} tokens; at most {max_length} are accepted")
        prompts.append(ids)
    return prompts


def render(tokenizer, conversation, where, **options):
    """The text that the chat template makes of a conversation; raises InputError, with `where`, where it makes none."""
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r}: has no chat template; one from an "
                         "instruction-tuned model, or with chat_template set, is accepted") from None
    # Thinking is off for Qwen-3's sake (others ignore it): with a <think> block first, no completion would earn the
    # format reward.
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, enable_thinking=False, **options)
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(f"{where}: the chat template refuses it ({error}); roles and an order of turns that it knows "
                         "are accepted") from None
    if conversation[-1]["content"].strip() not in text:
        raise InputError(f"{where}: the chat template loses the text; one that writes every message is accepted")
    return text


def _control_tokens(tokenizer):
    """Ids that make a turn or an end where the tokenizer reads them; a tag of the format that is one makes neither."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.unk_token_id, *tokenizer(FORMAT_INSTRUCTION, add_special_tokens=False)["input_ids"]}
    return special | {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}  # GPT-2's unknown token is its end too


def _refuse_control(where, tokenizer, control, ids):
    if found := control.intersection(ids):
        token = min(tokenizer.convert_ids_to_tokens(list(found)))
        raise InputError(f"{where}: contains {token!r}, a control token of the tokenizer; "
                         "text without control tokens is accepted")


def encode_preferences(tokenizer, pairs, end, max_length=None):
    """(prompt, chosen, rejected) token ids of each pair; both responses end with the token `end`.

    Messages become a prompt as in `encode_prompts`. Strings are tokenised as they stand, after one BOS if the tokenizer
    writes one: the control tokens of such a prompt are its author's own chat format. Raises InputError, naming the
    pair's file and line, for what `encode_prompts` refuses, for a control token in a response, which has one turn, and
    for a pair of more than `max_length` tokens.
    """
    control, encoded = _control_tokens(tokenizer), []
    chats = [pair for pair in pairs if not isinstance(pair.prompt, str)]
    prompts = iter(encode_prompts(tokenizer, [pair.prompt for pair in chats], places=[pair.where for pair in chats]))
    for pair in pairs:
        prompt = tokenizer(pair.prompt)["input_ids"] if isinstance(pair.prompt, str) else next(prompts)
        while tokenizer.bos_token_id is not None and prompt[:2] == [tokenizer.bos_token_id] * 2:
            prompt = prompt[1:]
        responses = []
        for side, text in ("chosen", pair.chosen), ("rejected", pair.rejected):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            _refuse_control(f"{pair.where}: {side} {_short(text)}", tokenizer, control, ids)
            responses.append([*ids, end])
        length = len(prompt) + max(map(len, responses))
        if len(prompt) < 2 or (max_length is not None and length > max_length):
            raise InputError(f"{pair.where}: {_short(pair.text)} and its longer response have {length} tokens, the "
                             f"prompt {len(prompt)}; a prompt of 2 or more and {max_length} in all are accepted")
        encoded.append((prompt, *responses))
    return encoded


def _preference(where, row):
    chosen, rejected = _conversation(where, row, "chosen"), _conversation(where, row, "rejected")
    prompt = None if row.get("prompt") is None else _conversation(where, row, "prompt")
    if len({type(value) for value in (chosen, rejected, prompt) if value is not None}) > 1:
        raise InputError(f"{where}: prompt, chosen and rejected mix text and messages; one kind is accepted")
    if chosen == rejected:
        raise InputError(f"{where}: chosen and rejected are the same, {_short(chosen)}; different ones are accepted")
    if prompt is None:  # implicit, as TRL reads it: the common beginning, a space before the responses left to them
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
        if not re.fullmatch(r"\w+", _text(where, message, "role")):  # a template may write it as it stands
            raise InputError(f"{where}: role is {_short(message['role'])}; a word such as user is accepted")
    return [{"role": message["role"], "content": message["content"]} for message in row[field]]


FILE_KINDS = {".jsonl": None, ".parquet": "parquet", ".csv": "csv"}  # ending -> what `datasets` calls it


def _rows(source, config=None, split="train", seed=None):
    """(where, dict) of each row of a .jsonl file, or of a data set that the library `datasets` reads.

    With a seed a data set of the hub is streamed and shuffled. A cell without a value is left out of its row.
    """
    _check_kind(source)
    ending = Path(source).suffix.lower()
    if ending == ".jsonl":
        for where, line in _lines(source, ".jsonl"):
            yield where, _json_object(where, line)
        return
    try:
        import datasets  # only here: a heavy import, and not everywhere installed
    except ImportError:
        raise InputError(f"{_name(source)}: needs the library datasets (pip install datasets); a .jsonl file is "
                         "accepted without it") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told below
    if ending in FILE_KINDS:
        arguments = {"path": FILE_KINDS[ending], "data_files": str(source), "split": "train"}
    else:
        arguments = {"path": str(source), "name": config, "split": split, "streaming": seed is not None}
    try:
        try:
            rows = datasets.load_dataset(**arguments)
        except RuntimeError as error:  # a set with a loading script, as older ones have: the hub's conversion
            if "scripts are no longer supported" not in str(error):
                raise
            rows = datasets.load_dataset(**arguments, revision="refs/convert/parquet")
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for number, row in enumerate(rows, start=1):
            where = f"{_name(source)}:{number}" if seed is None else f"{_name(source)}: a row"
            yield where, {key: value for key, value in row.items() if value is not None}
    except Exception as error:  # the library raises its own, pyarrow's, the hub's and the network's
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])  # choices are on the second
        raise InputError(f"{_name(source)}: {reason}; a .jsonl, .parquet or .csv file or a data set of the hub "
                         "is accepted") from None


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
                wrong = f"{field} {_short(value)} is on line {first.rpartition(':')[2]} too"
                raise InputError(f"{where}: {wrong}; different ones are accepted")
        principles.append(Principle(name, text, negative))
    if len(principles) < 2:
        raise InputError(f"{_name(path)}: has {len(principles)} principle(s); 2 or more are accepted")
    return principles


def _lines(path, *endings):
    """Yield ("file:number", text) of each line that is not blank."""
    _check_ending(path, *endings)
    where = _name(path)
    _check_kind(path)
    try:
        with open(path, "rb") as file:  # bytes: str.splitlines would split at U+2028, legal in a JSON string
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                where = f"{_name(path)}:{number}"
                if len(raw) > MAX_LINE:
                    raise InputError(f"{where}: the line is too long; at most {MAX_LINE} bytes are accepted")
                text = raw.decode().lstrip("\ufeff").rstrip()
                if text:
                    yield where, text
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start + 1} is {raw[error.start]:#04x}"
        raise InputError(f"{where}: {wrong}; text in UTF-8 is accepted") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); a text file is accepted") from None


def _json_object(where, text):
    """The dict on a line; NaN, Infinity and repeated keys, which Python would let pass, are refused."""
    def refuse_constant(name):
        raise ValueError(f"{name} is not a JSON value")

    def refuse_repeats(pairs):
        row = {}
        for key, value in pairs:
            if key in row:
                raise ValueError(f"key {_short(key)} is repeated")
            row[key] = value
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
    except ValueError as error:  # from the two above, or Python's own for a number of over 4300 digits
        wrong = str(error)
    raise InputError(f"{where}: {wrong}; one JSON object a line is accepted")


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


def check_flags(config):
    """Raises InputError for a setting that is an empty text, such as that of `--dataset "$FILE"` without a FILE."""
    for name, value in vars(config).items():
        if isinstance(value, str):
            flag = f"--{name.replace('_', '-')}"
            _text("the command line", {flag: value}, flag)


def at_least(config, **lowest):
    """Raises InputError for the first of these settings that is given and lower than its number here."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')}: got {value}; {low} or more is accepted")


def _check_kind(path):
    """Raises InputError for what could be read without end, or would wait for a writer: a device, a pipe."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{_name(path)}: is a pipe or a device; a file is accepted")


def _check_ending(path, *endings):
    if not str(path).lower().endswith(endings):
        ending = Path(path).suffix
        raise InputError(f"{_name(path)}: ends in {ending!r}; {' and '.join(endings)} files are accepted")


def _normalised(text):
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _name(path):
    return str(path) if str(path).isprintable() else repr(str(path))


def _short(value):
    """`value` on one line, in 40 characters."""
    shown = repr(value[:40]) if isinstance(value, str) else reprlib.repr(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"
