"""Where dialogues come from, by the name that a user gives."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.demo.human_dialogues import amazon_queen
from finetune.demo.human_dialogues.fillets import fillets_packages, read_fillets
from finetune.demo.human_dialogues.material import Material


class Source(NamedTuple):
    """Where dialogues come from.

    Attributes:
        packages: names of the Debian packages.
        read: reads them, in the same order.
        help: what they hold.
    """

    packages: tuple[str, ...]
    read: Callable[[Sequence[Path]], Material]
    help: str


SOURCES = {
    f"fillets-{code}": Source(
        fillets_packages(code),
        functools.partial(read_fillets, language=code),
        f"two actors, {language}; GPL 2",
    )
    for code, language in (("cs", "Czech"), ("nl", "Dutch"))
}
SOURCES["amazon-queen"] = Source(
    (amazon_queen.PACKAGE,),
    amazon_queen.read_amazon_queen,
    "many actors, English; to be given away with its readme",
)
