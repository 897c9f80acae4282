"""What the tensors of a Moshi are called in Hugging Face transformers, both ways.

`MoshiForConditionalGeneration` computes the same with other tensors: queries, keys and values are three
matrices and not one; the matrices of the depth transformer, one per codebook, are stacked into one tensor;
and a head's rotary halves lie one behind the other, while in Moshi they alternate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.errors import CheckpointError


@dataclass(frozen=True)
class Sizes:
    """What the names depend on.

    Attributes:
        dim, depth_dim: widths of the two transformers.
        num_layers, depth_layers: their layers.
        num_heads, depth_heads: their attention heads.
        kv_heads, depth_kv_heads: heads of their keys and values, fewer with grouped-query attention.
        dep_q: codebooks of one voice; the model hears as many as it speaks in.
    """

    dim: int
    depth_dim: int
    num_layers: int
    depth_layers: int
    num_heads: int
    depth_heads: int
    kv_heads: int
    depth_kv_heads: int
    dep_q: int


class Part(NamedTuple):
    """One tensor of transformers and where it comes from.

    Attributes:
        theirs: its name there, without `.weight`.
        ours: the names in Moshi, without `.weight` or `.alpha`: one, or one per codebook, which are stacked.
        start, stop: the rows of ours that it has; None: all.
        rotary_heads: number of heads whose rows are reordered; 0: none.
        kind: `linear`, which may have an adapter, `embedding` or `norm`.
    """

    theirs: str
    ours: tuple[str, ...]
    start: int | None = None
    stop: int | None = None
    rotary_heads: int = 0
    kind: str = "linear"

    @property
    def is_stacked(self) -> bool:
        """Whether it holds the matrices of all codebooks, [dep_q, out, in]."""
        return len(self.ours) > 1

    def rows(self, tensor: Tensor) -> Tensor:
        """Its rows of one of ours, in transformers' order: [rows, ...]."""
        return to_halves(tensor[self.start : self.stop], self.rotary_heads)


def parts(sizes: Sizes) -> Iterator[Part]:
    """All tensors of a model in transformers, those of its audio codec left out."""
    for index in range(2 * sizes.dep_q):
        yield Part(f"embed_tokens.{index}", (f"emb.{index}",), kind="embedding")
    yield Part("decoder.model.embed_tokens", ("text_emb",), kind="embedding")
    for index in range(sizes.num_layers):
        ours, theirs = f"transformer.layers.{index}", f"decoder.model.layers.{index}"
        heads = (sizes.num_heads, sizes.kv_heads)
        yield from _attention(ours, theirs, dim=sizes.dim, heads=heads, suffixes=("0",), rotary=True)
        yield Part(f"{theirs}.mlp.fc1", (f"{ours}.gating.linear_in",))
        yield Part(f"{theirs}.mlp.fc2", (f"{ours}.gating.linear_out",))
    yield Part("decoder.model.norm", ("out_norm",), kind="norm")
    yield Part("decoder.lm_head", ("text_linear",))
    yield from _depth(sizes)


def to_theirs(tensors: Mapping[str, Tensor], sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of transformers with its name.

    Args:
        tensors: of Moshi, by name; conditions, which transformers has no place for, are not looked at.
        sizes: of the model.

    Raises:
        CheckpointError: a tensor is missing.
    """
    for part in parts(sizes):
        found = [part.rows(_take(tensors, _full_name(name, part))) for name in part.ours]
        if part.kind == "norm":
            yield f"{part.theirs}.weight", found[0].flatten()
        else:
            yield f"{part.theirs}.weight", torch.stack(found) if part.is_stacked else found[0].contiguous()


def to_ours(tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of Moshi by name, of those of transformers; those of the codec are left out.

    Raises:
        CheckpointError: a tensor is missing or has another shape than `sizes` says.
    """
    rows: dict[str, list[Tensor]] = {}
    for part in parts(sizes):
        tensor = _take(tensors, f"{part.theirs}.weight")
        if part.is_stacked and len(tensor) != len(part.ours):
            raise CheckpointError(
                f"{part.theirs}.weight: holds {len(tensor)} codebooks, not {len(part.ours)}."
            )
        for name, single in zip(part.ours, tensor if part.is_stacked else [tensor], strict=True):
            if part.kind == "norm":
                single = single.view(1, 1, -1)
            rows.setdefault(_full_name(name, part), []).append(to_alternating(single, part.rotary_heads))
    return {name: torch.cat(found).contiguous() for name, found in rows.items()}


def to_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys, in which a head's real and imaginary parts alternate, as halves.

    Args:
        tensor: [num_heads * head_dim, ...].
        num_heads: 0 leaves everything as it is.
    """
    if not num_heads:
        return tensor
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_alternating(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    if not num_heads:
        return tensor
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _attention(
    ours: str, theirs: str, *, dim: int, heads: tuple[int, int], suffixes: tuple[str, ...], rotary: bool
) -> Iterator[Part]:
    """Attention and norms of a layer; `heads` are those of queries and of keys."""
    joint = tuple(f"{ours}.self_attn.in_projs.{suffix}" for suffix in suffixes)
    width = dim // heads[0] * heads[1]
    bounds = (0, dim, dim + width, dim + 2 * width)
    for number, name in enumerate("qkv"):
        turned = (heads[0], heads[1], 0)[number] if rotary else 0
        projection = f"{theirs}.self_attn.{name}_proj.linear"
        yield Part(projection, joint, bounds[number], bounds[number + 1], turned)
    out = tuple(f"{ours}.self_attn.out_projs.{suffix}" for suffix in suffixes)
    yield Part(f"{theirs}.self_attn.o_proj.linear", out)
    yield Part(f"{theirs}.input_layernorm", (f"{ours}.norm1",), kind="norm")
    yield Part(f"{theirs}.post_attention_layernorm", (f"{ours}.norm2",), kind="norm")


def _depth(sizes: Sizes) -> Iterator[Part]:
    """The depth transformer."""
    steps = tuple(map(str, range(sizes.dep_q)))
    yield Part("depth_decoder.text_embed_tokens", ("depformer_text_emb",), kind="embedding")
    for index in range(sizes.dep_q - 1):
        yield Part(f"depth_decoder.embed_tokens.{index}", (f"depformer_emb.{index}",), kind="embedding")
    yield Part("depth_decoder.input_projections", tuple(f"depformer_in.{step}" for step in steps))
    for index in range(sizes.depth_layers):
        ours, theirs = f"depformer.layers.{index}", f"depth_decoder.layers.{index}"
        heads = (sizes.depth_heads, sizes.depth_kv_heads)
        yield from _attention(ours, theirs, dim=sizes.depth_dim, heads=heads, suffixes=steps, rotary=False)
        yield Part(f"{theirs}.mlp.fc1", tuple(f"{ours}.gating.{step}.linear_in" for step in steps))
        yield Part(f"{theirs}.mlp.fc2", tuple(f"{ours}.gating.{step}.linear_out" for step in steps))
    yield Part("depth_decoder.lm_heads", tuple(f"linears.{step}" for step in steps))


def _full_name(name: str, part: Part) -> str:
    return f"{name}.{'alpha' if part.kind == 'norm' else 'weight'}"


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing; the weights are not those of a whole Moshi.")
    return tensors[name]
