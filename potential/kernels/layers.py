"""How do a loss and its gradient pass through stacked networks, exactly? Plain PyTorch; the C++ version is held to it.

The loss depends on energies E and on g = dE/dAEV. Its gradient by the parameters is that of c E + <v, g>, with c and v
the loss's derivatives, and <v, g> is the derivative of E along v (Pearlmutter, 10.1162/neco.1994.6.1.147). Both passes
are written out: no graph is kept, and nothing is differentiated twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "N_ERRORS",
    "Inputs",
    "Layout",
    "Tape",
    "backward_layers",
    "difference",
    "forward_layers",
    "respond",
    "tally",
]

N_ERRORS = 5  # of `respond`
SATURATED = -40.0  # times alpha: exp(-40) is below the rounding of one; smaller values become denormal, and slow


@dataclass(frozen=True)
class Layout:
    """Where the layers of one element's networks lie in parameters (M, P).

    widths: of the AEV, the hidden layers, and 1. offsets: where each weight (out, in) begins; its bias (out,) follows.
    """

    widths: tuple[int, ...]
    offsets: tuple[int, ...]

    def layers(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """View `flat`, (M, P), as weight (M, out, in) and bias (M, out) of each layer."""
        found = []
        for at, n_in, n_out in zip(self.offsets, self.widths, self.widths[1:], strict=False):
            weight = flat[:, at : at + n_out * n_in].view(-1, n_out, n_in)
            found.append((weight, flat[:, at + n_out * n_in : at + n_out * (n_in + 1)]))
        return found


@dataclass(frozen=True)
class Inputs:
    """What the networks see of N atoms.

    aev: (R, L). elements: of each, its atoms, (n,). rows: (N,), where each atom's AEV is; without, they are in order.
    """

    aev: Tensor
    elements: Sequence[Tensor]
    rows: Tensor | None = None

    @property
    def n_atoms(self) -> int:
        return len(self.aev) if self.rows is None else len(self.rows)

    def results(self, n_members: int, room: Tensor | None) -> tuple[Tensor, Tensor]:
        """Memory for energies (M, N) and g (M, N, L), the latter in `room` where there is one."""
        energies = self.aev.new_empty(n_members, self.n_atoms)
        return energies, self.aev.new_empty(*energies.shape, self.aev.shape[1]) if room is None else room


@dataclass(frozen=True)
class Tape:
    """What the way back needs of an element's forward pass; lists run over hidden layers."""

    inputs: list[Tensor]  # of each layer, the last being the linear output; (n, L) or (M, n, width)
    slopes: list[Tensor]  # CELU'(z), (M, n, width)
    pulls: list[Tensor]  # dE/dz, (M, n, width)


def forward_layers(
    flat: Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    seen: Inputs,
    former: object = None,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tape]]:
    """As potential.kernels.forward_layers; no memory is used again but `room`."""
    energies, g = seen.results(len(flat), room)
    tape = []
    for layout, atoms in zip(layouts, seen.elements, strict=True):
        layers = layout.layers(flat)
        rows = atoms if seen.rows is None else seen.rows.index_select(0, atoms)
        inputs, slopes = [seen.aev.index_select(0, rows)], []
        hidden = inputs[0].expand(len(flat), -1, -1)
        for weight, bias in layers[:-1]:
            z = torch.baddbmm(bias[:, None], hidden, weight.mT)
            slope = z.clamp(SATURATED * celu_alpha, 0.0).div_(celu_alpha).exp_()
            hidden = z.clamp_(min=0.0).add_(slope, alpha=celu_alpha).sub_(celu_alpha)
            inputs.append(hidden)
            slopes.append(slope)
        weight, bias = layers[-1]
        energies[:, atoms] = torch.baddbmm(bias[:, None], hidden, weight.mT).squeeze(2)
        pulls = [weight * slopes[-1]]
        for (weight, _), slope in zip(reversed(layers[1:-1]), reversed(slopes[:-1]), strict=True):
            pulls.insert(0, torch.bmm(pulls[0], weight).mul_(slope))
        g[:, atoms] = torch.bmm(pulls[0], layers[0][0])
        tape.append(Tape(inputs, slopes, pulls))
    return energies, g, tape


def backward_layers(
    flat: Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    tape: Sequence[Tape],
    seen: Inputs,
    by_energy: Tensor,
    by_g: Tensor,
    into: Tensor,
    add: bool = True,
) -> None:
    """As potential.kernels.backward_layers."""
    if not add:
        into.zero_()
    for layout, passed, atoms in zip(layouts, tape, seen.elements, strict=True):
        by = by_energy.index_select(1, atoms), by_g.index_select(1, atoms)
        _backward(layout.layers(flat), celu_alpha, passed, *by, layout.layers(into))


def _backward(
    layers: Sequence[tuple[Tensor, Tensor]],
    celu_alpha: float,
    tape: Tape,
    by_energy: Tensor,
    by_g: Tensor,
    into: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Of one element, whose atoms' cotangents are (M, n) and (M, n, L)."""
    tangents, tilts = [by_g], []  # along by_g: changes of each layer's input, of each z
    for (weight, _), slope in zip(layers[:-1], tape.slopes, strict=True):
        tilts.append(torch.bmm(tangents[-1], weight.mT))
        tangents.append(tilts[-1] * slope)
    (weight, _), (weight_slot, bias_slot) = layers[-1], into[-1]
    weight_slot.add_(torch.bmm(by_energy[:, None], tape.inputs[-1])).add_(tangents[-1].sum(1, keepdim=True))
    bias_slot.add_(by_energy.sum(1, keepdim=True))
    back = by_energy[:, :, None] * weight
    for i in reversed(range(len(layers) - 1)):
        slope, pull = tape.slopes[i], tape.pulls[i]
        # CELU'' is slope / alpha where z < 0, which is where slope < 1, and 0 elsewhere.
        bend = tilts[i].mul_(pull).mul_(slope < 1).div_(celu_alpha)
        z_back = bend.add_(back.mul_(slope))
        hidden = tape.inputs[i] if i else tape.inputs[0].expand(len(z_back), -1, -1)
        weight_slot, bias_slot = into[i]
        weight_slot.baddbmm_(z_back.mT, hidden).baddbmm_(pull.mT, tangents[i])
        bias_slot.add_(z_back.sum(1))
        if i:
            back = torch.bmm(z_back, layers[i][0])


def keep(jacobian: Tensor) -> Tensor:
    """As it is."""
    return jacobian.contiguous()


def respond(
    jacobians: Sequence[Tensor],
    known_forces: Tensor,
    known_virial: Tensor,
    g: Tensor,
    scale: Tensor,
    force_scale: float,
    virial_scale: float,
    force_cap: float,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As potential.kernels.respond; `room` is not used."""
    n_atoms = [(len(jacobian) - 6) // 3 for jacobian in jacobians]
    first = list(itertools.accumulate(n_atoms[:-1], initial=0))
    forces, virials, v = g.new_empty(*g.shape[:2], 3), g.new_empty(len(g), len(jacobians), 6), torch.empty_like(g)
    # Structures of one size are one product.
    for n in sorted(set(n_atoms)):
        alike = [structure for structure, size in enumerate(n_atoms) if size == n]
        jacobian = torch.stack([jacobians[i] for i in alike]) if len(alike) > 1 else jacobians[alike[0]][None]
        atoms = torch.tensor([first[i] + atom for i in alike for atom in range(n)]).to(g.device, non_blocking=True)
        here = torch.tensor(alike).to(g.device, non_blocking=True)
        rows = torch.bmm(g.index_select(1, atoms).view(len(g), len(alike), -1).transpose(0, 1), jacobian.mT)
        known = known_forces.index_select(0, atoms).view(len(alike), 3 * n), known_virial.index_select(0, here)
        off = (rows - torch.cat(known, dim=1)[:, None]).nan_to_num(0.0)
        off[..., : 3 * n] = off[..., : 3 * n].clamp(-force_cap, force_cap) * force_scale
        off[..., 3 * n :] *= virial_scale
        off *= (scale.index_select(1, here) / n).T[:, :, None]
        v.index_copy_(1, atoms, torch.bmm(off, jacobian).transpose(0, 1).reshape(len(g), len(atoms), -1))
        forces.index_copy_(1, atoms, rows[..., : 3 * n].transpose(0, 1).reshape(len(g), len(atoms), 3))
        virials.index_copy_(1, here, rows[..., 3 * n :].transpose(0, 1))
    frame_of_atom = torch.repeat_interleave(torch.tensor(n_atoms)).to(g.device, non_blocking=True)
    return forces, virials, v, tally(forces, virials, known_forces, known_virial, frame_of_atom, force_cap)


def tally(
    forces: Tensor, virial: Tensor, known_forces: Tensor, known_virial: Tensor, frame_of_atom: Tensor, force_cap: float
) -> Tensor:
    """The last of what potential.kernels.respond returns, (M, B, 5), of forces (M, N, 3) and virials (M, B, 6)."""
    off_forces, has_forces = difference(forces, known_forces)
    off_virial, has_virial = difference(virial, known_virial)
    capped = off_forces.clamp(-force_cap, force_cap)
    huber, n_forces = capped * (2 * off_forces - capped), has_forces.sum(1).expand(off_forces.shape[:2])
    of_atoms = torch.stack([n_forces, huber.sum(2), off_forces.square().sum(2)], dim=2)
    of_forces = of_atoms.new_zeros(*virial.shape[:2], 3).index_add_(1, frame_of_atom, of_atoms)
    of_virial = torch.stack([has_virial.sum(1).expand(virial.shape[:2]), off_virial.square().sum(2)], dim=2)
    return torch.cat([of_forces, of_virial], dim=2)


def difference(predicted: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction less label, 0 where there is no label, and where there is one, in the prediction's dtype."""
    missing = label.isnan()
    return (predicted - label).masked_fill_(missing, 0.0), missing.logical_not().to(predicted.dtype)
