"""One training step on fake tensors: true shapes and the real code, no memory and no arithmetic.

Transformer layers of the same kind cost the same, so a model with one layer of each kind stands for the
whole one: its step is watched part by part, and the parts are put together in `Walk` order.

Shapes: B batch rows, T frames.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from moshi.conditioners.text import TokenizedText
from moshi.models.lm import LMModel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.hooks import RemovableHandle

from finetune.args import TrainArgs
from finetune.base_model.conditions import Conditions, condition_names
from finetune.base_model.locate import MOSHI_ERRORS, describe_error
from finetune.base_model.streams import depth_layers
from finetune.errors import CheckpointError
from finetune.loss import loss_sums, loss_weights, total_loss
from finetune.wrapped_model import autocast, build_meta_model
from moshi_ttt.hybrid_model import ttt_layers
from moshi_ttt.ttt_layer import TTTLayer

PartName = Literal["embedding", "layer", "between", "depformer", "loss"]


class LayerKind(NamedTuple):
    """What decides the cost of a transformer layer."""

    hybrid: bool
    input_grad: bool  # a gradient flows on into the layers below
    first: bool  # its input is an embedding, maybe of another dtype


@dataclass(frozen=True)
class StepPart:
    """A part of a step.

    `embedding`, the transformer's `layer`s, what is `between` them and the depformer, its
    `depformer` layers (neither in a model without one), and the `loss` with the output layers, forward and
    backward at once. With gradient checkpointing the backward part of a hybrid layer is two parts: once its
    TTT layer has run again, the second one starts, `rerun`.
    """

    name: PartName
    index: int = 0
    backward: bool = False
    rerun: bool = False


Mark = Callable[[StepPart], None]


def layer_kinds(model: LMModel) -> list[LayerKind]:
    """The kind of each transformer layer of a prepared model."""
    embeddings = [*model.emb.parameters(), *model.text_emb.parameters()]
    if model.fuser is not None:
        for name in model.fuser.fuse2cond["sum"]:
            assert model.condition_provider is not None
            embeddings += model.condition_provider.conditioners[name].parameters()
    input_grad = any(parameter.requires_grad for parameter in embeddings)
    hybrid = ttt_layers(model)
    kinds = []
    for index, layer in enumerate(model.transformer.layers):
        kinds.append(LayerKind(index in hybrid, input_grad, index == 0))
        input_grad |= any(parameter.requires_grad for parameter in layer.parameters())
    return kinds


def reduced(
    args: TrainArgs, lm_kwargs: dict[str, Any], kinds: Sequence[LayerKind]
) -> tuple[TrainArgs, dict[str, Any], list[LayerKind]]:
    """The configuration of a model with one transformer layer of each kind, in order of appearance.

    Returns:
        The configuration, the arguments of `LMModel`, and the kinds of the layers.
    """
    chosen = list(dict.fromkeys(kinds))
    hybrid = [index for index, kind in enumerate(chosen) if kind.hybrid]
    args = replace(args, ttt=replace(args.ttt, layers=hybrid or "none"))
    return args, lm_kwargs | {"num_layers": len(chosen)}, chosen


def walk(num_layers: int, num_depformer_layers: int) -> Iterator[StepPart]:
    """The parts of a step in the order in which they run."""
    yield StepPart("embedding")
    yield from (StepPart("layer", index) for index in range(num_layers))
    yield StepPart("between")
    yield from (StepPart("depformer", index) for index in range(num_depformer_layers))
    yield StepPart("loss")
    yield from (StepPart("depformer", index, True) for index in reversed(range(num_depformer_layers)))
    yield StepPart("between", backward=True)
    for index in reversed(range(num_layers)):
        yield from (StepPart("layer", index, True), StepPart("layer", index, True, rerun=True))
    yield StepPart("embedding", backward=True)


@contextmanager
def fake_model(args: TrainArgs, lm_kwargs: dict[str, Any]) -> Iterator[LMModel]:
    """A prepared model of fake tensors on the CPU; they exist inside the context only.

    Raises:
        CheckpointError: Moshi refuses the architecture.
    """
    model = build_meta_model(args, lm_kwargs)
    with FakeTensorMode():
        for module in model.modules():
            for name, meta in module._parameters.items():
                if meta is not None:
                    fake = torch.empty(meta.shape, dtype=meta.dtype, device="cpu")
                    module._parameters[name] = nn.Parameter(fake, requires_grad=meta.requires_grad)
        yield model


def run_step(model: LMModel, args: TrainArgs, *, num_frames: int, mark: Mark) -> None:
    """Forward and backward pass of one micro-batch, with `mark` called where each part starts.

    Args:
        model: of `fake_model`, inside its context.
        num_frames: T of the chunks.
        mark: called with the part that starts. No backward part is marked that no gradient reaches.

    Raises:
        CheckpointError: Moshi's code refuses the architecture.
    """
    device = torch.device("cpu")
    codes = torch.zeros(args.batch_size, model.num_codebooks, num_frames, dtype=torch.long)
    conditions = _conditions(model, args.batch_size)
    weights = loss_weights(codes, model, args)
    with _marking(model, mark) as forward_ends:
        mark(StepPart("embedding"))
        try:
            with autocast(args, device):
                output = model(codes, conditions)
        except MOSHI_ERRORS as error:
            raise CheckpointError(
                f"moshi_paths: a training step of this Moshi is impossible: {describe_error(error)}"
            ) from None
        parts = loss_sums(output, codes, weights, model)
        del output
        forward_ends()
        total_loss(parts, weights.totals()).backward()


def _conditions(model: LMModel, batch_size: int) -> Conditions | None:
    """What `prepare_conditions` gives for real tensors: its tokenizers look at values."""
    if model.fuser is None:
        return None
    tokens = torch.zeros(batch_size, 1, dtype=torch.int)
    prepared = dict.fromkeys(condition_names(model), TokenizedText(tokens, tokens.bool()))
    return Conditions(model.condition_provider, prepared)


@contextmanager
def _marking(model: LMModel, mark: Mark) -> Iterator[Callable[[], None]]:
    """Hooks on all layers that call `mark`; yields what must be called before the backward pass.

    Gradient checkpointing runs the layers again during backward, which starts no forward part.
    """
    marker = _Marker(mark)
    main, depformer = list(model.transformer.layers), depth_layers(model)
    handles = [
        *(
            handle
            for index, layer in enumerate(main)
            for handle in marker.watch(layer, StepPart("layer", index))
        ),
        *(
            handle
            for index, layer in enumerate(depformer)
            for handle in marker.watch(layer, StepPart("depformer", index))
        ),
        *marker.watch_ends(main, "embedding", "between" if depformer else "loss"),
        *(marker.watch_ends(depformer, "between", "loss") if depformer else ()),
        *marker.watch_reruns(ttt_layers(model)),
    ]
    try:
        yield marker.forward_ends
    finally:
        for handle in handles:
            handle.remove()


class _Marker:
    """Hooks that call `mark` where the parts of a step start."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self.is_forward = True

    def forward_ends(self) -> None:
        """From now on layers run again for the backward pass only."""
        self.is_forward = False

    def watch(self, layer: nn.Module, part: StepPart) -> list[RemovableHandle]:
        """Mark a layer's two parts."""

        def enter(*_: Any) -> None:
            if self.is_forward:
                self.mark(part)

        def leave(_: nn.Module, inputs: Any, output: Tensor) -> None:
            self._mark_gradient(output, replace(part, backward=True))

        return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    def watch_ends(
        self, layers: Sequence[nn.Module], before: PartName, after: PartName
    ) -> list[RemovableHandle]:
        """Mark what comes after a stack of layers: `after` in the forward pass, `before` in the backward."""

        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._mark_gradient(inputs[0], StepPart(before, backward=True))

        def leave(*_: Any) -> None:
            if self.is_forward:
                self.mark(StepPart(after))

        return [layers[0].register_forward_pre_hook(enter), layers[-1].register_forward_hook(leave)]

    def watch_reruns(self, layers: dict[int, TTTLayer]) -> list[RemovableHandle]:
        """Mark where the TTT layers have run again."""

        def leave(index: int, *_: Any) -> None:
            if not self.is_forward:
                self.mark(StepPart("layer", index, backward=True, rerun=True))

        return [layer.register_forward_hook(partial(leave, index)) for index, layer in layers.items()]

    def _mark_gradient(self, tensor: Tensor, part: StepPart) -> None:
        """Mark the part in the backward pass, once the gradient of this tensor is known."""
        if self.is_forward and tensor.requires_grad:
            tensor.register_hook(lambda _: self.mark(part))
