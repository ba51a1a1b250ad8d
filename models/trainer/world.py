"""The process group that a gang's ranks share; it outlives a trial, so that a warm gang starts the next at once."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from torch import distributed

from models import device as devices
from models.checkpoint import Writer
from models.config import Layout
from models.corpus import OpenedDatasets


@dataclass(frozen=True)
class World:
    """A rank's place: its number, the layout, the device, and Megatron's parallel state behind them."""

    rank: int
    layout: Layout
    device: str
    writer: Writer = field(default_factory=Writer, compare=False)
    """Of checkpoints. It is the gang's: a trial may end, and the next one start, while the last of one is written."""
    datasets: OpenedDatasets = field(default_factory=OpenedDatasets, compare=False)
    """The gang's, too."""

    @classmethod
    def join(
        cls,
        rank: int,
        layout: Layout,
        device: str,
        init_method: str,
        *,
        local_rank: int = 0,
        num_threads: int = 1,
        timeout_seconds: float = 600.0,
    ) -> World:
        """Enter the gang. Blocks until every rank has come; ``init_method`` is torch's rendezvous URL."""
        torch.set_num_threads(num_threads)
        devices.prepare(device, local_rank)
        distributed.init_process_group(
            devices.collective_backend(device),
            init_method=init_method,
            rank=rank,
            world_size=layout.world_size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
        return cls(rank=rank, layout=layout, device=device)

    def leave(self) -> None:
        self.writer.close()
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()

    @property
    def is_writer(self) -> bool:
        """Rank 0 writes the run dir."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank())

    def agree(self, flag: Callable[[], bool]) -> bool:
        """Whether any rank says so, on every rank: all stop at the same step or none."""
        if self.layout.world_size == 1:
            return flag()
        value = torch.tensor([int(flag())], device=self.device)
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        return bool(value.item())

    def mean_over_data_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return self.sum_over_data_ranks(value) / self.layout.data if self.layout.data > 1 else value

    def sum_over_data_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.layout.data > 1:
            distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
        return value

    def from_last_stage(self, value: torch.Tensor) -> torch.Tensor:
        """The last pipeline stage's value on every stage; losses exist there only. Same shape and type on all."""
        if self.layout.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            distributed.broadcast(value, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return value
