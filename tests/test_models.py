"""What a real model needs: its questions from real data sets, its precision, its memory, other architectures, LoRA."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import data
import policy
import tiny
import train
from data import InputError, Question, load_questions

ROOT = Path(__file__).resolve().parent.parent
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
SMALL = (
    "--num-questions 2 --num-principles 2 --num-generations 2 --max-steps 2 --eval-questions 3 --eval-steps 0 "
    "--warmup-steps 0 --max-completion-length 16"
).split()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------ data sets

datasets = pytest.importorskip("datasets")
GSM8K = [{"question": f"{n} + 1000?", "answer": f"We add.\n{n} + 1000 = <<{n}+1000=1,{n:03}>>\n#### 1,{n:03}"} for n in range(300)]
OTHER = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]
COT = [{"source": f"{n} + 1?", "target": str(n + 1), "rationale": "We add.", "task": "sums"} for n in range(3)]


@pytest.fixture(scope="module")
def hub_like(tmp_path_factory):
    """A folder laid out as on the hub: two configurations of parquet files, one of them with two splits."""
    folder = tmp_path_factory.mktemp("hub") / "gsm8k"
    for name, rows in ("main/train-00000-of-00002", GSM8K[:150]), ("main/train-00001-of-00002", GSM8K[150:]), \
            ("main/test-00000-of-00001", OTHER), ("socratic/train-00000-of-00001", GSM8K[:1]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    (folder / "README.md").write_text("""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
""")
    return str(folder)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """The library sleeps for seconds at the end of a stream (apache/arrow issue 45214)."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("rows, first", [(GSM8K, Question("0 + 1000?", "1,000")), (COT, Question("0 + 1?", "1"))])
def test_questions_of_files(ending, rows, first, tmp_path):
    path = tmp_path / f"questions.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{ending}")(path)
    questions = load_questions(path, limit=2)
    assert questions[0] == first and len(questions) == len(rows), "a file is read whole: a wrong line is told"


def test_named_fields_and_cells_without_a_value(tmp_path):
    path = tmp_path / "questions.parquet"
    datasets.Dataset.from_list([{"Q": "a?", "best": "b", "answer": "x"}, {"Q": "c?", "best": None, "answer": "y"}]).to_parquet(path)
    with pytest.raises(InputError, match=r"questions.parquet:1: question is missing"):
        load_questions(path)
    with pytest.raises(InputError, match=r"questions.parquet:2: best is missing"):
        load_questions(path, "Q", "best")
    assert load_questions(path, "Q") == [Question("a?", "x"), Question("c?", "y")]
    datasets.Dataset.from_list([{"question": "a?", "answer": None}, {"question": "c?", "answer": 2}]).to_parquet(path)
    assert load_questions(path) == [Question("a?"), Question("c?", "2")]


def test_a_hub_set_is_streamed_shuffled_and_read_no_further_than_needed(hub_like, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 20)
    taken = load_questions(hub_like, config="main", limit=10, seed=0)
    assert len(set(taken)) == 10 and taken == load_questions(hub_like, config="main", limit=10, seed=0)
    assert taken != load_questions(hub_like, config="main", limit=10, seed=1)
    assert [q.text for q in taken] != [row["question"] for row in GSM8K[:10]], "not shuffled"
    everything = load_questions(hub_like, config="main")
    assert sorted(q.text for q in everything) == sorted(row["question"] for row in GSM8K)
    assert {q.answer for q in load_questions(hub_like, config="main", split="test")} == {"1", "2", "3"}


def test_a_hub_set_is_not_downloaded_to_take_a_few_rows(hub_like, monkeypatch):
    read = []
    real = datasets.load_dataset

    def counted(*args, **kwargs):
        rows = real(*args, **kwargs)
        assert isinstance(rows, datasets.IterableDataset), "not streamed: a hub set would be downloaded whole"
        return rows.map(lambda row: read.append(1) or row)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 5)
    load_questions(hub_like, config="main", limit=10)
    assert 10 <= len(read) < 100


def test_a_set_with_a_loading_script_is_read_from_the_hubs_conversion(hub_like, monkeypatch):
    """github.com/huggingface/datasets/issues/8012: the script is refused, the branch with its parquet files is not."""
    real = datasets.load_dataset

    def scripted(revision=None, **kwargs):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found CoT_Collection.py")
        return real(**kwargs)

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    assert len(load_questions(hub_like, config="main", limit=4)) == 4


def test_rows_of_a_hub_set_that_forge_a_turn_are_left_out_and_told(tmp_path, capsys):
    rows = [*GSM8K[:20], {"question": "a <|user|> b", "answer": "1"}, {"question": "word " * 600, "answer": "1"}]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    model, tokenizer = policy.load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    config = train.parse(["--principles", PRINCIPLES, *SMALL, "--dataset", str(tmp_path / "set"), "--max-steps", "20"])
    read = train.load_data(model, tokenizer, config)
    assert {q.text for q in read.questions + read.held_out} == {row["question"] for row in GSM8K[:20]}
    assert not {q.text for q in read.questions} & {q.text for q in read.held_out} and len(read.held_out) == 3
    assert "2 of 22 questions are left out" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, told", [
    ({}, "['main', 'socratic']"),
    ({"config": "none"}, "main"),
    ({"config": "main", "split": "validation"}, "validation"),
    ({"config": "main", "question_field": "prompt"}, "prompt is missing"),
])
def test_a_wrong_choice_in_a_hub_set_is_told_in_a_line(hub_like, arguments, told):
    with pytest.raises(InputError) as caught:
        load_questions(hub_like, **arguments)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_library_a_line_says_what_to_install(hub_like, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_questions(hub_like)


# ------------------------------------------------------------------------------------------------ architectures

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=512,
)
LLAMA_3_SCALING = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "gemma-3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    "llama-3.2": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA_3_SCALING, "tie_word_embeddings": True}),
    "qwen-3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    "smollm-3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "smollm-2": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "attention_bias": False}),
}


def write_model(folder, name, chat_template=True):
    """A random model of an architecture, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    kind, settings, more = ARCHITECTURES[name]
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    kind(settings(vocab_size=len(tokenizer), **SIZES, **ends, **more)).save_pretrained(folder)
    if not chat_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_goes_through_the_whole_of_training(name, tmp_path, capsys):
    model = write_model(tmp_path / "model", name)
    flags = [*SMALL, "--model", model, "--learning-rate", "1e-3", "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 0
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(steps) == 2 and all(math.isfinite(value) for step in steps for value in step.values())
    assert abs(steps[0]["kl"]) < 1e-6 < steps[1]["kl"], "the reference is not the starting policy, or nothing trained"
    start, end = (AutoModelForCausalLM.from_pretrained(f) for f in (model, tmp_path / "run" / "final"))
    assert type(end) is ARCHITECTURES[name][0]
    assert any((a != b).any() for a, b in zip(start.parameters(), end.parameters(), strict=True))
    assert f"--model {model} without --dataset" in capsys.readouterr().out, "whose questions it trains on is not said"


def test_a_model_without_a_chat_template_gets_a_plain_one_and_says_so(tmp_path, capsys):
    _, tokenizer = policy.load_model(write_model(tmp_path, "smollm-2", chat_template=False), torch.device("cpu"))
    assert capsys.readouterr().out.count("no chat template") == 1
    (ids,) = data.encode_prompts(tokenizer, [data.build_messages("2 + 3?", "Be brief.")])
    text = tokenizer.decode(ids)
    assert text.startswith("User: 2 + 3?") and text.endswith("\n\nAssistant:"), text


# ------------------------------------------------------------------------------------------------ precision and memory


def make_batch(model, tokenizer, *flags):
    config = train.parse(["--principles", PRINCIPLES, *SMALL, *flags])
    drawn = train.draw(tiny.make_questions(50, False), tiny.principles(), config, 0)
    batch = train.roll_out(model, tokenizer, *drawn, config.num_generations, config, [f"question {n}" for n in range(len(drawn[0]))])
    return config, batch


def gradient(model, batch, config):
    """Of one optimiser step, by `update`, as one vector; the batch's old log-probabilities are left as they were."""
    model, optimizer = copy.deepcopy(model), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda: None  # `update` clears it, and here it is the result
    stats, _ = train.update(model, optimizer, config, copy.copy(batch))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), stats


@pytest.mark.parametrize("name", ["gemma-3", "llama-3.2"])
@pytest.mark.parametrize("micro_batch", ["1", "3", "16"])
def test_checkpointing_and_micro_batches_below_a_question_change_no_gradient(name, micro_batch, tmp_path):
    model, tokenizer = policy.load_model(write_model(tmp_path, name), torch.device("cpu"))
    model.double()
    config, batch = make_batch(model, tokenizer, "--lambda-mi", "0.1", "--lambda-ot", "0.1", "--num-generations", "4",
                               "--max-grad-norm", "1e9")
    start = copy.deepcopy(model)
    for parameter in start.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    train.refer(start, batch, config)
    whole, stats = gradient(model, batch, config)
    model.recompute_rows = config.micro_batch = int(micro_batch)
    parts, part_stats = gradient(model, batch, config)
    assert whole.norm() > 0 and difference(parts, whole) < 1e-7
    assert math.isclose(stats["loss"], part_stats["loss"], rel_tol=1e-6)


def test_checkpointing_keeps_the_activations_of_micro_batch_completions_only(tmp_path):
    """What is saved for the backward pass, in bytes, does not grow with the completions of a question."""
    model, tokenizer = policy.load_model(write_model(tmp_path, "llama-3.2"), torch.device("cpu"))

    def saved(generations, recompute):
        _, batch = make_batch(model, tokenizer, "--num-generations", generations)
        model.recompute_rows, seen = recompute, {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            hidden = train.own_completions(model, batch)  # [Q, K, G, T, d]
        return sum(t.untyped_storage().nbytes() for t in seen.values()) / hidden.numel()

    model.recompute_rows = None
    assert saved("8", 4) < saved("8", None) / 5


def test_bfloat16_changes_log_probs_little_and_leaves_them_float32(tmp_path):
    model, tokenizer = policy.load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    config, batch = make_batch(model, tokenizer, "--num-generations", "4")
    figures = []
    for bf16 in (False, True):
        model.bf16 = bf16
        scores, hidden, logp = train.all_completions(model, batch, 1.0)  # [Q, G, K, K], [Q, K, G, T, d], [Q, K, G, T]
        assert scores.dtype == hidden.dtype == logp.dtype == torch.float32
        batch.ref_cloud = batch.ref_logp = None
        train.refer(model, batch, config)
        loss, stats, _ = train.losses(model, batch, config)
        assert {v.dtype for v in [loss, *stats.values()] if torch.is_tensor(v) and v.is_floating_point()} == {torch.float32}
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters()), "master weights are float32"
        figures.append(logp.detach()[batch.mask])
    error = (figures[0] - figures[1]).abs()
    assert 1e-5 < error.mean() < 0.05 and error.max() < 1, f"bfloat16 unused, or too coarse: {error.mean()}, {error.max()}"


def test_bfloat16_with_checkpointing_has_the_gradient_it_has_without(tmp_path):
    model, tokenizer = policy.load_model(str(tiny.MODEL_DIR), torch.device("cpu"), bf16=True)
    config, batch = make_batch(model, tokenizer, "--num-generations", "4", "--micro-batch", "3")
    train.refer(model, batch, config)
    whole, _ = gradient(model, batch, config)
    model.recompute_rows = 3
    parts, _ = gradient(model, batch, config)
    assert difference(parts, whole) < 0.02, "rows in other blocks are rounded otherwise, no more"


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_by_chunk_equal_the_definition(cap, bias, tmp_path):
    """Value and both gradients, with a softcap (Gemma-2) and with a bias in the head (Phi-2)."""
    model, _ = policy.load_model(write_model(tmp_path, "qwen-3"), torch.device("cpu"))
    model.config.final_logit_softcapping = cap
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(512))
    model.double()
    hidden = torch.randn(2, 3, 7, 32, dtype=torch.float64, requires_grad=True)  # [P, N, T, d]
    tokens, weights = torch.randint(512, (2, 3, 7)), torch.randn(2, 3, 7, dtype=torch.float64)  # [P, N, T] both
    mask = torch.rand(2, 3, 7) < 0.7  # [P, N, T]
    inputs, results = [hidden, *model.lm_head.parameters()], []
    logits = policy.head(model, 9 * hidden) / 0.7  # [P, N, T, V]
    plain = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * mask  # [P, N, T]
    for logp in (plain, *(policy.log_probs(model, 9 * hidden, tokens, mask, 0.7, n * 512) for n in (1, 8, 99))):
        results.append([logp, *torch.autograd.grad((logp * weights).sum(), inputs)])
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0], rtol=1e-9, atol=1e-12)


def test_bfloat16_log_probs_by_chunk_are_those_of_one_chunk():
    model, _ = policy.load_model(str(tiny.MODEL_DIR), torch.device("cpu"), bf16=True)
    hidden, tokens = torch.randn(64, 128, requires_grad=True), torch.randint(512, (64,))  # [M, d], [M]
    results = []
    for chunk in (64 * 512, 8 * 512):
        logp = policy.log_probs(model, hidden, tokens, torch.ones(64, dtype=torch.bool), 1.0, chunk)  # [M]
        results.append([logp, *torch.autograd.grad(logp.square().sum(), [hidden, model.lm_head.weight])])
    assert all(t.dtype == torch.float32 for t in results[1])
    for a, b in zip(*results, strict=True):
        assert difference(b, a) < 0.01


def test_the_estimate_of_memory_counts_what_it_says(tmp_path):
    model, tokenizer = policy.load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    size = sum(p.numel() for p in model.parameters())

    def estimate(*flags, model=model):
        config = train.parse(["--principles", PRINCIPLES, *SMALL, *flags])
        return train.estimate_memory(model, tokenizer, train.load_data(model, tokenizer, config), config)

    parts = estimate()
    assert (parts["weights"], parts["reference"], parts["gradients and optimiser"]) == (4 * size, 4 * size, 12 * size)
    # 4 layers x (2 heads' worth of keys and values of 128 float32) a token; 2 x 2 x 2 rows, and evaluation's 3 x 2
    prompt = parts["cache"] / (4 * 2 * 128 * 4 * 8) - 16
    assert prompt == int(prompt) and 40 < prompt < 150
    few, many = estimate("--num-generations", "4"), estimate("--num-generations", "8")
    assert 1.5 < many["activations"] / few["activations"] < 2
    checkpointed = [estimate("--num-generations", g, "--gradient-checkpointing", "--micro-batch", "1") for g in "48"]
    assert checkpointed[0]["activations"] == checkpointed[1]["activations"] < few["activations"] / 2
    assert estimate("--lora-rank", "4")["reference"] == 0, "with LoRA there is no second copy"


def test_out_of_memory_ends_with_advice_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "update", full)
    flags = [*SMALL, "--eval-questions", "1", "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 1
    out, error = capsys.readouterr()
    error = error.splitlines()[-1]  # the progress bar is on stderr too
    assert error.startswith("error: ") and "--gradient-checkpointing" in error and "--lora-rank 16" in error
    assert "memory: about" in out


# ------------------------------------------------------------------------------------------------ LoRA

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is optional")


@needs_peft
@pytest.mark.parametrize("bf16", [False, True])
def test_the_reference_of_lora_is_the_policy_at_the_start_and_only_adapters_train(bf16):
    model, tokenizer = policy.load_model(str(tiny.MODEL_DIR), torch.device("cpu"), bf16=bf16)
    model = policy.add_lora(model, 4, seed=0)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules()), "dropout is on"
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    config, batch = make_batch(model, tokenizer, "--lambda-mi", "0.1", "--lambda-ot", "0.1")
    with policy.at_start(model, None) as start:
        train.refer(start, batch, config)
    hidden = train.own_completions(model, batch)  # [Q, K, G, T, d]
    assert torch.equal(train.pick(hidden, batch.cloud), batch.ref_cloud), "with B = 0 adapters must add exactly nothing"
    assert train.estimate_memory(model, tokenizer, train.Data(tiny.principles(), tiny.make_questions(9, False), [], None, None), config)["gradients and optimiser"] == 12 * sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), config, batch)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name}, "at first A has no gradient, as B is 0"
    train.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), config, batch)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    with policy.at_start(model, None) as start, torch.no_grad():
        again = train.pick(train.own_completions(start, batch), batch.cloud)  # [Q, n, d]
    assert torch.equal(again, batch.ref_cloud), "with adapters off it is no longer the starting policy"


@needs_peft
def test_a_lora_run_leaves_a_merged_model_and_its_adapters(tmp_path):
    flags = [*SMALL, "--lora-rank", "4", "--learning-rate", "1e-2", "--max-steps", "3", "--gradient-checkpointing"]
    assert train.main(["--principles", PRINCIPLES, *flags, "--output-dir", str(tmp_path / "run")]) == 0
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert abs(steps[0]["kl"]) < 1e-9 < steps[2]["kl"]
    start = AutoModelForCausalLM.from_pretrained(tiny.MODEL_DIR, dtype=torch.float32)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.MODEL_DIR), tmp_path / "run" / "adapter")
    ids = torch.arange(5, 105)[None]  # [1, L]
    with torch.no_grad():
        merged, apart, before = (m.eval()(ids).logits for m in (final, adapted, start))
    torch.testing.assert_close(merged, apart, rtol=1e-5, atol=1e-5)
    assert (merged - before).abs().max() > 1e-2
    assert set(dict(final.named_parameters())) == set(dict(start.named_parameters()))


def test_without_peft_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    flags = [*SMALL, "--lora-rank", "4", "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 2
    assert "pip install peft" in capsys.readouterr().err
