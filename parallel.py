"""Data parallelism over questions: what `torchrun --nproc-per-node N train.py …` needs of torch.distributed.

    part(n)          the indices of a global batch of n that are this process's own
    sum_gradients    gradient of the step = sum over processes of (their share of the batch) · (gradient of their mean)

Every term of the loss is a mean over questions of what one question gives alone, and what is sampled for a question is
a function of its name: so N processes take the step that one takes with the same batch, up to the rounding of a sum.
All hold the whole model and take the same optimiser step; process 0 is the one that writes. With one process every
function here is the identity, and torch.distributed is not started.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=30)  # of one exchange: the longest that a process may be ahead of another


def start() -> None:
    """Join the others, if torchrun started this process: its environment says how many there are."""
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        if rank():
            sys.stdout = open(os.devnull, "w")  # process 0 speaks for all; errors, on stderr, are everyone's own


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def part(total: int) -> range:
    """This process's share of `total` things in their order; shares differ by one at most."""
    return range(total * rank() // world(), total * (rank() + 1) // world())


def gather(value) -> list:
    """`value` of every process, in the order of ranks."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def total(numbers: dict) -> dict:
    """Sums over processes, by name: what one of them does not have counts as 0."""
    everyones = gather(numbers)
    return {name: sum(n.get(name, 0.0) for n in everyones) for numbers in everyones for name in numbers}


def sum_gradients(parameters) -> None:
    """Add up the gradients of all processes, in place: once a step, one exchange for each tensor."""
    if world() > 1:
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:  # a process that had no part of the batch
                    parameter.grad = torch.zeros_like(parameter)  # the parameter's shape
                dist.all_reduce(parameter.grad)
