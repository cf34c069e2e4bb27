"""Files of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dist_train.errors import UserError

INSTALL = "pip install 'dist_train[text]'"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_name(name: str) -> bool:
    """Whether the hub may have something of that name."""
    return _NAME.fullmatch(name) is not None


def hub_folder(name: str, patterns: Sequence[str], what: str, *, dataset: bool = False) -> Path:
    """The folder in the hub's cache with the files of a model or a data set that match a pattern.

    They are fetched where there is a network and HF_HUB_OFFLINE is not set.

    Raises:
        UserError: they cannot be had; the message begins with `what`.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{what}: the Hugging Face hub needs huggingface_hub: {INSTALL}") from None
    try:
        folder = snapshot_download(name, repo_type="dataset" if dataset else "model", allow_patterns=list(patterns))
    except Exception as error:  # whatever the hub, the network or the disk may raise
        raise UserError(
            f"{what}: {name!r} cannot be had from the Hugging Face hub ({type(error).__name__}): give a path that "
            "exists, or connect to a network"
        ) from None
    return Path(folder)
