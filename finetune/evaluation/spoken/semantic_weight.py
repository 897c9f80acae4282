"""How much the semantic codebook weighs in the score of an item: as much as in training."""

from typing import NamedTuple

from finetune.checkpoint_files import ARGS_FILE, FIRST_CODEBOOK_KEY, TRAINING_FILE, step_of
from finetune.config_io import read_yaml
from finetune.errors import ConfigError
from finetune.loading import Checkpoint

MOSHI_WEIGHT = 100.0  # what Moshi itself was trained with (arXiv 2410.00037)


class SemanticWeight(NamedTuple):
    """A weight, where an acoustic codebook has 1, and what says so."""

    value: float
    source: str


def semantic_weight(checkpoint: Checkpoint, *, given: float | None = None) -> SemanticWeight:
    """The weight for a checkpoint: what is given, else that of its training, else Moshi's own.

    Raises:
        ConfigError: the configuration of an older checkpoint's run cannot be read, or the value is no weight.
    """
    if given is not None:
        return SemanticWeight(given, "--semantic-weight")
    if checkpoint.first_codebook_weight is not None:
        return SemanticWeight(checkpoint.first_codebook_weight, TRAINING_FILE)
    folder = checkpoint.folder.resolve()
    run_args = folder.parent.parent.parent / ARGS_FILE  # run/checkpoints/checkpoint_000100/consolidated
    if step_of(folder.parent) is not None and run_args.is_file():
        value = read_yaml(run_args).get(FIRST_CODEBOOK_KEY)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1e9:
            raise ConfigError(
                f"{run_args}: {FIRST_CODEBOOK_KEY}: {value!r} is not a number greater than 0; "
                "give --semantic-weight."
            )
        return SemanticWeight(float(value), ARGS_FILE)
    return SemanticWeight(MOSHI_WEIGHT, "not recorded: that of Moshi's own training")
