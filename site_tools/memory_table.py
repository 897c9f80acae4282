"""The table of docs/training.md: what Moshi 7B with TTT layers needs on GPUs of usual sizes.

python -m site_tools.memory_table      takes some minutes, needs no GPU
"""

from dataclasses import replace

from moshi.models import loaders

from finetune.args import LoraArgs, TrainArgs, TTTArgs
from finetune.training.plan.gpu_memory import estimate_memory, trace_memory

_MODES = {
    "LoRA (rank 64) + TTT": TrainArgs(lora=LoraArgs(enable=True, rank=64), ttt=TTTArgs(enable=True)),
    "TTT only": TrainArgs(ttt=TTTArgs(enable=True)),
    "full + TTT": TrainArgs(full_finetuning=True, ttt=TTTArgs(enable=True)),
}
_LAYERS = ("29,30,31", "26,27,28,29,30,31")
_DURATIONS_SEC = (100.0, 50.0)
_GPU_SIZES_GB = (24, 40, 48, 80)
_NUM_GPUS = (1, 2, 4, 8, 16, 32, 64)
_SHOWN_NUM_GPUS = (1, 8)


def main() -> None:
    """Print the table as Markdown."""
    sizes = " | ".join(f"{size} GB" for size in _GPU_SIZES_GB)
    print(f"| mode | TTT layers | GPUs | 100 s, GB | 50 s, GB | {sizes} |")
    print("|" + "---|" * (5 + len(_GPU_SIZES_GB)))
    for mode, args in _MODES.items():
        for layers in _LAYERS:
            peaks = _peaks_gb(replace(args, ttt=replace(args.ttt, layers=layers)))
            for num_gpus in _SHOWN_NUM_GPUS:
                cells = [_verdict(peaks, num_gpus, size) for size in _GPU_SIZES_GB]
                values = [f"{peaks[duration, num_gpus]:.1f}" for duration in _DURATIONS_SEC]
                row = [mode, str(len(layers.split(","))), str(num_gpus), *values, *cells]
                print(f"| {' | '.join(row)} |", flush=True)


def _peaks_gb(args: TrainArgs) -> dict[tuple[float, int], float]:
    """Peak by duration and number of GPUs, 10^9 bytes."""
    lm_kwargs = dict(loaders._lm_kwargs)
    peaks = {}
    for duration_sec in _DURATIONS_SEC:
        args = replace(args, duration_sec=duration_sec)
        step = trace_memory(args, lm_kwargs)
        for num_gpus in _NUM_GPUS:
            estimate = estimate_memory(args, lm_kwargs, num_gpus=num_gpus, step=step)
            peaks[duration_sec, num_gpus] = estimate.peak / 1e9
    return peaks


def _verdict(peaks: dict[tuple[float, int], float], num_gpus: int, size_gb: float) -> str:
    """Whether chunks of 100 s fit, and otherwise what would."""
    long, short = _DURATIONS_SEC
    if peaks[long, num_gpus] <= size_gb:
        return "fits"
    more = next((n for n in _NUM_GPUS if n > num_gpus and peaks[long, n] <= size_gb), None)
    ways = ["50 s"] if peaks[short, num_gpus] <= size_gb else []
    ways += [f"{more} GPUs"] if more is not None else []
    return f"does not fit; {' or '.join(ways) or 'needs larger GPUs'}"


if __name__ == "__main__":
    main()
