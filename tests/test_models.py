"""What a real model needs: its questions from real data sets, its precision, its memory, other architectures, LoRA."""

import copy
import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import load_questions
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

import train
from support import prefix, sampling, tiny
from support.data import is_held_out
from support.errors import InputError
from support.files import Question
from support.model import add_lora, check_model, load_model, save_model
from support.prompts import PromptTemplate, build_messages, encode_prompts, prompt_limit
from support.run import settle
from support.sampling import uniform_numbers
from support.scoring import completion_logp, token_log_probs, token_states
from support.steps import Step

ROOT = Path(__file__).resolve().parent.parent
PRINCIPLES = str(ROOT / "principles" / "reasoning.txt")
QUESTIONS = str(ROOT / "tests" / "questions.jsonl")  # a few: to check the embedded task's 4096 takes a second
SMALL = (
    f"--dataset {QUESTIONS} --num-questions 2 --num-principles 2 --num-generations 2 --max-steps 2 --eval-questions 3 "
    "--eval-steps 0 --warmup-steps 0 --max-completion-length 16"
).split()


@pytest.fixture(autouse=True, scope="module")
def no_plot():
    """Drawing one takes longer than a small run; test_run.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.run.write_plot", lambda *_: None)
        yield


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
    monkeypatch.setattr("support.rows.SHUFFLE_BUFFER", 20)
    taken = load_questions(hub_like, config="main", limit=10, seed=0)
    assert len(set(taken)) == 10 and taken == load_questions(hub_like, config="main", limit=10, seed=0)
    assert taken != load_questions(hub_like, config="main", limit=10, seed=1)
    assert [q.text for q in taken] != [row["question"] for row in GSM8K[:10]], "not shuffled"
    everything = load_questions(hub_like, config="main")
    assert sorted(q.text for q in everything) == sorted(row["question"] for row in GSM8K)
    assert {q.answer for q in load_questions(hub_like, config="main", split="test")} == {"1", "2", "3"}


def test_a_hub_set_is_not_downloaded_to_take_a_few_rows(hub_like, monkeypatch):
    read = []
    real = datasets.IterableDataset.__iter__

    def counted(rows):
        return (read.append(1) or row for row in real(rows))

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", counted)
    monkeypatch.setattr("support.rows.SHUFFLE_BUFFER", 5)
    load_questions(hub_like, config="main", limit=10)
    assert 10 <= len(read) < 100


def test_a_set_with_a_loading_script_is_read_from_the_hubs_conversion(hub_like, monkeypatch):
    """github.com/huggingface/datasets/issues/8012: the script is refused, the branch with its parquet files is not."""
    real = datasets.load_dataset_builder

    def scripted(*args, revision=None):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found CoT_Collection.py")
        return real(*args)

    monkeypatch.setattr(datasets, "load_dataset_builder", scripted)
    assert len(load_questions(hub_like, config="main", limit=4)) == 4


def test_rows_of_a_hub_set_that_forge_a_turn_are_left_out_and_told(tmp_path, capsys):
    rows = [*GSM8K[:20], {"question": "a <|user|> b", "answer": "1"}, {"question": "word " * 600, "answer": "1"}]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    config = train.parse(["--principles", PRINCIPLES, *SMALL, "--dataset", str(tmp_path / "set"), "--max-steps", "20"])
    read = train.load_data(model, tokenizer, config)
    assert {q.text for q in read.questions + read.held_out} <= {row["question"] for row in GSM8K[:20]}
    assert not any(is_held_out(q.text) for q in read.questions) and all(is_held_out(q.text) for q in read.held_out)
    assert len(read.questions) == sum(not is_held_out(row["question"]) for row in GSM8K[:20])
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


@pytest.mark.parametrize("name", ["gemma-3", "llama-3.2", "smollm-3"])  # a window, scaled positions, and none
def test_an_architecture_goes_through_the_whole_of_training(name, tmp_path):
    model = write_model(tmp_path / "model", name)
    flags = [*SMALL, "--model", model, "--learning-rate", "1e-3", "--beta", "0.01", "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 0
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(steps) == 2 and all(math.isfinite(value) for step in steps for value in step.values())
    assert abs(steps[0]["kl"]) < 1e-6 < steps[1]["kl"], "the reference is not the starting policy, or nothing trained"
    start, end = (AutoModelForCausalLM.from_pretrained(f) for f in (model, tmp_path / "run" / "final"))
    assert type(end) is ARCHITECTURES[name][0]
    assert any((a != b).any() for a, b in zip(start.parameters(), end.parameters(), strict=True))


def test_without_a_dataset_the_run_says_whose_questions_a_model_is_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.tiny.make_questions", lambda *_: [Question("1 + 1?", "2")])
    folder = write_model(tmp_path, "qwen-3")
    config = train.parse(["--principles", PRINCIPLES, "--model", folder])
    train.load_data(*load_model(folder, torch.device("cpu")), config)
    assert f"--model {folder} without --dataset: the questions are the embedded task's" in capsys.readouterr().out


def test_a_model_without_a_chat_template_gets_a_plain_one_and_says_so(tmp_path, capsys):
    _, tokenizer = load_model(write_model(tmp_path, "smollm-2", chat_template=False), torch.device("cpu"))
    assert capsys.readouterr().out.count("no chat template") == 1
    (ids,) = encode_prompts(tokenizer, [build_messages("2 + 3?", "Be brief.")])
    text = tokenizer.decode(ids)
    assert text.startswith("User: 2 + 3?") and text.endswith("\n\nAssistant:"), text


# ------------------------------------------------------------------------------------------------ scores are the plain forward's

# The settings of tiny models, under all the names that configurations have for them; each takes those that it knows.
SMALL_MODEL = dict(
    hidden_size=32, n_embd=32, d_model=32, intermediate_size=48, ffn_dim=48, ffn_hidden_size=48, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, word_embed_proj_dim=32, num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2,
    decoder_layers=2, encoder_layers=2, num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4,
    encoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48, num_key_value_heads=2, head_dim=8, rotary_dim=4,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, state_size=8,
    n_shared_experts=1, first_k_dense_replace=1, max_position_embeddings=256, n_positions=256, max_seq_len=256,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8,
              num_key_value_heads=4)
SLIDING = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
             "original_max_position_embeddings": 32, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
ACCEPTED = {name: {} for name in """afmoe apertus arcee bitnet bloom cohere cohere2 ctrl dots1 ernie4_5 ernie4_5_moe
    exaone4 falcon flex_olmo gemma gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite
    granitemoe helium hunyuan_v1_dense hunyuan_v1_moe jetmoe llama mistral mixtral mpt nanochat nemotron olmo olmo2
    olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
    xglm""".split()} | {
    "gemma2": SLIDING, "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=24),
    "deepseek_v2": LATENT, "deepseek_v3": LATENT, "minicpm3": LATENT | dict(dim_model_base=8), "codegen": {}, "biogpt": {},
    "mistral window": dict(sliding_window=24), "qwen3 window": dict(SLIDING, use_sliding_window=True),
    "granite scaled": dict(logits_scaling=8.0), "cohere scaled": dict(logit_scale=0.0625), "llama yarn": dict(rope_parameters=YARN),
    "phi3 longrope, equal": dict(rope_parameters=LONG_ROPE | {"long_factor": [1.0] * 4}),
    "falcon alibi": dict(alibi=True), "falcon new": dict(new_decoder_architecture=True),
}
MAMBA = dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=16)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
REFUSED = {
    "mamba": {}, "mamba2": MAMBA, "falcon_mamba": {}, "rwkv": dict(attention_hidden_size=32, context_length=256),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_ff_dim=48), "qwen3_next": HYBRID, "qwen3_5_text": HYBRID,
    "recurrent_gemma": {}, "minimax": {}, "xlstm": {}, "bert": {}, "roberta": {}, "xlnet": {}, "bart": {}, "mbart": {},
    "marian": {}, "pegasus": {}, "trocr": {}, "openai-gpt": {}, "roformer": {}, "blenderbot": {}, "t5": {},
    "phi3 longrope": dict(rope_parameters=LONG_ROPE), "hyperclovax scaled": dict(logits_scaling=8.0),  # it multiplies
    "llama dynamic": dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}),
    "llama longrope": dict(rope_parameters=LONG_ROPE),
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def write_any_model(name, more, tokenizer_folder, folder):
    """A tiny random model of any architecture that the library has, away from its start, where attention hardly matters."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name.split()[0]]
    known = {field.name for field in dataclasses.fields(kind)} | set(getattr(kind, "attribute_map", {}))
    sizes = {key: value for key, value in (SMALL_MODEL | more).items() if key in known}
    config = kind(**sizes, vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if name != "t5" else transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return str(folder)


def largest_error(model, prompts, lengths):
    """Of log-probabilities, against one unpadded row at a time through the library's own forward, without a cache."""
    width = max(map(max, lengths))
    tokens = torch.randint(5, 500, (len(prompts), 2, width), generator=torch.Generator().manual_seed(1))  # [P, N, T]
    mask = torch.arange(width) < torch.tensor(lengths)[..., None]  # [P, N, T]
    with torch.no_grad():
        ours = completion_logp(model, prompts, tokens, mask, 1.0)  # [P, N, T]
        worst = 0.0
        for (p, n), length in np.ndenumerate(lengths):
            written = tokens[p, n, :length]  # [length]
            logits = model(input_ids=torch.tensor([prompts[p] + written.tolist()]), use_cache=False).logits[0]
            plain = logits[len(prompts[p]) - 1 : -1].log_softmax(-1).gather(1, written[:, None])[:, 0]  # [length]
            worst = max(worst, (plain - ours[p, n, :length]).abs().max().item())
    return worst


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_architecture_scores_as_its_plain_forward(name, tokenizer_folder, tmp_path):
    """Two prompts of different lengths together, two completions each; one prompt past every window of the table."""
    model, _ = load_model(write_any_model(name, ACCEPTED[name], tokenizer_folder, tmp_path), torch.device("cpu"))
    error = largest_error(model, [[1, *range(20, 61)], [1, 50, 60, 70]], [[6, 3], [2, 8]])
    assert error < 1e-4, f"accepted, and {error:.1g} nats from the plain forward"


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_would_be_scored_wrongly_is_refused_in_a_line(name, tokenizer_folder, tmp_path):
    folder = write_any_model(name, REFUSED[name], tokenizer_folder, tmp_path)
    with pytest.raises(InputError) as caught:
        load_model(folder, torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(f"--model: {folder}: ") and message.endswith("in safetensors is accepted"), message
    assert len(message.splitlines()) == 1


SHORT = dict(max_position_embeddings=40, n_positions=40, max_seq_len=40, max_target_positions=40)


@pytest.mark.parametrize("name", "gpt2 opt mpt gptj gpt_neo gpt_bigcode codegen ctrl biogpt xglm llama whisper".split())
def test_a_prompt_that_fills_the_context_works_and_one_token_more_is_refused(name, tokenizer_folder, tmp_path):
    """Learned positions end in an IndexError beyond it, so the limit must be found under every family's name for it."""
    model, tokenizer = load_model(write_any_model(name, ACCEPTED.get(name, {}) | SHORT, tokenizer_folder, tmp_path), torch.device("cpu"))
    limit = prompt_limit(model, 8)
    assert limit == 32
    full = [1, *range(20, 20 + limit - 1)]
    assert largest_error(model, [full, full[:4]], [[8, 3], [2, 8]]) < 1e-4
    assert largest_error(model, [full, full[:4]], [[8, 3], [36, 8]]) < 1e-4, "a short response beside a long one"
    uniform = uniform_numbers(["a", "b"], 2, 8)  # [P, N, T]
    assert sampling.sample(model, [full, full[:4]], uniform, 1.0, [], 0).mask.all()
    talk = [{"role": "user", "content": "word " * 30}]
    length = len(encode_prompts(tokenizer, [talk])[0])
    encode_prompts(tokenizer, [talk], length)
    with pytest.raises(InputError, match=f"has {length} tokens; at most {length - 1} are accepted"):
        encode_prompts(tokenizer, [talk], length - 1)


def test_pairs_that_fill_the_context_each_in_its_way_train_together(tokenizer_folder, tmp_path):
    """A long prompt with a short response, a short prompt with a long one: the first is padded past the context."""
    folder = write_any_model("gpt_neo", ACCEPTED["gpt_neo"] | SHORT, tokenizer_folder, tmp_path)
    long, short = "7 " * 12, "7"
    rows = [{"prompt": f"{p}{n}", "chosen": c, "rejected": c + "8"} for p, c in ((long, short), (short, long)) for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--preferences {tmp_path}/pairs.jsonl --model {folder} --num-pairs 20 --max-steps 1 --eval-steps 0"
    run = tmp_path / "run"
    assert train.main([*flags.split(), "--max-completion-length", "4", "--output-dir", str(run)]) == 0
    lengths = [len(load_model(folder, torch.device("cpu"))[1].encode(text)) for text in (long, short)]
    assert 2 * lengths[0] > 40 > sum(lengths) + 6, "all pairs fit, and no two of different kinds together"
    assert "pair_logratio_chosen" in json.loads((run / "eval.json").read_text())["end"]


def test_a_window_is_tested_past_its_length(tokenizer_folder, tmp_path, monkeypatch):
    """A mask that forgets its window differs from the plain forward only beyond it."""
    folder = write_any_model("mistral", dict(sliding_window=24), tokenizer_folder, tmp_path)
    model, _ = load_model(folder, torch.device("cpu"))
    original = prefix.forward
    monkeypatch.setattr("support.prefix.forward", lambda model, ids, shown, positions, cache: without_window(
        model, lambda: original(model, ids, shown, positions, cache)))

    def without_window(model, call):
        window, model.config.sliding_window = model.config.sliding_window, 1000
        try:
            return call()
        finally:
            model.config.sliding_window = window

    with pytest.raises(ValueError, match="MistralForCausalLM gives other samples or scores"):
        check_model(model)


# ------------------------------------------------------------------------------------------------ tokenizers


def write_tokenizer(folder, **changes):
    """The embedded model with another tokenizer: `special` or `plain` tokens added, or attributes set."""
    shutil.copytree(tiny.MODEL_DIR, folder, dirs_exist_ok=True)
    tokenizer = tiny.make_tokenizer()
    if "special" in changes:
        tokenizer.add_special_tokens(changes.pop("special"))
    tokenizer.add_tokens(changes.pop("plain", []))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_disk(tmp_path, monkeypatch):
    """The library raises a bare Exception where the disk is full."""
    model, tokenizer = load_model("tiny-model", torch.device("cpu"))

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tokenizer, PromptTemplate(), tmp_path, "a card")
    assert not (tmp_path / "final").exists()


def test_a_pad_token_that_the_model_lacks_is_harmless_also_in_what_was_trained(tmp_path):
    folder = write_tokenizer(tmp_path / "a", special={"pad_token": "[PAD]"})
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id == 512, "as many as the model has tokens"
    model, tokenizer = load_model(folder, torch.device("cpu"))
    assert tokenizer.pad_token_id < 512
    save_model(model, tokenizer, PromptTemplate(), tmp_path, "a card")
    _, again = load_model(str(tmp_path / "final"), torch.device("cpu"))
    assert again.pad_token_id == tokenizer.pad_token_id
    with pytest.raises(InputError, match="PAD"):  # it never reaches the model from a file either
        encode_prompts(again, [[{"role": "user", "content": "a [PAD] b"}]])


@pytest.mark.parametrize("changes", [
    dict(plain=["<concept>"]),
    dict(special={"eos_token": "<|done|>"}),
    dict(special={"additional_special_tokens": ["<concept>"]}, chat_template="{{ messages[0]['content'] }}<concept>"),
])
def test_tokens_that_the_model_lacks_and_a_text_can_hold_are_refused(changes, tmp_path):
    with pytest.raises(InputError, match=r"tokens that the model, with 512, has not, the first is '<"):
        load_model(write_tokenizer(tmp_path, **changes), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ precision and memory


def make_batch(model, tokenizer, *flags, start=None):
    """(config, batch, targets) of two questions; `start`, or the model itself, is the frozen reference."""
    config = train.parse(["--principles", PRINCIPLES, *SMALL, *flags])
    settle(config, model, tokenizer)
    tasks = train.draw(tiny.make_questions(50, False), tiny.principles(), config, 0)
    batch = train.sample(model, tokenizer, PromptTemplate(), tasks, config.num_generations, config)
    rewards = train.reward_completions(batch, config)
    return config, batch, train.make_targets(model, start or copy.deepcopy(model), batch, rewards, config)


def gradient(model, batch, targets, config):
    """(gradient of one optimiser step, by `update`, as one vector; its terms)."""
    model = copy.deepcopy(model)
    optimizer, step = torch.optim.SGD(model.parameters()), Step()
    optimizer.zero_grad = lambda: None  # `update` clears it, and here it is the result
    train.update(model, optimizer, batch, targets, step, config)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), step.passes[0]


@pytest.mark.parametrize("name", ["gemma-3", "llama-3.2"])
@pytest.mark.parametrize("micro_batch", ["1", "3", "16"])
def test_checkpointing_and_micro_batches_below_a_question_change_no_gradient(name, micro_batch, tmp_path):
    model, tokenizer = load_model(write_model(tmp_path, name), torch.device("cpu"))
    model.double()
    start = copy.deepcopy(model)
    for parameter in start.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    config, batch, targets = make_batch(model, tokenizer, "--lambda-mi", "0.1", "--lambda-ot", "0.1",
                                        "--num-generations", "4", "--max-grad-norm", "1e9", start=start)
    whole, terms = gradient(model, batch, targets, config)
    config.gradient_checkpointing, config.micro_batch = True, int(micro_batch)
    parts, part_terms = gradient(model, batch, targets, config)
    assert whole.norm() > 0 and difference(parts, whole) < 1e-7
    assert math.isclose(terms["loss"], part_terms["loss"], rel_tol=1e-6)


def test_checkpointing_keeps_the_activations_of_micro_batch_completions_only(tmp_path):
    """What is saved for the backward pass, in bytes, does not grow with the completions of a question."""
    model, tokenizer = load_model(write_model(tmp_path, "llama-3.2"), torch.device("cpu"))

    def saved(generations, recompute):
        _, batch, _ = make_batch(model, tokenizer, "--num-generations", generations)
        prompts = [prompt for row in batch.prompts for prompt in row]
        tokens, mask, seen = batch.tokens.flatten(0, 1), batch.mask.flatten(0, 1), {}  # [P, N, T] both
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            states, _ = token_states(model, prompts, tokens, mask, recompute_rows=recompute)  # [M, d]
        return sum(t.untyped_storage().nbytes() for t in seen.values()) / states.numel()

    assert saved("8", 4) < saved("8", None) / 5


def test_bfloat16_changes_log_probs_little_and_leaves_them_float32(tmp_path):
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    config, batch, targets = make_batch(model, tokenizer, "--num-generations", "4")
    figures = []
    for bf16 in (False, True):
        config.bf16 = bf16
        now = train.read(model, batch, targets.ot_tokens, config, 4)
        assert {t.dtype for t in (now.logp, now.states, now.scores)} == {torch.float32}
        loss, terms = train.losses(now, batch, targets, config)
        assert {v.dtype for v in [loss, *terms.values()] if torch.is_tensor(v) and v.is_floating_point()} == {torch.float32}
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters()), "master weights are float32"
        figures.append(now.logp.detach()[batch.mask])
    error = (figures[0] - figures[1]).abs()
    assert 1e-5 < error.mean() < 0.05 and error.max() < 1, f"bfloat16 unused, or too coarse: {error.mean()}, {error.max()}"


def test_bfloat16_with_checkpointing_has_the_gradient_it_has_without(tmp_path):
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    flags = "--num-generations 4 --micro-batch 3 --bf16 True".split()
    config, batch, targets = make_batch(model, tokenizer, *flags)
    whole, _ = gradient(model, batch, targets, config)
    config.gradient_checkpointing = True
    parts, _ = gradient(model, batch, targets, config)
    assert difference(parts, whole) < 0.02, "rows in other blocks are rounded otherwise, no more"


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_by_chunk_equal_the_definition(cap, bias, tmp_path):
    """Value and both gradients, with a softcap (Gemma-2) and with a bias in the head (Phi-2)."""
    model, _ = load_model(write_model(tmp_path, "qwen-3"), torch.device("cpu"))
    model.config.final_logit_softcapping = cap
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(512))
    model.double()
    hidden = torch.randn(42, 32, dtype=torch.float64, requires_grad=True)  # [M, d]
    tokens, weights = torch.randint(512, (42,)), torch.randn(42, dtype=torch.float64)  # [M] both
    inputs, results = [hidden, *model.lm_head.parameters()], []
    logits = model.lm_head(9 * hidden)  # [M, V]
    logits = (logits if cap is None else cap * (logits / cap).tanh()) / 0.7  # [M, V]
    plain = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]  # [M]
    for logp in (plain, *(token_log_probs(model, 9 * hidden, tokens, 0.7, n * 512) for n in (1, 8, 99))):
        results.append([logp, *torch.autograd.grad((logp * weights).sum(), inputs)])
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0], rtol=1e-9, atol=1e-12)


def test_bfloat16_log_probs_by_chunk_are_those_of_one_chunk():
    model, _ = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    hidden, tokens = torch.randn(64, 128, requires_grad=True), torch.randint(512, (64,))  # [M, d], [M]
    results = []
    for chunk in (64 * 512, 8 * 512):
        logp = token_log_probs(model, hidden, tokens, 1.0, chunk, bf16=True)  # [M]
        results.append([logp, *torch.autograd.grad(logp.square().sum(), [hidden, model.lm_head.weight])])
    assert all(t.dtype == torch.float32 for t in results[1])
    for a, b in zip(*results, strict=True):
        assert difference(b, a) < 0.01


def test_out_of_memory_ends_with_advice_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "update", full)
    flags = [*SMALL, "--eval-questions", "1", "--output-dir", str(tmp_path / "run")]
    assert train.main(["--principles", PRINCIPLES, *flags]) == 1
    out, error = capsys.readouterr()
    error = error.splitlines()[-1]  # the progress bar is on stderr too
    assert error.startswith("error: ") and "--lora-rank 16" in error
    assert "memory: about" in out


# ------------------------------------------------------------------------------------------------ LoRA

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is optional")


def test_bfloat16_is_the_default_where_the_processor_has_it_but_not_for_small_models(monkeypatch):
    """What decides is the size of the model, not its name: a copy of the embedded model is as small."""
    def default(small, **capabilities):
        monkeypatch.setattr("support.run.SMALL_MODEL", small)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        config = train.parse(["--principles", str(PRINCIPLES), "--model", "tiny"])
        train.load(config)
        return config.bf16

    if torch.cuda.is_available():
        pytest.skip("on a GPU it always is")
    assert default(1000, amx_bf16=True)
    assert not default(1000) and not default(1000, avx512_bf16=True), "slower than float32 without AMX"
    assert not default(10**7, amx_bf16=True)


@needs_peft
@pytest.mark.parametrize("bf16", [False, True])
def test_the_reference_of_lora_is_the_policy_at_the_start_and_only_adapters_train(bf16):
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    model = add_lora(model, 4, seed=0, bf16=bf16)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules()), "dropout is on"
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    flags = ["--lambda-mi", "0.1", "--lambda-ot", "0.1", "--bf16", str(bf16)]
    config, batch, targets = make_batch(model, tokenizer, *flags)
    _, states = train.read_reference(model, None, batch, targets.ot_tokens, config)
    now = train.read(model, batch, targets.ot_tokens, config)
    assert torch.equal(now.states, states), "with B = 0 adapters must add exactly nothing"
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for trained in ("lora_B", "lora_"):  # at first A has no gradient, as B is 0
        train.update(model, optimizer, batch, targets, Step(learning_rate=1e-2), config)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if trained in name}
    _, again = train.read_reference(model, None, batch, targets.ot_tokens, config)
    assert torch.equal(again, states), "with adapters off it is no longer the starting policy"


@needs_peft
def test_a_lora_run_leaves_a_merged_model_and_its_adapters(tmp_path):
    flags = [*SMALL, *"--lora-rank 4 --learning-rate 1e-2 --gradient-checkpointing True --beta 0.01".split()]
    assert train.main(["--principles", PRINCIPLES, *flags, "--output-dir", str(tmp_path / "run")]) == 0
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert abs(steps[0]["kl"]) < 1e-9 < steps[1]["kl"]
    start = AutoModelForCausalLM.from_pretrained(tiny.MODEL_DIR, dtype=torch.float32)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32)
    from peft import PeftModel

    bare = AutoModelForCausalLM.from_pretrained(tiny.MODEL_DIR)
    adapted = PeftModel.from_pretrained(bare, tmp_path / "run" / "adapter", torch_device="cpu")
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
