"""From a question and a principle to the tokens of a prompt, through the model's chat template.

The user's turn is

    {question}

    Principle: {principle}
    Write <reasoning>…</reasoning><answer>…</answer>.

Worked examples go before it as earlier turns, and the answer may be begun (PromptTemplate). Control
tokens are refused in every text that comes from outside: they would forge a turn.
"""

import contextlib
import datetime
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support.errors import InputError, TooLong
from support.files import Example, example_of
from support.rows import good, short
from support.writing import write_json

# What a configuration calls the length of its context; where there are several, the first counts.
CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions", "n_ctx",
    "seq_length", "context_length",
)
PLAIN_TEMPLATE = (  # for a base model: "User: 2 + 3?\n\nAssistant:"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SEAM = 8  # tokens by which a prompt may be longer than its parts add up to; see data.Fitting
PROMPT_FILE = "prompt.json"  # in a model's folder: the template of its questions
FORMAT_INSTRUCTION = "Write <reasoning>…</reasoning><answer>…</answer>."
TURN = "<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"  # in an example


def context_length(model) -> int:
    """Tokens that the model can read; 2^20 where its configuration does not say."""
    config = model.config.get_text_config(decoder=True)  # of a model that also reads images, the language part
    lengths = (getattr(config, name, None) for name in CONTEXT_NAMES)
    return next((n for n in lengths if isinstance(n, int)), 2**20)


def prompt_limit(model, new_tokens: int) -> int:
    """The most tokens of a prompt that leave room for `new_tokens` in the model's context.

    Raises InputError where that is not enough for any prompt.
    """
    context = context_length(model)
    if context < new_tokens + 2:
        raise InputError(f"--max-completion-length: got {new_tokens} tokens after the prompt, and a context of "
                         f"{context}; a lower number is accepted")
    return context - new_tokens


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: of generation config, tokenizer and chat template.

    They may disagree: Gemma-3's generation config lists <eos> and <end_of_turn>. The template's is
    the special token, if any, that it writes after the assistant's text.
    """
    ids = model.generation_config.eos_token_id
    ids = {*([ids] if isinstance(ids, int) else ids or []), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(InputError):  # a template that wants other turns; its first prompt will say so
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "some words"}]
            tail = render(tokenizer, turns, "a turn").rpartition("some words")[2].strip()
            first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
            added = tokenizer.added_tokens_decoder
            ids |= {i for i in first if i in added and added[i].special}
    return sorted(ids)


@dataclass(frozen=True)
class PromptTemplate:
    """How a question and a principle become a prompt, everywhere in a run.

    The prefill, such as "<reasoning>", is part of the prompt. Rewards, samples and evaluation count
    it as written by the completion (answers.decode puts it first); scores leave it out.
    """

    examples: tuple[Example, ...] = ()  # earlier turns
    prefill: str = ""
    source: str = field(default="", compare=False)  # where it comes from, for `describe`

    def encode(self, tokenizer, pairs, max_length=None):
        """Token ids of each (question, principle), two texts. Raises as `encode_prompts`."""
        return encode_prompts(tokenizer, self.messages(pairs), max_length, self.prefill)

    def messages(self, pairs):
        """Each (question, principle) as chat messages."""
        return [build_messages(*pair, self.examples) for pair in pairs]

    def describe(self) -> str:
        """The line that every command prints: what precedes a question, and what begins its answer."""
        count = len(self.examples)
        examples = f"{count or 'no'} worked example{'s' * (count != 1)} before each question"
        begun = f"the answer begun with {self.prefill}" if self.prefill else "no prefill"
        return f"prompt: {examples}, {begun}" + (f" ({self.source})" if self.source else "")

    def save(self, folder) -> None:
        """Write prompt.json into a model's folder, whose default it then is; see `of_folder`."""
        examples = [asdict(example) for example in self.examples]
        write_json(Path(folder) / PROMPT_FILE, {"examples": examples, "prefill": self.prefill})

    @classmethod
    def of_folder(cls, name: str) -> "PromptTemplate | None":
        """The template in a model's folder; None where it has no prompt.json, and for a hub id."""
        path = Path(name) / PROMPT_FILE
        if not path.is_file():
            return None
        where = f"{name}/{PROMPT_FILE}"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            examples, prefill = tuple(example_of(where, row) for row in stored["examples"]), stored["prefill"]
            if not isinstance(prefill, str):
                raise TypeError("prefill is no text")
        except InputError:
            raise
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: {type(error).__name__}: {error}; the file that a training writes is "
                             "accepted") from None
        return cls(examples, prefill, f"as {where} says")


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
    return [good(prompt) for prompt in try_prompts(tokenizer, conversations, max_length, prefill)]


def try_prompts(tokenizer, conversations, max_length=None, prefill="") -> list:
    """As `encode_prompts`, with the InputError in place of a prompt that is refused."""
    refuse_control(tokenizer, [("--prefill", prefill)])
    places = [_place(conversation) for conversation in conversations]
    texts = try_render(tokenizer, conversations, places)
    encoded = iter(encode_texts(tokenizer, [text + prefill for text in texts if isinstance(text, str)]))
    prompts = [next(encoded) if isinstance(text, str) else text for text in texts]
    for n, ids in enumerate(prompts):
        if isinstance(ids, list) and max_length is not None and len(ids) > max_length:
            prompts[n] = TooLong(f"{places[n]}: the prompt has {len(ids)} tokens; at most {max_length} are accepted")
    return prompts


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
            raise InputError(f"{where}: the chat template loses the {message['role']} message {short(content)}; one "
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
        raise InputError(f"date: got {short(date)}; YYYY-MM-DD is accepted") from None
    return tokenizer.run_date


def prompt_fingerprint(tokenizer, generation_config=None, template=PromptTemplate()):
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
    prompt = template.encode(tokenizer, [("2 + 3?", "Be brief.")])[0]
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


def try_render(tokenizer, conversations, places) -> list:
    """The text of each conversation up to the model's turn, or the InputError that refuses it.

    Refused are what `render` refuses, and a control token in any message.
    """
    found = control_tokens(tokenizer, [turn["content"] for turns in conversations for turn in turns])
    texts = []
    for where, turns in zip(places, conversations):
        try:
            for turn in turns:
                refuse(where if turn is turns[-1] else f"{where}, an earlier turn", found.get(turn["content"]))
            texts.append(render(tokenizer, turns, where, add_generation_prompt=True))
        except InputError as error:
            texts.append(error)
    return texts


def _place(conversation):
    question, _, rest = conversation[-1]["content"].partition("\n\nPrinciple: ")
    principle = rest.partition("\n")[0]
    return f"question {short(question)}, principle {short(principle)}"


def _encode(tokenizer, texts):
    """Token ids of each text as it stands, in one call, which a fast tokenizer parallelises."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def control_tokens(tokenizer, texts) -> dict[str, str]:
    """A control token of each text that has one."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    harmless = {tokenizer.unk_token_id, *_encode(tokenizer, [FORMAT_INSTRUCTION])[0]}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}  # GPT-2's unknown token is one
    special = special - harmless | ends
    texts = list(dict.fromkeys(texts))  # an example is in every prompt: once is enough
    found = {text: special.intersection(ids) for text, ids in zip(texts, _encode(tokenizer, texts))}
    return {text: min(tokenizer.convert_ids_to_tokens(list(ids))) for text, ids in found.items() if ids}


def refuse_control(tokenizer, texts) -> None:
    """Raises InputError for the first of (where, text) that holds a control token."""
    found = control_tokens(tokenizer, [text for _, text in texts])
    for where, text in texts:
        refuse(where, found.get(text))


def refuse(where, token: str | None) -> None:
    """Raises InputError where a control token was found."""
    if token:
        raise InputError(f"{where}: contains {token!r}, a control token of the tokenizer; text without control tokens "
                         "is accepted")


def turn_end(model, tokenizer) -> int:
    """The token that ends the assistant's turn in the chat template (Gemma-3: not its <eos>)."""
    ends = set(eos_ids(model, tokenizer))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if tokenizer.chat_template:
        text = render(tokenizer, turns, "a turn of user and assistant")
        written = [t for t in tokenizer(text, add_special_tokens=False)["input_ids"] if t in ends]
        if written:
            return written[-1]
    return tokenizer.eos_token_id
