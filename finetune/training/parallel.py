"""How a model is spread over processes: whole in one, whole in each (DDP), or in shards (FSDP2)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from moshi.models.lm import LMModel, LMOutput
from moshi.models.loaders import CheckpointInfo
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, ValueType, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from finetune.args import TrainArgs
from finetune.base_model.conditions import Conditions
from finetune.base_model.locate import find_architecture
from finetune.distributed import alike, get_world_size, is_main
from finetune.errors import ConfigError
from finetune.sharding import shard_model
from finetune.wrapped_model import build_meta_model, build_model


def choose_strategy(args: TrainArgs, num_processes: int) -> str:
    """`none`, `ddp` or `fsdp`, what `auto` means decided.

    Raises:
        ConfigError: it does not fit the number of processes.
    """
    strategy, replicas = args.parallel.strategy, args.parallel.replicas
    if strategy == "auto":
        strategy = "none" if num_processes == 1 and replicas == 1 else "fsdp"
    if args.quantise is not None and strategy != "none":
        raise ConfigError(
            f"quantise: {args.quantise} is for one process, not for parallel.strategy {strategy}; leave one "
            "of them out."
        )
    if strategy == "none" and num_processes > 1:
        raise ConfigError(
            f"parallel.strategy: none is for one process, not for {num_processes}; use auto, fsdp or ddp."
        )
    if strategy == "fsdp" and num_processes % replicas:
        raise ConfigError(
            f"parallel.replicas: {replicas} does not divide the number of processes, {num_processes}."
        )
    return strategy


def build_parallel_model(
    args: TrainArgs,
    info: CheckpointInfo,
    *,
    device: torch.device,
    start_from: Callable[[LMModel], None],
) -> LMModel:
    """The model of this process, as `build_model` makes it, spread as configured.

    With several processes only the main one reads the base model, into the memory of its host; the others
    get their part of each tensor from it, one tensor after the other.

    Args:
        args: the configuration.
        info: files of the base model.
        device: of this process.
        start_from: called with the whole model before it is spread, to load a warm start.

    Raises:
        CheckpointError: see `build_model`; in the other processes a silent UserError.
    """
    strategy = choose_strategy(args, get_world_size())
    if strategy == "none" or (strategy == "ddp" and get_world_size() == 1):
        model = build_model(args, info, device=device)
        start_from(model)
        return model
    tensors: dict[str, ValueType] = {}
    with alike():
        if is_main():
            source = build_model(args, info, device=torch.device("cpu"))
            start_from(source)
            tensors = source.state_dict()
    model = build_meta_model(args, find_architecture(args.moshi_paths)[0])
    if strategy == "fsdp":
        shard_model(model, _mesh(args, device))
    model.to_empty(device=device)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, tensors, options=whole)
    return model


def gradients_wait(args: TrainArgs) -> bool:
    """Whether sharded gradients wait for the last micro-batch of a step, whole in every process until then.

    With few trainable parameters that saves communication, with all of them it would undo the sharding.
    """
    return args.num_microbatches > 1 and not args.full_finetuning


class TrainingPass:
    """Calls a model so that its gradients are averaged over the processes in the last micro-batch of a step.

    Args:
        model: of `build_parallel_model`.
        args: the configuration.
    """

    def __init__(self, model: LMModel, args: TrainArgs) -> None:
        self._model = model
        self._num_processes = get_world_size()
        self._strategy = choose_strategy(args, self._num_processes)
        self._waits = self._strategy == "ddp" or gradients_wait(args)
        self._ddp = None
        if self._strategy == "ddp" and self._num_processes > 1:
            self._ddp = DistributedDataParallel(
                model,
                init_sync=False,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=bool(model.extra_heads),
            )

    @property
    def loss_scale(self) -> int:
        """Factor of the loss that makes averaged gradients sums."""
        return self._num_processes

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch."""
        synchronise = last or not self._waits
        if self._strategy == "fsdp":
            assert isinstance(self._model, FSDPModule)
            self._model.set_requires_gradient_sync(synchronise)
        if self._ddp is not None and not synchronise:
            with self._ddp.no_sync():
                yield
        else:
            yield
        if self._strategy == "fsdp" and synchronise:
            # FSDP2 says nothing when its hooks do not fire: then gradients would be those of one process.
            gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
            assert gradients and all(isinstance(gradient, DTensor) for gradient in gradients)

    def __call__(self, codes: Tensor, conditions: Conditions | None) -> LMOutput:
        """As the model."""
        return (self._ddp or self._model)(codes, conditions)


def _mesh(args: TrainArgs, device: torch.device) -> DeviceMesh:
    replicas = args.parallel.replicas
    shards = get_world_size() // replicas
    if replicas == 1:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shards",))
    return init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicas", "shards"))
