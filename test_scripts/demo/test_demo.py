"""Properties of the demo's recordings, tokenizer and tiny models."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import wave
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import DEMO_SETTINGS
from finetune.commands import run_command
from finetune.demo import assets as assets_module
from finetune.demo.assets import DemoAssets, find_demo_assets, make_demo_assets
from finetune.demo.codebooks import count_codebook_use, demand_even_use
from finetune.demo.command import demo as demo_command
from finetune.demo.fit_codec import measure_codec
from finetune.demo.model_folder import open_repository, write_random_repository
from finetune.demo.speech.dialogues import MAIN, USER, Turn, make_dialogue
from finetune.demo.speech.espeak import Espeak
from finetune.demo.speech.render import Job, draw_user_voice, place_turns, render
from finetune.demo.speech.sentences import FACTS
from finetune.errors import UserError

SMALLEST = {"num_train": 1, "num_eval": 1, "minutes": 0.4, "seed": 1}


def wavs(demo: DemoAssets) -> list[Path]:
    return sorted((demo.out_dir / "data").glob("*/*.wav"))


def read_wav(path: Path) -> np.ndarray:
    """[num_samples, 2] in -1..1."""
    with wave.open(str(path), "rb") as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 2, 2)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, 2) / 32768


def read_words(path: Path, speaker: str) -> list[tuple[str, float, float]]:
    alignments = json.loads(path.with_suffix(".json").read_text())["alignments"]
    return [(word, start, end) for word, (start, end), who in alignments if who == speaker]


def contents(directory: Path) -> dict[str, str]:
    """Hashes of the files that the demo made; others, such as a code cache, may lie beside them."""
    names = json.loads((directory / "demo.json").read_text())["files"]
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def test_same_settings_give_the_same_files(demo, tmp_path):
    again = make_demo_assets(tmp_path / "again", **DEMO_SETTINGS)
    assert contents(again.out_dir) == contents(demo.out_dir)


def test_every_voice_speaks_the_same_in_another_process():
    speak_all = (
        "import hashlib\n"
        "from finetune.demo.speech.espeak import Espeak, EspeakVoice\n"
        "from finetune.demo.speech.render import _MAIN_VOICE, _USER_VOICES\n"
        "espeak = Espeak()\n"
        "for name in (_MAIN_VOICE.name, *_USER_VOICES):\n"
        "    voice = EspeakVoice(name, words_per_minute=170, pitch=55)\n"
        "    samples, _ = espeak.say('She saw the sea shells and spoke of fish.', voice)\n"
        "    print(name, hashlib.sha256(samples.tobytes()).hexdigest())\n"
    )
    spoken = [
        subprocess.run([sys.executable, "-c", speak_all], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert len(spoken[0].splitlines()) == 6
    assert spoken[0] == spoken[1]


def test_no_two_dialogues_are_alike(demo):
    texts = [
        tuple(turn.text for turn in make_dialogue(f"0/{index}", duration_sec=180)) for index in range(50)
    ]
    assert len(set(texts)) == len(texts)
    shared = [len(set(a) & set(b)) / len(set(a)) for a in texts for b in texts if a is not b]
    assert max(shared) < 0.5
    assert len({path.read_bytes() for path in wavs(demo)}) == 3


@pytest.mark.parametrize("index", range(5))
def test_told_facts_are_recalled_later_in_the_dialogue(index):
    said = [turn.text for turn in make_dialogue(f"facts/{index}", duration_sec=180) if turn.speaker == MAIN]
    recalled = 0
    for fact in FACTS:
        acks = [(line, re.fullmatch(as_pattern(fact.ack), text)) for line, text in enumerate(said)]
        for line, match in ((line, match) for line, match in acks if match):
            slots = match.groupdict()
            known = re.sub(r"\{(\w+)\}", lambda slot, slots=slots: slots.get(slot[1], slot[0]), fact.answer)
            pattern = as_pattern(known)
            recalled += any(re.match(pattern, later) for later in said[line + 1 :])
    assert recalled >= 4


def as_pattern(template: str) -> str:
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        name = match[1]
        first = name not in seen
        seen.add(name)
        return f"(?P<{name}>.+)" if first else f"(?P={name})"

    return re.sub(r"\\\{(\w+)\\\}", group, re.escape(template))


def test_manifests_name_recordings_relative_to_themselves_with_their_duration(demo):
    for manifest, count in ((demo.train_jsonl, 2), (demo.eval_jsonl, 1)):
        entries = [json.loads(line) for line in manifest.read_text().splitlines()]
        assert len(entries) == count
        for entry in entries:
            samples = read_wav(manifest.parent / entry["path"])
            assert entry["duration"] == pytest.approx(len(samples) / 24000, abs=1e-4)
            assert 12 < entry["duration"] < 35


def test_word_times_lie_in_the_recording_and_in_order_for_each_speaker(demo):
    for path in wavs(demo):
        duration_sec = len(read_wav(path)) / 24000
        starts = [entry[1][0] for entry in json.loads(path.with_suffix(".json").read_text())["alignments"]]
        assert starts == sorted(starts)
        for speaker in (MAIN, USER):
            words = read_words(path, speaker)
            assert all(0 <= start < end <= duration_sec for _, start, end in words)
            assert all(one[2] <= two[1] + 1e-3 for one, two in pairwise(words))


@pytest.mark.parametrize(("channel", "speaker"), [(0, MAIN), (1, USER)])
def test_words_are_heard_on_their_speakers_channel_and_nothing_else_is(demo, channel, speaker):
    for path in wavs(demo):
        samples = read_wav(path)[:, channel]
        inside = np.zeros(len(samples), dtype=bool)
        for word, start, end in read_words(path, speaker):
            part = slice(round(start * 24000), round(end * 24000))
            inside[part] = True
            loud = np.flatnonzero(np.abs(samples[part]) > 0.005)
            assert len(loud), word
            # A plosive keeps the mouth shut for up to 60 ms, at both ends of a word.
            assert loud[0] < 0.07 * 24000, word
            assert loud[-1] > part.stop - part.start - 0.07 * 24000, word
        assert (samples[~inside] ** 2).sum() < 1e-3 * (samples**2).sum()


def test_every_written_word_has_one_entry_numbers_contractions_and_spoken_pairs_included(tmp_path):
    turns = [
        Turn(USER, "It's 7:30 on the 23rd, isn't it? I live in the house at the back of the lake.", 0.3),
        Turn(MAIN, "Room 1,250 costs forty-two pounds; twenty-first floor (to the left).", 0.4),
        Turn(USER, "Right.", -1.0),
    ]
    path = tmp_path / "dialogue.wav"
    duration_sec = render(Espeak(), Job(turns, draw_user_voice("a"), path))
    for speaker in (MAIN, USER):
        words = read_words(path, speaker)
        written = " ".join(turn.text for turn in turns if turn.speaker == speaker).split()
        assert [word for word, _, _ in words] == written
        assert all(0.02 <= end - start < 2.0 for _, start, end in words)
        assert words[-1][2] <= duration_sec


def test_a_speaker_never_overlaps_with_himself():
    turns = [Turn(MAIN, "a", 0.0), Turn(USER, "b", -1.0), Turn(USER, "c", -5.0), Turn(MAIN, "d", 0.5)]
    starts = place_turns(turns, [48000, 12000, 12000, 1000])
    assert starts == [0, 24000, 24000 + 12000 + 2400, 38400 + 12000 + 12000]


def test_tokenizer_has_moshis_special_tokens_and_can_write_any_text(demo):
    tokenizer = open_repository(demo.model_dir).get_text_tokenizer()
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, 3)
    assert 500 <= tokenizer.get_piece_size() <= 1000
    text = "Zoë's xylophone costs 12 €."
    assert tokenizer.unk_id() not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_model_loads_with_moshis_loaders_and_starts_near_chance(demo):
    lm = open_repository(demo.model_dir).get_moshi(device="cpu", dtype=torch.float32)
    assert (lm.n_q, lm.dep_q, lm.card, lm.text_card) == (16, 8, 64, 800)
    assert all(torch.isfinite(weight).all() for weight in lm.state_dict().values())
    codes = torch.randint(0, 64, (2, 17, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = lm(codes)
    audio_loss = F.cross_entropy(out.logits[out.mask], codes[:, 1:9][out.mask])
    text_loss = F.cross_entropy(out.text_logits[out.text_mask], codes[:, :1][out.text_mask])
    assert audio_loss == pytest.approx(math.log(64), abs=1.0)
    assert text_loss == pytest.approx(math.log(800), abs=1.0)


def test_loaded_codec_uses_every_codebook_evenly_on_speech(demo):
    mimi = open_repository(demo.model_dir).get_mimi()
    assert (mimi.sample_rate, mimi.frame_rate, mimi.num_codebooks, mimi.cardinality) == (24000, 12.5, 8, 64)
    uses = measure_codec(mimi, [path for path in wavs(demo) if path.parent.name == "train"])
    assert [use._asdict() for use in uses] == demo.report["codebooks"]
    assert all(use.entropy_bits >= 0.8 * math.log2(64) for use in uses)


def test_codes_carry_the_latent(demo):
    mimi = open_repository(demo.model_dir).get_mimi()
    audio = torch.from_numpy(read_wav(wavs(demo)[0])[: 10 * 24000].T.astype(np.float32))[:, None]
    with torch.no_grad():
        latent = mimi.encode_to_latent(audio, quantize=False)
        error = mimi.decode_latent(mimi.encode(audio)) - latent
    assert error.var() < 0.2 * latent.var()


def test_uneven_codes_are_refused():
    generator = torch.Generator().manual_seed(0)
    even = torch.randint(0, 64, (3, 5000), generator=generator)
    demand_even_use(count_codebook_use(even, num_bins=64), num_bins=64)
    even[1] = torch.randint(0, 16, (5000,), generator=generator)
    with pytest.raises(UserError, match=r"codebook 1 .* 16 of 64 entries"):
        demand_even_use(count_codebook_use(even, num_bins=64), num_bins=64)


def test_second_call_writes_nothing(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.out_dir.rglob("*")}
    again = make_demo_assets(demo.out_dir, **DEMO_SETTINGS)
    assert again.reused and not demo.reused
    assert again.report == demo.report
    assert {path: path.stat().st_mtime_ns for path in demo.out_dir.rglob("*")} == before


@pytest.mark.slow
def test_other_settings_and_lost_files_make_everything_anew(tmp_path):
    out_dir = tmp_path / "assets"
    first = make_demo_assets(out_dir, **SMALLEST)
    (first.model_dir / "mimi.safetensors").unlink()
    assert find_demo_assets(out_dir) is None
    second = make_demo_assets(out_dir, **SMALLEST | {"seed": 2})
    assert not second.reused
    assert find_demo_assets(out_dir).settings["seed"] == 2
    backup, assets = sorted(tmp_path.iterdir(), reverse=True)
    assert assets.name == "assets" and backup.name.startswith("assets.bak-")


def test_interrupted_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets_module, "fit_codec", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_demo_assets(tmp_path / "assets", **SMALLEST)
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by the demo"):
        make_demo_assets(tmp_path, **SMALLEST)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_synthesiser_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install 'moshi-ttt\[demo\]'"):
        make_demo_assets(tmp_path / "assets", **SMALLEST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "minutes is 0.0"),
        (["--minutes", "nan"], "minutes is nan"),
        (["--num-eval", "0"], "num_eval is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--minutes", "three"], "invalid float value: 'three'"),
    ],
)
def test_bad_options_end_with_one_line_and_status_2(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: demo_command(["--out", str(tmp_path / "assets"), *options]))
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_random_repository_loads_without_any_recording(tmp_path):
    checkpoint = open_repository(write_random_repository(tmp_path / "model", num_layers=1, dim=64))
    lm = checkpoint.get_moshi(device="cpu", dtype=torch.float32)
    assert (len(lm.transformer.layers), lm.dim) == (1, 64)
    noise = torch.randn(1, 1, 24000, generator=torch.Generator().manual_seed(0))
    codes = checkpoint.get_mimi().encode(0.1 * noise)
    assert codes.shape == (1, 8, 13)
    assert len(codes.unique()) > 10
