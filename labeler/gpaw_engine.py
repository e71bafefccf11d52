"""How is GPAW asked for a label? Plane waves, PAW data sets, Fermi-Dirac smearing, gamma-centred k-points.

The stored energy is the free energy, which the forces belong to; zero is that of free, unpolarized atoms.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeler.ase_engine import answer_of, atoms_of
from labeler.config import GpawSettings
from labeler.engine import Answer, MissingEngine, NotConverged
from shards.frame import Frame
from shards.label import Level

__all__ = ["GpawEngine", "kpoint_mesh"]


class GpawEngine:
    def __init__(self, settings: GpawSettings) -> None:
        self._settings = settings

    @property
    def n_rungs(self) -> int:
        return len(self._settings.ladder)

    def level(self, elements: Sequence[str]) -> Level:
        for module in ("gpaw", "_gpaw"):
            if importlib.util.find_spec(module) is None:
                raise MissingEngine(
                    f'labeler.engine = "gpaw": module {module} is not installed; pip install gpaw (needs g++)'
                )
        paths = {path.name: path for path in (self._paw_data(element) for element in elements)}
        return Level(
            engine="gpaw",
            version=metadata.version("gpaw"),
            settings=self._settings.model_dump(mode="json", exclude={"ladder"})
            | {"basis": "plane waves", "smearing": "fermi-dirac", "kpoints": "gamma-centred", "spin": "unpolarized"},
            data={name: hashlib.sha256(paths[name].read_bytes()).hexdigest() for name in sorted(paths)},
        )

    def refuse(self, frame: Frame) -> str:
        if not frame.pbc.all():
            return f"pbc {frame.pbc.tolist()}: plane waves need three periodic axes"
        if frame.charge or frame.spin:
            return f"charge {frame.charge} and spin {frame.spin}: metals are labeled neutral and unpolarized"
        return ""

    def compute(self, frame: Frame, rung: int) -> Answer:
        from gpaw import GPAW, ConvergenceError

        atoms = atoms_of(frame)
        atoms.calc = GPAW(**self._keywords(frame, rung))
        try:
            answer = answer_of(atoms)
        except ConvergenceError as error:
            rung_settings = self._settings.ladder[rung]
            raise NotConverged(f"not self-consistent after {rung_settings.max_steps} steps on rung {rung}") from error
        steps = int(atoms.calc.get_number_of_iterations())
        return Answer(answer.energy, answer.forces, answer.stress, answer.energy_extrapolated, steps)

    def _keywords(self, frame: Frame, rung: int) -> dict[str, Any]:
        level, way = self._settings, self._settings.ladder[rung]
        return {
            "mode": {"name": "pw", "ecut": level.cutoff_eV},
            "xc": level.xc,
            "kpts": {"size": kpoint_mesh(frame.cell, level.kpoint_spacing_per_A), "gamma": True},
            "occupations": {"name": "fermi-dirac", "width": level.smearing_eV},
            "convergence": {
                "energy": level.energy_tolerance_eV,
                "density": level.density_tolerance,
                "eigenstates": level.eigenstates_tolerance_eV2,
            },
            "eigensolver": way.eigensolver,
            "mixer": {
                "name": way.mixer,
                "beta": way.mixing,
                "nmaxold": way.mixing_history,
                "weight": way.mixing_weight,
            },
            "maxiter": way.max_steps,
            # Ranks share k-points only: that needs nothing of GPAW's own C interface to MPI, hence no special build.
            "parallel": {"domain": 1, "band": 1},
            "txt": "-",
        }

    def _paw_data(self, element: str) -> Path:
        # The package itself is safe to import anywhere; its submodules refuse to load under an MPI launcher.
        from gpaw import setup_paths

        names = [f"{element}.{self._settings.xc}", f"{element}.{self._settings.xc}.gz"]
        for folder in setup_paths:
            for name in names:
                if (path := Path(folder) / name).is_file():
                    return path
        raise MissingEngine(
            f'labeler.engine = "gpaw": no PAW data {names[-1]} in {[str(folder) for folder in setup_paths]};'
            " pip install gpaw-data, or put its folder into GPAW_SETUP_PATH"
        )


def kpoint_mesh(cell: NDArray[np.float64], spacing_per_A: float) -> tuple[int, int, int]:
    """Number of k-points along each axis: neighbours no further apart than `spacing_per_A`.

    cell: (3, 3), rows are the lattice vectors, A.
    """
    reciprocal = 2 * math.pi * np.linalg.norm(np.linalg.inv(cell), axis=0)
    # The small number keeps a length that is a round-off above a multiple from getting one more point.
    first, second, third = (max(1, math.ceil(length / spacing_per_A - 1e-6)) for length in reciprocal)
    return first, second, third
