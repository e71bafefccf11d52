"""Which frames that have a label deserve one of a higher level of theory?

Those whose label is expected to change most: by the spread of the committee, and by how far the levels differ there.
The square of that per second is what lowers the error most for the time it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from shards.frame import Frame
from shards.label import Label

__all__ = ["expected_seconds", "gaps", "worth"]

Floats = NDArray[np.float64]
Row = tuple[Frame, Label]


def worth(spreads: Floats, gaps: Floats, seconds: Floats) -> Floats:
    """By what frames are put in order, (n_frames,); spreads and gaps in eV / sqrt(n_atoms)."""
    return np.asarray(np.hypot(spreads, gaps) / np.sqrt(seconds))


def gaps(rows: Sequence[Row], predicted: Floats, elements: Sequence[str]) -> Floats:
    """How far the committee is from the labels of the lower level beyond a constant per element, (n_frames,),
    eV / sqrt(n_atoms). Of a committee that was carried to the higher level: the gap between the levels.

    predicted: (n_frames,), eV.
    """
    counts = np.array([[(frame.numbers == atomic_numbers[each]).sum() for each in elements] for frame, _ in rows])
    scale = 1 / np.sqrt(counts.sum(axis=1))
    off = scale * (predicted - [label.energy for _, label in rows])
    shift = np.linalg.lstsq(scale[:, None] * counts, off, rcond=1e-10)[0]
    return np.asarray(np.abs(off - scale * (counts @ shift)))


def expected_seconds(frames: Sequence[Frame], measured: Sequence[Row]) -> Floats:
    """What labels of frames will take, (n_frames,), s: a power of the number of electrons, fitted to labels."""
    electrons = np.log([frame.numbers.sum() for frame, _ in measured])
    seconds = np.log([max(label.seconds, 1e-6) for _, label in measured])
    power = max(0.0, np.polyfit(electrons, seconds, 1)[0]) if np.ptp(electrons) > 0 else 0.0
    beyond = np.log([frame.numbers.sum() for frame in frames]) - electrons.mean()
    return np.asarray(np.exp(seconds.mean() + power * beyond))
