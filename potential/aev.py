"""Which symmetry functions describe an atom, and where does each stand in its AEV?

Atomic environment vector (AEV) of ANI, 10.1039/C6SC05720A, eqs. 2-4, with the scaled angle of the reference code:

    fc(r; Rc) = cos(pi r / Rc) / 2 + 1/2, 0 beyond Rc
    radial:  sum_j    0.25 exp(-EtaR (r_ij - ShfR)^2) fc(r_ij; Rcr)
    angular: sum_j<k  2 ((1 + cos(theta - ShfZ)) / 2)^Zeta exp(-EtaA ((r_ij + r_ik) / 2 - ShfA)^2)
                      fc(r_ij; Rca) fc(r_ik; Rca),        theta = acos(0.95 cos(theta_ijk))

Layout: radial by species of the neighbour, then angular by pair of species; within a pair ShfA is major, ShfZ minor.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import astuple, dataclass

import numpy as np

from potential.config import PotentialSettings

__all__ = ["ANGLE_SCALE", "AEVParameters"]

ANGLE_SCALE = 0.95  # keeps the angle, and so its derivative, away from 0 and pi

# Neighbouring bins may overlap by this much; with it the rule returns the published exponents exactly.
RADIAL_OVERLAP = 0.40
ANGULAR_OVERLAP = 0.35


@dataclass(frozen=True)
class AEVParameters:
    """Hold the constants of the formula above. Cutoffs and shifts in A, angles in rad, eta in 1/A^2."""

    radial_cutoff_A: float
    angular_cutoff_A: float
    eta_radial: float
    eta_angular: float
    zeta: float
    radial_shifts: tuple[float, ...]
    angular_shifts: tuple[float, ...]
    angle_shifts: tuple[float, ...]
    n_species: int

    @classmethod
    def from_settings(cls, settings: PotentialSettings, n_species: int) -> AEVParameters:
        """Place the bins evenly and make them as narrow as the overlap allows, as ANI-Al and its relatives do."""
        first = settings.first_shift_A
        radial = _shifts(first, settings.radial_cutoff_A, settings.n_radial)
        angular = _shifts(first, settings.angular_cutoff_A, settings.n_angular_radial)
        width = math.pi / settings.n_angular
        return cls(
            radial_cutoff_A=settings.radial_cutoff_A,
            angular_cutoff_A=settings.angular_cutoff_A,
            eta_radial=_narrowest_eta(radial[1] - radial[0]),
            eta_angular=_narrowest_eta(angular[1] - angular[0]),
            zeta=_narrowest_zeta(width),
            radial_shifts=radial,
            angular_shifts=angular,
            angle_shifts=tuple(width * (k + 0.5) for k in range(settings.n_angular)),
            n_species=n_species,
        )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Of all fields, which takes longer than to find what is kept for them."""
        return hash(astuple(self))

    @property
    def n_radial(self) -> int:
        """Radial functions of all species together; the angular part starts here."""
        return self.n_species * len(self.radial_shifts)

    @property
    def n_per_pair(self) -> int:
        return len(self.angular_shifts) * len(self.angle_shifts)

    @property
    def species_pairs(self) -> tuple[tuple[int, int], ...]:
        """(0, 0), (0, 1), .., (0, n-1), (1, 1), ..: the order of the angular part."""
        return tuple((a, b) for a in range(self.n_species) for b in range(a, self.n_species))

    @property
    def length(self) -> int:
        return self.n_radial + self.n_species * (self.n_species + 1) // 2 * self.n_per_pair


def _shifts(first_A: float, cutoff_A: float, n: int) -> tuple[float, ...]:
    return tuple(first_A + (cutoff_A - first_A) / n * k for k in range(n))


def _narrowest_eta(step_A: float) -> float:
    """Smallest multiple of 0.1 /A^2 at which Gaussians `step_A` apart share at most RADIAL_OVERLAP of their area."""

    def narrow_enough(tenths: int) -> bool:
        return math.erfc(math.sqrt(tenths / 10) * step_A / 2) <= RADIAL_OVERLAP

    return (bisect.bisect_left(range(2, 1_000_000), True, key=narrow_enough) + 2) / 10


def _narrowest_zeta(step_rad: float) -> float:
    """Smallest multiple of 0.1 above 4 at which neighbouring angular bins share at most ANGULAR_OVERLAP.

    The published rule integrates over (-6, 6) rad, which is not a whole number of periods: half of the image of the
    first bin one turn away is left out. Kept, because the published exponents follow from it.
    """
    angles = np.linspace(-6.0, 6.0, 120_001)
    first, second = (np.log1p(np.cos(angles - step_rad * k)) - math.log(2) for k in (0.5, 1.5))

    def narrow_enough(tenths: int) -> bool:
        low, high = np.exp(tenths / 10 * first), np.exp(tenths / 10 * second)
        return bool(np.minimum(low, high).sum() <= ANGULAR_OVERLAP * low.sum())

    return (bisect.bisect_left(range(41, 100_000), True, key=narrow_enough) + 41) / 10
