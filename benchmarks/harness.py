"""How are two ways to do the same work compared fairly on a machine that others use too?

Tasks are called in turn, round after round, in one process on one thread with denormals flushed, and what counts is the
CPU time of the process. A ratio is the median over rounds of the ratio within a round, with its quartiles.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROWS", "Row", "Times", "compare", "interleave", "publish", "ratio_row", "settle"]

Task = Callable[[], Any]
ROUNDS = 9
SECONDS_PER_TURN = 0.15  # a task shorter than this is repeated within a round
ROWS = "SMELT_BENCH_ROWS"  # where rows are written to instead of being shown


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, against which bars, and how near it is to what the machine can do.

    value: in `unit`; `less` says that smaller is better. at_least, aim: the bars, None where there is none.
    ours, peer: absolute figures in words. quartiles: of the value over rounds. agreement: largest deviation from the
    peer, in words. roofline: share of the machine's own rate, which tiles of integers may exceed.
    """

    work: str
    value: float
    unit: str
    at_least: float | None
    aim: float | None
    ours: str
    peer: str = ""
    quartiles: tuple[float, float] | None = None
    agreement: str = ""
    roofline: float | None = None
    less: bool = False

    def reaches(self, bar: float | None) -> bool:
        return bar is None or (self.value <= bar if self.less else self.value >= bar)


@dataclass(frozen=True)
class Times:
    """Seconds per call of one task, one number per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def settle(n_threads: int = 1) -> None:
    """Give all tasks of this process the same conditions."""
    torch.set_num_threads(n_threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)


def interleave(
    tasks: Mapping[str, Task],
    rounds: int = ROUNDS,
    seconds: float = SECONDS_PER_TURN,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Times]:
    """Time every task in every round, after one call of each that does not count."""
    for task in tasks.values():
        task()
    measured: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            measured[name].append(_time(task, seconds, clock))
    return {name: Times(tuple(values)) for name, values in measured.items()}


def _time(task: Task, seconds: float, clock: Callable[[], float]) -> float:
    n_calls, start, began = 0, clock(), time.perf_counter()
    while n_calls == 0 or time.perf_counter() - began < seconds:
        task()
        n_calls += 1
    return (clock() - start) / n_calls


def compare(slow: Times, fast: Times) -> tuple[float, tuple[float, float]]:
    """How many times faster, and the quartiles over rounds."""
    ratios = [a / b for a, b in zip(slow.rounds, fast.rounds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (low, high)


def ratio_row(
    work: str,
    peer: Times,
    ours: Times,
    amount: tuple[float, str],
    bars: tuple[float, float] | None,
    floor_s: float | None = None,
    agreement: str = "",
) -> Row:
    """A row for `ours` against `peer`. amount: of work in a call, with its unit. floor_s: least time of a call here."""
    value, quartiles = compare(peer, ours)
    n, unit = amount
    figures = (f"{n / times.median:,.4g} {unit}/s" for times in (ours, peer))
    share = None if floor_s is None else floor_s / ours.median
    return Row(work, value, "x", *(bars or (None, None)), *figures, quartiles, agreement, share)


def publish(rows: list[Row]) -> None:
    """Show the rows, or write them as JSON where `python -m benchmarks` wants them."""
    if path := os.environ.get(ROWS):
        Path(path).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        return
    from benchmarks.table import show

    show(rows, sys.stdout)
