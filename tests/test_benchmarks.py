"""The benchmark of a step runs with the present code; what it measures is its own affair."""

import json
import sys

import pytest

from benchmarks import step


@pytest.mark.parametrize("table", ["--price", "--growth"])
def test_a_round_of_every_variant(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "GROWTH", {"--num-questions": (1, 2)})
    small = "--rounds 1 --num-questions 1 --num-principles 2 --num-generations 2 --max-completion-length 4".split()
    monkeypatch.setattr(sys, "argv", ["step.py", table, *small, "--output-dir", str(tmp_path)])
    step.main()
    assert capsys.readouterr().out.count("| GRPO") >= 1
    assert json.loads((tmp_path / "step.json").read_text())
