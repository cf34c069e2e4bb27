"""Objects that a configuration chooses by name: those of this package, of a program, and of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from dist_train.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name.

    `kind` and `key` are what messages call such an object and the key of the configuration that names it. A name that
    neither this package nor the program has registered is looked up among the entry points of `group`, which installed
    packages declare; such a package is imported when its name is asked for, and no sooner.
    """

    def __init__(self, kind: str, key: str, group: str, built_in: Mapping[str, T]) -> None:
        self._kind = kind
        self._key = key
        self._group = group
        self._built_in = dict(built_in)
        self._registered: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Make an object known; a later one of the same name replaces it, as when a notebook's cell is run again.

        Raises:
            ValueError: the name is empty, or an object of this package has it.
        """
        if not name.strip() or name in self._built_in:
            reason = f"there is a {self._kind} of this package with that name" if name.strip() else "it is empty"
            raise ValueError(f"{name!r} cannot name a {self._kind}: {reason}")
        self._registered[name] = value

    def find(self, name: str) -> T:
        """The object of that name.

        Raises:
            UserError: there is none, or the package that declares it cannot be imported.
        """
        known = self._built_in | self._registered
        if name not in known and name in declared(self._group):
            value = load_declared(self._group, name, f"{self._key}: the {self._kind}")
            self._registered.setdefault(name, cast(T, value))  # the package may have registered it itself
            known = self._registered
        if name not in known:
            raise UserError(f"{self._key}: there is no {self._kind} {name!r}; there is {', '.join(self.names())}")
        return known[name]

    def names(self) -> list[str]:
        """Names of all that there are."""
        return list(dict.fromkeys([*self._built_in, *self._registered, *declared(self._group)]))


@cache
def declared(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, of all installed packages."""
    return {point.name: point for point in entry_points(group=group)}


def load_declared(group: str, name: str, what: str) -> object:
    """Import the object of an entry point.

    Raises:
        UserError: it cannot be imported; the message begins with `what`.
    """
    point = declared(group)[name]
    try:
        return point.load()
    except Exception as error:  # whatever the code of another package raises when it is imported
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{what} {name!r} of an installed package ({point.value}) cannot be loaded: {reason}") from None
