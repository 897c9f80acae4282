"""The model card of an exported checkpoint: README.md with the front matter of the Hugging Face Hub."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from moshi.models.loaders import FRAME_RATE
from ruamel.yaml import YAML

from finetune.args import TTTArgs
from finetune.checkpoint.layout import CONFIG_FILE, FULL_FILE, LORA_FILE, TRAINING_FILE, TTT_FILE
from finetune.errors import CheckpointError, one_line

DEFAULT_LICENSE = "cc-by-4.0"  # of Moshi's own weights, from which a fine-tuned model derives
_PLACEHOLDER = "USER/REPO"

_INTRODUCTION = (
    "[Moshi](https://github.com/kyutai-labs/moshi), Kyutai's real-time speech-text model, which listens and "
    "speaks at the same time"
)
_INTRODUCTION_OF_TEXT = (
    "A sibling of [Moshi](https://github.com/kyutai-labs/moshi), Kyutai's real-time speech-text model, which "
    "writes down what it hears"
)
_TTT_EXPLAINED = (
    "Inside the layers listed below, between attention and feed-forward, a small MLP per attention head "
    "learns while the model listens, by gradient steps on a reconstruction loss. What it learns in a "
    "conversation is state of that conversation and is never written into the weights."
)
_FULL_WEIGHTS = {
    None: "full weights of the model, no adapters",
    True: "full weights: the LoRA adapters are merged into those of the base model",
    False: "full weights: those of the base model, which training left unchanged",
}
_MOSHI_PAPER = "- Défossez et al. 2024, *Moshi: a speech-text foundation model for real-time dialogue*."
_TTT_PAPERS = (
    "- Sun et al. 2024, *Learning to (Learn at Test Time)*.\n"
    "- Dalal et al. 2025, *One-Minute Video Generation with Test-Time Training*."
)


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card says, all of it from the files of a checkpoint.

    Attributes:
        step: optimiser step of the checkpoint.
        config: its config.json.
        ttt: its `ttt` section.
        parameters: number of parameters by weight file.
        base_model: Hub id of the base model; None when that is local.
        repo_id: Hub id that the model will have; None when it is not known yet.
        merged_lora: of full weights that an export put together: whether adapters were merged into them
            (else they are the base model's own); None for weights that training wrote.
        trained_with: the program that trained.
    """

    step: int
    config: dict[str, Any]
    ttt: TTTArgs
    parameters: Mapping[str, int]
    base_model: str | None
    repo_id: str | None = None
    merged_lora: bool | None = None
    trained_with: str = "moshi-ttt"

    @property
    def has_ttt(self) -> bool:
        """Whether the model has TTT layers."""
        return TTT_FILE in self.parameters

    @property
    def writes_only(self) -> bool:
        """Whether the model writes text and has no voice."""
        return self.config.get("dep_q") == 0

    @property
    def training(self) -> str:
        """How the base model was trained, for people."""
        parts = []
        if FULL_FILE in self.parameters and self.merged_lora is None:
            parts.append("full weights")
        if FULL_FILE in self.parameters and self.merged_lora:
            parts.append("LoRA adapters (merged into the weights)")
        if LORA_FILE in self.parameters:
            parts.append("LoRA adapters")
        if self.has_ttt:
            parts.append("Test-Time-Training (TTT) layers")
        return " and ".join(parts)


def model_card(facts: CardFacts, *, title: str | None = None, license_id: str = DEFAULT_LICENSE) -> str:
    """The text of README.md.

    Args:
        facts: of the checkpoint.
        title: the heading; None takes one from the kind of training.
        license_id: license identifier of the Hub.

    Raises:
        CheckpointError: config.json lacks the shape of the model, or the `ttt` section does not fit it.
    """
    try:
        sections = [
            _front_matter(facts, license_id),
            f"# {title or _default_title(facts)}",
            _description(facts),
            _training(facts),
            _ttt_settings(facts),
            _files(facts),
            _usage(facts),
            _stock_moshi(facts),
            _limitations(facts),
            _citation(facts),
        ]
    except (KeyError, MemoryError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG_FILE} or {TRAINING_FILE} is damaged: {one_line(error)}.") from None
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: CardFacts, license_id: str) -> str:
    values: dict[str, Any] = {"license": license_id, "library_name": "moshi-ttt"}
    if facts.base_model is not None:
        values["base_model"] = facts.base_model
    values["pipeline_tag"] = "automatic-speech-recognition" if facts.writes_only else "audio-to-audio"
    values["tags"] = ["moshi", *(["test-time-training"] if facts.has_ttt else []), "speech"]
    stream = io.StringIO()
    YAML().dump(values, stream)
    return f"---\n{stream.getvalue()}---"


def _default_title(facts: CardFacts) -> str:
    if facts.has_ttt:
        return "Moshi with Test-Time-Training layers"
    if LORA_FILE in facts.parameters:
        return "Moshi with LoRA adapters"
    return "Fine-tuned Moshi" if facts.training else "Moshi"


def _description(facts: CardFacts) -> str:
    introduction = _INTRODUCTION_OF_TEXT if facts.writes_only else _INTRODUCTION
    if not facts.training:
        return f"{introduction}: the base model as it is, in which nothing was trained."
    text = f"{introduction}, fine-tuned with {facts.trained_with}: {facts.training}."
    return f"{text} {_TTT_EXPLAINED}" if facts.has_ttt else text


def _training(facts: CardFacts) -> str:
    rows = [("base model", _base_link(facts)), ("training step", f"{facts.step:,}")]
    if LORA_FILE in facts.parameters:
        rows.append(("LoRA rank", f"{facts.config['lora_rank']:,}"))
        rows.append(("LoRA scaling", f"{facts.config['lora_scaling']:g}"))
    elif FULL_FILE in facts.parameters:
        rows.append(("weights", _FULL_WEIGHTS[facts.merged_lora]))
    else:
        rows.append(("weights", "TTT layers only; the base model's own weights are unchanged"))
    return "## Training\n\n" + _table(("", ""), rows)


def _base_link(facts: CardFacts) -> str:
    if facts.base_model is None:
        return f"the files named in `{TRAINING_FILE}`"
    return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _ttt_settings(facts: CardFacts) -> str:
    """The settings of the TTT layers, or of a baseline that has only their attention windows; else empty."""
    if not facts.ttt.enable:
        return ""
    ttt, num_layers = facts.ttt, int(facts.config["num_layers"])
    indices = ttt.layer_indices(num_layers)
    rows = [("layers", f"{', '.join(map(str, indices)) or 'none'} (of {num_layers}, counted from 0)")]
    if indices:
        shape = ttt.to_config(model_dim=facts.config["dim"], num_heads=facts.config["num_heads"])
        rows += [
            ("inner MLP per head", " → ".join(map(str, shape.inner_dims(shape.head_dim)))),
            ("inner learning rate `base_lr`", f"{ttt.base_lr:g} (`base_lr_scale: {ttt.base_lr_scale}`)"),
            ("keys", _key_source(ttt.key_shift)),
            ("mini-batch", f"{ttt.mini_batch_size:,} frames ({ttt.mini_batch_size / FRAME_RATE:g} s)"),
            ("gate", ttt.gating),
            ("causal", "yes" if ttt.causal else "no"),
            ("attention window of these layers", _window(facts, ttt.ttt_layer_context)),
        ]
    if len(indices) < num_layers:
        layers = "the other layers" if indices else "all layers"
        rows.append((f"attention window of {layers}", _window(facts, ttt.non_ttt_layer_context)))
    heading = f"## TTT settings\n\nAll of them are in `{TRAINING_FILE}`.\n\n"
    return heading + _table(("setting", "value"), rows)


def _key_source(key_shift: int) -> str:
    if not key_shift:
        return "of the frame itself (`key_shift: 0`)"
    return f"of the frame {key_shift / FRAME_RATE:g} s earlier (`key_shift: {key_shift}`)"


def _window(facts: CardFacts, frames: int | None) -> str:
    context = frames if frames is not None else facts.config["context"]
    return "unlimited" if context is None else f"{context:,} frames ({context / FRAME_RATE:g} s)"


def _files(facts: CardFacts) -> str:
    rows = [(f"`{name}`", f"{count:,}") for name, count in facts.parameters.items()]
    return "## Files\n\n" + _table(("file", "parameters"), rows)


def _usage(facts: CardFacts) -> str:
    if facts.has_ttt and not facts.ttt.causal:
        return ""
    name = facts.repo_id or _PLACEHOLDER
    where = "" if facts.repo_id else f" `{_PLACEHOLDER}` is this repository, or the path of a copy."
    heading, out = ("Transcribe", "words.json") if facts.writes_only else ("Talk to it", "out.wav")
    return (
        f"## {heading}\n\nIn a checkout of moshi-ttt:{where}\n\n```bash\n"
        f"python generate.py --checkpoint {name} in.wav {out}\n"
        f"python serve.py --checkpoint {name}\n```"
    )


def _stock_moshi(facts: CardFacts) -> str:
    if FULL_FILE in facts.parameters:
        file, option = FULL_FILE, "--moshi-weight"
    elif LORA_FILE in facts.parameters:
        file, option = LORA_FILE, "--lora-weight"
    else:
        return f"## Stock Moshi\n\nThe `moshi` package knows no TTT layers, so it cannot use `{TTT_FILE}`."
    reads = f"The `moshi` package reads `{file}`"
    if facts.has_ttt:
        reads += (
            " but ignores the TTT layers, so it runs another model than the one that was trained. It refuses "
            f"keys that it does not know: give it a copy of `{CONFIG_FILE}` without the section `ttt`."
        )
    elif _has_own_windows(facts):
        reads += ", with the attention window of the base model instead of the one in the table."
    else:
        reads += "."
    config = "CONFIG_WITHOUT_TTT.json" if facts.has_ttt else CONFIG_FILE
    base = facts.base_model or "BASE_MODEL"
    command = f"python -m moshi.server --hf-repo {base} {option} {file} --config-path {config}"
    return f"## Stock Moshi\n\n{reads}\n\n```bash\n{command}\n```"


def _has_own_windows(facts: CardFacts) -> bool:
    windows = (facts.ttt.ttt_layer_context, facts.ttt.non_ttt_layer_context)
    return facts.ttt.enable and any(window is not None for window in windows)


def _limitations(facts: CardFacts) -> str:
    lines = []
    if facts.has_ttt:
        lines.append("- The MLX and Rust runtimes of Moshi do not support TTT layers.")
        if not facts.ttt.causal:
            lines.append(
                "- The TTT layers are not causal: they read the future inside a mini-batch, so the model "
                "cannot stream and nobody can talk to it. It is for comparison."
            )
    lines += [
        "- It is a voice model: do not use it to impersonate anybody or to deceive.",
        "- Like Moshi, it can say things that are wrong or harmful. This card is made from the settings of "
        "the training alone and reports no evaluation.",
    ]
    return "## Limitations\n\n" + "\n".join(lines)


def _citation(facts: CardFacts) -> str:
    papers = [_MOSHI_PAPER, *([_TTT_PAPERS] if facts.has_ttt else [])]
    return "## Citation\n\n" + "\n".join(papers)


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in (header, ("---", "---"), *rows))
