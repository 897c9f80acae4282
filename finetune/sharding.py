"""FSDP2 around Moshi's classes: what they need so that PyTorch's engine can shard them.

Two of their properties do not fit FSDP2 (torch 2.9). It makes a module sharded by changing its
class to a subclass of `(FSDPModule, cls)`; Moshi's streaming modules derive from `abc.ABC`, whose memory
layout differs, and Python refuses. And the tensors of a module's output are found through PyTorch's pytrees,
which do not know the dataclass `LMOutput`: backward hooks would never fire, and gradients stay unreduced
without any error.
"""

import abc

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fully_shard import cls_to_fsdp_cls
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


class _StreamingFSDPModule(abc.ABC, FSDPModule):
    """FSDP2's mix-in with the memory layout of Moshi's streaming modules."""


def shard_model(model: LMModel, mesh: DeviceMesh) -> None:
    """Shard every transformer layer and then the rest of a model, in place.

    Parameters become DTensors with their own dtypes: frozen ones may be bfloat16 beside trainable float32
    ones, and autocast decides what is computed in which, as without sharding. Gradients are averaged over
    the processes.

    Args:
        model: prepared (LoRA, TTT, frozen), on any device, the meta device too.
        mesh: `[replicas, shards]` of processes.
    """
    if LMOutput not in pytree.SUPPORTED_NODES:
        pytree.register_dataclass(LMOutput)
    stacks = [model.transformer] + ([model.depformer] if model.depformer is not None else [])
    for layer in (layer for stack in stacks for layer in stack.layers):
        _shard(layer, mesh)
    _shard(model, mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was here."""
    return isinstance(model, FSDPModule)


def put_back_into_shards(model: nn.Module) -> None:
    """Free the whole parameters after passes without backward; nothing to do for a model that is not sharded.

    The outermost module keeps its parameters whole from a forward to its backward. Without a backward they
    would stay registered, and what looks at the model's parameters then would miss those that are trained.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: its shard, or all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be in shards; every process of the mesh must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    cls = type(module)
    if cls not in cls_to_fsdp_cls:
        namespace = {"__deepcopy__": _no_deepcopy, "__module__": cls.__module__}
        cls_to_fsdp_cls[cls] = type(f"FSDP{cls.__name__}", (_StreamingFSDPModule, cls), namespace)
    fully_shard(module, mesh=mesh)


def _no_deepcopy(module: nn.Module, memo: dict) -> None:
    raise AssertionError("A sharded module cannot be copied; gather its tensors instead.")
