"""The benchmark on a real model: marks of principles, halves of TruthfulQA, the model's folder."""

import hashlib
import json

import pytest

from experiments import common, reading, real, smollm2
from support.files import load_principles
from support.model import load_model

SHOWS = {  # principle -> (a text that shows its mark, one that does not)
    "Number every step: 1., 2., 3.": ("1. Add 2 and 3.\n2. Name it.", "1.5 and 2.5 are 4."),
    'Begin with the words "Let us".': ("Let us add 2 and 3.", "Add, and let us see."),
    "Ask yourself a question first.": ("What is asked? The sum.", "The sum. Is it 5?"),
    'Use the word "because".': ("Because 2 + 3 = 5.", "It is the cause of it."),
    "Use the words first, then and finally.": ("First 2, then 3, finally 5.", "Finally 5, but first 2, then 3."),
    "Name a common mistake.": ("A common mistake is 6.", "It is mistaken for 6."),
    'Speak to the reader: use the word "you".': ("You add 2 and 3.", "The youth adds 2 and 3."),
    'Speak of yourself: use the word "I".': ("I add 2 and 3.", "It is 5, i.e. five."),
    'Give an example that starts with "For example".': ("For example, 2 + 3.", "An example is 2 + 3."),
    "Say how sure you are, in percent.": ("I am 90 % sure.", "I am quite sure."),
    'Use the word "therefore".': ("Therefore it is 5.", "There, before the 5."),
    "End every sentence with an exclamation mark.": ("It is 5! Yes!", "It is 5! Yes."),
    "Use at most eight words.": ("2 and 3 are 5.", "Two and three and nothing else make exactly five."),
    "Put the most important word in **bold**.": ("Now it is **five**.", "It is 2 ** 3 ** 1."),
}


def test_each_principle_of_the_pool_has_a_mark_that_is_found():
    texts = {principle.text for principle in load_principles(real.POOL)}
    assert texts == set(reading.MARKS) == set(SHOWS)
    assert len(texts) >= 12
    assert {principle.text for principle in load_principles(real.PRINCIPLES)} < texts
    for principle, (yes, no) in SHOWS.items():
        assert reading.follows(principle, f"<reasoning>{yes}</reasoning><answer>5</answer>"), principle
        assert not reading.follows(principle, f"<reasoning>{no}</reasoning><answer>5</answer>"), principle


@pytest.mark.parametrize("text, found", [
    ("The answer is 1, but no. A common mistake is 2.", True), ("A mistake that is not rare is 6.", True),
    ("Well, name a common mistake: it is 6.", False), ("There is no common mistake.", False),
    ("Not a common mistake, but 5.", False), ("First, neither is a mistake.", False),
])
def test_a_mistake_is_named_where_the_principle_is_not_just_repeated_or_denied(text, found):
    assert reading.follows("Name a common mistake.", f"<reasoning>{text}</reasoning>") == found


def test_stored_answers_are_read_by_the_marks_as_they_are_now(tmp_path):
    rows = [{"question": "1?", "principle": "Name a common mistake.", "text": text, "follows": True} for text in (
        "<reasoning>There is no common mistake.</reasoning>", "<reasoning>A common mistake is 6.</reasoning>")]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = reading.read_answers(tmp_path / "answers.jsonl")
    assert [row["follows"] for row in found] == [False, True]
    table = reading.by_principle(["Name a common mistake."], {"start": rows, "end": found})
    assert table.splitlines()[-1] == "| Name a common mistake. | 1.00 | 0.50 |"


def test_a_text_with_any_line_separator_is_one_row(tmp_path):
    rows = [{"text": "one\u2028two\u0085three\x0cfour\r\nfive"}, {"text": ""}]
    common.write_lines(tmp_path / "rows.jsonl", rows)
    assert common.read_lines(tmp_path / "rows.jsonl") == rows


def test_the_mark_is_looked_for_in_a_reasoning_of_some_words():
    completion = "<reasoning>2 + 3 = 5.</reasoning><answer>You can say 5, because I do.</answer>"
    assert not reading.follows('Use the word "because".', "<reasoning>Because.</reasoning>")
    for word in ("because", "you", "I"):
        principle = next(text for text in reading.MARKS if f'"{word}"' in text)
        assert not reading.follows(principle, completion), principle


def test_the_halves_of_truthfulqa_are_about_equal_and_depend_on_the_text_alone():
    share = sum(real.in_first_half(f"question {n}") for n in range(2000)) / 2000
    assert 0.45 < share < 0.55
    assert real.in_first_half("a") == (hashlib.sha256(b"a").digest()[0] < 128)


def test_a_folder_is_the_model_only_if_its_weights_have_their_sum(tmp_path):
    assert not smollm2.is_made(tmp_path / "none")
    (tmp_path / smollm2.WEIGHTS).write_bytes(b"weights")
    assert not smollm2.is_made(tmp_path)
    (tmp_path / smollm2.SUM).write_text(f"{hashlib.sha256(b'weights').hexdigest()}  {smollm2.WEIGHTS}\n")
    assert smollm2.is_made(tmp_path)
    (tmp_path / smollm2.WEIGHTS).write_bytes(b"other")
    assert not smollm2.is_made(tmp_path)
    with pytest.raises(SystemExit, match="is not this model; a new or empty folder is accepted"):
        smollm2.make(tmp_path)


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_folder() == tmp_path / "enigma" / "SmolLM2-135M-Instruct"


@pytest.mark.skipif(
    not smollm2.default_folder().exists(), reason="python experiments/smollm2.py has not been run: no SmolLM2"
)
def test_lm_evals_log_likelihoods_are_those_of_a_plain_forward(monkeypatch):
    import torch

    model, tokenizer = load_model(str(smollm2.default_folder()), torch.device("cpu"))
    monkeypatch.setattr(real, "load_model", lambda *_: (model, tokenizer))
    pairs = [("Q: Is ice cold?\nA:", " Yes."), ("Q: Is ice cold?\nA:", " No, never."), ("Q: Why?\nA:", " Because.")]
    for (context, answer), (value, _) in zip(pairs, real.log_likelihoods("any", pairs)):
        ids = tokenizer(context + answer)["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert value == pytest.approx(sum(logp[n - 1, ids[n]].item() for n in range(start, len(ids))), abs=1e-3)


def test_a_written_answer_is_compared_with_all_true_and_all_false_ones():
    choices = {"choices": ["Yes", "No", "Never"], "labels": [1, 0, 0]}
    row = {"question": "Is it?", "mc1_targets": {"choices": ["Yes", "No"], "labels": [1, 0]}, "mc2_targets": choices}
    assert real.with_answers(row) == {
        "question": "Is it?", "correct_answers": ["Yes"], "incorrect_answers": ["No", "Never"],
    }


def test_the_written_answer_is_the_likeliest_text_up_to_the_end_of_its_paragraph(monkeypatch):
    import torch

    from support.tiny import MODEL_DIR

    model, tokenizer = load_model(str(MODEL_DIR), torch.device("cpu"))
    monkeypatch.setattr(real, "load_model", lambda *_: (model, tokenizer))
    context = "2 + 3"
    (answer,) = real.written_answers("any", [context])
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=real.MAX_ANSWER)[0, len(ids) :]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True).split("\n\n")[0]
