"""Codebooks for an untrained Mimi, fitted by residual k-means, and how evenly they are used.

N vectors, D latent dimensions, C code dimensions, K codebooks, T frames.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from moshi.models.compression import MimiModel
from moshi.quantization.core_vq import EuclideanCodebook
from moshi.quantization.vq import ResidualVectorQuantizer
from torch import Tensor, nn

from finetune.errors import UserError

MIN_ENTROPY_SHARE = 0.8

_NUM_KMEANS_STEPS = 15
_MAX_KMEANS_VECTORS = 8192


class CodebookUse(NamedTuple):
    """How a codebook is used: entries that occur, and the entropy of the codes in bits."""

    num_used: int
    entropy_bits: float


@torch.no_grad()
def fit_codebooks(mimi: MimiModel, latents: Tensor, *, seed: int) -> None:
    """Set projections and codebooks of both quantizers from latents of speech.

    The semantic quantizer sees the whitened principal components, the acoustic one the plain ones, whose
    transposed projection leads back to the latent. So decoding the acoustic codes approximates the latent,
    and the semantic output, which would count it twice, is zero.

    Args:
        mimi: changed in place.
        latents: [N, D], frames in which somebody speaks; at least as many as a codebook has entries.
        seed: the same seed and latents give the same codebooks.

    Raises:
        UserError: too few latents.
    """
    quantizer = mimi.quantizer
    if len(latents) < quantizer.cardinality:
        raise UserError(
            f"the demo has only {len(latents)} frames of speech, too few for codebooks of "
            f"{quantizer.cardinality} entries: ask for more or longer dialogues."
        )
    generator = torch.Generator().manual_seed(seed)
    variances, axes = torch.linalg.eigh(torch.cov(latents.T))  # ascending
    code_dim = quantizer.dimension
    axes, variances = axes.flip(1)[:, :code_dim].T, variances.flip(0)[:code_dim]  # [C, D], [C]
    whitened = axes / variances.clamp(min=1e-4 * variances[0]).sqrt()[:, None]
    first, rest = quantizer.rvq_first, quantizer.rvq_rest
    assert isinstance(first, ResidualVectorQuantizer) and isinstance(rest, ResidualVectorQuantizer)
    for part, projection in ((first, whitened), (rest, axes)):
        _weight(part.input_proj).copy_(projection[:, :, None])
        _fit_residual(part, latents @ projection.T, generator)
    _weight(first.output_proj).zero_()
    _weight(rest.output_proj).copy_(axes.T[:, :, None])


def count_codebook_use(codes: Tensor, *, num_bins: int) -> list[CodebookUse]:
    """The use of each codebook in codes [K, T]."""
    uses = []
    for row in codes:
        counts = torch.bincount(row, minlength=num_bins).double()
        shares = counts[counts > 0] / counts.sum()
        uses.append(CodebookUse(len(shares), float(-(shares * shares.log2()).sum())))
    return uses


def demand_even_use(uses: Iterable[CodebookUse], *, num_bins: int) -> None:
    """Raise UserError unless every codebook has 80 % of the greatest possible entropy, log2(num_bins)."""
    least_bits = MIN_ENTROPY_SHARE * math.log2(num_bins)
    for index, use in enumerate(uses):
        if use.entropy_bits < least_bits:
            raise UserError(
                f"codebook {index} of the demo's codec has an entropy of {use.entropy_bits:.2f} bits with "
                f"{use.num_used} of {num_bins} entries in use, at least {least_bits:.2f} bits are needed: "
                "ask for more or longer dialogues, or for another seed."
            )


def _weight(projection: nn.Module) -> Tensor:
    assert isinstance(projection, nn.Conv1d)
    return projection.weight


def _fit_residual(part: ResidualVectorQuantizer, vectors: Tensor, generator: torch.Generator) -> None:
    """Fit codebook after codebook to what the earlier ones leave of vectors [N, C]."""
    residual = vectors
    for layer in part.vq.layers:
        codebook = layer._codebook
        assert isinstance(codebook, EuclideanCodebook)
        subset = torch.randperm(len(residual), generator=generator)[:_MAX_KMEANS_VECTORS]
        centroids = _kmeans(residual[subset], codebook.codebook_size, generator)
        codes = torch.cdist(residual, centroids).argmin(dim=1)
        usage = torch.bincount(codes, minlength=len(centroids)).clamp(min=1).to(vectors)
        codebook.cluster_usage.copy_(usage)
        codebook.embedding_sum.copy_(centroids * usage[:, None])
        codebook._initialized.fill_(1)
        # A cache of embedding_sum / cluster_usage.
        codebook.register_buffer("_embedding", None, persistent=False)
        residual = residual - centroids[codes]


def _kmeans(vectors: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm on vectors [N, C] from random members; returns centroids [num_clusters, C]."""
    centroids = vectors[torch.randperm(len(vectors), generator=generator)[:num_clusters]]
    for _ in range(_NUM_KMEANS_STEPS):
        codes = torch.cdist(vectors, centroids).argmin(dim=1)
        counts = torch.bincount(codes, minlength=num_clusters)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)
        fresh = vectors[torch.randint(len(vectors), (num_clusters,), generator=generator)]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), fresh)
    return centroids
