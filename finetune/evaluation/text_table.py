"""Tables as text, for terminals and logs."""

from collections.abc import Sequence


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of rows: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for label, *cells in table:
        padded = [label.ljust(widths[0])]
        padded += [text.rjust(width) for text, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines
