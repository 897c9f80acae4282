"""Inputs of the long-context evaluation: the tokens that recordings become, and why some become none."""

import json

import numpy as np
import pytest
import sphn
import torch

from audio_helpers import noise, write_flac
from finetune.base_model.locate import find_model_files
from finetune.checkpoint.reading import open_checkpoint
from finetune.data.audio.read import read_pieces
from finetune.data.batches.chunks import Chunk
from finetune.data.batches.dataset import ChunkDataset
from finetune.data.codes import cache as code_cache
from finetune.data.codes.cache import CodeCache
from finetune.data.codes.encode_audio import codec_context_frames, encode_recording
from finetune.data.recordings.lines import Recording
from finetune.errors import ConfigError, DataError
from finetune.evaluation.long_context.streams import StreamOptions, open_streams
from finetune.inference.speech_model import load_speech_model

K = 8
FRAME = 1920


@pytest.fixture(scope="module")
def speech(untrained_run):
    return load_speech_model(str(untrained_run("ttt")), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def info(untrained_run):
    return find_model_files(open_checkpoint(str(untrained_run("ttt"))).base)


@pytest.fixture
def open_data(speech, info):
    def run(data, **options):
        return open_streams(str(data), StreamOptions(**options), speech, info)

    return run


def add(path, num_frames=10, channels=1, *, rate=24000, seed=None):
    """Write noise that no other name has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = noise(num_frames * FRAME * rate // 24000, channels, seed=sum(map(ord, path.name)))
    if path.suffix.lower() == ".flac":
        write_flac(path, samples, rate)
    elif path.suffix.lower() == ".opus":
        sphn.write_opus(str(path), samples, rate)
    else:
        sphn.write_wav(str(path), samples, rate)
    return path


def write_manifest(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def names(sources):
    return [source.name for source in sources]


def whole(stream):
    return stream.frames(0, stream.num_frames)


def codes_of(path, mimi):
    return encode_recording(mimi, read_pieces(path, sample_rate=24000))


@pytest.mark.parametrize(
    ("name", "rate"), [("a.wav", 24000), ("a.wav", 16000), ("a.flac", 16000), ("a.opus", 24000)]
)
def test_mono_voice_is_moshis_own_stream_and_nothing_else(tmp_path, speech, open_data, name, rate):
    path = add(tmp_path / "ü b" / name, 25, rate=rate)
    (stream,) = open_data(tmp_path).streams
    codes = whole(stream)
    assert (stream.name, stream.num_frames, codes.dtype) == (f"ü b/{name}", 25, torch.int64)
    assert codes.shape == (1 + 2 * K, 25)
    assert torch.equal(codes[1 : 1 + K], codes_of(path, speech.mimi)[0])
    assert set(codes[0].tolist()) == {-1} and set(codes[1 + K :].flatten().tolist()) == {-1}


def test_zero_tokens_add_exactly_nothing(speech):
    lm = speech.lm
    zero = torch.full((1, 1), lm.zero_token_id)
    for embedding in (lm.text_emb, *lm.emb):
        assert embedding(zero).abs().max() == 0
        assert embedding(zero + 1).abs().max() > 0


def test_right_channel_of_a_stereo_file_is_the_user_when_asked_for(tmp_path, speech, open_data):
    path = add(tmp_path / "a.wav", 20, channels=2)
    left, right = codes_of(path, speech.mimi)
    (real,) = open_data(tmp_path, user="real").streams
    assert torch.equal(whole(real)[1:], torch.cat([left, right]))
    (empty,) = open_data(tmp_path, user="empty").streams
    assert torch.equal(whole(empty)[1:], torch.cat([left, torch.full_like(right, -1)]))


def test_silent_user_has_the_codes_of_digital_silence(tmp_path, speech, open_data):
    num_frames = codec_context_frames(speech.mimi) + 40
    add(tmp_path / "s" / "a.wav", num_frames - 10)
    add(tmp_path / "s" / "b.wav", 20, channels=2)
    silence = encode_recording(speech.mimi, np.zeros((1, (num_frames + 10) * FRAME), np.float32))[0]
    assert not torch.equal(silence[:, 0], silence[:, -1])
    (stream,) = open_data(tmp_path, user="silent", group="speaker").streams
    assert torch.equal(whole(stream)[1 + K :], silence)
    assert torch.equal(stream.frames(num_frames, num_frames + 5)[1 + K :], silence[:, -10:-5])


def test_mono_file_has_no_real_user(tmp_path, open_data):
    add(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"a\.wav: mono, but --user real takes the user from the right"):
        open_data(tmp_path, user="real")


def test_pieces_of_a_stream_are_slices_of_it(tmp_path, open_data):
    for name, num_frames in (("a", 7), ("b", 1), ("c", 12)):
        add(tmp_path / "s" / f"{name}.wav", num_frames, channels=2)
        write_words(tmp_path / "s" / f"{name}.json", [["hello", 0.1, 0.3]])
    (stream,) = open_data(tmp_path, group="speaker", user="real", text="given").streams
    codes = whole(stream)
    for start in range(21):
        for stop in range(start, 21):
            assert torch.equal(stream.frames(start, stop), codes[:, start:stop])
    for start, stop in ((-1, 3), (4, 3), (0, 21)):
        with pytest.raises(ValueError, match=f"s: frames {start} to {stop} of 20"):
            stream.frames(start, stop)


def test_recordings_of_a_speaker_follow_each_other(tmp_path, speech, open_data):
    paths = [add(tmp_path / "s" / name, frames) for name, frames in (("b/1.wav", 9), ("b/2.flac", 14))]
    add(tmp_path / "t" / "x.wav", 5)
    opened = open_data(tmp_path, group="speaker", min_frames=6)
    (stream,) = opened.streams
    assert [(part.source.name, part.start_frame, part.num_frames) for part in stream.parts] == [
        ("s/b/1.wav", 0, 9),
        ("s/b/2.flac", 9, 14),
    ]
    expected = torch.cat([codes_of(path, speech.mimi)[0] for path in paths], dim=-1)
    assert torch.equal(whole(stream)[1 : 1 + K], expected)
    assert opened.left_out == {"t": "5 frames, fewer than --min-frames 6"}


def test_longer_streams_are_cut_and_what_is_cut_off_is_not_encoded(tmp_path, open_data, encoded):
    for name in "abc":
        add(tmp_path / "s" / f"{name}.wav", 10)
    (stream,) = open_data(tmp_path, group="speaker", max_frames=15).streams
    assert stream.num_frames == 15 and [part.num_frames for part in stream.parts] == [10, 5]
    assert encoded == ["a.wav", "b.wav"]


@pytest.fixture
def encoded(monkeypatch):
    """List the files that are read for encoding."""
    read = []

    def noted(path, **settings):
        read.append(path.name)
        return read_pieces(path, **settings)

    monkeypatch.setattr(code_cache, "read_pieces", noted)
    return read


@pytest.mark.parametrize("cache", [None, "codes"])
def test_second_opening_encodes_nothing(tmp_path, open_data, encoded, cache):
    add(tmp_path / "data" / "a.wav")
    add(tmp_path / "data" / "b.wav", channels=2)
    cache_dir = cache and str(tmp_path / cache)
    first = open_data(tmp_path / "data", cache_dir=cache_dir, user="silent").streams
    assert sorted(encoded) == ["a.wav", "b.wav"]
    second = open_data(tmp_path / "data", cache_dir=cache_dir, user="silent").streams
    assert len(encoded) == 2
    assert all(torch.equal(whole(x), whole(y)) for x, y in zip(first, second, strict=True))
    folder = tmp_path / (cache or "data/.moshi_ttt_codes")
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_stereo_codes_are_those_of_training(tmp_path, speech, info, open_data, encoded):
    path = add(tmp_path / "a.wav", 12, channels=2, rate=16000)
    cache = CodeCache(mimi_weights=info.mimi_weights, mimi_config=info.mimi_config, num_codebooks=K)
    recording = Recording(path, 12 * 0.08, path.with_suffix(".json"))
    cache.fill([recording], speech.mimi, progress=False)
    encoded.clear()
    (stream,) = open_data(tmp_path, user="real").streams
    assert encoded == []
    assert torch.equal(whole(stream)[1:], cache.load(recording))


def test_cache_that_cannot_be_written_is_no_recordings_fault(tmp_path, open_data):
    add(tmp_path / "a.wav")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^--cache-dir: cannot write Mimi codes to .*file/codes"):
        open_data(tmp_path, cache_dir=str(tmp_path / "file" / "codes"))


def test_file_that_cannot_be_used_is_a_failure_and_never_a_stream(tmp_path, open_data):
    for name in ("a/1.wav", "b/1.wav", "b/2.wav", "c/1.wav"):
        add(tmp_path / name)
    truncated = tmp_path / "b" / "2.wav"
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    (tmp_path / "c" / "1.wav").write_text("no audio")
    for group, failed, streams in (
        ("single", ["b/2.wav", "c/1.wav"], ["a/1.wav", "b/1.wav"]),
        ("speaker", ["b", "c"], ["a"]),
    ):
        opened = open_data(tmp_path, group=group)
        assert names(opened.streams) == streams
        assert list(opened.failures) == failed
        assert "c/1.wav: cannot be read as audio" in opened.failures[failed[1]]
        assert "b/2.wav: truncated" in opened.failures[failed[0]]


def test_manifest_with_another_length_or_a_missing_file_fails_by_name(tmp_path, open_data):
    add(tmp_path / "a.wav", 25)
    add(tmp_path / "b.wav", 25)
    lines = [{"path": "a.wav", "duration": 9}, {"path": "b.wav", "duration": 2}, {"path": "c.wav"}]
    lines += [{"path": "\0.wav"}, {"path": "\ud800.wav"}]
    opened = open_data(write_manifest(tmp_path / "m.jsonl", lines))
    assert names(opened.streams) == ["b.wav"]
    assert "lasts 2.00 s, shorter than the manifest's 9.00 s" in opened.failures["a.wav"]
    assert "c.wav: cannot read the audio file (No such file" in opened.failures["c.wav"]
    assert "(embedded null byte)" in opened.failures["\\x00.wav"]
    assert "surrogates not allowed" in opened.failures["\\ud800.wav"]


def test_codes_that_are_there_already_do_not_hide_a_manifest_with_another_length(tmp_path, open_data):
    add(tmp_path / "a.wav", 25)
    (stream,) = open_data(tmp_path).streams
    assert stream.num_frames == 25
    for duration, fails in ((1.0, False), (1.95, False), (2.09, False), (0.9, True), (2.2, True)):
        path = write_manifest(tmp_path / "m.jsonl", [{"path": "a.wav", "duration": duration}])
        if not fails:
            assert names(open_data(path).streams) == ["a.wav"]
            continue
        with pytest.raises(DataError, match=rf"a\.wav: lasts .*than the manifest's {duration:.2f} s"):
            open_data(path)


def test_no_stream_at_all_is_one_error(tmp_path, open_data):
    add(tmp_path / "a.wav", 5)
    with pytest.raises(DataError, match=r"every stream of .* is shorter than --min-frames 6; lower it"):
        open_data(tmp_path, min_frames=6)
    (tmp_path / "a.wav").write_text("no audio")
    with pytest.raises(DataError, match=r"no stream of .* can be used, 1 failed: .*a\.wav: cannot be read"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": "loud"}, "--user: loud is unknown; it is one of empty, silent, real"),
        ({"text": "some"}, "--text: some is unknown"),
        ({"group": "book"}, "--group: book is unknown; it is one of single, speaker"),
        ({"max_frames": 0}, "--max-frames: 0 is below 1"),
        ({"max_frames": 5, "min_frames": 6}, "--min-frames: 6 is above --max-frames 5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        StreamOptions(**options)


def write_words(path, words):
    alignments = [[text, [start, end], "SPEAKER_MAIN"] for text, start, end in words]
    path.write_text(json.dumps({"alignments": alignments}))


WORDS = [["good", 0.159999999, 0.4], ["morning", 0.5, 0.9], ["everyone", 1.2, 1.9], ["late", 99.0, 99.5]]


def training_text(path, num_frames, speech, info):
    """The text row of the whole recording as one training chunk."""
    cache = CodeCache(mimi_weights=info.mimi_weights, mimi_config=info.mimi_config, num_codebooks=K)
    dataset = ChunkDataset(
        [Recording(path, 1.0, path.with_suffix(".json"))],
        [Chunk(0, 0, num_frames)],
        cache,
        chunk_frames=num_frames,
        frame_rate=12.5,
        tokenizer=speech.tokenizer,
        text_padding_id=speech.lm.text_padding_token_id,
        end_of_text_padding_id=speech.lm.end_of_text_padding_id,
    )
    return dataset[0][0]


def test_given_text_is_interleaved_as_in_training(tmp_path, speech, info, open_data):
    first, second = (
        add(tmp_path / "s" / "a.wav", 30, channels=2),
        add(tmp_path / "s" / "b.wav", 20, channels=2),
    )
    write_words(first.with_suffix(".json"), WORDS)
    write_words(second.with_suffix(".json"), WORDS[1:2])
    stream = open_data(tmp_path, text="given", group="speaker", max_frames=45).streams[0]
    expected = [training_text(first, 30, speech, info), training_text(second, 20, speech, info)]
    assert len(set(expected[0].tolist())) > 3
    assert torch.equal(whole(stream)[0], torch.cat(expected)[:45])


def test_given_text_without_word_timings_is_a_failure(tmp_path, open_data, encoded):
    for name in ("a", "b", "c"):
        add(tmp_path / f"{name}.wav")
    write_words(tmp_path / "a.json", WORDS)
    (tmp_path / "b.json").write_text('{"book_meta": {}}')
    opened = open_data(tmp_path, text="given")
    assert names(opened.streams) == ["a.wav"] and encoded == ["a.wav"]
    assert 'b.json: expected {"alignments"' in opened.failures["b.wav"]
    assert "c.json: cannot read the word timings (No such file" in opened.failures["c.wav"]


def test_own_text_is_left_to_whoever_measures(tmp_path, open_data):
    add(tmp_path / "a.wav")
    assert set(whole(open_data(tmp_path, text="own").streams[0])[0].tolist()) == {-1}
