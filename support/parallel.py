"""Data parallelism over questions, for `torchrun --nproc-per-node N train.py …`.

    share(n)         the slice of a batch of n that is this process's own
    sum_gradients    the step's gradient = sum over processes of (share of the batch) · gradient

Every term of the loss is a mean over questions, and what is sampled for a question is a function of
its name: N processes take the step that one takes with the same batch, up to the rounding of a sum.
All hold the whole model and take the same optimiser step; process 0 writes. With one process
torch.distributed is not started, and every function here leaves things as they are.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=30)  # the longest that a process may wait for the others


def start() -> None:
    """Join the other processes, if torchrun started this one."""
    if {"RANK", "WORLD_SIZE"} <= set(os.environ) and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        if rank():
            sys.stdout = open(os.devnull, "w")  # process 0 prints for all; each has its own stderr


def is_lost_peer(error) -> bool:
    """Whether an error is that of an exchange with a process that has ended, not one of the program."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(total: int) -> slice:
    """This process's share of `total` things, in order; shares differ by one at most."""
    return slice(total * rank() // world(), total * (rank() + 1) // world())


def gather(value) -> list:
    """`value` of every process, in the order of ranks."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters) -> None:
    """Add up the gradients of all processes in place, with one exchange for each tensor."""
    if world() > 1:
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:  # a process that had no part of the batch
                    parameter.grad = torch.zeros_like(parameter)  # the parameter's shape
                dist.all_reduce(parameter.grad)
