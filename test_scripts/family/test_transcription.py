"""Speech to text: words come back with their times, as one pass has them; errors are counted by position."""

import json

import numpy as np
import pytest
import sphn
import torch

from finetune.args import ModelPaths
from finetune.base_model.codec import load_codec
from finetune.base_model.locate import find_model_files
from finetune.data.batches.interleaver import interleave_text
from finetune.data.words import Word, delayed
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.command import evaluate
from finetune.evaluation.transcription import measure
from finetune.evaluation.transcription.measure import Transcript, compare, error_rates
from finetune.evaluation.word_errors import errors_by_word
from finetune.inference.conversation import Conversation, Sampling
from finetune.inference.speech_model import load_speech_model
from finetune.inference.transcription import Transcriber, WordStream
from finetune.serving.voice import MemoryFiles, Voice
from miniatures.family import TEXT_DELAY_FRAMES, write_kind

RATE = 12.5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_kind(tmp_path_factory.mktemp("kind") / "base", "speech to text")


@pytest.fixture(scope="module")
def speech(base):
    return load_speech_model(str(base), device=torch.device("cpu"), dtype=torch.float32, must_speak=False)


def test_the_words_of_a_text_stream_come_back_with_their_starts(speech):
    starts = {"Hello": 0.4, "my": 0.8, "friend": 2.0, "oh,": 4.0}
    words = [Word(text, start, start + 0.3, "SPEAKER_MAIN") for text, start in starts.items()]
    tokens = interleave_text(
        delayed(words, TEXT_DELAY_FRAMES / RATE),
        num_frames=100,
        frame_rate=RATE,
        tokenizer=speech.tokenizer,
        text_padding_id=speech.lm.text_padding_token_id,
        end_of_text_padding_id=speech.lm.end_of_text_padding_id,
    ).tolist()
    stream = WordStream(speech)
    found = [stream.add(token, frame) for frame, token in enumerate(tokens)] + [stream.finish()]
    found = [word for word in found if word is not None]
    assert {word.text: word.start_sec for word in found} == starts
    assert all(word.end_sec > word.start_sec and word.speaker == "SPEAKER_MAIN" for word in found)


@torch.no_grad()
def test_the_transcript_is_what_one_pass_finds_most_likely(speech):
    audio = 0.2 * torch.randn(24000, generator=torch.Generator().manual_seed(0))
    with Conversation(speech.lm, speech.mimi, sampling=Sampling(greedy=True)) as conversation:
        transcriber = Transcriber(speech, conversation)
        heard = torch.cat(transcriber.frames(audio))
        written = dict(transcriber._tokens(audio, conversation.listen, lambda: False))
    assert len(heard) // 1920 == 13 + TEXT_DELAY_FRAMES + 12  # what is said is heard to its end, and written
    codes = speech.mimi.encode(heard[None, None])
    frames = codes.shape[2]
    assert sorted(written) == list(range(1, frames + 1))
    text = torch.tensor([[[0, *(written[frame][0] for frame in range(1, frames))]]])
    initial = speech.lm._get_initial_token()
    text[0, 0, 0] = speech.lm.forward_text(initial)[
        1
    ].argmax()  # frame 0 is predicted before anything is heard
    logits = speech.lm(torch.cat([text, codes], 1)).text_logits[0, 0]
    assert logits.argmax(-1).tolist() == text[0, 0].tolist()


def test_a_server_sends_no_audio_of_a_model_that_writes_text_only(speech):
    voice = Voice(speech, files=MemoryFiles())
    with voice._conversation:
        assert voice._answer(np.zeros(voice.frame_size, np.float32)).audio is None


@pytest.mark.parametrize(
    ("written", "errors"),
    [
        ("a b c d", [0, 0, 0, 0]),
        ("a x c d", [0, 1, 0, 0]),
        ("a c d", [0, 1, 0, 0]),
        ("a b x y c d", [0, 2, 0, 0]),
        ("x a b c d", [1, 0, 0, 0]),
        ("", [1, 1, 1, 1]),
    ],
)
def test_errors_are_counted_where_they_are(written, errors):
    assert errors_by_word(["a", "b", "c", "d"], written.split()) == errors


def test_error_rates_are_those_of_the_words_in_each_bin():
    first = compare("a", [Word("One", 0.0, 0.1), Word("two", 5.0, 5.1)], [Word("one,", 0.5, 0.6)])
    assert (first.seconds.tolist(), first.errors.tolist()) == ([0.0, 5.0], [0, 1])
    second = Transcript("b", np.array([0.0, 0.1, 9.0]), np.array([1, 0, 2]))
    rates = error_rates([first, second], bin_frames=50, bootstrap=RatioBootstrap(50))
    assert [(each["words"], each["errors"]) for each in rates["bins"]] == [(3, 1), (1, 1), (1, 2)]
    assert rates["all"]["wer"] == pytest.approx(4 / 5) and rates["bins"][2]["wer"] == 2
    assert rates["bins"][1]["interval"] is None and rates["bins"][0]["interval"] is not None


@pytest.fixture
def recordings(tmp_path):
    """Two recordings of noise with words beside them."""
    lines = []
    for seed in range(2):
        path = tmp_path / f"{seed}.wav"
        samples = 0.1 * np.random.default_rng(seed).standard_normal(24000 * 2).astype(np.float32)
        sphn.write_wav(str(path), samples, 24000)
        words = [["hello", [0.1, 0.4], "SPEAKER_MAIN"], ["there", [1.2, 1.5], "SPEAKER_MAIN"]]
        path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
        lines.append(json.dumps({"path": path.name, "duration": 2.0}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data.jsonl"


def test_a_measurement_is_written_and_gone_on_with(base, recordings, command, tmp_path, monkeypatch):
    arguments = ("transcription", "--base", base, "--data", recordings, "--out", tmp_path / "out")
    status, output, errors = command(evaluate, *arguments, "--bin-frames", 12)
    assert status == 0 and [line for line in errors if line.startswith("error")] == []
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["arms"]["plain"]["all"]["words"] == 4 and len(results["arms"]["plain"]["bins"]) == 2
    assert "from 12" in output
    monkeypatch.setattr(measure, "enter_arm", lambda *_: pytest.fail("heard again"))
    assert command(evaluate, *arguments, "--bin-frames", 12)[0] == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_a_model_that_speaks_and_a_recording_without_words_are_named(
    base, recordings, command, tmp_path, tiny_base
):
    arguments = ("transcription", "--data", recordings, "--out", tmp_path / "out")
    status, _, errors = command(evaluate, *arguments, "--base", tiny_base)
    assert status == 2 and "this model speaks (dep_q: 8)" in errors[-1]
    recordings.with_name("1.wav").rename(recordings.with_name("elsewhere.wav"))
    status, _, errors = command(evaluate, *arguments, "--base", base)
    assert status == 2 and "1.wav: cannot be read: No such file" in errors[-1]
    recordings.with_name("1.json").unlink()
    status, _, errors = command(evaluate, *arguments, "--base", base)
    assert (
        status == 2 and "--max-failures: 1 recordings failed, 0 may" in errors[-1] and "1.json" in errors[-1]
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["plain"]["all"]["words"] == 2


def test_the_codec_of_a_model_that_predicts_both_voices_has_the_codebooks_of_one(tmp_path):
    base = write_kind(tmp_path / "base", "both voices predicted")
    info = find_model_files(ModelPaths(hf_repo_id=str(base)))
    assert load_codec(info, torch.device("cpu")).num_codebooks == 8
