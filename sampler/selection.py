"""Which of many candidate frames are worth their labels, and in which order? Pure functions on fingerprints.

The distance of two fingerprints is |a - b| / ((|a| + |b|) / 2): 0 for the same, about 1.4 for unrelated directions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["relative_distances", "select"]


def relative_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of every fingerprint in `a` (n_a, n_features) to every one in `b` (n_b, n_features): (n_a, n_b)."""
    size_a, size_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    difference = np.stack([np.linalg.norm(row - b, axis=1) for row in a]) if len(a) else np.zeros((0, len(b)))
    scale = (size_a[:, None] + size_b[None, :]) / 2
    distances: NDArray[np.float64] = difference / np.where(scale > 0, scale, 1.0)
    return distances


def select(
    fingerprints: NDArray[np.float64],
    scores: NDArray[np.float64],
    *,
    distance: float,
    known: NDArray[np.float64] | None = None,
    count: int | None = None,
) -> list[int]:
    """Choose frames that differ from each other and from the `known` ones; indices, most wanted first.

    fingerprints: (n_frames, n_features). scores: (n_frames,), larger is more uncertain. known: (n_known,
    n_features). Of near-duplicates (relative distance <= `distance`) the most uncertain one stays. Without `count`
    the order is by score; with it, at most `count` frames come back in farthest-point order.
    """
    nearest = np.full(len(fingerprints), np.inf)
    if known is not None and len(known) and len(fingerprints):
        nearest = relative_distances(fingerprints, known).min(axis=1)
    by_score = np.argsort(-np.nan_to_num(scores, nan=np.inf), kind="stable")
    kept = _without_duplicates(fingerprints, by_score, nearest, distance)
    return kept if count is None else _farthest_first(fingerprints, kept, nearest, count)


def _without_duplicates(
    fingerprints: NDArray[np.float64], order: NDArray[np.int64], nearest: NDArray[np.float64], distance: float
) -> list[int]:
    kept: list[int] = []
    nearest = nearest.copy()
    for index in map(int, order):
        if nearest[index] > distance:
            kept.append(index)
            np.minimum(nearest, relative_distances(fingerprints[index : index + 1], fingerprints)[0], out=nearest)
    return kept


def _farthest_first(
    fingerprints: NDArray[np.float64], kept: list[int], nearest: NDArray[np.float64], count: int
) -> list[int]:
    """Repeatedly take the frame farthest from all taken and known ones; among equals the first of `kept`."""
    chosen: list[int] = []
    remaining = list(kept)
    nearest = nearest.copy()
    while remaining and len(chosen) < count:
        index = max(remaining, key=lambda i: nearest[i])
        remaining.remove(index)
        chosen.append(index)
        np.minimum(nearest, relative_distances(fingerprints[index : index + 1], fingerprints)[0], out=nearest)
    return chosen
