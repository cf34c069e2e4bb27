"""What every rank has computed and received in a step -> which rank is wrong. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_MAX_NAMED = 4

Digests = list[list[str]]
"""Of each call of `all_gather` in a step, of each slice: the SHA-256 of its part."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a rank says of a step.

    `received`: what it was given in each call, of all slices of all ranks. `computed`: slices that it has computed
    again, as the rank whose they are and what it has added to each call; in the order in which it has done so. `state`:
    digests of what every rank holds alike. `sums`: the digest of the sums that the step uses; `sums_again`: that of the
    same sums, made again from `received`. `alarm`: what of its memory has changed by itself. `objects`: whether it has
    found a difference. `unlike_before`: whether it no longer computes what it once has, when all agreed on it.
    """

    host: str
    alarm: list[str] = field(default_factory=list)
    state: Mapping[str, str] = field(default_factory=dict)
    received: Digests = field(default_factory=list)
    computed: list[tuple[int, Digests]] = field(default_factory=list)
    sums: str = ""
    sums_again: str = ""
    objects: bool = False
    unlike_before: bool = False


@dataclass(frozen=True)
class Verdict:
    """The ranks that are wrong, or among which the wrong one is where `certain` is false, and what is wrong."""

    ranks: list[int]
    what: str
    certain: bool = True


def judge(statements: Sequence[Statement]) -> Verdict | None:
    """Who is wrong; None: nobody. Causes come before effects: memory, then calls in their order, then sums."""
    alarms = {rank: said.alarm for rank, said in enumerate(statements) if said.alarm}
    if alarms:
        names = dict.fromkeys(name for alarm in alarms.values() for name in alarm)
        return Verdict([*alarms], f"memory has changed that nobody wrote to: {', '.join(names)}")
    for name in statements[0].state:
        ranks, certain = _minority({rank: said.state[name] for rank, said in enumerate(statements)})
        if ranks:
            return Verdict(ranks, f"its {name} are not those of the other ranks", certain)
    for call in range(len(statements[0].received)):
        verdict = _judge_call(statements, call)
        if verdict:
            return verdict
    again = [rank for rank, said in enumerate(statements) if said.sums != said.sums_again]
    if again:
        return Verdict(again, "the sums over all slices, made twice, are not the same bits")
    ranks, certain = _minority({rank: said.sums for rank, said in enumerate(statements)})
    if ranks:
        return Verdict(ranks, "the sums over all slices are not those of the other ranks", certain)
    objecting = [rank for rank, said in enumerate(statements) if said.objects]
    return Verdict(objecting, "a difference was found that is gone", certain=False) if objecting else None


def _minority(opinions: Mapping[int, str]) -> tuple[list[int], bool]:
    """The ranks that contradict more than half of them, and true; where no opinion has so many: all, and false."""
    (opinion, count), *others = Counter(opinions.values()).most_common()
    if not others:
        return [], True
    if 2 * count > len(opinions):
        return [rank for rank, own in opinions.items() if own != opinion], True
    return list(opinions), False


def _judge_call(statements: Sequence[Statement], call: int) -> Verdict | None:
    """Who is wrong in a call, where all that was gathered before is the same on all ranks."""
    slices_of_a_rank = len(statements[0].received[call]) // len(statements)
    found: dict[int, Verdict] = {}
    for index in range(len(statements[0].received[call])):
        owner, place = divmod(index, slices_of_a_rank)
        received = [said.received[call][index] for said in statements]
        computed: dict[int, list[str]] = {owner: [received[owner]]}
        for rank, said in enumerate(statements):
            for whose, digests in said.computed:
                if whose == owner:
                    computed.setdefault(rank, []).append(digests[call][place])
        verdict = _judge_slice(owner, received, computed)
        if verdict:
            found[index] = verdict
    if not found:
        return None
    ranks = sorted({rank for verdict in found.values() for rank in verdict.ranks})
    # Of a rank that is wrong, its own slices before those that it has computed for others.
    own = [index for index in found if index // slices_of_a_rank in ranks] or list(found)
    last = len(statements[0].received) - 1
    what = {last: "the gradient", last - 1: "the loss"}.get(call, f"sums of BatchNorm (call {call + 1})")
    listed = ", ".join(map(str, own[:_MAX_NAMED])) + (" and more" if len(own) > _MAX_NAMED else "")
    certain = all(verdict.certain for verdict in found.values())
    unlike = [rank for rank in ranks if statements[rank].unlike_before]
    if not certain and len(unlike) == 1:
        return Verdict(unlike, f"{what} of slice {listed}: it no longer computes what it did in the audit before")
    return Verdict(ranks, f"{what} of slice {listed}: {found[own[0]].what}", certain)


def _judge_slice(owner: int, received: Sequence[str], computed: Mapping[int, Sequence[str]]) -> Verdict | None:
    """Who is wrong in a slice.

    A rank that contradicts itself is wrong. Each other one that has computed the slice has a vote.
    """
    fickle = [rank for rank, values in computed.items() if len(set(values)) > 1]
    steady = {rank: values[0] for rank, values in computed.items() if rank not in fickle}
    against, certain = _minority(steady) if steady else ([], True)
    if fickle or against:
        how = "computed again it is another one" if fickle else "other ranks have computed another one"
        return Verdict([*fickle, *against], how, certain)
    truth = steady[owner]
    misread = [rank for rank, value in enumerate(received) if value != truth]
    if len(misread) > 1 and len(misread) == len(received) - 1:
        return Verdict([owner], "it was sent to the others as another one")
    return Verdict(misread, f"it is not what rank {owner} has sent") if misread else None
