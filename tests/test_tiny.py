"""tiny.py and tiny-model/build.py: the task, its text, and the shipped model, which is the one that was recorded."""

import json
import random

import build
import pytest
import torch

from grpo import format_reward
from support import tiny
from support.answers import answer_is_right
from support.files import load_principles
from support.model import load_model
from support.prompts import PromptTemplate


def test_held_out_numbers_are_never_trained_on():
    rng = random.Random(0)

    def keys(held_out):
        return {(p.steps[0][:3], p.steps[1][1:3]) for p in (tiny.make_problem(rng, held_out) for _ in range(5000))}

    assert not keys(True) & keys(False)
    train, held_out = tiny.make_questions(4096, False), tiny.make_questions(512, True)
    assert len({q.text for q in train}) == 4096 and len({q.text for q in held_out}) == 512
    assert not {q.text for q in train} & {q.text for q in held_out}


def test_working_is_right_and_shows_its_principle_and_no_other():
    rng = random.Random(0)
    for _ in range(300):
        problem = tiny.make_problem(rng)
        (a, sign, b, first), (left, sign2, c, answer) = problem.steps
        assert left == first and eval(f"({a} {sign} {b}) {sign2} {c}") == answer == problem.answer > 0
        assert not any(tiny.follows(tiny.plain_working(problem), other) for other in tiny.STYLES)
        for name, style in tiny.STYLES.items():
            assert [other for other in tiny.STYLES if tiny.follows(style.write(problem), other)] == [name]


def test_the_text_has_the_rates_that_the_opening_states():
    rng, num = random.Random(0), 6000
    problem = tiny.make_problem(rng)
    style = tiny.STYLES["check"]
    texts = [build.write_completion(rng, problem, style.rate, style) for _ in range(num)]
    guesses = [t for t in texts if any(g in t for g in tiny.GUESSES)]
    works = [t for t in texts if t not in set(guesses)]

    def share(rows, test):
        return sum(map(test, rows)) / len(rows)

    assert abs(len(guesses) / num - build.GUESS) < 0.03
    assert abs(share(works, lambda t: tiny.follows(t, "check")) - style.rate) < 0.03
    assert abs(share(guesses, format_reward) - build.WELL_FORMED_SHARE["guess"]) < 0.03
    assert abs(share(works, format_reward) - build.WELL_FORMED_SHARE["work"]) < 0.03
    assert share(works, lambda t: answer_is_right(t, str(problem.answer))) == 1
    assert share(guesses, lambda t: answer_is_right(t, str(problem.answer))) < 0.1


def test_the_example_file_holds_the_principles_of_the_task():
    path = tiny.MODEL_DIR.parent / "principles" / "reasoning.txt"
    assert [p.text for p in load_principles(path)] == [p.text for p in tiny.principles()]


def test_the_tokenizer_returns_every_text_and_has_one_template_for_all():
    tokenizer = build.make_tokenizer()
    assert len(tokenizer) == 512
    shipped = tiny.make_tokenizer()
    assert shipped.get_vocab() == tokenizer.get_vocab() and shipped.chat_template == tokenizer.chat_template
    for text in ("<reasoning>1 + 1 = 2.</reasoning><answer>2</answer>", "naïve 😀 \n\t x", " two  spaces "):
        assert tokenizer.decode(tiny.encode(tokenizer, text)) == text
    with pytest.raises(Exception, match="roles user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_labels_are_the_completion_and_its_end_alone():
    tokenizer = tiny.make_tokenizer()
    ids, mask, labels = build.encode_examples(tokenizer, random.Random(0), 8)
    for row in range(8):
        learned = ids[row][labels[row] != -100]
        assert (learned == labels[row][labels[row] != -100]).all() and learned[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[row][mask[row].bool()])
        assert text.endswith("<|assistant|>" + tokenizer.decode(learned)), "a label in the prompt, or the mask is off"


def test_the_shipped_model_loads_and_scores_as_recorded():
    files = sum(f.stat().st_size for f in tiny.MODEL_DIR.iterdir())
    assert files <= 4 * 2**20, f"tiny-model/ is {files} bytes"
    recorded = json.loads((tiny.MODEL_DIR / "record.json").read_text())
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    seen = build.measure(model, tokenizer, num_questions=32)
    assert abs(seen["loss"] - recorded["loss"]) < 1e-3, "not the weights, or not the text, that were recorded"
    assert 0.4 <= recorded["accuracy"] <= 0.7 and recorded["format"] < 0.5
    for name in ("format", "accuracy", "si"):
        assert abs(seen[name] - recorded[name]) < 0.08, f"{name}: {seen[name]:.3f}, recorded {recorded[name]:.3f}"


def test_tiny_names_the_embedded_model():
    assert tiny.model_path("tiny") == str(tiny.MODEL_DIR) and tiny.model_path("a/b") == "a/b"


def test_the_folder_under_any_name_has_the_prompt_of_tiny():
    assert PromptTemplate.of_folder(str(tiny.MODEL_DIR)) == PromptTemplate()
