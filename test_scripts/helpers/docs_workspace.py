"""A folder in which the commands of the documentation find the files that they name, all of them tiny."""

import contextlib
import gzip
import io
import json
import os
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sphn

from docs_commands import ROOT
from miniatures.duplex import ANSWERS, write_bench, write_outputs
from miniatures.extend import JAPANESE, write_other_tokenizer
from miniatures.recall import write_items
from run_helpers import TTT, write_untrained_run, write_yaml
from spoken_helpers import write_sblimp, write_speech, write_stories, write_swuggy

DEMO_SIZES = ("--num-train", "1", "--num-eval", "2", "--minutes", "0.05")
RUN_SIZES = (
    *("--duration_sec", "1.28", "--batch_size", "1", "--max_steps", "2"),
    *("--log_freq", "1", "--eval_freq", "2", "--ckpt_freq", "1"),
)
SECONDS = 4.0  # of each recording
GENERATE = ("python", "generate.py", "--checkpoint")
_LINKED = {".distcp", ".safetensors", ".wav"}  # written anew or not at all, never changed in place


class Result(NamedTuple):
    """What became of a command: exit status, standard output and standard error."""

    status: int
    output: str
    errors: str


def run_python(words: Sequence[str]) -> Result:
    """Run `python SCRIPT …` or `python -m MODULE …` in this process, in the present folder.

    Args:
        words: the command, with `python` as the first word.

    Returns:
        What it did; the modules' own main blocks run, as on the command line.
    """
    output, errors = io.StringIO(), io.StringIO()
    is_module = words[1] == "-m"
    before, sys.argv = sys.argv, list(words[2:] if is_module else words[1:])
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            if is_module:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        status = 0
    except SystemExit as exit_:
        status = exit_.code or 0
    finally:
        sys.argv = before
    return Result(status, output.getvalue(), errors.getvalue())


def succeed(words: Sequence[str], *statuses: int) -> Result:
    """Run a command that ends with one of these exit statuses (0)."""
    result = run_python(words)
    assert result.status in (statuses or (0,)), result
    return result


def make_workspace(folder: Path) -> Path:
    """Make everything that the documentation names, by its own commands where there are some."""
    folder.mkdir()
    (folder / "example").symlink_to(ROOT / "example")
    with _in_folder(folder):
        succeed(["python", "-m", "finetune.demo", *DEMO_SIZES])
        _write_data()
        _train_runs()
        _write_voices_and_memories()
    return folder


def copy_workspace(source: Path, target: Path) -> Path:
    """A workspace of one command's own; large files are shared."""
    return Path(shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy))


def _shorten(path: Path, entry: dict) -> dict:
    """Cut a dialogue of the demo to its first seconds; returns its line of the manifest."""
    samples, rate = sphn.read(str(path))
    sphn.write_wav(str(path), samples[:, : round(SECONDS * rate)].copy(), int(rate))
    timings = path.with_suffix(".json")
    words = json.loads(timings.read_text())["alignments"]
    timings.write_text(json.dumps({"alignments": [word for word in words if word[1][1] < SECONDS]}))
    return entry | {"duration": SECONDS}


def _write_data() -> None:
    for manifest in Path("demo_assets/data").glob("*.jsonl"):
        entries = [json.loads(line) for line in manifest.read_text().splitlines()]
        entries = [_shorten(manifest.parent / entry["path"], entry) for entry in entries]
        manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    shutil.copytree("demo_assets/data", "debian_prompts/data")
    shutil.copytree("demo_assets/data/train", "recordings")
    lines = [
        json.dumps({"path": path.name, "duration": SECONDS}) for path in Path("recordings").glob("*.wav")
    ]
    for name in ("manifest", "train"):
        Path(f"recordings/{name}.jsonl").write_text("\n".join(lines) + "\n")
    encode = ["python", "-m", "finetune.data.encode", "recordings/manifest.jsonl"]
    succeed([*encode, "--base", "demo_assets/model", "--devices", "cpu"])
    Path("text.txt").write_text("\n".join(JAPANESE * 20), encoding="utf-8")
    write_other_tokenizer(Path("japanese.model"))
    Path("data/dailytalk").mkdir(parents=True)
    lines = [json.dumps({"path": f"{number}.wav", "duration": 60.0}) for number in range(60)]
    Path("data/dailytalk/dailytalk.jsonl").write_text("\n".join(lines) + "\n")
    Path("data/librilight/100/book").mkdir(parents=True)
    write_speech(Path("data/librilight/100/book/a.wav"), np.random.default_rng(0), 40)
    lines = [json.dumps({"path": "100/book/a.wav", "duration": 3.2}), *lines]
    for name, part in (("manifest", lines), ("train", lines[:1])):
        Path(f"data/librilight/{name}.jsonl").write_text("\n".join(part) + "\n")
    write_swuggy(Path("zerospeech2021"), num_ids=2)
    write_sblimp(Path("zerospeech2021"), num_ids=2)
    shutil.copytree("zerospeech2021", "spoken")
    for name in ("tstory", "sstory"):
        write_stories(Path("spoken") / name, num_ids=2)
    bench = write_bench(Path("full-duplex-bench/v1_0"), seconds=0.4, num_samples=1)
    write_outputs(bench, ANSWERS, seconds=0.4, num_samples=1)
    write_items(Path("runs/recall/assets/items"), num_groups=1)
    _write_other_layouts()
    Path("librilight/small").mkdir(parents=True)
    write_speech(Path("librilight/small/a.wav"), np.random.default_rng(0), 40)


def _write_other_layouts() -> None:
    """The first dialogue as J-Moshi, lhotse and Hugging Face lay it out."""
    wav = sorted(Path("recordings").glob("*.wav"))[0]
    words = json.loads(wav.with_suffix(".json").read_text())["alignments"]
    for name in ("audio", "text"):
        Path(f"dialogues/{name}").mkdir(parents=True)
    shutil.copy(wav, "dialogues/audio/one.wav")
    entries = [
        {"speaker": "AB"[speaker == "SPEAKER_USER"], "word": word, "start": start, "end": end}
        for word, (start, end), speaker in words
    ]
    Path("dialogues/text/one.json").write_text(json.dumps(entries))
    items = [[word, start, end - start] for word, (start, end), _ in words]
    sources = [{"type": "file", "channels": [0, 1], "source": str(wav)}]
    cut = {"id": "one", "type": "MonoCut", "start": 0, "duration": SECONDS, "channel": 0}
    cut |= {"supervisions": [{"alignment": {"word": items}}], "recording": {"sources": sources}}
    with gzip.open("cuts.jsonl.gz", "wt") as file:
        file.write(json.dumps(cut) + "\n")
    Path("speech").mkdir()
    write_speech(Path("speech/one.wav"), np.random.default_rng(0), 40)
    Path("speech/metadata.csv").write_text("file_name,text\none.wav,hello\n")


def _train_runs() -> None:
    """`runs/quickstart`, `runs/first` (LoRA + TTT, from `config.yaml`), `runs/second`, and the logs of a job.

    They are of a run whose newest checkpoint turned out to be damaged and which diverged later.
    """
    succeed(["python", "train.py", "--config", "example/quickstart.yaml", *RUN_SIZES])
    data = {f"{part}_data": f"demo_assets/data/{part}.jsonl" for part in ("train", "eval")}
    values = {
        "data": data | {"num_workers": 0},
        "moshi_paths": {"hf_repo_id": "demo_assets/model"},
        "lora": {"enable": True, "rank": 4},
        "ttt": TTT | {"log_inner_loop_losses": True},
        "param_dtype": "float32",
        "run_dir": "runs/first",
    }
    write_untrained_run(Path("runs/adapters"), "lora", Path("demo_assets/model"))
    train = ["python", "train.py", "--config", str(write_yaml(Path("config.yaml"), values)), *RUN_SIZES]
    results = [succeed(train)]
    for copy in ("second", "recall/ttt", "recall/none"):
        shutil.copytree("runs/first", f"runs/{copy}")
    resume = ["python", "train.py", "--resume", "runs/second", "--max_steps", "4"]
    weights = Path("runs/second/checkpoints/checkpoint_000002/consolidated/ttt.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    results.append(succeed(resume))
    diverging = ["--run_dir", "runs/diverging", "--optim.lr", "1e6", "--max_steps", "6"]
    results.append(succeed([*train, *diverging], 1))
    logs = Path("logs/training")
    logs.mkdir(parents=True)
    (logs / "moshi_ttt.54321.log").write_text("".join(result.output for result in results))
    (logs / "moshi_ttt.54321.err").write_text("".join(result.errors for result in results))


def _write_voices_and_memories() -> None:
    generator = np.random.default_rng(1)
    for name in ("in", "monday", "tuesday"):
        write_speech(Path(f"{name}.wav"), generator, 6)
    for run, memory in (("quickstart", "me"), ("first", "ann")):
        name = f"{memory}.safetensors"
        succeed([*GENERATE, f"runs/{run}", "in.wav", "out.wav", "--save-memory", name])
    Path("memories").mkdir()
    shutil.copy("ann.safetensors", "memories")


def _link_or_copy(source: str, target: str) -> None:
    if Path(source).suffix in _LINKED:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
