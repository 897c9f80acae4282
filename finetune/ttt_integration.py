"""TTT layers and attention windows into a Moshi model, as the configuration says.

Which layers they are, `TTTArgs.layer_indices` in `finetune.args` decides.
"""

from collections.abc import Iterable, Sequence

from moshi.models.lm import LMModel
from moshi.models.loaders import FRAME_RATE
from pydantic import ValidationError
from torch import nn

from finetune.args import TTTArgs
from finetune.errors import ConfigError
from moshi_ttt.hybrid_model import hybrid_layers, patch_lm_model, transformer_layers, ttt_layers
from moshi_ttt.inner_loop import compute_dtype


def apply_ttt_to_model(lm_model: LMModel, ttt_args: TTTArgs) -> list[int]:
    """Add TTT layers to the chosen layers of a Moshi model and set the attention windows, in place.

    The new modules follow the device and dtype of their layer (the meta device too). With
    `ttt_args.enable` false nothing changes.

    Args:
        lm_model: a Moshi model that has never streamed.
        ttt_args: the `ttt:` section.

    Returns:
        Indices of the layers that have TTT now, sorted.

    Raises:
        ConfigError: a layer does not exist, the widths do not fit, or a window would apply to no layer.
        ValueError: the model has streamed before or is patched already.
    """
    if not ttt_args.enable:
        return []
    try:
        indices = ttt_args.layer_indices(len(lm_model.transformer.layers))
        num_heads = transformer_layers(lm_model.transformer)[0].self_attn.num_heads
        config = ttt_args.to_config(model_dim=lm_model.dim, num_heads=num_heads)
    except ValidationError as error:
        raise ConfigError(f"ttt: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    others = [i for i in range(len(lm_model.transformer.layers)) if i not in indices]
    for key, layers in (("ttt_layer_context", indices), ("non_ttt_layer_context", others)):
        context_frames = getattr(ttt_args, key)
        baseline = not indices and key == "ttt_layer_context"  # without TTT, with the windows of its twin
        if context_frames is not None and not layers and not baseline:
            raise ConfigError(f"ttt.{key}: {context_frames} would apply to no layer; set it to null.")
    patch_lm_model(lm_model, indices, config)
    set_attention_windows(lm_model, indices, ttt_args.ttt_layer_context)
    set_attention_windows(lm_model, others, ttt_args.non_ttt_layer_context)
    assert sorted(ttt_layers(lm_model)) == indices
    return indices


def set_attention_windows(lm_model: LMModel, indices: Iterable[int], context_frames: int | None) -> None:
    """Give layers another attention window, in frames, before they stream; None leaves theirs."""
    layers = transformer_layers(lm_model.transformer)
    for index in indices if context_frames is not None else ():
        layers[index].self_attn.context = context_frames


def attention_windows(lm_model: LMModel) -> list[int | None]:
    """The attention window of each transformer layer in frames, read from the attention modules."""
    return [layer.self_attn.context for layer in transformer_layers(lm_model.transformer)]


def float32_parameters(lm_model: LMModel) -> list[nn.Parameter]:
    """What a half-precision model keeps in float32: all of TTT and its gates but the four projections.

    Training computes with float32 masters of `W0`, norms, inner rates and gates. Rounded, they would be
    another model, and its memory could not be told from that of another checkpoint.
    """
    kept: list[nn.Parameter] = []
    for layer in hybrid_layers(lm_model).values():
        ttt = layer.ttt
        projections = {id(p) for linear in (ttt.wq, ttt.wk, ttt.wv, ttt.wo) for p in linear.parameters()}
        kept += [p for p in ttt.parameters() if id(p) not in projections]
        kept.append(layer.forward_ssm_gating.gating_alpha)
    return kept


def keep_ttt_precision(lm_model: LMModel) -> None:
    """Give `float32_parameters` float32 (float64 stays float64), in place, before weights are loaded."""
    for parameter in float32_parameters(lm_model):
        parameter.data = parameter.data.to(compute_dtype(parameter))


def window_lines(model: LMModel) -> list[str]:
    """The attention windows, and how many layers have which."""
    windows = attention_windows(model)
    lines = []
    for frames in sorted({window for window in windows if window is not None}):
        layers = [index for index, window in enumerate(windows) if window == frames]
        lines.append(
            f"Attention window: {frames:,} frames ({frames / FRAME_RATE:g} s) in {len(layers)} layers "
            f"({_ranges(layers)})."
        )
    return lines


def _ranges(indices: Sequence[int]) -> str:
    """`[1, 2, 3, 7]` as `1-3, 7`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
