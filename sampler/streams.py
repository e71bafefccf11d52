"""Which random numbers belong to whom? One seed per walker, and from it one independent stream per purpose.

The numbers of a walker therefore do not depend on which other walkers share its batch, nor on the device.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Purpose", "derive_key", "derive_seed", "open_stream"]


class Purpose(IntEnum):
    CELL = 0
    SCHEDULE = 1
    DYNAMICS = 2


def derive_seed(seed: int, index: int) -> int:
    """The seed of walker (or frame) `index` of a task with seed `seed`: 63 bits, fit for an int64 column."""
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def open_stream(seed: int, purpose: Purpose) -> np.random.Generator:
    """Start the stream of `purpose` from its beginning."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(int(purpose),))))


def derive_key(seed: int, purpose: Purpose) -> int:
    """The key, int64, of random numbers that are a function of it and a counter."""
    return int(np.random.SeedSequence(seed, spawn_key=(int(purpose),)).generate_state(1, np.uint64).view(np.int64)[0])
