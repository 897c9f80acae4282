"""MkDocs hooks: equations become MathML, which browsers draw without a script.

A block fenced as `math` holds LaTeX; GitHub draws the same blocks in the repository.
"""

from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by MkDocs: hands `math` fences to `math_block`."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": math_block}]
    return config


def math_block(source: str, *_args: Any, **_kwargs: Any) -> str:
    """The HTML of one equation, of several where lines are separated by a blank line.

    Raises:
        ValueError: a command of LaTeX is not known.
    """
    equations = [" ".join(block.split()) for block in source.split("\n\n")]
    return "\n".join(convert(equation, display="block") for equation in equations)
