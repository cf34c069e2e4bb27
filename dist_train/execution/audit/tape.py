"""What the ranks have gathered in a step, kept, and given to a second computation of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class RecordingTape:
    """Takes down what each `all_gather` gives: `calls`, each (world, slices of a rank, ...)."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def all_gather(self, own: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """What the ranks have gathered."""
        gathered = gather(own)
        alone = gathered.data_ptr() == own.data_ptr()  # then it is the caller's own memory
        self.calls.append(gathered.detach().clone() if alone else gathered.detach())
        return gathered


class PlayingTape:
    """Says what was gathered, and keeps what the caller has added to it: `parts`, each (slices of a rank, ...).

    What a computation adds is so a function of what the ranks had gathered before: a wrong number of one rank does not
    spread to those of the others.
    """

    def __init__(self, calls: Sequence[Tensor]) -> None:
        self._calls = calls
        self.parts: list[Tensor] = []

    def all_gather(self, own: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002
        """What the ranks had gathered in this call; nobody waits."""
        gathered = self._calls[len(self.parts)].clone()
        self.parts.append(own.detach().clone())
        return gathered
