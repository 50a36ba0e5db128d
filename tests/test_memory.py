"""memory.py: what is chosen from the free memory, what is refused, and where the free memory is read."""

import copy
from pathlib import Path

import pytest
import torch

import train
from support import memory, tiny
from support.data import load_data
from support.errors import InputError
from support.model import load_model
from support.preferences import load_pairs
from support.run import settle
from support.scoring import token_states

PRINCIPLES = str(Path(__file__).parent.parent / "principles" / "reasoning.txt")
SMALL = (
    "--num-questions 2 --num-principles 2 --num-generations 2 --max-completion-length 8 --eval-questions 2 --max-steps 1"
).split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer, data)."""
    model, tokenizer = load_model(str(tiny.MODEL_DIR), CPU)
    config = train.parse(["--principles", PRINCIPLES, *SMALL])
    settle(config, model, tokenizer)
    return model, tokenizer, load_data(model, tokenizer, config)


def estimate(loaded, *flags):
    """(the parts of the estimate, the line, the settings) of a run with these flags."""
    model, tokenizer, data = loaded
    config = train.parse(["--principles", PRINCIPLES, *SMALL, *flags])
    settle(config, model, tokenizer)
    config.gradient_checkpointing, config.micro_batch, line = memory.fit(model, data, config)
    texts = memory.Texts(model, data.longest_prompts, config.max_completion_length)
    return memory.sizes(model, texts, None, config), line, config


def total(parts):
    return sum(parts.values())


def test_with_enough_memory_nothing_is_recomputed_and_the_line_says_how_much_is_free(loaded, monkeypatch):
    monkeypatch.setattr("support.memory.free_memory", lambda device: 64e9)
    parts, line, config = estimate(loaded)
    assert (config.gradient_checkpointing, config.micro_batch) == (False, 16)
    assert line.startswith(f"memory: about {total(parts) / 1e9:.2g} GB (") and line.endswith("of 64 GB free")
    assert f"activations {parts['activations'] / 1e9:.2g}" in line


def test_less_memory_means_one_question_at_a_time_and_then_ever_fewer_rows_recomputed(loaded, monkeypatch):
    free, held, seen = 64e9, sum(p.nbytes for p in loaded[0].parameters()), []
    monkeypatch.setattr("support.memory.free_memory", lambda device: free)
    for _ in range(12):
        try:
            parts, line, config = estimate(loaded, "--num-generations", "16", "--max-completion-length", "64")
        except InputError as error:
            seen.append("refused")
            assert "it does not fit; try --lora-rank 16" in str(error) and "\n" not in str(error)
            break
        assert total(parts) <= memory.HEADROOM * free + held
        seen.append((config.gradient_checkpointing, config.micro_batch))
        flags = f"--micro-batch {config.micro_batch}" + " --gradient-checkpointing True" * config.gradient_checkpointing
        assert len(seen) == 1 or f"{flags} is chosen, since all at once would take" in line
        free = (total(parts) - held) / memory.HEADROOM - 1  # what was chosen is now one byte too large
    assert seen[:5] == [(False, 128), (False, 64), (True, 32), (True, 16), (True, 8)] and seen[-1] == "refused", seen


def test_flags_that_are_given_are_kept(loaded, monkeypatch):
    monkeypatch.setattr("support.memory.free_memory", lambda device: 64e9)
    _, _, config = estimate(loaded, "--micro-batch", "3")
    assert (config.gradient_checkpointing, config.micro_batch) == (False, 3)
    _, _, config = estimate(loaded, "--gradient-checkpointing", "True")
    assert (config.gradient_checkpointing, config.micro_batch, config.how_read["recompute_rows"]) == (True, 16, 16)
    monkeypatch.setattr("support.memory.free_memory", lambda device: 1e6)
    with pytest.raises(InputError, match="it does not fit"):
        estimate(loaded, "--gradient-checkpointing", "False")
    _, line, config = estimate(loaded, "--gradient-checkpointing", "False", "--micro-batch", "5")
    assert (config.gradient_checkpointing, config.micro_batch) == (False, 5)
    assert "it may not fit; try --lora-rank 16" in line, "nothing else would fit either"
    monkeypatch.setattr("support.memory.free_memory", lambda device: 0.06e9)
    _, _, chosen = estimate(loaded, "--num-generations", "16")
    _, line, _ = estimate(loaded, "--num-generations", "16", "--gradient-checkpointing", "False", "--micro-batch", "256")
    fits = f"--gradient-checkpointing {chosen.gradient_checkpointing} --micro-batch {chosen.micro_batch} would"
    assert line.endswith(f"it may not fit; {fits}"), line


def test_what_cannot_fit_ends_with_one_line_and_status_2_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.memory.free_memory", lambda device: 1e6)
    folder = tmp_path / "run"
    assert train.main(["--principles", PRINCIPLES, *SMALL, "--output-dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: memory: about") and error.count("\n") == 1 and not folder.exists()


def test_where_the_free_memory_is_unknown_the_estimate_is_told_and_nothing_is_refused(loaded, monkeypatch):
    monkeypatch.setattr("support.memory.free_memory", lambda device: None)
    parts, line, config = estimate(loaded)
    assert (config.gradient_checkpointing, config.micro_batch) == (False, 16)
    assert line.startswith("memory: about") and "free" not in line


def test_the_estimate_counts_what_it_says(loaded, monkeypatch):
    monkeypatch.setattr("support.memory.free_memory", lambda device: 64e9)
    size = sum(p.numel() for p in loaded[0].parameters())
    parts, _, _ = estimate(loaded)
    assert [parts[name] for name in ("weights", "reference", "optimiser", "gradient")] == [
        4 * size, 4 * size, 8 * size, 4 * size
    ]
    few, many = (estimate(loaded, "--num-generations", g)[0]["activations"] for g in ("8", "16"))
    assert 1.5 < many / few < 2, "rows are twice as many, prompts as many"
    flags = "--gradient-checkpointing", "True", "--micro-batch", "1"
    _, _, config = estimate(loaded, *flags)
    texts = memory.Texts(loaded[0], loaded[2].longest_prompts, config.max_completion_length)
    once, again = (memory.training(loaded[0], texts, rows, 2, 2, config)["activations"] for rows in (16, 32))
    assert once == again < few / 2, "one row at a time, however many there are"
    assert estimate(loaded, "--bf16", "True")[0]["bfloat16 copies"] == 2 * size


def test_a_row_and_a_token_keep_what_torch_keeps_of_a_whole_batch(loaded):
    model, prompts, kept = copy.deepcopy(loaded[0]), [[5, 6, 7, 8, 9] * 9, [5, 6, 9, 9, 7] * 9], {}
    texts = memory.Texts(model, prompts, 16)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    tokens = torch.ones(2, 12, 16, dtype=torch.long)  # [P, N, T]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        token_states(model, prompts, tokens, torch.ones_like(tokens).bool())
    whole = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    assert texts.token * texts.tokens(2) + 24 * texts.row == pytest.approx(whole, rel=0.05)


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(("files", "free"), [
    ({"proc/self/cgroup": "0::/\n"}, 8e9),  # no limit but the machine's
    ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/memory.max": "max", "sys/fs/cgroup/box/memory.current": "9"},
     8e9),
    ({"proc/self/cgroup": "0::/box/job\n", "sys/fs/cgroup/box/job/memory.max": "max",
      "sys/fs/cgroup/box/memory.max": "5000000000", "sys/fs/cgroup/box/memory.current": "3000000000",
      "sys/fs/cgroup/box/memory.stat": "anon 1\ninactive_file 1000000000\nactive_file 7\n"}, 3e9),  # of a parent
    ({"proc/self/cgroup": "9:cpu:/\n4:cpuset,memory:/box\n0::/\n",
      "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "5000000000",
      "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "3000000000",
      "sys/fs/cgroup/memory/box/memory.stat": "cache 8\ninactive_file 0\n"}, 2e9),  # version 1
])
def test_free_memory_is_that_of_the_machine_under_the_limits_of_every_cgroup(tmp_path, monkeypatch, files, free):
    write(tmp_path, {"proc/meminfo": "MemTotal: 16000000 kB\nMemFree: 9 kB\nMemAvailable:    7812500 kB\n", **files})
    assert memory.free_memory(CPU, tmp_path) == free
    monkeypatch.setattr(memory.parallel, "world", lambda: 2)
    assert memory.free_memory(CPU, tmp_path) == free / 2, "processes side by side share it"


def test_free_memory_is_unknown_without_proc(tmp_path):
    assert memory.free_memory(CPU, tmp_path) is None


def test_of_pairs_halves_are_tried_and_an_evaluations_sampling_counts(monkeypatch):
    model, tokenizer = load_model(str(tiny.MODEL_DIR), CPU)
    config = train.parse(["--preferences", "tiny", "--max-steps", "1", "--num-pairs", "16", "--eval-questions", "256"])
    settle(config, model, tokenizer)
    assert memory.choices(config, 16)[:6] == [(False, 32), (False, 16), (False, 8), (False, 4), (False, 2), (True, 16)]
    data, chosen = load_pairs(model, tokenizer, config), {}
    for free in (64e9, 0.12e9, 0.04e9):
        monkeypatch.setattr("support.memory.free_memory", lambda device, free=free: free)
        chosen[free] = memory.fit(model, data, config)
    assert chosen[64e9][:2] == (False, 32) and "sampling" in chosen[64e9][2], "256 completions at a time"
    assert chosen[0.12e9][0] and "sampling" not in chosen[0.12e9][2], "16 of them, as in a step"
    assert chosen[0.04e9][0] and chosen[0.04e9][1] < chosen[0.12e9][1]
