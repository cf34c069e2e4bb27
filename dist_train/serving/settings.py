"""What a server is told, and how its worker processes get it."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_train.errors import UserError

_VARIABLE = "DIST_TRAIN_SERVE"
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class Settings:
    """`rate` is requests a second for each client and worker, 0: no limit; `contract` is warn, refuse or ignore.

    `run` is the run that reasons are computed from; None: there are none.
    """

    model: str
    name: str
    api_key_file: str | None = None
    max_rows: int = 10_000
    max_bytes: int = 16 << 20
    rate: float = 0.0
    contract: str = "warn"
    workers: int = 1
    run: str | None = None

    def to_environment(self, environ: MutableMapping[str, str]) -> None:
        """For the workers, which are processes of their own."""
        environ[_VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """In a worker."""
        return cls(**json.loads(environ[_VARIABLE]))


def api_keys(file: str | None) -> list[bytes]:
    """The keys of a file, one a line; lines that begin with # are comments.

    Raises:
        UserError: the file cannot be read, has no keys, or a short one.
    """
    if file is None:
        return []
    try:
        lines = [line.strip() for line in Path(file).read_bytes().splitlines()]
    except OSError as error:
        raise UserError(f"--api-key-file {file}: cannot be read: {error.strerror}") from None
    keys = [line for line in lines if line and not line.startswith(b"#")]
    if not keys:
        raise UserError(f"--api-key-file {file}: has no key: write one a line")
    if min(map(len, keys)) < _SHORTEST_KEY:
        raise UserError(f"--api-key-file {file}: a key is shorter than {_SHORTEST_KEY} characters")
    return keys
