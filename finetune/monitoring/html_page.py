"""A page of HTML that holds everything it shows, without links or scripts, or its picture alone."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moshi_ttt.files.atomic_file import replacing

SUFFIXES = (".html", ".png")
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:2em}} img{{max-width:100%}}
td,th{{text-align:left;padding:.2em .8em;vertical-align:top}}
.error{{background:#fdd}} .warning{{background:#ffd}}</style></head>
<body><h1>{title}</h1>"""


def write_page(
    path: Path, figure: Figure, *, title: str, alt: str, above: Sequence[str], below: Sequence[str] = ()
) -> None:
    """Write the page (`.html`), or only its picture (`.png`); an older file is replaced.

    Args:
        path: of the file, with one of `SUFFIXES`.
        figure: the picture.
        title: of the page.
        alt: what the picture shows.
        above: what stands above the picture, from `paragraph`, `bullets`, `preformatted` and `table`.
        below: what stands below it.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    content = buffer.getvalue()
    if path.suffix != ".png":
        data = base64.b64encode(content).decode("ascii")
        image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
        head = _HEAD.format(title=html.escape(title))
        content = "\n".join([head, *above, image, *below, "</body></html>\n"]).encode("utf-8")
    with replacing(path) as partial:
        partial.write_bytes(content)


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return "\n".join(["<ul>", *(f"<li>{html.escape(line)}</li>" for line in lines), "</ul>"])


def preformatted(lines: Sequence[str]) -> str:
    """Lines as they stand on a terminal."""
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of plain texts; rows are their kind (`error` and `warning` have a colour) and their cells."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}" for name in header) + "</tr>"]
    for kind, cells in rows:
        columns = "".join(f"<td>{html.escape(cell)}" for cell in cells)
        lines.append(f'<tr class="{html.escape(kind)}">{columns}</tr>')
    return "\n".join([*lines, "</table>"])
