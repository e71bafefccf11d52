"""How far is a committee from labels, and does it know? Sums over frames, never all frames in memory at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potential.committee import Committee
from potential.model_file import load_committee
from potential.structures import Structures
from shards.frame import Frame
from shards.label import Label
from shards.reader import Shard

__all__ = ["evaluate_committee"]

ATOMS_PER_BATCH = 2000


def evaluate_committee(model: Path, shards: Iterable[Shard]) -> dict[str, Any]:
    """Return root mean square and mean absolute errors of the committee's mean, and its mean spreads.

    Keys: n_frames, energy_rmse_eV_per_atom, energy_mae_eV_per_atom, force_rmse_eV_per_A, force_mae_eV_per_A,
    stress_rmse_eV_per_A3, stress_mae_eV_per_A3, energy_spread_eV (of the total energy / sqrt(n_atoms)),
    force_spread_eV_per_A; NaN is left out. "by_origin" holds the same per "kind" or "kind/trigger" of frames.
    """
    committee = load_committee(model)
    sums: dict[str, _Sums] = defaultdict(_Sums)
    for batch in _batches(shards):
        for (frame, label), predicted in zip(batch, _predict(committee, [frame for frame, _ in batch]), strict=True):
            for group in ("", _group(frame)):
                sums[group].add(frame, label, predicted)
    total = sums.pop("", _Sums())
    return {
        "model": str(model),
        "digest": committee.digest,
        **total.facts(),
        "by_origin": {group: sums[group].facts() for group in sorted(sums)},
    }


class _Sums:
    """Numbers of values, their squares and their absolute values, by quantity."""

    def __init__(self) -> None:
        self.n_frames = 0
        self._n: dict[str, int] = defaultdict(int)
        self._square: dict[str, float] = defaultdict(float)
        self._absolute: dict[str, float] = defaultdict(float)

    def add(self, frame: Frame, label: Label, predicted: dict[str, NDArray[np.float64]]) -> None:
        self.n_frames += 1
        self._take("energy", (predicted["energy"] - label.energy) / frame.n_atoms)
        if label.has_forces:
            self._take("force", predicted["forces"] - label.forces)
        if label.has_stress and frame.pbc.all():
            self._take("stress", predicted["stress"] - label.stress)
        self._take("energy_spread", predicted["energy_spread"])
        self._take("force_spread", predicted["force_spread"])

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"n_frames": self.n_frames}
        for name, unit in (("energy", "eV_per_atom"), ("force", "eV_per_A"), ("stress", "eV_per_A3")):
            if self._n[name]:
                facts[f"{name}_rmse_{unit}"] = math.sqrt(self._square[name] / self._n[name])
                facts[f"{name}_mae_{unit}"] = self._absolute[name] / self._n[name]
        for name, unit in (("energy_spread", "eV"), ("force_spread", "eV_per_A")):
            if self._n[name]:
                facts[f"{name}_{unit}"] = self._absolute[name] / self._n[name]
        return facts

    def _take(self, name: str, values: NDArray[np.float64]) -> None:
        self._n[name] += values.size
        self._square[name] += float(np.square(values).sum())
        self._absolute[name] += float(np.abs(values).sum())


def _batches(shards: Iterable[Shard]) -> Iterator[list[tuple[Frame, Label]]]:
    batch: list[tuple[Frame, Label]] = []
    for shard in shards:
        for row in shard.rows():
            batch.append(row)
            if sum(frame.n_atoms for frame, _ in batch) >= ATOMS_PER_BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _predict(committee: Committee, frames: list[Frame]) -> Iterator[dict[str, NDArray[np.float64]]]:
    structures = Structures.from_frames(frames, committee.elements, torch.float64)
    evaluation = committee.evaluate(structures, forces="members", stress=True)
    assert evaluation.forces_members is not None
    assert evaluation.stress is not None
    forces, spread = evaluation.forces_members.mean(0), evaluation.force_spread()
    ends = structures.n_atoms.cumsum(0).tolist()
    for i, end in enumerate(ends):
        atoms = slice(end - frames[i].n_atoms, end)
        yield {
            "energy": evaluation.energy[i].double().numpy(),
            "forces": forces[atoms].double().numpy(),
            "stress": evaluation.stress[i].double().numpy(),
            "energy_spread": evaluation.energy_spread()[i].double().numpy(),
            "force_spread": spread[atoms].double().numpy(),
        }


def _group(frame: Frame) -> str:
    return f"{frame.origin.kind}/{frame.origin.trigger}" if frame.origin.trigger else frame.origin.kind
