"""How much faster are two threads than one?

Run: python -m benchmarks.threads. On a machine that others use, wall time says little. So what counts is the CPU time
of the busier thread: work that is not shared out, and what sharing costs, is in it; time taken away by others is not.
Others slow down one processor or both for seconds. So one thread works on each of the two processors in turn, and its
speed is the mean of both; two threads are twice as fast if they reach the sum. Short rounds, many of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import aluminium, crystal
from benchmarks.harness import Row, Times, compare, publish, settle
from potential.neighbours import find_neighbours
from potential.structures import Structures

ROUNDS = 31
PROCESSORS = sorted(os.sched_getaffinity(0))[:2]


def busier_thread(task: Callable[[], Any], processors: set[int]) -> float:
    """CPU seconds of the calling thread, or of all its helpers together where that is more (there is one)."""
    torch.set_num_threads(len(processors))
    os.sched_setaffinity(0, processors)
    process, thread = time.process_time(), time.thread_time()
    task()
    own = time.thread_time() - thread
    return max(own, time.process_time() - process - own)


def row(work: str, task: Callable[[], Any], bars: tuple[float, float] | None) -> Row:
    rounds = [
        (
            statistics.harmonic_mean([busier_thread(task, {each}) for each in PROCESSORS]),
            busier_thread(task, set(PROCESSORS)),
        )
        for _ in range(ROUNDS + 1)
    ]
    one, two = (Times(tuple(times)) for times in zip(*rounds[1:], strict=True))
    value, quartiles = compare(one, two)
    figures = (f"{1e3 * times.median:.2f} ms" for times in (two, one))
    return Row(work, value, "x", *(bars or (None, None)), *figures, quartiles)


def main() -> None:
    settle()
    committee = aluminium()
    one = Structures.from_frames([crystal(8)], ["Al"], torch.float64)
    many = Structures.from_frames([crystal(3, seed) for seed in range(64)], ["Al"], torch.float64)
    lists = {id(s): find_neighbours(s, 7.0) for s in (one, many)}
    bars = 1.8, 1.95
    publish(
        [
            row("second thread, mean forces, 2048 Al", lambda: committee.evaluate(one, lists[id(one)]), bars),
            row("second thread, mean forces, 64 x 108 Al", lambda: committee.evaluate(many, lists[id(many)]), bars),
            row("second thread, neighbours, 64 x 108 Al", lambda: find_neighbours(many, 7.0), None),
        ]
    )


if __name__ == "__main__":
    main()
