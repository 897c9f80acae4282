"""The page `docs/configuration.md`, made from the dataclasses of `finetune.args`.

python -m site_tools.config_reference        # writes docs/configuration.md
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from finetune.args import TrainArgs
from finetune.config_io import field_infos, type_name, yaml_text

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

_INTRODUCTION = """\
# Configuration

Every key of a training configuration. Each is an option of the command line too: `--optim.lr 1e-4`. Unknown
keys, values of another type and impossible combinations end with one line that names the key, and status 2.

This page is made from `finetune/args.py` by `python -m site_tools.config_reference`.
"""
_BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


def render() -> str:
    """The page as Markdown."""
    sections = [f"## {title}\n\n{text}\n\n{_table(cls, prefix)}" for title, text, cls, prefix in _sections()]
    return _INTRODUCTION + "\n" + "\n\n".join(sections) + "\n"


def _sections(cls: type = TrainArgs, prefix: str = "") -> Iterator[tuple[str, str, type, str]]:
    """Title, introduction, dataclass and prefix of its keys, the top level first."""
    text = (cls.__doc__ or "").strip().split("\n")[0]
    if not prefix:
        yield "Top level", "Keys that stand in no section.", cls, prefix
    elif any(not dataclasses.is_dataclass(info.annotation) for info in field_infos(cls).values()):
        yield f"`{prefix.removesuffix('.')}:`", text.partition(" — ")[2].capitalize() or text, cls, prefix
    for name, info in field_infos(cls).items():
        if dataclasses.is_dataclass(info.annotation):
            yield from _sections(info.annotation, f"{prefix}{name}.")


def _table(cls: type, prefix: str) -> str:
    rows = ["| key | type | default | what |", "|---|---|---|---|"]
    for name, info in field_infos(cls).items():
        if not dataclasses.is_dataclass(info.annotation):
            rows.append(
                f"| `{prefix}{name}` | {_type(info)} | {_default(info)} | {_escape(info.description or '')} |"
            )
    return "\n".join(rows)


def _type(info: FieldInfo) -> str:
    bounds = []
    for item in info.metadata:
        if isinstance(item, MinLen):
            continue
        sign, attribute = _BOUNDS[type(item)]
        bounds.append(f"{sign} {getattr(item, attribute):g}")
    return _escape(", ".join([type_name(info.annotation), *bounds]))


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    if default == "":
        return "unset"
    return f"`{default}`" if isinstance(default, str) else f"`{yaml_text(default)}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
