"""The page at `/`: the stock client of Moshi, our own, or a folder."""

import logging
import tarfile
from pathlib import Path

from huggingface_hub import hf_hub_download

from finetune.base_model.locate import MOSHI_ERRORS, describe_error
from finetune.errors import ConfigError
from finetune.serving.app import PAGE_DIR

logger = logging.getLogger(__name__)


def find_page(choice: str) -> Path | None:
    """The folder of the page.

    Args:
        choice: `auto` (stock where it was downloaded before, else own), `stock`, `own`, `none`, a folder.

    Raises:
        ConfigError: the stock client cannot be had, or the folder has no index.html.
    """
    if choice == "none":
        return None
    if choice == "own":
        return PAGE_DIR
    if choice == "auto":
        try:
            return _stock_client(local_files_only=True)
        except (*MOSHI_ERRORS, tarfile.TarError):
            logger.info("Moshi's web client is not here (--static stock downloads it); serving our own page.")
            return PAGE_DIR
    if choice == "stock":
        try:
            return _stock_client(local_files_only=False)
        except (*MOSHI_ERRORS, tarfile.TarError) as error:
            reason = describe_error(error)
            raise ConfigError(f"--static stock: Moshi's web client cannot be had: {reason}") from None
    folder = Path(choice)
    if not (folder / "index.html").is_file():
        raise ConfigError(
            f"--static: {folder / 'index.html'} does not exist; give auto, own, stock, none or a folder."
        )
    return folder


def _stock_client(*, local_files_only: bool) -> Path:
    name = ("kyutai/moshi-artifacts", "dist.tgz")
    archive = Path(hf_hub_download(*name, local_files_only=local_files_only))
    folder = archive.parent / "dist"
    if not folder.exists():
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(archive.parent, filter="data")
    return folder
