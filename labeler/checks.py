"""Is a frame worth asking about, and is an answer fit to be stored? Pure: touches no file and no code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from labeler.config import LabelerSettings
from labeler.engine import Answer
from shards.frame import Frame

__all__ = ["answer_fault", "frame_fault"]


def frame_fault(frame: Frame, settings: LabelerSettings) -> str:
    """What is wrong with the frame; empty when nothing is."""
    shortest = _shortest(frame, settings.minimum_distance_A)
    if shortest < settings.minimum_distance_A:
        return f"two atoms {shortest:.3f} A apart: labeler.minimum_distance_A is {settings.minimum_distance_A}"
    return ""


def _shortest(frame: Frame, within_A: float) -> float:
    """Shortest pair distance, periodic images included, A; infinite when there is no pair within `within_A`."""
    from ase import neighborlist  # only here: it takes a third of a second, and drivers compute no label

    find_pairs: Any = neighborlist.primitive_neighbor_list  # ASE has no types for it
    distances = find_pairs("d", frame.pbc, frame.cell, frame.positions, within_A)
    return float(np.min(distances, initial=np.inf))


def answer_fault(answer: Answer, n_atoms: int, settings: LabelerSettings) -> str:
    """What is wrong with the answer; empty when nothing is."""
    for name, array, shape in (("forces", answer.forces, (n_atoms, 3)), ("stress", answer.stress, (3, 3))):
        if array is not None and array.shape != shape:
            return f"{name} of shape {array.shape}: must be {shape}"
        if array is not None and not np.isfinite(array).all():
            return f"{name} not finite"
    for name, value in answer.ingredients.items():
        if not math.isfinite(value):
            return f"ingredient {name} = {value}: not finite"
    per_atom = abs(answer.energy) / n_atoms
    if not per_atom <= settings.max_energy_eV_per_atom:
        return (
            f"energy {answer.energy} eV for {n_atoms} atoms: labeler.max_energy_eV_per_atom is"
            f" {settings.max_energy_eV_per_atom}"
        )
    largest = float(np.max(np.abs(answer.forces), initial=0.0)) if answer.forces is not None else 0.0
    if largest > settings.max_force_eV_per_A:
        return f"force component of {largest:.3g} eV/A: labeler.max_force_eV_per_A is {settings.max_force_eV_per_A}"
    return ""
