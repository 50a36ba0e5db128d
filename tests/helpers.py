"""What several tests need: a file, the message of a refusal, a small tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.errors import InputError
from support.files import read_questions
from support.prompts import build_messages
from support.rows import LeftOut, is_file

TURNS = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"


def load_questions(source, question_field=None, answer_field=None, config=None, split="train", limit=None, seed=0):
    """All `Question`s of a file, or `limit` of a data set: a list of those of `read_questions`."""
    left_out, questions = LeftOut(source), []
    for question in read_questions(source, left_out, question_field, answer_field, config, split, seed):
        questions.append(question)
        if not is_file(source) and len(questions) == limit:
            break
    left_out.tell(len(questions), "questions")
    return questions


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(function, *args, **kwargs):
    """The message of the InputError that the call must raise, checked for the form that every message has."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, f"`error: ...` must be one line; escape the value: {message!r}"
    assert message.isprintable(), f"control characters must not reach the terminal: {message!r}"
    assert len(message) < 400, f"long values must be shortened: {len(message)} characters"
    assert "; " in message and message.endswith("accepted"), f"say what is accepted, at the end: {message}"
    return message



def tokenizer_with(template, post_bos=False, bos="<s>", specials=()):
    """A byte-level BPE tokenizer of a few hundred tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = ["user model Principle: Write <reasoning></reasoning><answer></answer>."]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|turn|>", "<|end|>", *specials]
    raw.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if post_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token="</s>", chat_template=template)


def chat(question="2 + 3?", principle="Be brief."):
    return build_messages(question, principle)


def metaspace_tokenizer(kind=models.BPE, vocabulary=300, template="{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}[model]\n"):
    """As in Llama-2 and Mistral: words begin with a space, a text too, and nothing bounds a token but the vocabulary."""
    texts = ["[user] What is 2 + 3 ?\n\nPrinciple: Be brief.\nWrite <reasoning> how </reasoning><answer> 5 </answer>.\n[model]\n 5 pens"] * 9
    letters = [*map(chr, range(32, 127)), "\n", "\u2581", "\u2026"]
    if kind is models.BPE:
        raw, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False)
    else:
        raw, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, unk_token="<unk>", show_progress=False)
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template)
