"""Which structures make up a step, and which rank does which? Pure arithmetic, the same on every rank.

Structures are sorted by size and cut into windows as long as an epoch has steps. Every batch takes one structure from
each window, and a window belongs to one rank for good. So each batch has the same mix of sizes, every rank has its
even share of it, keeps only its own structures in memory, and no batch depends on the number of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Windows"]


class Windows:
    """Cut structures of `n_atoms` atoms, (n,), into windows."""

    def __init__(self, n_atoms: NDArray[np.integer[Any]], batch: int, least_steps: int) -> None:
        n = len(n_atoms)
        self.n_steps = max(-(-n // batch), min(least_steps, n))
        order = np.argsort(n_atoms, kind="stable")
        self._windows = [order[i : i + self.n_steps] for i in range(0, n, self.n_steps)]

    def owned(self, rank: int, n_ranks: int) -> NDArray[np.int64]:
        """Return the structures that `rank` works on, every one in exactly one rank."""
        mine = self._windows[rank::n_ranks]
        return np.concatenate(mine) if mine else np.empty(0, dtype=np.int64)

    @property
    def n_windows(self) -> int:
        """As many structures has a step at most."""
        return len(self._windows)

    def most(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (k,): how much of what is counted, (n, k), the structures of a step have at most."""
        most: NDArray[np.int64] = np.sum([counts[window].max(axis=0) for window in self._windows], axis=0)
        return most

    def epoch(self, seed: int, epoch: int) -> list[NDArray[np.int64]]:
        """Return the structures of each step; together they are every structure once."""
        rng = np.random.default_rng([seed, epoch])
        steps = np.full((self.n_steps, len(self._windows)), -1)
        for column, window in zip(steps.T, self._windows, strict=True):
            # The last window may be short: its structures fall to random steps.
            column[rng.permutation(self.n_steps)[: len(window)]] = window
        return [step[step >= 0] for step in steps]
