"""Which member learns from which frame? Decided by frame ids alone, never by order or number.

The ids are cut into 16 blocks. Member k trains on blocks (b + 2k) mod 16, b = 0..12, is validated on b = 13 and 14
and tested on b = 15 (the split of the published ANI-Al ensemble), so eight members validate on disjoint frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["N_BLOCKS", "TEST", "TRAIN", "VALID", "assign_blocks", "member_roles"]

N_BLOCKS = 16
N_PAIRS = N_BLOCKS // 2
TRAIN, VALID, TEST = 0, 1, 2
ROLE_OF_BLOCK = np.array([TRAIN] * 13 + [VALID] * 2 + [TEST])


def assign_blocks(ids: Sequence[str]) -> NDArray[np.int64]:
    """Return each frame's block, (n_frames,), in 0..15.

    A frame's home block is a hash of its id, so it stays when the data set grows. In a set of a few tens of frames
    some homes are empty, and a member could be without validation frames: an empty block then borrows a frame
    from the fullest one. The borrowed frames, few and only in small sets, go home as the set grows.

    Raises:
        ValueError: fewer than 8 frames, which cannot give every member its own validation frames.
    """
    if len(ids) < N_PAIRS:
        raise ValueError(f"{len(ids)} labeled frames: cross-validation needs at least {N_PAIRS}")
    keys = [hashlib.sha256(id.encode()).digest() for id in ids]
    home = np.array([key[0] % N_BLOCKS for key in keys], dtype=np.int64)
    rank_of_frame = np.argsort(np.argsort(np.array([key.hex() for key in keys]))).astype(np.int64)
    # Blocks 2k + 13 and 2k + 14 validate member k: in a set too small for 16 blocks each such pair must have one.
    pairs = (home + 3) // 2 % N_PAIRS
    filled = _lend(pairs, rank_of_frame, N_PAIRS)
    blocks = np.where(filled == pairs, home, (2 * filled + 13) % N_BLOCKS)
    return _lend(blocks, rank_of_frame, N_BLOCKS) if len(ids) >= N_BLOCKS else blocks


def member_roles(blocks: NDArray[np.int64], n_members: int) -> NDArray[np.int64]:
    """Return TRAIN, VALID or TEST of every member and frame, (n_members, n_frames)."""
    offset = 2 * np.arange(n_members)[:, None]
    roles: NDArray[np.int64] = ROLE_OF_BLOCK[(blocks[None, :] - offset) % N_BLOCKS]
    return roles


def _lend(bins: NDArray[np.int64], rank_of_frame: NDArray[np.int64], n_bins: int) -> NDArray[np.int64]:
    """Fill each empty bin with one frame, of the highest hash, from the bin that is the fullest then."""
    bins = bins.copy()
    for empty in range(n_bins):
        counts = np.bincount(bins, minlength=n_bins)
        if counts[empty] == 0:
            lenders = np.flatnonzero(bins == counts.argmax())
            bins[lenders[rank_of_frame[lenders].argmax()]] = empty
    return bins
