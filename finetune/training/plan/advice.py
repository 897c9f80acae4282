"""The memory estimate in words: a table, whether it fits, and which change would make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from finetune.args import ParallelArgs, TrainArgs
from finetune.training.plan.gpu_memory import MemoryEstimate, estimate_memory, num_shards_of, trace_memory

_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser (AdamW moments)",
    "activations": "activations, the most",
    "ttt_memory": "TTT memory between chunks",
    "sharding": "gathered by fsdp",
    "peak": "peak",
}
_MOST_GPUS = 64


@dataclass(frozen=True)
class Change:
    """A change of the configuration that needs less memory."""

    text: str
    args: TrainArgs
    num_gpus: int


def memory_lines(
    args: TrainArgs, lm_kwargs: dict[str, Any], *, num_gpus: int, gpu_memory_gb: float | None
) -> tuple[list[str], bool]:
    """The lines of a dry run about memory.

    Returns:
        The lines, and whether the run fits (True where no size is given).
    """
    estimates = {
        checkpointing: estimate_memory(
            replace(args, gradient_checkpointing=checkpointing), lm_kwargs, num_gpus=num_gpus
        )
        for checkpointing in (True, False)
    }
    lines = [f"Memory of each GPU of {num_gpus}, {_spread(args, num_gpus)}, estimated, in GB (10^9 bytes):"]
    lines += _table(estimates, args.gradient_checkpointing)
    lines += [
        "  An estimate: counted on tensors without memory, not measured on your GPU. Not all items are",
        "  there at once, the peak is what counts. Not in it: CUDA context and libraries (about 1 GB), NCCL",
        "  buffers, fragmentation, and the Mimi codec and copies of weights for samples (sample_freq).",
    ]
    if gpu_memory_gb is None:
        return lines, True
    peak = estimates[args.gradient_checkpointing].peak
    if peak <= gpu_memory_gb * 1e9:
        return [*lines, f"Fits in {gpu_memory_gb:g} GB by this estimate: {peak / 1e9:.1f} GB."], True
    lines.append(f"DOES NOT FIT in {gpu_memory_gb:g} GB: {peak / 1e9:.1f} GB. What helps, most gentle first:")
    lines += [f"  {line}" for line in advice(args, lm_kwargs, num_gpus=num_gpus, gpu_memory_gb=gpu_memory_gb)]
    return lines, False


def advice(args: TrainArgs, lm_kwargs: dict[str, Any], *, num_gpus: int, gpu_memory_gb: float) -> list[str]:
    """Changes one upon another with the peak of each, until one fits."""
    lines = []
    step, traced = None, None
    for change in _changes(args, num_gpus):
        one_gpu = replace(change.args, parallel=ParallelArgs())
        if one_gpu != traced:
            step, traced = trace_memory(change.args, lm_kwargs), one_gpu
        peak = estimate_memory(change.args, lm_kwargs, num_gpus=change.num_gpus, step=step).peak
        fits = peak <= gpu_memory_gb * 1e9
        lines.append(f"{change.text}: {peak / 1e9:.1f} GB{', fits' if fits else ''}")
        if fits:
            return lines
    return [
        *lines,
        "None of these is enough: take GPUs with more memory, or train fewer layers (ttt.layers, lora.rank).",
    ]


def _changes(args: TrainArgs, num_gpus: int) -> Iterator[Change]:
    """Each on top of those before it, those that change the training least first."""
    then = ""
    if not args.gradient_checkpointing:
        args, then = replace(args, gradient_checkpointing=True), "and "
        yield Change("gradient_checkpointing: true", args, num_gpus)
    if args.batch_size > 1:
        rows = args.batch_size * args.num_microbatches
        args = replace(args, batch_size=1, num_microbatches=rows)
        yield Change(f"{then}batch_size: 1 with num_microbatches: {rows}", args, num_gpus)
        then = "and "
    shards = num_shards_of(args, num_gpus)
    if args.parallel.strategy == "ddp" and num_gpus > 1:
        args = replace(args, parallel=replace(args.parallel, strategy="fsdp"))
        yield Change(f"{then}parallel.strategy: fsdp", args, num_gpus)
        then = "and "
    if args.duration_sec > 20:
        args = replace(args, duration_sec=args.duration_sec / 2)
        yield Change(f"{then}duration_sec: {args.duration_sec:g}", args, num_gpus)
        then = "and "
    if args.full_finetuning:
        lora = replace(args.lora, enable=True)
        args = replace(args, full_finetuning=False, lora=lora)
        yield Change(f"{then}lora.enable: true instead of full_finetuning", args, num_gpus)
        then = "and "
    if num_gpus == 1 and shards is None and args.quantise is None and args.save_adapters:
        yield Change(f"{then}quantise: int8", replace(args, quantise="int8"), num_gpus)
        then = "or instead of that "
    gpus = max(num_gpus, shards or 1)
    without = "" if args.quantise is None else " and without quantise"
    args = replace(args, quantise=None)
    parallel = replace(args.parallel, strategy="fsdp", replicas=1)
    while gpus * 2 <= _MOST_GPUS:
        gpus *= 2
        yield Change(
            f"{then}{gpus} GPUs with parallel.strategy: fsdp{without}",
            replace(args, parallel=parallel),
            gpus,
        )


def _spread(args: TrainArgs, num_gpus: int) -> str:
    shards = num_shards_of(args, num_gpus)
    return "a whole model on each" if shards is None else f"fsdp over {shards}"


def _table(estimates: dict[bool, MemoryEstimate], chosen: bool) -> list[str]:
    heads = [f"{'with' if key else 'without'}{' (chosen)' if key == chosen else ''}" for key in estimates]
    lines = [f"  {'gradient checkpointing':<28}" + "".join(f"{head:>18}" for head in heads)]
    for field in fields(MemoryEstimate):
        values = [getattr(estimate, field.name) / 1e9 for estimate in estimates.values()]
        if any(values):
            lines.append(f"  {_LABELS[field.name]:<28}" + "".join(f"{value:>18.2f}" for value in values))
    return lines
