"""checkpoint.py: what a file of it restores, and that a damaged one is noticed and never run."""

import os
import pickle
import random
import zipfile

import pytest
import torch

from support import checkpoint
from support.errors import InputError


@pytest.fixture
def trained():
    """(model, optimizer) of two layers, of which the second has made a step."""
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 40))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 20)).sum().backward()
    optimizer.step()
    return model, optimizer


def weights_of(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def state(step):
    checksums = {"weights": "a", "prompt": "b", "held_out": "c"}
    return {"step": step, "settings": {"seed": 0}, "checksums": checksums, "evals": {"start": {"si": 0.5}, "steps": {}}}


def save(run_dir, trained, step, **options):
    (run_dir / "config.json").write_text("{}")
    model, optimizer = trained
    return checkpoint.save(run_dir, weights_of(model), optimizer, state(step), **options)


def test_it_restores_the_weights_that_are_trained_and_the_optimiser_but_its_rate(trained, tmp_path):
    stored = checkpoint.read(save(tmp_path, trained, 7))
    model, optimizer = trained
    assert set(stored["weights"]) == {"1.weight", "1.bias"} and stored["evals"] == {"start": {"si": 0.5}, "steps": {}}
    other = torch.nn.Sequential(model[0], torch.nn.Linear(30, 40))
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    checkpoint.restore(stored, weights_of(other), fresh)
    assert torch.equal(other[1].weight, model[1].weight) and fresh.param_groups[0]["lr"] == 0.5
    for key, value in optimizer.state[model[1].weight].items():
        assert torch.equal(fresh.state[other[1].weight][key], value), key


def test_only_the_newest_are_kept_in_the_order_of_steps(trained, tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, trained, step, limit=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_10.pt", "step_11.pt"]


def test_an_interrupted_writing_leaves_the_checkpoint_before_and_nothing_else(trained, tmp_path, monkeypatch):
    path = save(tmp_path, trained, 1)
    content = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    for name in ("torch.save", "os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, stop)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, trained, 1)
        assert list(path.parent.iterdir()) == [path] and path.read_bytes() == content


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_every_flipped_bit_is_noticed_unless_it_means_nothing(trained, tmp_path):
    """torch.load alone reads changed weights without a word; some bytes of a zip file are filling."""
    save(tmp_path, trained, 3)
    path = save(tmp_path, trained, 4)
    content, stored, noticed = path.read_bytes(), checkpoint.read(path), 0
    rng = random.Random(0)
    at = {0, len(content) // 2, len(content) - 1, *(rng.randrange(len(content)) for _ in range(300))}
    for place in at:
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        try:
            assert same(checkpoint.read(path), stored), f"byte {place}"
        except InputError as refused:
            noticed += 1
            message = str(refused)
            assert "\n" not in message and str(path) in message and f"--resume {path.parent}/step_3.pt" in message
    with zipfile.ZipFile(path.with_name("step_3.pt")) as archive:
        assert archive.testzip() is None
    assert noticed > len(at) / 2


@pytest.mark.parametrize("damage", [
    *(lambda content, share=share: content[: int(share * len(content))] for share in (0, 0.001, 0.3, 0.7, 0.99)),
    lambda content: content[1000:], lambda _: bytes(range(256)), lambda _: b"PK\x05\x06" + bytes(18),
    lambda _: pickle.dumps({"step": 4}),
], ids=lambda _: "")
def test_what_is_no_whole_checkpoint_is_refused(damage, trained, tmp_path):
    path = save(tmp_path, trained, 4)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="step_4.pt: damaged, or not a checkpoint .*; there is no older checkpoint"):
        checkpoint.read(path)


class Malicious:
    def __reduce__(self):
        return os.abort, ()


def test_a_file_with_code_in_it_is_refused_and_not_run(trained, tmp_path):
    path = save(tmp_path, trained, 4)
    torch.save({**state(4), "logs": {}, "weights": Malicious(), "optimizer": {}}, path)  # its checksums are right
    with pytest.raises(InputError, match="step_4.pt: damaged, or not a checkpoint"):
        checkpoint.read(path)
    torch.save({"step": 4}, path)
    with pytest.raises(InputError, match="has no checksums"):
        checkpoint.read(path)
