"""Which member learns from which frame? Decided by frame ids alone, never by order or number.

The ids are cut into 16 blocks. Member k trains on blocks (b + 2k) mod 16, b = 0..12, is validated on b = 13 and 14
and tested on b = 15 (the split of the published ANI-Al ensemble), so eight members validate on disjoint frames.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["N_BLOCKS", "TEST", "TRAIN", "VALID", "assign_blocks", "member_roles"]

N_BLOCKS = 16
N_PAIRS = N_BLOCKS // 2
TRAIN, VALID, TEST = 0, 1, 2
ROLE_OF_BLOCK = np.array([TRAIN] * 13 + [VALID] * 2 + [TEST], dtype=np.int8)


def assign_blocks(keys: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Return each frame's block, (n_frames,), in 0..15. keys: (n_frames, 16), the ids as bytes.

    A frame's home block is a hash of its id, so it stays when the data set grows. In a set of a few tens of frames
    some homes are empty, and a member could be without validation frames: an empty block then borrows a frame
    from the fullest one. The borrowed frames, few and only in small sets, go home as the set grows.

    Raises:
        ValueError: fewer than 8 frames, which cannot give every member its own validation frames.
    """
    if len(keys) < N_PAIRS:
        raise ValueError(f"{len(keys)} labeled frames: cross-validation needs at least {N_PAIRS}")
    home = np.fromiter((_hash(key)[0] % N_BLOCKS for key in keys), np.int8, len(keys))
    # Blocks 2k + 13 and 2k + 14 validate member k: in a set too small for 16 blocks each such pair must have one.
    pairs = (home + 3) // 2 % N_PAIRS
    filled = _lend(pairs, keys, N_PAIRS)
    blocks = np.where(filled == pairs, home, (2 * filled + 13) % N_BLOCKS)
    return _lend(blocks, keys, N_BLOCKS) if len(keys) >= N_BLOCKS else blocks


def member_roles(blocks: NDArray[np.int8], n_members: int) -> NDArray[np.int8]:
    """Return TRAIN, VALID or TEST of every member and frame, (n_members, n_frames)."""
    roles = np.empty((n_members, len(blocks)), dtype=np.int8)
    for k in range(n_members):
        roles[k] = np.roll(ROLE_OF_BLOCK, 2 * k)[blocks]
    return roles


def _hash(key: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(key.tobytes().hex().encode()).digest()


def _lend(bins: NDArray[np.int8], keys: NDArray[np.uint8], n_bins: int) -> NDArray[np.int8]:
    """Fill each empty bin with one frame, of the highest hash, from the bin that is the fullest then."""
    bins = bins.copy()
    for empty in range(n_bins):
        counts = np.bincount(bins, minlength=n_bins)
        if counts[empty] == 0:
            lenders = np.flatnonzero(bins == counts.argmax())
            bins[max(lenders, key=lambda i: _hash(keys[i]))] = empty
    return bins
