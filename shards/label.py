"""What is a label, and at which level of theory was it computed? Knows no file format and no quantum code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.schema import canonical_json

__all__ = ["Label", "Level"]


@dataclass(frozen=True)
class Level:
    """Everything that changes the number: labels with different digests are never mixed by accident.

    settings: JSON values only. data: file name -> sha256 of pseudopotentials, basis sets and the like.

    Raises:
        ValueError: settings that are not JSON (NaN included).
    """

    engine: str
    version: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("settings", "data"):
            try:
                # Through JSON, so that a level read from a file equals the one that was written.
                value = json.loads(canonical_json(getattr(self, name)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"level.{name} = {getattr(self, name)!r}: must be JSON values: {error}") from error
            object.__setattr__(self, name, value)

    def to_json(self) -> str:
        """The level as canonical JSON: what the shard stores and the digest covers."""
        return canonical_json(
            {"engine": self.engine, "version": self.version, "settings": self.settings, "data": self.data}
        )

    @classmethod
    def from_json(cls, text: str) -> Level:
        return cls(**json.loads(text))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, eq=False)
class Label:
    """Hold what a quantum code says about one frame. Its identity is (frame id, level digest).

    energy: eV, the one whose negative gradient the forces are (with smearing: the free energy).
    forces: (n_atoms, 3), eV/A, all NaN when not computed. stress: (3, 3), eV/A^3, tension positive, all NaN when
    not computed. energy_extrapolated: eV, at zero smearing, NaN when not computed. scf_steps: 0 when not applicable.
    ingredients: eV, by name, what a composite energy is put together from.

    Raises:
        ValueError: a shape that does not fit, an energy that is not finite, forces or stress in part NaN, an
            ingredient that is not finite or whose name is not an identifier.
    """

    energy: float
    forces: NDArray[np.float64]
    stress: NDArray[np.float64] = field(default_factory=lambda: np.full((3, 3), np.nan))
    energy_extrapolated: float = float("nan")
    seconds: float = 0.0
    host: str = ""
    scf_steps: int = 0
    ingredients: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        forces = np.array(self.forces, dtype=np.float64)
        stress = np.array(self.stress, dtype=np.float64)
        if forces.ndim != 2 or forces.shape[1] != 3 or stress.shape != (3, 3):
            raise ValueError(
                f"label: forces {forces.shape} and stress {stress.shape}: expected (n_atoms, 3) and (3, 3)"
            )
        if not np.isfinite(self.energy):
            raise ValueError(f"label: energy = {self.energy}: must be finite")
        for name, value in self.ingredients.items():
            if not (name.isidentifier() and np.isfinite(value)):
                raise ValueError(f"label: ingredient {name!r} = {value}: must be an identifier and a finite energy")
        for name, array in (("forces", forces), ("stress", stress)):
            if not (np.isfinite(array).all() or np.isnan(array).all()):
                raise ValueError(f"label: {name} must be finite, or all NaN when not computed")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def has_forces(self) -> bool:
        return bool(np.isfinite(self.forces).all())

    @property
    def has_stress(self) -> bool:
        return bool(np.isfinite(self.stress).all())
