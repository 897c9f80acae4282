"""The command line of `python -m finetune.export`."""

import argparse
from pathlib import Path

from finetune.commands import Parser
from finetune.errors import ConfigError
from finetune.export.card import DEFAULT_LICENSE
from finetune.export.folder import export_checkpoint, local_files, push_to_hub
from finetune.export.formats.folder import FORMATS, export_in_format


def export(arguments: list[str] | None = None) -> int:
    """Export a checkpoint, push it where asked, and print where it is.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the user has to mend something.
    """
    options = _parse(arguments)
    if options.format is not None:
        export_in_format(
            options.format,
            options.checkpoint,
            options.out,
            base_model=options.base_model,
            dtype=options.dtype or "auto",
        )
        print(f"Exported to {options.out}")
        return 0
    base = export_checkpoint(
        options.checkpoint,
        options.out,
        base_model=options.base_model,
        title=options.title,
        license_id=options.license,
        repo_id=options.push_to_hub,
        merged_dtype=(options.dtype or "auto") if options.merged else None,
    )
    if local_files(base):
        print(
            f"The base model is local ({local_files(base)[0]}): other machines need --base-model USER/REPO."
        )
    if options.push_to_hub is None:
        print(f"Exported to {options.out}")
    else:
        url = push_to_hub(options.out, options.push_to_hub, private=options.private)
        print(f"Exported to {options.out} and pushed to {url}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m finetune.export",
        description="Copies a checkpoint into a new folder with a model card, and pushes it to the Hub.",
    )
    parser.add_argument(
        "--checkpoint",
        help="run directory (its newest checkpoint) or checkpoint (of moshi-finetune too, with --base-model)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--base-model",
        metavar="HF_ID_OR_DIR",
        help="where the base model is found, instead of where training found it; without --checkpoint, "
        "with --merged: the base model itself",
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="write the whole model, the adapters merged into the base weights, instead of adapters",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="for other libraries: peft and peft-transformers write the adapters as PEFT loads them, for "
        "Moshi's own class and for that of transformers; transformers the whole model; kyutai turns such a "
        "model, given with --checkpoint, into a base model for here",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the merged weights, or those for transformers (default: that of training)",
    )
    parser.add_argument("--title", metavar="TEXT", help="heading of the model card")
    parser.add_argument(
        "--license",
        default=DEFAULT_LICENSE,
        metavar="ID",
        help="license identifier of the Hub (%(default)s, that of Moshi's weights)",
    )
    parser.add_argument("--push-to-hub", metavar="USER/REPO", help="upload the folder to this repository")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    options = parser.parse_args(arguments)
    if options.checkpoint is None:
        if options.base_model is None:
            raise ConfigError("--checkpoint: give a trained model, or --base-model alone with --merged.")
        options.checkpoint, options.base_model = options.base_model, None
    if options.private and options.push_to_hub is None:
        raise ConfigError("--private: goes with --push-to-hub.")
    is_whole = options.merged or options.format == "transformers"
    if options.dtype is not None and not is_whole:
        raise ConfigError(
            "--dtype: goes with --merged or --format transformers; adapters and TTT weights stay in float32."
        )
    if options.format is not None:
        _refuse_beside_format(options)
    return options


def _refuse_beside_format(options: argparse.Namespace) -> None:
    given = {
        "--merged": options.merged,
        "--title": options.title is not None,
        "--license": options.license != DEFAULT_LICENSE,
        "--push-to-hub": options.push_to_hub is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(f"{name}: goes without --format, which writes no model card and is not pushed.")
