"""How wrong are energies, forces and stress, and which way is better? Pure arithmetic per member and structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potential.kernels import difference, tally

__all__ = [
    "COLUMNS",
    "Predicted",
    "References",
    "Weights",
    "compare",
    "energy_pulls",
    "errors_of",
    "mean_loss",
    "pulls",
    "summarise",
]

# Sums that are kept per member; every error of a training is made from them.
COLUMNS = ("n", "loss", "n_energy", "energy", "n_force", "force", "n_stress", "stress")

GPA = 160.2176634  # GPa in 1 eV/A^3, from the exact SI value of the elementary charge


@dataclass(frozen=True)
class Weights:
    """The loss of a structure: energy * dE^2/n + force * mean huber(dF) + stress * mean dW^2/n, W = volume * stress."""

    energy: float
    force: float  # A^2
    stress: float
    force_cap: float  # eV/A


@dataclass(frozen=True)
class References:
    """Labels of B structures with N atoms in all; NaN where there is none.

    energy: (B,), eV, less the self energies. forces: (N, 3), eV/A. virial: (B, 6), volume * stress, eV, in the order
    xx yy zz yz xz xy. volume: (B,), A^3. n_atoms: (B,). frame_of_atom: (N,).
    """

    energy: Tensor
    forces: Tensor
    virial: Tensor
    volume: Tensor
    n_atoms: Tensor
    frame_of_atom: Tensor


# Energies (M, B) of a block, errors (M, B, 5) of its forces and virials, as potential.kernels.respond and `tally` have
# them, and its labels.
Predicted = tuple[Tensor, Tensor, References]


def compare(blocks: Sequence[Predicted], weights: Weights) -> Tensor:
    """(M, B, 8), COLUMNS, of the structures of all blocks; what has no label counts as right."""
    energies, errors_of_others, labels = zip(*blocks, strict=True)
    energy, errors = torch.cat(energies, dim=1), torch.cat(errors_of_others, dim=1)
    known, volume, n = (torch.cat([getattr(each, name) for each in labels]) for name in ("energy", "volume", "n_atoms"))
    off_energy, has_energy = difference(energy, known)
    n_force, huber, force, n_virial, virial = errors.unbind(2)
    per_atom = off_energy / n
    loss = weights.energy * off_energy * per_atom + (weights.force / 3 * huber + weights.stress / 6 * virial) / n
    columns = [
        torch.ones_like(loss),
        loss,
        has_energy.expand_as(loss),
        per_atom.square(),
        n_force,
        force,
        n_virial,
        virial / volume.square(),
    ]
    return torch.stack(columns, dim=2)


def errors_of(forces: Tensor, virial: Tensor, truth: References, weights: Weights) -> Tensor:
    """(M, B, 5), for `compare`, of predicted forces (M, N, 3) and virials (M, B, 6)."""
    return tally(forces, virial, truth.forces, truth.virial, truth.frame_of_atom, weights.force_cap)


def energy_pulls(energy: Tensor, truth: References, weights: Weights, scale: Tensor) -> Tensor:
    """Derivative of sum(scale * loss) by energy, (M, B); scale: (M, B)."""
    off_energy = (energy - truth.energy).masked_fill_(truth.energy.isnan(), 0.0)
    return off_energy.mul_(scale).mul_(2 * weights.energy).div_(truth.n_atoms)


def pulls(forces: Tensor, virial: Tensor, truth: References, weights: Weights, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of sum(scale * loss) by forces (M, N, 3) and virial (M, B, 6); scale: (M, B)."""
    scale = scale / truth.n_atoms
    off_forces, _ = difference(forces, truth.forces)
    off_virial, _ = difference(virial, truth.virial)
    capped = off_forces.clamp(-weights.force_cap, weights.force_cap)
    by_forces = 2 / 3 * weights.force * capped * scale[:, truth.frame_of_atom, None]
    return by_forces, weights.stress / 3 * off_virial * scale[:, :, None]


def mean_loss(sums: Tensor) -> list[float]:
    """Return each member's loss from its sums, (M, 8)."""
    losses: list[float] = (sums[:, COLUMNS.index("loss")] / sums[:, COLUMNS.index("n")]).tolist()
    return losses


def summarise(sums: Tensor) -> dict[str, list[float | None]]:
    """Turn sums, (M, 8), into per-member loss and root mean square errors; None where nothing was compared."""
    by_name = dict(zip(COLUMNS, sums.double().unbind(1), strict=True))

    def root(name: str, unit: float) -> list[float | None]:
        return _where(by_name[f"n_{name}"], (by_name[name] / by_name[f"n_{name}"]).sqrt() * unit)

    return {
        "loss": _where(by_name["n"], by_name["loss"] / by_name["n"]),
        "energy_meV_per_atom": root("energy", 1000.0),
        "force_eV_per_A": root("force", 1.0),
        "stress_GPa": root("stress", GPA),
    }


def _where(counts: Tensor, values: Tensor) -> list[float | None]:
    return [value if n else None for n, value in zip(counts.tolist(), values.tolist(), strict=True)]
