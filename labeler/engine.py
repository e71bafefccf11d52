"""What must a quantum code offer to be a labeler's engine? The protocol, and nothing of any one code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.frame import Frame
from shards.label import Level
from shards.settings import SettingsError

__all__ = ["Answer", "Engine", "MissingEngine", "NotConverged"]


class MissingEngine(SettingsError):  # noqa: N818 - said as "missing engine" everywhere
    """A code, its data or a launcher that is not installed here; the message says what to do about it."""


class NotConverged(Exception):  # noqa: N818 - a finding, not a fault of the program
    """The self-consistency cycle (or another iterative solver) gave up."""


@dataclass(frozen=True)
class Answer:
    """What a code said about one frame, unchecked.

    energy: eV, consistent with the forces. energy_extrapolated: eV, at zero smearing, NaN where there is none.
    forces: (n_atoms, 3), eV/A, and stress: (3, 3), eV/A^3, tension positive; None when not computed. ingredients: eV,
    by name, what a composite energy is put together from.
    """

    energy: float
    forces: NDArray[np.float64] | None
    stress: NDArray[np.float64] | None
    energy_extrapolated: float = float("nan")
    scf_steps: int = 0
    ingredients: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A quantum code at one level of theory. Making one touches nothing; `compute` runs in a process of its own."""

    @property
    def n_rungs(self) -> int:
        """Number of ways to reach self-consistency, all giving the same number; tried in turn."""

    def level(self, elements: Sequence[str]) -> Level:
        """Name the level of theory for these elements.

        Raises:
            MissingEngine: the code or its data is not installed.
        """

    def refuse(self, frame: Frame) -> str:
        """Why this code cannot treat the frame; empty when it can."""

    def compute(self, frame: Frame, rung: int) -> Answer:
        """Compute in the current folder, on all MPI ranks at once when there are several.

        Raises:
            NotConverged: on this rung of the ladder.
        """
