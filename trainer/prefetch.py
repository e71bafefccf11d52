"""How is what comes next made ready while the present is worked on? By one thread, in order, a bounded way ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Prefetcher"]

Made = TypeVar("Made")
Part = NDArray[np.int64]


class Prefetcher(Generic[Made]):
    """Make something of each part, at most `depth` parts before it is asked for; what `make` raises is raised then."""

    def __init__(self, make: Callable[[Part], Made], depth: int) -> None:
        self._make = make
        self._depth = depth
        self._thread = ThreadPoolExecutor(1)
        self._next: list[Part] = []
        self._begun: dict[bytes, Future[Made]] = {}

    def expect(self, parts: Sequence[Part]) -> None:
        """Name the parts that will be asked for after those of the next call of `each`."""
        self._next = list(parts[: self._depth])

    def each(self, parts: Sequence[Part]) -> Iterator[Made]:
        following, self._next = [*parts, *self._next], []
        coming = ((part.tobytes(), self._begin(part)) for part in following)
        begun = deque(islice(coming, self._depth))
        for _ in parts:
            made = begun.popleft()[1].result()
            begun.extend(islice(coming, 1))
            yield made
        self._begun = dict(begun)

    def _begin(self, part: Part) -> Future[Made]:
        return self._begun.pop(part.tobytes(), None) or self._thread.submit(self._make, part)
