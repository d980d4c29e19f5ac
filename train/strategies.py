"""How a model is spread over workers: DDP, or FSDP 2 (``fully_shard``), under Ray or in one process without it.

In: the name of a strategy. Out: a Lightning strategy, and functions to shard a model and to gather it again. The
process group is Ray Train's; gloo on CPUs, where Lightning's FSDP 1 refuses to run (it wants an accelerator's index)
and FSDP 2 does not. Checkpoints hold whole weights, so that a run may go on with another number of workers.

Knows no data and no task.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import nn

StrategyName = Literal["ddp", "fsdp"]


class _RayDevice:
    """What the strategies take from Ray instead of working it out for themselves."""

    global_rank: int
    world_size: int

    @property
    def root_device(self) -> torch.device:
        import ray.train.torch

        return ray.train.torch.get_device()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}


class RayFullyShardStrategy(_RayDevice, ModelParallelStrategy):
    """FSDP 2 in Ray Train's process group; Ray has a strategy for FSDP 1 only."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        # the mesh covers all workers; Lightning would count this node's devices
        super(ModelParallelStrategy, self).setup_environment()
        self.set_world_ranks()
        self._process_group_backend = torch.distributed.get_backend()
        self._device_mesh = init_device_mesh(self.root_device.type, (torch.distributed.get_world_size(),))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # as Lightning's, but a machine has its own copy: the first one's path means nothing on another node
        from lightning_fabric.strategies.model_parallel import _load_checkpoint

        state = {"state_dict": self.model, **{f"optimizer_{index}": one for index, one in enumerate(self.optimizers)}}
        return _load_checkpoint(
            path=Path(checkpoint_path), state=state, optimizer_states_from_list=True, weights_only=weights_only
        )


def ray_strategy(name: StrategyName) -> Strategy:
    """The strategy for a Ray Train worker."""
    if name == "fsdp":
        return RayFullyShardStrategy()
    from ray.train.lightning import RayDDPStrategy

    # no buffer changes while training (train.module holds batch normalisation's), and sending them all costs each step
    return RayDDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def local_strategy() -> Strategy:
    """The strategy of one process without Ray: what the benchmark compares with."""
    return SingleDeviceStrategy(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def is_sharded(strategy: Strategy) -> bool:
    return isinstance(strategy, ModelParallelStrategy)


def shard(model: nn.Module, mesh: Any) -> None:
    """Spread a model's parameters over the mesh, each transformer layer by itself; nothing happens the second time."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    for layer in [*layers_of(model), model]:
        fully_shard(layer, mesh=mesh)
        if mesh.device_type == "cpu":
            layer.set_force_sum_reduction_for_comms(True)  # gloo cannot average


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers of a model: members of its innermost module lists that are no lists themselves."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            for member in module:
                nested = any(isinstance(part, nn.ModuleList) and len(part) > 1 for part in member.modules())
                if not nested and any(True for _ in member.parameters()):
                    yield member


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights of a sharded model, on every worker; all must call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))


__all__ = ["DDPStrategy", "StrategyName", "gather", "is_sharded", "local_strategy", "ray_strategy", "shard"]
