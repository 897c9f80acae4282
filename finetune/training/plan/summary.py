"""What a run is about to do, in the lines printed at its start and by --dry-run."""

from moshi.models.lm import LMModel

from finetune.args import TrainArgs
from finetune.base_model.conditions import describe_conditions
from finetune.base_model.int8_linear import SCALE, quantised_parameters
from finetune.ttt_integration import _ranges, attention_windows, window_lines
from finetune.ttt_utils import (
    get_parameter_groups,
    is_depformer_parameter,
    is_ttt_parameter,
    outer_learning_rates,
)
from finetune.wrapped_model import context_frames
from moshi_ttt.hybrid_model import ttt_layers


def model_summary(model: LMModel, args: TrainArgs) -> list[str]:
    """Parameters, groups with their outer rates, patched layers, attention windows, chunk, warm-up."""
    return [
        *_parameter_lines(model, args),
        *_layer_lines(model, args),
        *_condition_lines(model),
        _chunk_line(args),
        f"Steps: {args.max_steps}, {_schedule(args)}; batch {args.batch_size} x {args.num_microbatches} "
        f"micro-batches per process; a line every {args.log_freq} steps.",
    ]


def _schedule(args: TrainArgs) -> str:
    optim, num_steps = args.optim, args.max_steps
    warm_up = optim.num_warmup_steps(num_steps)
    text = f"of which {round(warm_up)} warm up ({warm_up / num_steps:.0%})"
    if optim.schedule == "wsd":
        text += f" and the last {round(optim.num_decay_steps(num_steps))} decay ({optim.pct_decay:.0%})"
    return text if optim.schedule == "onecycle" else f"{text}, schedule {optim.schedule}"


def _parameter_lines(model: LMModel, args: TrainArgs) -> list[str]:
    added = {"lora_A", "lora_B"}
    counts = {name: p.numel() for name, p in model.named_parameters() if not name.endswith(f".{SCALE}")}
    base = sum(
        count
        for name, count in counts.items()
        if not is_ttt_parameter(name) and added.isdisjoint(name.split("."))
    )
    total = sum(counts.values())
    groups = get_parameter_groups(model, args)
    trainable = sum(parameter.numel() for group in groups.values() for parameter in group)
    lines = [
        f"Parameters: {total:,} in all, {base:,} of the base model, {trainable:,} trainable "
        f"({trainable / total:.2%}).",
        *_quantised_lines(model, base),
        "Trainable parameters by group, with their peak outer learning rates:",
    ]
    rates = outer_learning_rates(args)
    for name, parameters in groups.items():
        count = sum(parameter.numel() for parameter in parameters)
        rate = rates[name]
        lines.append(f"  {name}: {count:,} params, lr={rate:.2e} ({rate / args.optim.lr:g}x base)")
        if name == "base":
            lines += _depformer_lines(model, args)
    return lines


def _quantised_lines(model: LMModel, base: int) -> list[str]:
    count = sum(parameter.numel() for parameter in quantised_parameters(model) if parameter.ndim == 2)
    if not count:
        return []
    return [f"Rounded to int8: {count:,} parameters of the base model ({count / base:.0%})."]


def _depformer_lines(model: LMModel, args: TrainArgs) -> list[str]:
    """Those of its own rate inside the group `base`, where it has one."""
    multiplier = args.optim.depformer_lr_multiplier
    if multiplier == 1:
        return []
    count = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and is_depformer_parameter(name)
    )
    if not count:
        return ["    optim.depformer_lr_multiplier applies to nothing: the depth transformer does not train."]
    return [f"    of which depth transformer: {count:,} params, lr={args.optim.lr * multiplier:.2e}"]


def _layer_lines(model: LMModel, args: TrainArgs) -> list[str]:
    return [*_ttt_lines(model, args), *window_lines(model), *_reach_remarks(model, args)]


def _reach_remarks(model: LMModel, args: TrainArgs) -> list[str]:
    """Whether there is anything that only a memory can know."""
    windows = attention_windows(model)
    if not ttt_layers(model) or any(window is not None and window < args.chunk_frames for window in windows):
        return []
    adds = "nothing"
    if args.ttt.persistent_states:
        adds = "only what is further back in a recording than that"
    return [
        f"Note: the attention of every layer sees a chunk of {args.chunk_frames:,} frames whole; a memory "
        f"has {adds} to add. Shorter windows are ttt.ttt_layer_context and ttt.non_ttt_layer_context."
    ]


def _ttt_lines(model: LMModel, args: TrainArgs) -> list[str]:
    layers = ttt_layers(model)
    if not args.ttt.enable:
        return ["TTT: off (ttt.enable: false), stock Moshi layers and attention windows."]
    if not layers:
        unused = "" if args.ttt.ttt_layer_context is None else "; ttt.ttt_layer_context applies to none"
        return [f"TTT: ttt.layers is none, this run is the baseline without TTT layers{unused}."]
    config = next(iter(layers.values())).config
    dims = " -> ".join(map(str, config.inner_dims(config.head_dim)))
    memory = (
        f"is carried from chunk to chunk of a recording, {context_frames(model)} frames of context before "
        "each (ttt.persistent_states)"
    )
    if not args.ttt.persistent_states:
        memory = "starts at W0 in every chunk (ttt.persistent_states: false)"
    return [
        f"TTT: layers {_ranges(sorted(layers))} of {len(model.transformer.layers)}; "
        f"inner MLP {dims} per head, "
        f"{_inner_rate(args)}, mini-batches of {args.ttt.mini_batch_size}, "
        f"{'causal' if args.ttt.causal else 'NOT causal (leaks the future)'}.",
        f"TTT keys: {_key_source(args.ttt.key_shift)} (ttt.key_shift: {args.ttt.key_shift}).",
        f"TTT memory: {memory}.",
    ]


def _inner_rate(args: TrainArgs) -> str:
    unit = "shares of a token's error" if args.ttt.base_lr_scale == "share" else "the published scale"
    return f"base_lr {args.ttt.base_lr:g} in {unit}"


def _key_source(key_shift: int) -> str:
    if not key_shift:
        return "of the frame itself, the memory learns what a frame is"
    where = "the frame before" if key_shift == 1 else f"the frame {key_shift} before"
    return f"of {where}, the memory learns what follows a frame"


def _condition_lines(model: LMModel) -> list[str]:
    conditions = describe_conditions(model)
    return [f"Text conditions: {conditions}."] if conditions else []


def _chunk_line(args: TrainArgs) -> str:
    frames = args.chunk_frames
    line = f"Chunks: {args.duration_sec:g} s = {frames:,} frames"
    if not args.ttt.enable:
        return f"{line}."
    full, rest = divmod(frames, args.ttt.mini_batch_size)
    remainder = f" and one of {rest}" if rest else ""
    return f"{line} = {full:,} mini-batches of {args.ttt.mini_batch_size}{remainder}."
