"""Two things measured in turn, and the lines of the table that come of it: what the rows of `bench.py` share."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple


class NotHere(Exception):
    """A row cannot be measured on this machine: the message is one clause that says why."""


class Line(NamedTuple):
    """One line of the table."""

    row: str  # P1 to P10
    measured: str
    ours: str
    against: str  # limit or peer, measured in the same run
    ratio: str
    reach: str


def in_turn(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> list[tuple[float, float]]:
    """What two measurements give, (ours, peer), A B A B ...; before that each is played once, uncounted."""
    ours(), peer()
    return [(ours(), peer()) for _ in range(repeats)]


def per_s(count: float, play: Callable[[], None]) -> float:
    """How many of `count` things a second one call of `play` does, by the clock."""
    started = time.perf_counter()
    play()
    return count / (time.perf_counter() - started)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Smallest, median, largest."""
    return min(values), median(values), max(values)


def number(value: float) -> str:
    """To three digits, larger numbers whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rate(values: Sequence[float], unit: str) -> str:
    """Median (smallest to largest) with a unit."""
    least, middle, most = map(number, spread(values))
    return f"{middle} ({least} to {most}) {unit}"


def ratios(pairs: Sequence[tuple[float, float]]) -> str:
    """Smallest, median, largest of ours / peer."""
    least, middle, most = spread([ours / peer for ours, peer in pairs])
    return f"{least:.2f}, **{middle:.2f}**, {most:.2f}"


def compare(row: str, measured: str, pairs: Sequence[tuple[float, float]], unit: str, peer: str, reach: str) -> Line:
    """The line of pairs of rates (ours, peer), where more is better."""
    ours, theirs = zip(*pairs)
    return Line(row, measured, rate(ours, unit), f"{peer}: {rate(theirs, unit)}", ratios(pairs), reach)
