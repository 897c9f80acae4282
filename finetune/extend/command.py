"""The command line of `python -m finetune.extend`."""

from pathlib import Path

from finetune.commands import Parser
from finetune.extend.folder import Extension, extend_model


def extend(arguments: list[str] | None = None) -> int:
    """Make a new model folder and print what was kept.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the user has to mend something.
    """
    parser = Parser(
        prog="python -m finetune.extend",
        description="Makes of a base model a new one with another text tokenizer, or with the user's stream "
        "predicted, or both. What is kept answers as before.",
    )
    parser.add_argument("--base", required=True, metavar="HF_ID_OR_DIR", help="the model to start from")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="sentencepiece model that replaces the model's own"
    )
    parser.add_argument(
        "--predict-user", action="store_true", help="predict the user's audio codes too (dep_q 8 becomes 16)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is drawn for new text pieces (%(default)s)"
    )
    options = parser.parse_args(arguments)
    made = extend_model(
        options.base,
        options.out,
        tokenizer=options.tokenizer,
        predict_user=options.predict_user,
        seed=options.seed,
    )
    print("\n".join([*_lines(made), f"made {options.out}"]))
    return 0


def _lines(made: Extension) -> list[str]:
    lines = ["{:,} parameters, before {:,}".format(*reversed(made.num_parameters))]
    vocabulary = made.vocabulary
    if vocabulary is not None:
        others, new = vocabulary.num_kept - vocabulary.num_text, vocabulary.num_pieces - vocabulary.num_kept
        lines.append(
            f"text tokens: {vocabulary.num_pieces:,}, before {vocabulary.num_old:,}; kept: "
            f"{vocabulary.num_text:,} of text, {others:,} bytes and control pieces; new: {new:,}"
        )
    if made.num_steps[0] != made.num_steps[1]:
        lines.append("depth transformer: {} codebooks predicted, before {}".format(*reversed(made.num_steps)))
    return lines
