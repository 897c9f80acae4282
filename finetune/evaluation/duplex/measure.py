"""Measuring all samples of all sets, each failure by the name of its sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from finetune.errors import DataError
from finetune.evaluation.duplex.figures import TASKS, Values
from finetune.evaluation.duplex.layout import Sample, SampleSet, read_annotation
from finetune.evaluation.duplex.outputs import (
    SpeechSettings,
    check_length,
    make_output,
    output_folder,
    read_speech,
)
from finetune.evaluation.duplex.speech import ModelSpeech
from finetune.evaluation.duplex.talk import Talker
from finetune.evaluation.duplex.wer import WordErrorMeter
from finetune.evaluation.word_errors import WordErrors


@dataclass(frozen=True)
class MeasuredSample:
    """A measured sample.

    Attributes:
        values: its figures, see `FIGURES`.
        speech: when the model spoke.
        errors: of a recogniser's words against the model's text; None: not asked for.
    """

    values: Values
    speech: ModelSpeech
    errors: WordErrors | None = None


@dataclass
class MeasuredSet:
    """The samples of a set that could be measured.

    Attributes:
        samples: by id.
        failures: why others could not, by name of set and sample.
    """

    samples: dict[str, MeasuredSample] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def make_outputs(talker: Talker, sets: Sequence[SampleSet], root: Path) -> tuple[int, dict[str, str]]:
    """Let a model answer every sample; answers that are there are kept.

    Args:
        talker: the model.
        sets: the samples.
        root: of the outputs, by set and id.

    Returns:
        How many were there already, and why others failed, by name.

    Raises:
        ConfigError: an answer cannot be written.
    """
    samples = [sample for each in sets for sample in each.samples]
    num_kept, failures = 0, {}
    with tqdm(samples, unit="sample", disable=None, leave=False) as bar:
        for sample in bar:
            bar.set_description(sample.name[-30:])
            try:
                num_kept += not make_output(talker, sample, root / sample.place)
            except DataError as error:
                failures[sample.name] = str(error)
    return num_kept, failures


def measure_sets(
    sets: Sequence[SampleSet],
    root: Path,
    settings: SpeechSettings,
    *,
    failures: dict[str, str] | None = None,
    meter: WordErrorMeter | None = None,
) -> dict[str, MeasuredSet]:
    """The figures of all samples, by set.

    Args:
        sets: the samples.
        root: of the outputs.
        settings: how speech is found.
        failures: samples that have no output, and why.
        meter: what counts word errors; None: nothing does.

    Raises:
        ConfigError: a transcript cannot be written.
    """
    failures = failures or {}
    measured = {each.name: MeasuredSet() for each in sets}
    total = sum(len(each.samples) for each in sets)
    with tqdm(total=total, unit="sample", disable=None, leave=False, desc="scoring") as bar:
        for each in sets:
            for sample in each.samples:
                bar.update()
                ours = measured[each.name]
                if sample.name in failures:
                    ours.failures[sample.name] = failures[sample.name]
                    continue
                try:
                    folder = output_folder(sample, root, is_only_set=len(sets) == 1)
                    ours.samples[sample.id] = _measure(sample, each, folder, settings, meter)
                except DataError as error:
                    ours.failures[sample.name] = str(error)
    return measured


def _measure(
    sample: Sample, samples: SampleSet, folder: Path, settings: SpeechSettings, meter: WordErrorMeter | None
) -> MeasuredSample:
    annotation = read_annotation(sample, samples)
    speech = read_speech(folder, settings)
    check_length(speech, annotation, task=samples.task, name=sample.name)
    values = TASKS[samples.task].measure(speech, annotation)
    errors = None if meter is None else meter.count(folder, name=sample.place)
    return MeasuredSample(values, speech, errors)
