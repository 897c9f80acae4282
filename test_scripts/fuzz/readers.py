"""Files that a stranger may hand over, and how the product reads each kind of them."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import sphn
import torch

from audio_helpers import noise, write_flac
from finetune.args import ModelPaths, TrainArgs
from finetune.base_model.locate import find_architecture, find_model_files, lm_config
from finetune.base_model.text import load_tokenizer
from finetune.checkpoint.integrity import content_files, describe_file
from finetune.checkpoint.layout import DONE_FILE, list_checkpoints
from finetune.checkpoint.reading import load_checkpoint_model, warm_start
from finetune.config_io import build_args, load_run_args, load_train_args
from finetune.data.audio.read import read_audio_header, read_voice
from finetune.data.check.full import Checker, Settings
from finetune.data.codes.code_file import code_file_bytes, read_codes, read_entry
from finetune.data.recordings.lines import Recording, load_manifest, read_lines
from finetune.data.words import load_transcript
from finetune.demo.assets import DemoAssets
from finetune.export.folder import export_checkpoint
from finetune.files import write_json
from finetune.inference.conversation import Conversation, Sampling
from finetune.inference.speech_model import SpeechModel, load_speech_model
from finetune.memory import memory
from finetune.training.run import run_training
from finetune.wrapped_model import build_model
from moshi_ttt.memory import load_ttt_states, save_ttt_states
from moshi_ttt.session import load_session, save_session
from run_helpers import MODES, checkpoint_content, run_args, write_yaml

RATE = 24000
SETTINGS = {"duration_sec": 1.28, "batch_size": 1, "max_steps": 1}


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        files: that are damaged, relative to the folder.
        read: reads the folder as the product does; a user's mistake is an error of ours, or an exit status.
        number: of damaged files in the long test.
    """

    files: tuple[str, ...]
    read: Callable[[Path], object]
    number: int


class Samples:
    """Good files of every kind, made when first asked for.

    Args:
        folder: to make them in.
        demo: the assets of the demo.
        base: a base model.
        untrained_run: of conftest.
    """

    def __init__(
        self, folder: Path, demo: DemoAssets, base: Path, untrained_run: Callable[[str], Path]
    ) -> None:
        self.folder, self.demo, self.base, self._untrained_run = folder, demo, base, untrained_run

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The kinds, by name."""
        config = "config.json"
        return {
            "memory": Kind(("memory.safetensors",), self._read_memory, 30),
            "session": Kind(("session.safetensors",), self._read_session, 25),
            "export": Kind((config, "training.json", "lora.safetensors", "ttt.safetensors"), self._talk, 50),
            "merged": Kind((config, "training.json", "consolidated.safetensors"), self._talk, 15),
            "adapters": Kind((config, "lora.safetensors"), self._read_adapters, 20),
            "base": Kind(
                (config, config, "mimi_config.json", "model.safetensors", "mimi.safetensors"), self._talk, 50
            ),
            "run": Kind(
                ("resume.json", DONE_FILE, "state/.metadata", "state/__0_0.distcp"), self._resume, 30
            ),
            "configuration": Kind(("args.yaml",), self._read_configuration, 15),
            "manifest": Kind(("manifest.jsonl",), self._read_manifest, 20),
            "words": Kind(("voice.json",), self._check, 20),
            "wav": Kind(("voice.wav",), self._check, 15),
            "flac": Kind(("voice.flac",), self._check, 10),
            "opus": Kind(("voice.opus",), self._check, 15),
            "tokenizer": Kind(("tokenizer.model",), self._read_tokenizer, 10),
            "codes": Kind(("codes.safetensors",), self._read_code_file, 15),
        }

    def make(self, kind: str, out: Path) -> None:
        """A folder with good files of a kind, to be damaged."""
        source = self.folder / kind
        if not source.exists():
            getattr(self, f"_make_{kind}")(source)
        shutil.copytree(source, out)

    @cached_property
    def _speech(self) -> SpeechModel:
        return self._load(self._untrained_run("lora_ttt"))

    def _load(self, path: Path) -> SpeechModel:
        return load_speech_model(str(path), device=torch.device("cpu"), dtype=torch.float32)

    def _conversation(self, speech: SpeechModel) -> Conversation:
        return Conversation(speech.lm, speech.mimi, sampling=Sampling(greedy=True), batch_size=1)

    def _make_memory(self, out: Path) -> None:
        out.mkdir()
        with self._conversation(self._speech) as conversation:
            for _ in range(3):
                conversation.listen(torch.zeros(1, conversation.mimi.frame_size))
            save_ttt_states(conversation.lm, out / "memory.safetensors")
            save_session(conversation.generator, conversation.mimi, out / "session.safetensors")

    _make_session = _make_memory

    def _make_export(self, out: Path) -> None:
        shutil.copytree(checkpoint_content(self._untrained_run("lora_ttt")), out)

    def _make_merged(self, out: Path) -> None:
        export_checkpoint(self._untrained_run("lora_ttt"), out, merged_dtype="float32")

    def _make_adapters(self, out: Path) -> None:
        shutil.copytree(checkpoint_content(self._untrained_run("lora")), out)
        (out / "training.json").unlink()

    def _make_base(self, out: Path) -> None:
        shutil.copytree(self.base, out)

    def _make_run(self, out: Path) -> None:
        run_training(run_args(self.demo, self.folder / "trained", **SETTINGS))
        shutil.copytree(list_checkpoints(self.folder / "trained" / "checkpoints")[-1], out)

    def _make_configuration(self, out: Path) -> None:
        out.mkdir()
        values = MODES["lora_ttt"] | {"run_dir": "runs/x", "optim": {"lr": 1e-4}, "data": {"shuffle": True}}
        write_yaml(out / "args.yaml", values)

    def _make_manifest(self, out: Path) -> None:
        out.mkdir()
        shutil.copyfile(self.demo.train_jsonl, out / "manifest.jsonl")

    def _make_words(self, out: Path) -> None:
        out.mkdir()
        wav = next(iter(sorted(self.demo.train_jsonl.parent.rglob("*.wav"))))
        shutil.copyfile(wav, out / "voice.wav")
        shutil.copyfile(wav.with_suffix(".json"), out / "voice.json")

    _make_wav = _make_words

    def _make_flac(self, out: Path) -> None:
        self._make_words(out)
        write_flac(out / "voice.flac", noise(RATE, 2), RATE)
        (out / "voice.wav").unlink()

    def _make_opus(self, out: Path) -> None:
        self._make_words(out)
        samples, _ = sphn.read(str(out / "voice.wav"))
        sphn.write_opus(str(out / "voice.opus"), np.ascontiguousarray(samples), RATE)
        (out / "voice.wav").unlink()

    def _make_tokenizer(self, out: Path) -> None:
        out.mkdir()
        shutil.copyfile(self.base / "tokenizer.model", out / "tokenizer.model")

    def _make_codes(self, out: Path) -> None:
        out.mkdir()
        codes = torch.randint(64, (2, 8, 600), generator=torch.Generator().manual_seed(0))
        content = code_file_bytes(codes, key="k", codec="c", audio_bytes=3, audio_sha256="s")
        (out / "codes.safetensors").write_bytes(content)

    def _read_memory(self, folder: Path) -> None:
        memory(["inspect", str(folder / "memory.safetensors")])
        with self._conversation(self._speech) as conversation:
            load_ttt_states(conversation.lm, folder / "memory.safetensors")
            self._say(conversation)

    def _read_session(self, folder: Path) -> None:
        with self._conversation(self._speech) as conversation:
            load_session(conversation.generator, conversation.mimi, folder / "session.safetensors")
            self._say(conversation)

    def _say(self, conversation: Conversation) -> None:
        conversation.listen(torch.zeros(1, conversation.mimi.frame_size))

    def _talk(self, folder: Path) -> None:
        speech = self._load(folder)
        with self._conversation(speech) as conversation:
            for _ in range(2):
                self._say(conversation)

    def _read_adapters(self, folder: Path) -> None:
        args = build_args(TrainArgs, MODES["lora"] | {"moshi_paths": {"hf_repo_id": str(self.base)}})
        model = build_model(args, find_model_files(args.moshi_paths), device=torch.device("cpu"))
        try:
            warm_start(model, folder, args)
        finally:
            load_checkpoint_model(folder, base=str(self.base), dtype=torch.float32)

    def _resume(self, folder: Path) -> None:
        run_dir = folder.parent / "run"
        checkpoint = run_dir / "checkpoints" / "checkpoint_000001"
        shutil.copytree(self.folder / "trained", run_dir)
        shutil.rmtree(checkpoint)
        shutil.copytree(folder, checkpoint)
        if (folder / DONE_FILE).read_bytes() == (self.folder / "run" / DONE_FILE).read_bytes():
            # As a stranger seals it who wants it to be read.
            sealed = {name: describe_file(checkpoint / name) for name in content_files(checkpoint)}
            write_json(checkpoint / DONE_FILE, {"files": sealed})
        run_training(run_args(self.demo, run_dir, **SETTINGS | {"max_steps": 2, "resume": "auto"}))

    def _read_configuration(self, folder: Path) -> None:
        try:
            load_train_args(folder / "args.yaml")
        finally:
            load_run_args(folder)

    def _read_manifest(self, folder: Path) -> None:
        list(read_lines(folder / "manifest.jsonl", key="MANIFEST"))
        load_manifest(folder / "manifest.jsonl", key="data.train_data")

    def _check(self, folder: Path) -> None:
        (path,) = (path for path in folder.iterdir() if path.suffix != ".json")
        recording = Recording(path=path, duration_sec=20.0, alignment_path=path.with_suffix(".json"))
        Checker(Settings(tokenizer=self.base / "tokenizer.model")).check(recording)
        try:
            read_audio_header(path)
            read_voice(path, sample_rate=RATE)
        finally:
            tokenizer = _load_tokenizer(ModelPaths(hf_repo_id=str(self.base)))
            for word in load_transcript(path.with_suffix(".json")).words:
                tokenizer.encode(word.text)

    def _read_tokenizer(self, folder: Path) -> None:
        paths = ModelPaths(hf_repo_id=str(self.base), tokenizer_path=str(folder / "tokenizer.model"))
        find_architecture(paths)
        tokenizer = _load_tokenizer(paths)
        tokenizer.encode("hello there")
        for piece in range(tokenizer.get_piece_size()):
            tokenizer.id_to_piece(piece)

    def _read_code_file(self, folder: Path) -> None:
        entry = read_entry(folder / "codes.safetensors")
        read_codes(entry, 0, entry.num_frames)


def _load_tokenizer(paths: ModelPaths) -> sentencepiece.SentencePieceProcessor:
    info = find_model_files(paths)
    return load_tokenizer(info, lm_config(info))
