"""Data-parallel training: one process per device, as torchrun starts them.

    torchrun --nproc-per-node 2 -m training train-base --config X.toml "base.only=[unet]"

Every process draws samples of its own and gradients are averaged, so N processes with
`batch` samples each make steps of N * batch. Only the first process writes. Without torchrun
nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

#: the others wait this long while one of them draws pictures or measures
_PATIENCE = timedelta(hours=24)


def count() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, 0 for the one that writes."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join() -> None:
    """Meet the other processes; every one of them must call this, once or more often."""
    if count() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)


def leave() -> None:
    """Part from the other processes, if they were met."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def first_one_first() -> Iterator[None]:
    """Run the block in the first process, then in the others, which find what that one made."""
    join()
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and count() > 1:
        dist.barrier()


def share() -> slice:
    """Which parts of a list this process makes: every `count()`-th, from its rank on."""
    return slice(rank(), None, count())


def exchange(own: Sequence[T], number: int) -> list[T]:
    """All `number` parts in their order, each from the process whose `share` it is.

    Every process must call this; parts are pickled, so tensors belong on the cpu.
    """
    join()
    parts: list[T] = []
    for i in range(number):
        box: list[Any] = [own[i // count()] if i % count() == rank() else None]
        if count() > 1:
            dist.broadcast_object_list(box, src=i % count())
        parts += box
    return parts


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with the first process's: all of them must train the same network."""
    if count() > 1:
        for tensor in tensors:
            sent = tensor.contiguous()  # backends differ in which memory formats they take
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= count()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def agree(*flags: bool, device: torch.device) -> list[bool]:
    """For each flag, whether it is set in any process: all of them must stop at the same step."""
    if count() == 1:
        return list(flags)
    total = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return [value > 0 for value in total.tolist()]
