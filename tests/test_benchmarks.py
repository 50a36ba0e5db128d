"""Benchmarks run with the present code; what they measure is their own affair."""

import json
import sys

import pytest
import torch

from benchmarks import memory, step
from support.model import load_model


@pytest.mark.parametrize("table", ["--price", "--growth"])
def test_a_round_of_every_variant(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "GROWTH", {"--num-questions": (1, 2)})
    small = "--rounds 1 --num-questions 1 --num-principles 2 --num-generations 2 --max-completion-length 4".split()
    monkeypatch.setattr(sys, "argv", ["step.py", table, *small, "--output-dir", str(tmp_path)])
    step.main()
    assert capsys.readouterr().out.count("| GRPO") >= 1
    assert json.loads((tmp_path / "step.json").read_text())


def test_the_random_models_whose_memory_is_measured(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    memory.write_model(str(tmp_path), "Llama", "LlamaConfig", json.dumps(sizes))
    model, tokenizer = load_model(str(tmp_path), torch.device("cpu"))
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(tokenizer) <= model.config.vocab_size
