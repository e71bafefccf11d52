"""How do the ranks of one training add up their numbers? The only file that knows Horovod."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Solo", "World", "join_world"]


class World(ABC):
    """The ranks of one training. All of them must make the same calls in the same order."""

    rank: int
    n_ranks: int
    n_here: int  # ranks on this node
    rank_here: int  # among them

    @abstractmethod
    def add_up(self, values: Tensor, name: str) -> None:
        """Replace `values` on every rank, in place, by their sum over ranks; bitwise the same everywhere."""


class Solo(World):
    """One process."""

    rank = 0
    n_ranks = 1
    n_here = 1
    rank_here = 0

    def add_up(self, values: Tensor, name: str) -> None:
        pass


class _Horovod(World):
    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.rank = hvd.rank()
        self.n_ranks = hvd.size()
        self.n_here = hvd.local_size()
        self.rank_here = hvd.local_rank()
        self._hvd = hvd

    def add_up(self, values: Tensor, name: str) -> None:
        assert values.is_contiguous()
        assert values.dtype in (torch.float32, torch.float64)
        # A Horovod that was built for CPUs refuses tensors on GPUs.
        host = values if values.device.type == "cpu" or self._hvd.nccl_built() else values.cpu()
        self._hvd.allreduce_(host, name=name, op=self._hvd.Sum)
        if host is not values:
            values.copy_(host)


def join_world(n_ranks: int) -> World:
    """Join the other ranks that the launcher started; alone when there is to be only one.

    Raises:
        RuntimeError: the launcher started another number of ranks.
    """
    if n_ranks == 1:
        return Solo()
    world = _Horovod()
    if world.n_ranks != n_ranks:
        raise RuntimeError(f"the launcher started {world.n_ranks} ranks, the job asks for {n_ranks}")
    return world
