"""Data spread over processes: what block coordinate descent has to sum over all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from declarative_cvx.errors import ParameterError


@dataclass(frozen=True)
class DataSum:
    """Sums over all data points, where one process holds all of them: there is nothing to add.

    The states of a data point concern no other point, so that training needs from the whole data
    set only sums: Gram matrices, gradients with respect to (A, B, C, D), the objective and the
    number of points. Every such sum goes through `sum`; nothing else has to know where the data
    are.
    """

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value`, of any shape, over all processes."""
        return value

    def same(self, value: Tensor) -> Tensor:
        """The value of the first process, for all: random starting weights, for instance."""
        return value


@dataclass(frozen=True)
class ShardedSum(DataSum):
    """Sums over the processes of a `torch.distributed` group, each with data points of its own.

    Every process gets the same numbers, hence takes the same decisions. They exchange sums only;
    no data point and no state leaves its process.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Of any backend (gloo, nccl) that has all-reduce and broadcast; the default group if None.

    Raises
    ------
    ParameterError
        If `torch.distributed` has not been initialised.
    """

    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ParameterError(
                "ShardedSum needs a process group: call torch.distributed.init_process_group "
                "first (under torchrun without further arguments), or use DataSum()."
            )

    @property
    def rank(self) -> int:
        """Number of this process within the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of processes in the group."""
        return dist.get_world_size(self.group)

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def same(self, value: Tensor) -> Tensor:
        first = value.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, src=self._first, group=self.group)
        return first

    def shard(self, data: Tensor) -> Tensor:
        """This process's rows of `data`: as many for each as possible, in order.

        Parameters
        ----------
        data : Tensor, shape (m, ...)

        Raises
        ------
        ParameterError
            If there are fewer rows than processes.
        """
        if len(data) < self.size:
            raise ParameterError(
                f"{len(data)} data points cannot be spread over {self.size} processes: every "
                "process needs one at least. Start fewer processes."
            )
        return data.tensor_split(self.size)[self.rank]

    @property
    def _first(self) -> int:
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)
