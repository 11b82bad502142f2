"""Decide how a run ends from what is known of its ranks: the message, the exit code, the rank that caused it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from clipdist.distributed.compare import join_runs
from clipdist.errors import EXIT_FAULT

FIRST_PHASES = ("start", "restore", "data", "checkpoint", "validation")  # of a step, in order; training itself is last
NAMED_RANKS = 4  # so many are named with their nodes


@dataclass
class RankState:
    """A rank's last reported state. Times in seconds on the clock of the rank that keeps it."""

    rank: int
    heard: float = 0.0
    node: str = "?"
    pid: int = 0
    step: int | None = None
    phase: str = "start"
    since: float = 0.0  # its last progress
    left: bool = False  # it ended normally, or its end is known

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.node}"

    @property
    def place(self) -> str:
        return f"{f'at step {self.step} ' if self.step is not None else ''}in phase {self.phase}"


@dataclass(frozen=True)
class Cause:
    """Why a run has to end.

    Attributes:
        text: what happened to the rank, without its name.
        words: the error that the rank itself reported; empty if it reported none.
    """

    rank: int
    text: str
    code: int = EXIT_FAULT
    words: str = ""


@dataclass(frozen=True)
class Verdict:
    """How all ranks end.

    Attributes:
        line: message of every rank.
        stacks: whether each rank also shows its stacks.
        rank: the one that caused the end; -1: none.
        words: the error that it reported itself; empty if none.
        nodes: of the ranks that ended without a report.
    """

    line: str
    code: int = EXIT_FAULT
    stacks: bool = False
    rank: int = -1
    words: str = ""
    nodes: list[str] = field(default_factory=list)


def death(state: RankState, unreachable: bool) -> Cause:
    """Return the cause for a rank whose connection broke."""
    if unreachable:
        text = "cannot be reached any more: the machine is down, or the network between is cut"
        return Cause(state.rank, f"{text} (last known {state.place})")
    text = f"(pid {state.pid}) ended without a word (last known {state.place}): killed from outside, out of memory, or"
    return Cause(state.rank, f"{text} a crash in native code; its own log may say more")


def silence(state: RankState, seconds: float) -> Cause:
    """Return the cause for a rank that is connected but sends no heartbeats."""
    text = f"(pid {state.pid}) has not answered for {seconds:.0f} s, last known {state.place}"
    return Cause(state.rank, f"{text}: stopped, stuck in native code, or its machine is down")


def decide(causes: list[Cause], states: dict[int, RankState]) -> Verdict:
    """Choose among causes that came within moments the one that led to the others.

    A rank that ended without a report comes first: the others then report collectives that it left.
    """
    silent = [cause for cause in causes if not cause.words]
    cause = (silent or causes)[0]
    state = states[cause.rank]
    if cause.words:
        where = state.place if state.step is not None else "at the start"
        return Verdict(f"{state.name} ended {where}: {cause.words}", cause.code, rank=cause.rank, words=cause.words)
    others = sorted({other.rank for other in silent} - {cause.rank})
    also = f"; {_ranks(others)} ended as well" if others else ""
    nodes = sorted({states[other.rank].node for other in silent})
    return Verdict(f"{state.name} {cause.text}{also}", cause.code, rank=cause.rank, nodes=nodes)


def hang(states: Iterable[RankState], now: float, hang_s: float, where: str) -> Verdict:
    """Return the verdict for a run without progress: it names the ranks furthest behind, for which the others wait."""
    groups = []
    for _, members in groupby(sorted(states, key=_position), key=_position):
        ranks = list(members)
        groups.append((ranks, max(now - state.since for state in ranks)))
    (behind, seconds), *ahead = groups
    if len(behind) <= NAMED_RANKS:
        named = ", ".join(state.name for state in behind)
    else:
        named = _ranks([state.rank for state in behind])
    verb = "has" if len(behind) == 1 else "have"
    line = f"no progress for {hang_s:.0f} s: {named} {verb} been {behind[0].place} for {seconds:.0f} s"
    for ranks, seconds in ahead:
        line += f"; {_ranks([state.rank for state in ranks])} {ranks[0].place} for {seconds:.0f} s (waiting for it?)"
    return Verdict(f"{line}; all stacks: {where}", stacks=True, rank=behind[0].rank if ahead else -1)


def _position(state: RankState) -> tuple[int, int, str]:
    order = FIRST_PHASES.index(state.phase) if state.phase in FIRST_PHASES else len(FIRST_PHASES)
    return (-1 if state.step is None else state.step), order, state.phase


def _ranks(ranks: list[int]) -> str:
    """Return "ranks 0-2, 5" for [0, 1, 2, 5]."""
    return f"rank{'s' if len(ranks) > 1 else ''} {join_runs(ranks)}"
