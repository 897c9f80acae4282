"""What a checkpoint consists of, and which checkpoints a folder holds.

run_dir/checkpoints/checkpoint_000100/
    consolidated/                  for use, and all that is ever handed to others
        lora.safetensors           LoRA adapters (and embeddings that training changed), or
        consolidated.safetensors   full weights (full fine-tuning, or adapters merged)
        ttt.safetensors            TTT weights and gates, when there are any
        config.json                as in a Moshi repository, with a `ttt` section when there is one
        training.json              the step, the files, the `ttt` section, where the base model came from,
                                   the weight of the semantic codebook
    state/                         for resuming: trainable weights, optimiser, carried memory, random states
    resume.json                    the same in words: step, data position, configuration, best evaluation
    DONE.json                      size and hash of every file; written last
"""

from pathlib import Path

LORA_FILE = "lora.safetensors"
FULL_FILE = "consolidated.safetensors"
TTT_FILE = "ttt.safetensors"
WEIGHT_FILES = (FULL_FILE, LORA_FILE, TTT_FILE)
CONFIG_FILE = "config.json"
TRAINING_FILE = "training.json"
RESUME_FILE = "resume.json"
DONE_FILE = "DONE.json"
CONSOLIDATED_DIR = "consolidated"
STATE_DIR = "state"
LATEST_FILE = "latest"
TEXT_KEY = "text"  # of training.json: how text was placed, see `finetune.args.TextOptions`
FIRST_CODEBOOK_KEY = "first_codebook_weight_multiplier"  # of training.json, as in the configuration
PREFIX = "checkpoint_"
PARTIAL_PREFIX = ".tmp-"  # being written
OLD_PREFIX = ".old-"  # being deleted


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a `checkpoints` folder, oldest first; other names and files are passed over."""
    folders = [(step_of(path), path) for path in folder.glob(f"{PREFIX}*") if path.is_dir()]
    found = [(step, path) for step, path in folders if step is not None]
    return [path for _, path in sorted(found, key=lambda entry: entry[0])]


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder, None where it is no such name."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if path.name != digits and digits.isascii() and digits.isdigit() else None


def run_dir_of(path: str | Path) -> Path:
    """The run directory of a path to resume from: of a checkpoint its run's, otherwise the path itself."""
    path = Path(path)
    return path.resolve().parent.parent if step_of(path) is not None else path
