"""data.py: who is held out, which items a step takes, which questions fit, and whose prompt a model gets."""

import collections
import hashlib
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import OPEN, TURNS, metaspace_tokenizer, refusal, tokenizer_with, write
from tokenizers import models

import train
from support import data, parallel, tiny
from support.data import (
    Epochs,
    Fitting,
    check_sides,
    is_held_out,
    items_of_step,
    load_data,
    make_template,
    pick_questions,
    split,
)
from support.errors import InputError
from support.files import Example, Preference, Question
from support.model import load_model
from support.preferences import load_pairs
from support.prompts import SEAM, PromptTemplate, encode_prompts
from support.rows import LeftOut

ROOT = Path(__file__).resolve().parent.parent
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
POOL = [Question(f"What is {n} + {n}?", str(2 * n)) for n in range(200)]


@pytest.fixture(scope="module")
def tiny_model():
    return load_model(str(tiny.MODEL_DIR), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ held out


def test_a_fifth_is_held_out_and_membership_is_a_function_of_the_text():
    trained, held_out = split(POOL, 1000)
    assert set(trained) | set(held_out) == set(POOL) and not set(trained) & set(held_out)
    assert held_out and all(is_held_out(q.text) for q in held_out) and not any(is_held_out(q.text) for q in trained)
    texts = [f"{n} apples?" for n in range(5000)]
    assert abs(sum(map(is_held_out, texts)) / 5000 - data.HELD_OUT) < 0.02
    known = hashlib.sha256("".join("01"[is_held_out(text)] for text in texts).encode()).hexdigest()
    assert known.startswith(KNOWN), "the split has changed: trained models were trained on what is held out now"


KNOWN = "3820f720"


def test_rows_their_order_and_the_number_to_evaluate_move_no_text():
    for size in (1, 2, 3, 17, 100):
        for part in (POOL[:size], random.Random(size).sample(POOL, size)):
            for num in (1, 5, 1000):
                trained, held_out = split(part, num)
                assert not any(is_held_out(q.text) for q in trained) and all(is_held_out(q.text) for q in held_out)
                assert len(held_out) == min(num, sum(is_held_out(q.text) for q in part))
                assert split(part[::-1], num) == (trained, held_out), "it depends on the file's order"
                assert split(part, 10**9)[1][:num] == held_out, "a smaller evaluation is the beginning of a larger one"


def test_no_text_is_on_both_sides_whatever_its_case_and_spacing():
    spellings = ("Is {} odd?", "is  {} ODD?", " Is {} odd?\n")
    variants = [Question(spelling.format(n)) for n in range(90) for spelling in spellings]
    trained, held_out = split(variants + variants, 10)
    assert split(variants[::-1] * 2, 10) == (trained, held_out)
    numbers = [{question.text.split()[1] for question in side} for side in (trained, held_out)]
    assert not numbers[0] & numbers[1], "the model would be tested on a question it was trained on"
    assert len(held_out) == len(numbers[1]) == 10, "one question must not be counted twice in an evaluation"


def test_pairs_and_questions_over_the_same_prompts_are_on_the_same_side():
    system, early = {"role": "system", "content": "Be brief."}, [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}]
    for question in POOL:
        asked = {"role": "user", "content": question.text}
        own = {"role": "user", "content": f"{question.text}\n\nPrinciple: Be brief.\nWrite it."}  # the prompt of train.py
        for prompt in (question.text, f" {question.text.upper()}\n", [asked], [system, asked], [system, *early, asked], [own]):
            assert is_held_out(Preference(prompt, "a", "b").text) == is_held_out(question.text), prompt


def test_a_stream_is_read_on_for_a_longer_training_and_evaluated_on_the_same():
    def taken(needed):
        read = []
        return split((read.append(q) or q for q in POOL), 12, needed), len(read)

    (short, held_out), few = taken(10)
    (longer, same), more = taken(100)
    assert few < more < len(POOL) and same == held_out and len(held_out) == 12
    assert set(short) < set(longer) and len(longer) == 100 and not any(is_held_out(q.text) for q in longer)
    assert set(split(iter(POOL), 12, 10**9)[1]) == set(held_out), "to the end of the set"


@pytest.mark.parametrize("train, held_out, world, refused", [
    (5, 2, 1, False), (5, 0, 1, True), (0, 5, 1, True), (5, 2, 2, False), (5, 1, 2, True), (5, 2, 3, True),
])
def test_a_set_with_an_empty_side_is_refused_in_a_line(train, held_out, world, refused, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "world", lambda: world)
    sides = POOL[:train], POOL[:held_out]
    if refused:
        assert "a larger set" in refusal(check_sides, *sides, 2, "questions")
    else:
        check_sides(*sides, 2, "questions")
        assert capsys.readouterr().out == ""
        check_sides(*sides, 128, "questions")
        assert f"{held_out} of {train + held_out} questions are held out; --eval-questions asks for 128" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the items of a step

SIZES = (1, 2, 3, 4, 5, 7, 11, 13, 15, 16, 17, 31, 97)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("total", SIZES)
def test_all_items_are_taken_equally_often_and_steps_are_full(total, size, monkeypatch):
    seen = collections.Counter()
    for step in range(2 * total + 3):
        taken = items_of_step(total, step, size, seed=3)
        assert len(taken) == size and set(taken) <= set(range(total))
        assert total < size or len(set(taken)) == size, f"step {step} takes an item twice: {taken}"
        seen.update(taken)
        counts = [seen[item] for item in range(total)]
        assert max(counts) - min(counts) <= 1, f"after step {step}: {counts}"
        for world in range(1, min(3, size) + 1):  # as --num-questions and --num-pairs must be
            monkeypatch.setattr(parallel, "world", lambda world=world: world)
            parts = []
            for rank in range(world):
                monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
                part = taken[parallel.share(size)]
                assert part, "a process without an item"
                parts += part
            assert parts == taken


def test_a_step_is_a_function_of_seed_and_step_alone():
    far = items_of_step(17, 3000, 16, 0)  # epoch 2823
    data._epochs.cache_clear()
    assert items_of_step(17, 3000, 16, 0) == far, "a resumed run would go on with other items"
    assert items_of_step(17, 3, 16, 0) == Epochs(17, 16, 0).order(2)[14:] + Epochs(17, 16, 0).order(3)[:13]
    assert items_of_step(17, 3000, 16, 1) != far
    orders = {tuple(Epochs(17, 16, 0).order(epoch)) for epoch in range(20)}
    assert len(orders) == 20, "an epoch repeats another's order"


def test_a_step_does_not_shuffle_the_whole_set(monkeypatch):
    shuffled = []
    real = Epochs.shuffled
    monkeypatch.setattr(Epochs, "shuffled", lambda self, epoch: shuffled.append(epoch) or real(self, epoch))
    for step in range(50):
        items_of_step(1000, step, 16, seed=99)
    assert shuffled == [0]


# ------------------------------------------------------------------------------------------------ what fits


def fitting(tokenizer, principles, limit, template=None, source="q.jsonl"):
    return Fitting(tokenizer, template or PromptTemplate(), principles, limit, LeftOut(source))


def test_lengths_are_found_in_tokens_with_few_prompts(monkeypatch):
    tokenizer = tokenizer_with(TURNS + OPEN)
    questions = [Question(q) for q in ["How many are left? " * 3, "\u7b97" * 40 + "?", *(f"{n} + 1?" for n in range(60))]]
    principles = ["State the given numbers first. " * 2, "\u68c0" * 30 + ".", "Be brief."]
    assert max(questions, key=lambda q: len(q.text)) != questions[1] and max(principles, key=len) != principles[1]
    most = len(PromptTemplate().encode(tokenizer, [(questions[1].text, principles[1])])[0])
    count, try_prompts = [], data.try_prompts
    monkeypatch.setattr(data, "try_prompts", lambda *args: count.append(len(args[1])) or try_prompts(*args))
    fit = fitting(tokenizer, principles, most + SEAM)
    assert list(fit.of(questions)) == questions and sum(count) == len(questions), "every pair was encoded"
    prompts = fit.longest_prompts()
    assert [len(prompt) for prompt in prompts] == sorted(len(prompt) for prompt in prompts) and len(prompts[-1]) == most
    fit = fitting(tokenizer, principles, most + SEAM - 1)
    assert list(fit.of(questions)) == [q for q in questions if q != questions[1]]
    told = str(fit.left_out.first)
    assert "'\u7b97" in told and "'\u68c0" in told and f"{most} tokens; at most {most - 1}" in told and fit.left_out.count == 1


@pytest.mark.parametrize("kind, vocabulary", [(models.BPE, 900), (models.Unigram, 150)])
def test_what_fits_under_the_longest_principle_fits_under_all(kind, vocabulary):
    """For tokenizers without word boundaries too: the tokens that are kept free suffice."""
    tokenizer, rng = metaspace_tokenizer(kind, vocabulary), random.Random(0)
    pieces = "What is 2 + 3 ? brief. Principle: Write how 5 pens \n [model] < > answer".split(" ")
    questions, principles = ([" ".join(rng.choices(pieces, k=rng.randint(1, 12))) + "?" for _ in range(n)] for n in (25, 9))
    template = PromptTemplate((Example("1 + 1?", "Be kind.", "2", "2"),), "<reasoning>")
    lengths = {pair: len(template.encode(tokenizer, [pair])[0]) for pair in itertools.product(questions, principles)}
    for limit in range(min(lengths.values()), max(lengths.values()) + SEAM + 1):
        kept = {q.text for q in fitting(tokenizer, principles, limit, template).of(map(Question, questions))}
        assert all(lengths[question, principle] <= limit for question in kept for principle in principles)
        surely = {q for q in questions if max(lengths[q, p] for p in principles) <= limit - 2 * SEAM}
        assert surely <= kept


def test_of_a_file_only_a_question_that_is_too_long_is_left_out():
    tokenizer = tokenizer_with(TURNS + OPEN)
    long, forged, fine = Question("word " * 900), Question("a <|end|> b"), Question("a?")
    assert list(fitting(tokenizer, ["p"], 400).of([long, fine])) == [fine]
    with pytest.raises(InputError, match=r"'<\|end\|>', a control token"):
        list(fitting(tokenizer, ["p"], 400).of([long, forged, fine]))
    fit = fitting(tokenizer, ["p"], 400, source="a/set")
    assert list(fit.of([long, forged, fine])) == [fine] and (fit.left_out.count, fit.taken) == (2, 1)
    with pytest.raises(InputError, match="control token"):
        fitting(tokenizer, ["p", "b <|turn|>"], 400)


def test_a_set_in_which_nothing_fits_is_given_up():
    fit = fitting(tokenizer_with(TURNS + OPEN), ["p " * 500], 400, source="a/set")
    with pytest.raises(InputError, match="tokens; at most 392"):
        list(fit.of(Question(f"{n}?") for n in itertools.count()))


def questions_file(tmp_path, *more, name="q.jsonl"):
    rows = [{"question": q.text, "answer": q.answer} for q in POOL[:40]]
    return str(write(tmp_path, name, "".join(json.dumps(row) + "\n" for row in [*rows, *more])))


def test_too_long_questions_are_left_out_of_files_and_sets_alike_and_one_is_named(tiny_model, tmp_path, capsys):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    path = questions_file(tmp_path / "set", {"question": "word " * 600, "answer": 1}, name="train.jsonl")
    found = []
    for source in (path, str(tmp_path / "set")):
        config = train.parse(["--principles", PRINCIPLES, "--dataset", source, "--eval-questions", "4"])
        read = load_data(*tiny_model, config)
        assert f"{source}: 1 of 41 questions are left out, one of them: question 'word" in capsys.readouterr().out
        assert len(read.held_out) == 4 and len(read.questions) == sum(not is_held_out(q.text) for q in POOL[:40])
        assert len(read.longest_prompts) == 2
        found.append((set(read.questions), set(read.held_out)))
    assert found[0][0] == found[1][0]
    config = SimpleNamespace(dataset=path, num_questions=100, question_field=None, answer_field=None, dataset_config=None,
                             dataset_train_split="train", seed=0, max_completion_length=64)
    assert set(pick_questions(*tiny_model, ["p"], PromptTemplate(), config)) == set(POOL[:40]), "si.py and geometry.py"


def test_bad_pairs_are_left_out_of_a_set_and_refused_in_a_file(tiny_model, tmp_path, capsys):
    pytest.importorskip("datasets")
    good = [{"prompt": q.text, "chosen": f" {q.answer}", "rejected": " 0"} for q in POOL[1:60]]
    bad = {
        "tokens; at most 512": {"chosen": " 4" * 700}, "control token": {"rejected": " 4 <|user|>"}, "the same": {"chosen": " 5"},
        "chosen is ''": {"chosen": ""}, "rejected is None": {"rejected": None}, "answer is [1]": {"answer": [1]},
    }
    (tmp_path / "set").mkdir()
    source = str(tmp_path / "set")
    for told, change in bad.items():
        row = {"prompt": "2 + 2?", "chosen": " 4", "rejected": " 5", **change}
        path = write(tmp_path / "set", "train.jsonl", "".join(json.dumps(r) + "\n" for r in [row, *good]))
        flags = ["--eval-questions", "4", "--num-pairs", "16"]
        read = load_pairs(*tiny_model, train.parse(["--preferences", source, *flags]))
        printed = capsys.readouterr().out
        looked_at = 1 + len(read.pairs) + 4
        assert f"{source}: 1 of {looked_at} pairs are left out, one of them: {path}:1: " in printed
        assert told in printed or "is missing" in printed and "None" in told, printed
        assert len(read.held_out_pairs) == 4 and len(read.pairs) == sum(not is_held_out(row["prompt"]) for row in good)
        config = train.parse(["--preferences", str(path), *flags])
        if told.startswith("tokens"):
            assert len(load_pairs(*tiny_model, config).pairs) == len(read.pairs)
        else:
            with pytest.raises(InputError, match=r"train.jsonl:1: "):
                load_pairs(*tiny_model, config)


def test_pairs_that_fit_take_the_place_of_those_that_do_not(tiny_model, tmp_path):
    """Else few would be repeated while others that can be used are never taken."""
    rows = [{"prompt": "word " * 600 * (n % 4 > 0) + POOL[n].text, "chosen": "a", "rejected": "b"} for n in range(200)]
    path = write(tmp_path, "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    usable = [is_held_out(row["prompt"]) for row in rows[::4]]
    for steps, places in ((4, 32), (5, 40), (99, 50)):
        flags = ["--preferences", str(path), "--num-pairs", "8", "--max-steps", str(steps), "--eval-questions", "9"]
        read = load_pairs(*tiny_model, train.parse(flags))
        assert len(read.held_out_pairs) == min(9, sum(usable))
        assert len(read.pairs) == min(places, 50 - sum(usable))
        prompts = [tuple(prompt) for prompt in read.pairs.prompts]
        assert len(set(prompts)) == len(prompts)
    assert sum(usable) > 5


def test_a_held_out_prompt_leaves_room_for_the_completion_that_an_evaluation_writes(tiny_model, tmp_path):
    model, tokenizer = tiny_model
    texts = [("word " * length).strip() for length in range(240, 256)]  # two tokens a word
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts]
    path = write(tmp_path, "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    short = [{"prompt": q.text, "chosen": "a", "rejected": "b"} for q in POOL[:40]]
    write(tmp_path, "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows + short))
    read = load_pairs(model, tokenizer, train.parse(["--preferences", str(path), "--max-completion-length", "100"]))
    context = model.config.max_position_embeddings
    assert all(len(prompt) + 100 <= context for prompt in read.held_out_pairs.prompts)
    assert any(len(prompt) + 100 > context for prompt in read.pairs.prompts), "training writes nothing"


# ------------------------------------------------------------------------------------------------ whose prompt

EXAMPLE = {"question": "1 + 1?", "principle": "Be kind.", "reasoning": "Dear, 2.", "answer": "2"}


def asked(**flags):
    return SimpleNamespace(**{"model": "tiny", "examples": None, "prefill": None, **flags})


def test_a_folder_that_carries_its_prompt_is_prompted_by_it_whatever_its_name(tmp_path):
    template = PromptTemplate((Example(**EXAMPLE),), "<reasoning>")
    (tmp_path / "any").mkdir()
    folder = str(tmp_path / "any")
    plain = make_template(asked(model=folder))
    assert plain == make_template(asked(model="no/such-model")) and plain.prefill == "<reasoning>" and len(plain.examples) >= 2
    template.save(folder)
    assert make_template(asked(model=folder)) == template == make_template(asked(), folder, "tiny")
    assert make_template(asked(), str(tmp_path), folder) == template, "the first that has one"
    assert make_template(asked()) == PromptTemplate() == make_template(asked(model=str(tiny.MODEL_DIR)))


def test_flags_are_above_what_the_folder_says(tmp_path):
    PromptTemplate((Example(**EXAMPLE),), "<reasoning>").save(tmp_path)
    model = str(tmp_path)
    assert make_template(asked(model=model, examples="none")) == PromptTemplate((), "<reasoning>")
    assert make_template(asked(model=model, prefill=False)) == PromptTemplate((Example(**EXAMPLE),), "")
    path = write(tmp_path, "e.jsonl", json.dumps(EXAMPLE | {"answer": 7}))
    assert make_template(asked(examples=str(path), prefill=True)) == PromptTemplate((Example(**EXAMPLE | {"answer": "7"}),), "<reasoning>")
    assert "No such file" in refusal(make_template, asked(examples=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize("template, told", [
    (PromptTemplate(), "prompt: no worked examples before each question, no prefill"),
    (PromptTemplate((Example(**EXAMPLE),), "<reasoning>", "why"), "prompt: 1 worked example before each question, the answer begun with <reasoning> (why)"),
])
def test_the_line_says_which_examples_and_prefill(template, told):
    assert template.describe() == told


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"examples": [], "prefill": 1}', '{"examples": [{}], "prefill": ""}', '{"examples": 3, "prefill": ""}', b"\xff", "[" * 10**5])
def test_a_damaged_prompt_file_is_one_line(content, tmp_path):
    write(tmp_path, "prompt.json", content)
    assert "prompt.json" in refusal(PromptTemplate.of_folder, str(tmp_path))


def test_encode_prompts_is_what_the_template_encodes():
    tokenizer = tokenizer_with(TURNS + OPEN)
    template = PromptTemplate((Example(**EXAMPLE),), "<reasoning>")
    assert template.encode(tokenizer, [("a?", "b")]) == encode_prompts(tokenizer, template.messages([("a?", "b")]), None, "<reasoning>")


def test_the_embedded_task_is_evaluated_on_what_training_never_sees():
    model = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    read = load_data(*model, train.parse(["--principles", PRINCIPLES, "--eval-questions", "8"]))
    assert read.held_out == tiny.make_questions(8, True) and not set(read.questions) & set(read.held_out)
    flags = "--preferences tiny --num-pairs 8 --max-steps 1 --eval-questions 8".split()
    pairs = load_pairs(*model, train.parse(flags))
    trained, held_out = (set(map(tuple, side.prompts)) for side in (pairs.pairs, pairs.held_out_pairs))
    assert held_out and not trained & held_out
    asked = SimpleNamespace(dataset=None, num_questions=8, seed=0, max_completion_length=64)
    assert pick_questions(*model, ["p"], PromptTemplate(), asked) == tiny.make_questions(8, True)
