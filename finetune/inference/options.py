"""Options that generate.py, serve.py and evaluate.py share."""

import argparse
import math

import torch
from moshi.models.lm import LMModel

from finetune.distributed import choose_device
from finetune.errors import ConfigError
from finetune.inference.conversation import Sampling
from finetune.inference.speech_model import SpeechModel, load_speech_model
from moshi_ttt.hybrid_model import TTT_MODES, ttt_layers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options that choose a model, its precision and what its memory does; returns their group.

    `choose_checkpoint` must look at what they got.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="run directory (its newest checkpoint), checkpoint (of moshi-finetune too, with --base), or "
        "repository user/name of the Hub",
    )
    group.add_argument(
        "--base",
        metavar="PATH",
        help="base model instead of the one the checkpoint names: a local folder or a repository; without "
        "--checkpoint: the base model itself",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the model (bfloat16 on a GPU, float32 on a CPU); the memory is float32",
    )
    group.add_argument(
        "--no-fuse-lora", action="store_true", help="keep LoRA adapters apart from the base weights: slower"
    )
    group.add_argument(
        "--ttt",
        choices=TTT_MODES,
        default="on",
        help="on; frozen: the fast weights stay at W0, without inner steps; off: gate 0 (%(default)s)",
    )
    group.add_argument(
        "--condition",
        type=_condition,
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="what a model with text conditions is told; once for each of them (those left out: unknown)",
    )
    return group


def choose_checkpoint(options: argparse.Namespace) -> None:
    """Let `--base` alone stand for the base model itself, in the place of a checkpoint.

    Raises:
        ConfigError: neither is given.
    """
    if options.checkpoint is not None:
        return
    if options.base is None:
        raise ConfigError(
            "--checkpoint: give a trained model, or --base alone for a base model as it is (see --help)."
        )
    options.checkpoint, options.base = options.base, None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose how tokens are drawn."""
    defaults = Sampling()
    group = parser.add_argument_group("sampling")
    group.add_argument("--greedy", action="store_true", help="the most likely tokens, nothing is drawn")
    group.add_argument("--temp", type=_temperature, default=defaults.temp, help="of audio (%(default)s)")
    group.add_argument(
        "--temp-text", type=_temperature, default=defaults.temp_text, help="of text (%(default)s)"
    )
    group.add_argument(
        "--top-k", type=positive_integer, default=defaults.top_k, help="of audio (%(default)s)"
    )
    group.add_argument(
        "--top-k-text", type=positive_integer, default=defaults.top_k_text, help="of text (%(default)s)"
    )


def load_from_options(
    options: argparse.Namespace, *, checkpoint: str | None = None, must_speak: bool = True
) -> SpeechModel:
    """The model that the options name.

    Args:
        options: of `add_model_options`.
        checkpoint: instead of the one they name.
        must_speak: refuse a model that writes text only.

    Raises:
        UserError: it cannot be loaded, or an option does not fit it.
    """
    device = choose_device(options.device)
    dtype = DTYPES.get(options.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    return load_speech_model(
        options.checkpoint if checkpoint is None else checkpoint,
        base=options.base,
        device=device,
        dtype=dtype,
        fuse_lora=not options.no_fuse_lora,
        mode=options.ttt,
        conditions=conditions_from_options(options),
        must_speak=must_speak,
    )


def conditions_from_options(options: argparse.Namespace) -> dict[str, str]:
    """Texts by the name of the condition.

    Raises:
        ConfigError: one is given twice.
    """
    conditions: dict[str, str] = {}
    for name, text in options.condition:
        if name in conditions:
            raise ConfigError(f"--condition: {name} is given twice.")
        conditions[name] = text
    return conditions


def check_memory_options(options: argparse.Namespace, lm: LMModel) -> None:
    """Refuse memory files where there is no memory.

    Raises:
        ConfigError: names the option.
    """
    has_layers = bool(ttt_layers(lm))
    for option in ("load_memory", "save_memory"):
        if getattr(options, option) is None:
            continue
        name = f"--{option.replace('_', '-')}"
        if not has_layers:
            raise ConfigError(f"{name}: {options.checkpoint} has no TTT layers, so there is no memory.")
        if options.ttt != "on":
            raise ConfigError(f"{name}: with --ttt {options.ttt} the memory does not learn; use --ttt on.")


def sampling_from_options(options: argparse.Namespace) -> Sampling:
    """How tokens are drawn."""
    return Sampling(
        greedy=options.greedy,
        temp=options.temp,
        temp_text=options.temp_text,
        top_k=options.top_k,
        top_k_text=options.top_k_text,
    )


def positive_integer(text: str) -> int:
    """An option's value of at least 1."""
    return whole_number(text, lowest=1, highest=10**6)


def seed(text: str) -> int:
    """An option's value that random generators take."""
    return whole_number(text, lowest=0, highest=2**63 - 1)


def whole_number(text: str, *, lowest: int, highest: int) -> int:
    """An option's value between two bounds."""
    if not (text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if len(text) > 20 or not lowest <= int(text) <= highest:
        raise argparse.ArgumentTypeError(
            f"{text[:30]} is not allowed, must be between {lowest} and {highest}"
        )
    return int(text)


def _condition(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TEXT")
    return name, value


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, must be a number between 0 and 100")
    return value
