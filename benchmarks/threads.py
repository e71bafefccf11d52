"""How much faster are two threads than one?

Run: python -m benchmarks.threads. On a machine that others use, wall time says little. So what counts is the CPU time
of the busier thread: work that is not shared out, and what sharing costs, is in it; time taken away by others is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import aluminium, crystal
from benchmarks.harness import Row, Times, compare, publish, settle
from potential.neighbours import find_neighbours
from potential.structures import Structures

ROUNDS, CALLS = 9, 5


def busier_thread(task: Callable[[], Any], n_threads: int) -> float:
    """CPU seconds of the calling thread, or of all its helpers together where that is more (there is one)."""
    torch.set_num_threads(n_threads)
    process, thread = time.process_time(), time.thread_time()
    for _ in range(CALLS):
        task()
    own = time.thread_time() - thread
    return max(own, time.process_time() - process - own) / CALLS


def row(work: str, task: Callable[[], Any], bars: tuple[float, float] | None) -> Row:
    rounds = [(busier_thread(task, 1), busier_thread(task, 2)) for _ in range(ROUNDS + 1)][1:]
    one, two = (Times(tuple(times)) for times in zip(*rounds, strict=True))
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
