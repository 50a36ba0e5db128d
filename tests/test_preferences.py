"""Preference pairs: their files, their tokens, their log-probabilities, and the training on them."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import train
from support import preferences, settings, tiny
from support.answers import answer_is_right
from support.errors import InputError
from support.model import load_model
from support.preferences import (
    add_reference,
    encode_pairs,
    encode_preferences,
    evaluate_pairs,
    load_preferences,
    pair_logp,
    preference_loss,
)
from support.prompts import turn_end
from support.steps import Step

ROOT = Path(__file__).resolve().parent.parent
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2 + 3?"), ("assistant", "5"), ("assistant", "6")))


def configured(**values):
    config = settings.Config(preferences="tiny", **{"beta": settings.DEFAULT_BETA, **values})
    config.check()
    return config


def step(model, optimizer, pairs, config, rate=0.0):
    """One optimiser step on pairs; its figures."""
    taken = Step(learning_rate=rate)
    preferences.update(model, optimizer, pairs, taken, config)
    return taken.passes[0]


@pytest.fixture(scope="module")
def tiny_model():
    return load_model(str(tiny.MODEL_DIR), torch.device("cpu"))


def write(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        ({"prompt": "2 + 3?", "chosen": " 5", "rejected": " 6"}, "2 + 3?", " 5", " 6"),
        ({"chosen": "2 + 3? 5", "rejected": "2 + 3? 6"}, "2 + 3?", " 5", " 6"),  # the space stays with the responses
        ({"chosen": "a: no", "rejected": "a: not"}, None, None, None),  # nothing is left of chosen
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], "5", "6"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], "5", "6"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "answer": 5, "score": 1}, [USER], "5", "6"),
    ],
)
def test_the_formats_of_trl_are_read(row, prompt, chosen, rejected, tmp_path):
    if prompt is None:
        with pytest.raises(InputError, match="pairs.jsonl:1: chosen is empty"):
            load_preferences(write(tmp_path, row))
        return
    (pair,) = load_preferences(write(tmp_path, row))
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
    assert pair.answer == ("5" if "answer" in row else None)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_tables_are_read_as_the_same_rows(ending, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": f"{n} + 3?", "chosen": f" is {n + 3}", "rejected": " is 0"} for n in (1, 2)])
    path = str(tmp_path / f"pairs.{ending}")
    getattr(rows, f"to_{ending}")(path)
    assert [(p.prompt, p.chosen, p.rejected) for p in load_preferences(path)] == [("1 + 3?", " is 4", " is 0"), ("2 + 3?", " is 5", " is 0")]


def test_a_csv_of_pairs_keeps_every_text_as_it_stands(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected,answer\n"Is it, or not?", NA,None,007\n,"a: 1","a: 2",\n')
    (first, second) = load_preferences(path)
    assert (first.prompt, first.chosen, first.rejected, first.answer) == ("Is it, or not?", " NA", "None", "007")
    assert (second.prompt, second.chosen, second.answer) == ("a:", " 1", None), "an empty cell is a missing one"


def test_a_split_of_a_set_is_read_where_it_is_asked_for(tmp_path):
    pytest.importorskip("datasets")
    for split in "train", "test":
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({**OK, "prompt": f"{split}?"}))
    assert [p.prompt for p in load_preferences(str(tmp_path), split="test")] == ["test?"]
    flags = ["--preferences", str(tmp_path), "--dataset-train-split", "other", "--output-dir", str(tmp_path / "run")]
    assert train.main(flags) == 2, "no such split"


OK = {"prompt": "a?", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    "row, told",
    [
        ({"prompt": "a?", "chosen": "b"}, ["rejected is missing"]),
        ({"prompt": "a?", "rejected": "b"}, ["chosen is missing"]),
        ({**OK, "chosen": ""}, ["chosen is ''"]),
        ({**OK, "rejected": "  "}, ["rejected is '  '"]),
        ({**OK, "chosen": "c"}, ["the same", "'c'"]),
        ({**OK, "chosen": 5}, ["chosen is 5", "text or a list"]),
        ({**OK, "chosen": [GOOD]}, ["mix"]),
        ({**OK, "prompt": 7}, ["prompt is 7"]),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, ["chosen is", "one assistant message"]),
        ({"prompt": [USER], "chosen": [GOOD, GOOD], "rejected": [BAD]}, ["chosen is", "one assistant message"]),
        ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, ["prompt holds", "content"]),
        ({"prompt": [USER], "chosen": [{**GOOD, "content": None}], "rejected": [BAD]}, ["content is None"]),
        ({"chosen": "b", "rejected": "c"}, ["prompt is empty", "begin alike"]),
        ("{", ["JSON breaks"]),
        ("[]", ["not an object"]),
    ],
)
def test_a_bad_pair_is_one_line_and_status_2(row, told, tmp_path, capsys):
    path = write(tmp_path, OK, row)
    assert train.main(["--preferences", str(path), "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path}:2: " in error and "accepted" in error, error
    for part in told:
        assert part in error, f"{part!r} is not in: {error}"


@pytest.mark.parametrize(
    "rows, told",
    [
        ([{**OK, "prompt": "word " * (600 + n)} for n in range(9)], ["pairs.jsonl:", "tokens", "512"]),
        ([{"prompt": [{**USER, "content": "<|end|>"}], "chosen": [GOOD], "rejected": [BAD]}] * 1 + [OK], ["control token"]),
        ([OK], ["of 1 pairs 0 are held out", "a larger set"]),
        ([], ["has no pair"]),
    ],
)
def test_a_bad_file_of_pairs_is_one_line_and_status_2(rows, told, tmp_path, capsys):
    flags = ["--preferences", str(write(tmp_path, *rows)), "--eval-questions", "1", "--output-dir", str(tmp_path / "run")]
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in told:
        assert part in error, f"{part!r} is not in: {error}"
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_a_source_that_is_not_there_is_one_line(tmp_path, capsys):
    for source in ("none.jsonl", "none.parquet"):
        assert train.main(["--preferences", str(tmp_path / source), "--output-dir", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and source in error, error


# ------------------------------------------------------------------------------------------------ the embedded pairs


def test_chosen_reasons_rightly_and_rejected_does_not():
    pairs = tiny.make_pairs(400, False)
    guesses = 0
    for pair in pairs:
        assert answer_is_right(pair.chosen, pair.answer) and not answer_is_right(pair.rejected, pair.answer), pair
        assert pair.chosen != pair.rejected
        guesses += any(guess in pair.rejected for guess in tiny.GUESSES)
        for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>", "Answer:"):
            assert (tag in pair.chosen) == (tag in pair.rejected), "a pair must say nothing about the format"
    assert 0.4 < guesses / 400 < 0.6
    held_out = tiny.make_pairs(200, True)
    assert not {p.text for p in pairs} & {p.text for p in held_out}


# ------------------------------------------------------------------------------------------------ tokens and log-probs


def test_tokens_are_the_responses_and_their_end(tiny_model):
    model, tokenizer = tiny_model
    rows = tiny.make_pairs(5, True)
    pairs = encode_pairs(model, tokenizer, rows)
    for p, row in enumerate(rows):
        for side, text in enumerate((row.chosen, row.rejected)):
            assert tokenizer.decode(pairs.tokens[p, side][pairs.mask[p, side]]) == text + tokenizer.eos_token
    small = pairs[1:3]
    assert small.tokens.shape[2] == small.mask.sum(-1).max() and small.answers == pairs.answers[1:3]


TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[model]\n{% endif %}"


def small_tokenizer(pre_tokenizer, decoder, merged):
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizer, decoder
    letters = [*map(chr, range(32, 127)), "\n", "\u2581"]
    raw.train_from_iterator([merged] * 9, trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TURNS)


@pytest.mark.parametrize("row, text", [
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "<s>[user]\n2 + 3?\n[model]\n{}</s>"),
    ({"prompt": "[q] 2 + 3?\n", "chosen": "5", "rejected": "6"}, "[q] 2 + 3?\n{}</s>"),
    ({"prompt": "[q] 2 + 3?", "chosen": " 5", "rejected": " 6"}, "[q] 2 + 3? {}</s>"),
])
@pytest.mark.parametrize("ends", [False, True], ids=["", "add_eos_token"])
def test_prompt_and_response_are_tokenised_as_one_text(row, text, ends, tmp_path):
    metaspace = {"prepend_scheme": "first", "split": False}  # as in Llama-2: a text begins with a space
    tokenizer = small_tokenizer(pre_tokenizers.Metaspace(**metaspace), decoders.Metaspace(**metaspace), "[user]")
    single = "<s> $A </s>" if ends else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    (ids,) = encode_preferences(tokenizer, load_preferences(write(tmp_path, row)), tokenizer.eos_token_id)
    for response, written in zip(ids[1:], "56"):
        joint = tokenizer(text.format(written), add_special_tokens=False)["input_ids"]
        with_bos = joint if joint[0] == 1 else [1, *joint]
        assert ids[0] + response == with_bos, "a space, or an end, that is not in the file?"
        assert response[-2:] == [tokenizer.convert_tokens_to_ids(written), 2]


def test_a_token_across_the_seam_belongs_to_the_responses(tmp_path):
    tokenizer = small_tokenizer(pre_tokenizers.Whitespace(), decoders.BPEDecoder(), "xy xy xy")
    pair = load_preferences(write(tmp_path, {"prompt": "a b x", "chosen": "y", "rejected": "z"}))
    ((prompt, chosen, rejected),) = encode_preferences(tokenizer, pair, 2)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in (prompt, chosen, rejected)] == [
        ["a", "b"], ["xy", "</s>"], ["x", "z", "</s>"]], "both texts must be tokenised as the model would read them"


def test_the_turn_ends_with_the_templates_own_token(tiny_model):
    model, tokenizer = copy.deepcopy(tiny_model)
    assert turn_end(model, tokenizer) == tokenizer.eos_token_id
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, user]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|user|>' }}{% endfor %}"
    assert turn_end(model, tokenizer) == user, "Gemma-3 ends a turn with <end_of_turn>, not with its eos"


def test_pair_logp_is_the_plain_forward_at_the_temperature(tiny_model):
    model, tokenizer = tiny_model
    pairs = encode_pairs(model, tokenizer, tiny.make_pairs(3, True))
    with torch.no_grad():
        ours = pair_logp(model, pairs, 0.7)  # [P, 2]
        for p, prompt in enumerate(pairs.prompts):
            for side in range(2):
                ids = pairs.tokens[p, side][pairs.mask[p, side]]  # [T']
                logits = model(torch.tensor([prompt + ids.tolist()])).logits[0] / 0.7
                steps = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])
                assert math.isclose(ours[p, side], steps.sum(), rel_tol=1e-4), "chosen and rejected swapped, or shifted?"
    kept = add_reference(model, pairs, 0.7).ref_logp
    torch.testing.assert_close(kept, ours, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name, at_start, chosen_pull", [("infopo", 0.0, 0.1), ("dpo", math.log(2), 0.05)])
def test_the_loss_at_the_start(tiny_model, name, at_start, chosen_pull):
    model, tokenizer = tiny_model
    config = configured(preference_loss=name)
    pairs = encode_pairs(model, tokenizer, tiny.make_pairs(4, True))
    pairs = add_reference(model, pairs, 1.0)
    loss, stats = preference_loss(pair_logp(model, pairs, 1.0), pairs.ref_logp, config)
    assert math.isclose(loss.item(), at_start, abs_tol=1e-3)
    assert math.isclose(stats["pair_weight_rejected"], chosen_pull, rel_tol=1e-3), "beta does not reach the loss"


# ------------------------------------------------------------------------------------------------ training


FLAGS = "--temperature 0.7 --num-pairs 6 --max-steps 3 --eval-questions 4 --eval-steps 1 --warmup-steps 1 --max-completion-length 16".split()


def test_accumulation_over_pairs_changes_nothing(tiny_model):
    model, tokenizer = copy.deepcopy(tiny_model)
    model.double()
    pairs = add_reference(model, encode_pairs(model, tokenizer, tiny.make_pairs(10, False)), 1.0)
    gradients = []
    for size in (4, 1):
        config = configured(micro_batch=size, max_grad_norm=1e9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.zero_grad = lambda: None  # `update` clears it, and here it is the result
        model.zero_grad()
        step(model, optimizer, pairs, config)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0
    # not 1e-15: the norms of a float64 Llama go through float32, and prompts share what they begin with
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-7


def test_a_run_on_pairs_alone(tmp_path):
    assert train.main(["--preferences", "tiny", *FLAGS, "--output-dir", str(tmp_path / "run")]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and abs(steps[0]["loss_preference"]) < 1e-3
    for name in ("pair_margin", "pair_accuracy", "pair_logratio_chosen", "pair_logratio_rejected", "grad_norm"):
        assert all(math.isfinite(step[name]) for step in steps), name
    assert steps[2]["pair_margin"] != 0, "the reference moves with the policy"
    evals = json.loads((tmp_path / "run" / "eval.json").read_text())
    for when in ("start", "end"):
        for name in ("format", "accuracy", "pair_logratio_margin", "pair_accuracy", "pair_logratio_chosen"):
            assert evals[when][name]["low"] <= evals[when][name]["high"]
    assert abs(evals["start"]["pair_logratio_margin"]["mean"]) < 1e-3 and evals["end"]["pair_logratio_margin"]["mean"] != 0
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_of_a_completion_that_was_cut_the_format_does_not_count(tiny_model, monkeypatch):
    pairs = add_reference(tiny_model[0], encode_pairs(*tiny_model, tiny.make_pairs(3, True)), 1.0)
    cut, whole = torch.tensor([[True], [False], [False]]), "<reasoning>So.</reasoning><answer>4</answer>"
    monkeypatch.setattr(preferences, "write", lambda *_: (SimpleNamespace(truncated=cut), [[whole]] * 3))
    assert evaluate_pairs(*tiny_model, pairs, configured())["format"]["mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("loss", ["infopo", "dpo"])
def test_a_short_training_prefers_the_chosen(tiny_model, loss):
    model, tokenizer = copy.deepcopy(tiny_model)
    pairs = add_reference(model, encode_pairs(model, tokenizer, tiny.make_pairs(192, False)), 1.0)
    config = configured(preference_loss=loss)
    optimizer = torch.optim.AdamW(model.parameters())
    margins = [step(model, optimizer, pairs[16 * s : 16 * s + 16], config, 2e-4)["pair_margin"] for s in range(12)]
    held_out = add_reference(
        tiny_model[0], encode_pairs(model, tokenizer, tiny.make_pairs(32, True)), 1.0
    )
    margin = evaluate_pairs(model, tokenizer, held_out, config)["pair_logratio_margin"]["mean"]
    assert abs(margins[0]) < 1e-3 and margin > 0.5, f"chosen and rejected swapped? {margins}"


@pytest.mark.parametrize(
    "flags, told", [([], "--principles: missing"), (["--preferences", "tiny", "--beta", "0"], "--beta: got 0.0"),
                    (["--preferences", "tiny", "--num-pairs", "0"], "--num-pairs: got 0"),
                    (["--preferences", "tiny", "--principles", "p.txt"], "--preferences: not accepted beside")],
)
def test_bad_flags(flags, told, capsys):
    assert train.main(flags) == 2
    assert told in capsys.readouterr().err
