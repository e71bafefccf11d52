"""How do atoms move by one step of Langevin dynamics, exactly? Plain PyTorch; the C++ version is held to it.

Random numbers are a function of (key of the frame, step, atom within the frame): Philox4x32-10 (Salmon et al., SC11,
10.1145/2063384.2063405) on the counter (atom, step, step >> 32, 0), then Box and Muller's transform of the upper 24
bits of its words. So nobody's numbers depend on batch mates, threads or devices.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Moving", "drift", "kick", "normals"]

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


class Moving(Protocol):
    """N atoms of B frames, all float64: positions, velocities, forces (N, 3), in A, A/fs, eV/A.

    inverse_mass: (N, 1), 1/amu. noise_scale: (N, 1), A/fs, standard deviation of the random kicks. frame_of_atom: (N,).
    first_atom: (B + 1,). noise_key: (B,), int64, of each frame's random numbers. Positions and velocities change in
    place.
    """

    positions: Tensor
    velocities: Tensor
    forces: Tensor
    inverse_mass: Tensor
    noise_scale: Tensor
    frame_of_atom: Tensor
    first_atom: Tensor
    noise_key: Tensor


def drift(atoms: Moving, step: Tensor, push: float, half_step_fs: float, damping: float) -> None:
    """Half a kick by the forces, half a step, friction and noise, half a step: B, A, O, A.

    step: (B,), number of each frame's step. push: velocity per force over mass. damping: factor on velocities; 1 means
    no noise either.
    """
    atoms.velocities.addcmul_(atoms.forces, atoms.inverse_mass, value=push)
    atoms.positions.add_(atoms.velocities, alpha=half_step_fs)
    if damping != 1:
        atoms.velocities.mul_(damping).addcmul_(normals(atoms, step), atoms.noise_scale)
    atoms.positions.add_(atoms.velocities, alpha=half_step_fs)


def kick(atoms: Moving, push: float, max_force_eV_A: float) -> bool:
    """Half a kick by the forces, if no component is above the limit or not a number; else nothing but False."""
    if not float(atoms.forces.abs().amax()) <= max_force_eV_A:
        return False
    atoms.velocities.addcmul_(atoms.forces, atoms.inverse_mass, value=push)
    return True


def normals(atoms: Moving, step: Tensor) -> Tensor:
    """(N, 3), float64: independent standard normal numbers for each atom and step (B,)."""
    frame = atoms.frame_of_atom
    index = torch.arange(len(frame), device=frame.device) - atoms.first_atom[frame]
    step, key = step[frame], atoms.noise_key[frame]
    words = philox((index, step & LOW, step >> 32 & LOW, torch.zeros_like(index)), (key & LOW, key >> 32 & LOW))
    fractions = [(word >> 8).double() / 2**24 for word in words]
    radius, other_radius = ((-2 * (fraction + 2**-24).log()).clamp(min=0).sqrt() for fraction in fractions[::2])
    angle, other_angle = (math.pi * (2 * fraction - 1) for fraction in fractions[1::2])
    return torch.stack([radius * angle.cos(), radius * angle.sin(), other_radius * other_angle.cos()], dim=1)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four random 32-bit words, (n,), from four of a counter and two of a key; all int64."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        # Products wrap round to negative numbers, but all their bits are right.
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (q >> 32 & LOW) ^ b ^ low, q & LOW, (p >> 32 & LOW) ^ d ^ high, p & LOW
        low, high = low + INCREMENTS[0] & LOW, high + INCREMENTS[1] & LOW
    return a, b, c, d
