"""support/steps.py: which items a step takes, how figures combine, and the learning rate of every step."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import transformers

import train
from support.errors import InputError, NotFinite
from support.settings import Config
from support.steps import COUNTS, LARGEST, SMALLEST, backward, batch_figures, combine, descend, learning_rates

PRINCIPLES = str(Path(__file__).resolve().parent.parent / "principles" / "reasoning.txt")
SCHEDULES = get_args(Config.__dataclass_fields__["lr_scheduler_type"].type)


def rates(*flags):
    return learning_rates(train.parse(["--principles", PRINCIPLES, "--learning-rate", "1", *map(str, flags)]))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 5), (4, 3), (4, 4), (4, 9), (20, 5)])
def test_every_schedule_has_a_rate_for_every_step_and_none_of_the_first_is_zero(name, steps, warmup):
    """A polynomial whose warm-up is as long as the run used to divide by zero at the last step."""
    found = rates("--lr-scheduler-type", name, "--max-steps", steps, "--warmup-steps", warmup)
    assert len(found) == steps and all(0 < rate <= 1 for rate in found[: warmup + 1])
    assert all(0 <= rate <= 1 for rate in found)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_the_warm_up_rises_evenly_to_the_full_rate_and_the_rest_is_the_librarys(name):
    ours = rates("--lr-scheduler-type", name, "--max-steps", 12, "--warmup-steps", 3)
    assert ours[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    library = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=12)
    for step in range(12):
        assert step < 3 or ours[step] == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        library.step()


def test_a_schedule_that_the_library_refuses_is_one_line():
    with pytest.raises(InputError, match="--lr-scheduler-type: polynomial"):
        rates("--lr-scheduler-type", "polynomial", "--learning-rate", "1e-8")


def test_figures_do_not_depend_on_the_parts_they_come_in():
    """Six questions as one part, or as any parts of parts: counts add up, a mean is one over what it is a mean over."""
    rng = random.Random(0)
    names = ("loss", "approx_kl", "ratio_mean", *LARGEST, *SMALLEST)
    parts = [{"items": 1, "tokens": rng.randint(0, 9), "ratios": 4, **{n: rng.random() for n in names}} for _ in range(6)]
    whole = combine(parts)
    for cut in (1, 2, 3, 5):
        assert combine([combine(parts[:cut]), combine(parts[cut:])]) == pytest.approx(whole)
    assert [whole[name] for name in COUNTS] == [6, sum(p["tokens"] for p in parts), 24]
    assert whole["loss"] == pytest.approx(sum(p["loss"] for p in parts) / 6)
    assert whole["approx_kl"] == pytest.approx(sum(p["tokens"] * p["approx_kl"] for p in parts) / whole["tokens"])
    assert whole["ratio_max"] == max(p["ratio_max"] for p in parts)
    assert whole["sinkhorn_converged"] == min(p["sinkhorn_converged"] for p in parts)


def test_a_term_that_is_not_finite_is_named():
    loss = torch.tensor(float("nan"), requires_grad=True)
    with pytest.raises(NotFinite, match="loss_new is nan"):
        backward(loss, {"items": 1, "loss_new": loss, "loss_grpo": torch.tensor(0.0)}, 1.0)
    with pytest.raises(NotFinite, match="the loss is nan"):
        backward(loss, {"items": 1}, 1.0)


def test_a_larger_gradient_is_scaled_down_and_then_cleared():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    figures = descend(model, torch.optim.SGD(model.parameters(), lr=9.0), [{"items": 1}], 0.5, 2.5)
    assert figures["grad_norm"] == pytest.approx(5)
    assert model.weight[0].tolist() == pytest.approx([-0.75, -1.0]) and model.weight.grad is None


def test_groups_of_one_reward_are_counted():
    values = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.5, 0.5]]])  # [Q, K, G]: three of four
    ones = torch.ones(2, 2, 2)  # [Q, K, G]
    batch = SimpleNamespace(tasks=[0, 1], mask=ones[..., None].bool(), truncated=ones, entropy=ones)
    assert batch_figures(batch, SimpleNamespace(values=values))["zero_variance_groups"] == 0.75
