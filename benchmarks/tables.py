"""The figures of a report as Markdown tables."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.common.inputs import Size
from benchmarks.operator import BASELINES

Cells = Sequence[str]


def markdown(report: dict[str, Any]) -> str:
    """One line on the machine, then a section with tables for each part of the report."""
    environment = report["environment"]
    lines = [
        f"{environment['device_name']} ({environment['device']}), threads: {environment['threads']}, "
        f"PyTorch {environment['torch']}, {environment['date']}; "
        f"medians of {environment['repetitions']} ({environment['clock']})"
        + ("; quick, so the figures mean nothing" if environment["quick"] else "")
        + "."
    ]
    for name, part in report["parts"].items():
        lines += ["", f"## {name.capitalize()}", *_PARTS[name](part)]
    return "\n".join(lines) + "\n"


def _operator(part: dict[str, Any]) -> list[str]:
    head = ["size", "form", "pass", "operator", "ms", "peak, MB", "matrix rate"]
    head += [f"faster than {base}" for base in BASELINES] + [f"memory of {base}" for base in BASELINES]
    rows = []
    for case in part["cases"]:
        size = Size(**case["size"]).name
        form = "causal" if case["causal"] else "not causal"
        for kind in ("forward", "forward_backward"):
            for name, one in case[kind]["candidates"].items():
                row = [size, form, kind.replace("_", " + "), name, _ms(one), _mb(one["peak_bytes"])]
                row.append(f"{100 * one['share_of_matrix_rate']:.0f} %")
                row += [f"{one['times_faster_than'][base]:.2f}x" for base in BASELINES]
                row += [f"{one['memory_relative_to'][base]:.2f}x" for base in BASELINES]
                rows.append(row)
    return _table(head, rows)


def _scaling(part: dict[str, Any]) -> list[str]:
    head = ["tokens", "forward + backward, ms", "peak, MB", "inference in chunks, peak, MB"]
    rows = [
        [
            f"{one['num_tokens']:,}",
            _ms(one["forward_backward"]),
            _mb(one["forward_backward"]["peak_bytes"]),
            _mb(one["inference"]["peak_bytes"]),
        ]
        for one in part["lengths"]
    ]
    time, memory = part["time_line"], part["memory_line"]
    return [
        *_table(head, rows),
        "",
        f"Straight lines: {1e6 * time['slope']:.1f} us per token, "
        f"{1e6 * time['slope'] * part['size']['mini_batch_size']:.0f} per mini-batch "
        f"(R^2 {time['r_squared']:.4f}), "
        f"{memory['slope'] / 1e3:.1f} kB per token (R^2 {memory['r_squared']:.4f}). "
        f"Memory of inference, largest over smallest: {part['inference_memory_growth']:.3f}.",
    ]


def _streaming(part: dict[str, Any]) -> list[str]:
    inner, layers = part["inner_step"], part["layers"]
    head = ["", "ms per frame"]
    gigabytes = inner["floor_bytes_per_second"] / 1e9
    return [
        *_table(head, [[f"inner step: {name}", _ms(one)] for name, one in inner["candidates"].items()]),
        "",
        f"Fast weights: {_mb(inner['fast_weight_bytes'])} MB; the floor is the {inner['floor']}, "
        f"{gigabytes:.1f} GB/s. Step over floor: {inner['step_over_floor']:.2f}.",
        *_table(
            [*head, "parameters"],
            [
                [name, _ms(one), f"{layers['parameters'][name] / 1e6:.1f} M"]
                for name, one in layers["candidates"].items()
            ],
        ),
        "",
        f"TTT layer over Moshi layer: {layers['ttt_over_moshi']:.2f}; "
        f"with key shift over without: {layers['key_shift_over_none']:.3f}; "
        f"with TTT over without: {layers['with_over_without']:.2f}.",
    ]


def _layer(part: dict[str, Any]) -> list[str]:
    head = ["mode", "layer", "ms per step", "peak above weights and optimiser, MB", "time", "memory"]
    rows = []
    for mode, result in part["modes"].items():
        for name, one in result["candidates"].items():
            ratios = ["1", "1"]
            if name == "with ttt":
                ratios = [f"{result[key]:.2f}x" for key in ("with_over_without", "memory_with_over_without")]
            rows.append([mode, name, _ms(one), _mb(one["peak_bytes"]), *ratios])
    return _table(head, rows)


def _epoch(part: dict[str, Any]) -> list[str]:
    rows = [[name, _ms(one)] for name, one in part["candidates"].items()]
    return [
        *_table(["code cache", "ms per epoch"], rows),
        "",
        f"{part['audio_seconds'] / 60:.1f} minutes of audio in {part['recordings']} recordings, "
        f"{part['batches']} batches of {part['batch_size']}. Cold over warm: {part['cold_over_warm']:.1f}.",
    ]


def _check(part: dict[str, Any]) -> list[str]:
    rows = [[name, _ms(one)] for name, one in part["candidates"].items()]
    return _table(["", f"ms for {part['recordings']:,} recordings"], rows)


def _diagnostics(part: dict[str, Any]) -> list[str]:
    head = ["diagnostics", "ms per step", "time"]
    return _table(
        head, [[name, _ms(one), f"{one['over_never']:.3f}x"] for name, one in part["candidates"].items()]
    )


def _model(part: dict[str, Any]) -> list[str]:
    talk, training = part["conversation"], part["training"]
    rows = []
    for name, one in training["candidates"].items():
        gigabytes = [f"{one[key] / 1e9:.2f}" for key in ("peak_bytes", "estimated_bytes")]
        mfu = "-" if one["mfu"] is None else f"{100 * one['mfu']:.0f} %"
        rows.append([name, f"{one['trainable_parameters'] / 1e6:.1f} M", _ms(one), *gigabytes, mfu])
    return [
        *_table(["", "ms per frame"], [[name, _ms(one)] for name, one in talk["candidates"].items()]),
        "",
        f"TTT in layers {', '.join(map(str, talk['ttt_layers']))}: with TTT over without: "
        f"{talk['with_over_without']:.3f}; real-time factor with TTT and codec: "
        f"{talk['real_time_factor']:.2f}.",
        *_table(["training", "trainable", "ms per step", "peak, GB", "foreseen, GB", "MFU"], rows),
        "",
        f"{training['batch_size']} rows of {training['num_frames']:,} frames, gradient checkpointing: "
        f"{training['gradient_checkpointing']}; with TTT over without: {training['with_over_without']:.3f}.",
    ]


def _profile(part: dict[str, Any]) -> list[str]:
    cases = part["cases"]
    groups = next(iter(cases.values()))
    rows = []
    for group in groups:
        cells = []
        for seconds in cases.values():
            share = seconds[group] / sum(seconds.values())
            cells.append(f"{1e3 * seconds[group]:.1f} ({100 * share:.0f} %)")
        rows.append([group, *cells])
    rows.append(["sum", *(f"{1e3 * sum(seconds.values()):.0f}" for seconds in cases.values())])
    return _table(["ms per step (share)", *cases], rows)


def _int8(part: dict[str, Any]) -> list[str]:
    head = ["base", "weights, MB", "peak, MB", "ms per step"]
    rows = [
        [name, *(_mb(one[f"{key}_bytes"]) for key in ("weight", "peak")), _ms(one)]
        for name, one in part["step"]["candidates"].items()
    ]
    loss_rows = [
        [str(number), name, when, f"{loss:.4f}"]
        for number, run in enumerate(part["losses"]["runs"], start=1)
        for name, losses in run.items()
        for when, loss in losses.items()
    ]
    return [*_table(head, rows), *_table(["run", "base", "fine-tuning", "held-out loss"], loss_rows)]


_PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "operator": _operator,
    "scaling": _scaling,
    "streaming": _streaming,
    "layer": _layer,
    "epoch": _epoch,
    "check": _check,
    "index": _check,
    "diagnostics": _diagnostics,
    "profile": _profile,
    "int8": _int8,
    "model": _model,
}


def _table(head: Cells, rows: Iterable[Cells]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["", *(f"| {' | '.join(cells)} |" for cells in lines)]


def _ms(record: dict[str, Any]) -> str:
    return f"{1e3 * record['median_seconds']:.4g}"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.4g}"
