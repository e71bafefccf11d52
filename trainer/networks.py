"""What do the stacked networks say, and how does a loss on energies and forces move their parameters?

Forces are products of the descriptor's derivatives with g = dE/dAEV, so their loss reaches the parameters through g
alone. Both passes are written out here: no graph is kept, and the descriptor is never differentiated twice. The
gradient of <v, g> is that of the directional derivative of E along v (Pearlmutter, doi:10.1162/neco.1994.6.1.147).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potential.committee import CELU_ALPHA, Committee

__all__ = ["Networks", "Tape"]

# exp(-40) is below the rounding of one in both precisions; smaller values would become denormal, which are slow.
SATURATED = -40 * CELU_ALPHA


@dataclass
class Tape:
    """What the gradient pass needs of one element's forward pass; lists run over hidden layers."""

    atoms: Tensor
    inputs: list[Tensor]  # of each layer, the last being the linear output; (n, L) or (M, n, width)
    slopes: list[Tensor]  # CELU'(z), (M, n, width)
    pulls: list[Tensor]  # dE/dz, (M, n, width)


class Networks:
    """Stacked per-element networks on parameters (n_members, n_parameters).

    shapes: (out, in) of each layer of each element. Parameters lie element by element, layer by layer, weight
    (out, in) before bias (out).
    """

    def __init__(self, shapes: Sequence[Sequence[tuple[int, int]]]) -> None:
        self._shapes = [list(layers) for layers in shapes]
        self.n_parameters = sum(out * (width + 1) for layers in shapes for out, width in layers)

    @classmethod
    def of(cls, committee: Committee) -> Networks:
        return cls([[(w.shape[1], w.shape[2]) for w, _ in layers] for layers in _stacks(committee)])

    @torch.no_grad()
    def take(self, committee: Committee, dtype: torch.dtype) -> Tensor:
        """Copy the committee's weights into one array, (n_members, n_parameters)."""
        flat = torch.empty(committee.n_members, self.n_parameters, dtype=dtype)
        for slots, layers in zip(self.layers(flat), _stacks(committee), strict=True):
            for (weight_slot, bias_slot), (weight, bias) in zip(slots, layers, strict=True):
                weight_slot.copy_(weight)
                bias_slot.copy_(bias)
        return flat

    @torch.no_grad()
    def give(self, flat: Tensor, committee: Committee) -> None:
        """Copy `flat` into the committee."""
        for slots, layers in zip(self.layers(flat), _stacks(committee), strict=True):
            for (weight_slot, bias_slot), (weight, bias) in zip(slots, layers, strict=True):
                weight.copy_(weight_slot)
                bias.copy_(bias_slot)

    def layers(self, flat: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """View `flat`, (M, n_parameters), as weight (M, out, in) and bias (M, out) of each layer of each element."""
        elements, at = [], 0
        for shapes in self._shapes:
            layers = []
            for out, width in shapes:
                weight = flat[:, at : at + out * width].view(-1, out, width)
                bias = flat[:, at + out * width : at + out * (width + 1)]
                layers.append((weight, bias))
                at += out * (width + 1)
            elements.append(layers)
        return elements

    @property
    def layer_names(self) -> tuple[str, ...]:
        """hidden1, hidden2, ... of the deepest network, and output."""
        depth = max(len(layers) for layers in self._shapes)
        return (*(f"hidden{i}" for i in range(1, depth)), "output")

    def spread(self, factors: Mapping[str, float]) -> Tensor:
        """Give every parameter the factor of its layer, 1 where none is named: (n_parameters,), float64."""
        spread = torch.ones(1, self.n_parameters, dtype=torch.float64)
        for layers in self.layers(spread):
            names = (*(f"hidden{i}" for i in range(1, len(layers))), "output")
            for name, (weight, bias) in zip(names, layers, strict=True):
                weight.fill_(factors.get(name, 1.0))
                bias.fill_(factors.get(name, 1.0))
        return spread[0]

    def forward(self, flat: Tensor, aev: Tensor, species: Tensor) -> tuple[Tensor, Tensor, list[Tape]]:
        """Return atomic energies (M, n_atoms), g = dE/dAEV (M, n_atoms, L), and what `gradient` needs.

        aev: (n_atoms, L). species: (n_atoms,), index of each atom's element.
        """
        energies = aev.new_empty(len(flat), len(aev))
        g = aev.new_empty(len(flat), *aev.shape)
        tapes = []
        for element, layers in enumerate(self.layers(flat)):
            atoms = torch.nonzero(species == element).squeeze(1)
            whole = len(atoms) == len(aev)
            part, pull, tape = _forward(layers, aev if whole else aev[atoms], atoms)
            if whole:
                return part, pull, [Tape(atoms[:0], [], [], [])] * element + [tape]
            energies[:, atoms], g[:, atoms] = part, pull
            tapes.append(tape)
        return energies, g, tapes

    def gradient(self, flat: Tensor, tapes: Sequence[Tape], weights: Tensor, v: Tensor, into: Tensor) -> None:
        """Add to `into`, shaped like `flat`, the gradient of sum(weights * energies) + sum(v * g).

        weights: (M, n_atoms). v: (M, n_atoms, L).
        """
        for layers, slots, tape in zip(self.layers(flat), self.layers(into), tapes, strict=False):
            if tape.inputs:
                whole = len(tape.atoms) == weights.shape[1]
                c, t = (weights, v) if whole else (weights[:, tape.atoms], v[:, tape.atoms])
                _gradient(layers, slots, tape, c, t)


Layers = Sequence[tuple[Tensor, Tensor]]


def _stacks(committee: Committee) -> list[list[tuple[Tensor, Tensor]]]:
    """Weight and bias of each layer of each element."""
    return [
        [
            (committee.get_parameter(f"networks.{e}.weights.{i}"), committee.get_parameter(f"networks.{e}.biases.{i}"))
            for i in range(len(hidden) + 1)
        ]
        for e, hidden in enumerate(committee.hidden)
    ]


def _forward(layers: Layers, aev: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tape]:
    inputs, slopes = [aev], []
    hidden = aev.expand(len(layers[0][0]), *aev.shape)
    for weight, bias in layers[:-1]:
        z = torch.baddbmm(bias[:, None], hidden, weight.mT)
        slope = z.clamp(SATURATED, 0.0).div_(CELU_ALPHA).exp_()
        hidden = z.clamp_(min=0.0).add_(slope, alpha=CELU_ALPHA).sub_(CELU_ALPHA)
        inputs.append(hidden)
        slopes.append(slope)
    weight, bias = layers[-1]
    energies = torch.baddbmm(bias[:, None], hidden, weight.mT).squeeze(2)
    pulls = [weight * slopes[-1]]
    for (weight, _), slope in zip(reversed(layers[1:-1]), reversed(slopes[:-1]), strict=True):
        pulls.insert(0, torch.bmm(pulls[0], weight).mul_(slope))
    return energies, torch.bmm(pulls[0], layers[0][0]), Tape(atoms, inputs, slopes, pulls)


def _gradient(layers: Layers, slots: Layers, tape: Tape, weights: Tensor, v: Tensor) -> None:
    tangents, tilts = [v], []  # directional derivatives along v: of each layer's input, of each z
    for (weight, _), slope in zip(layers[:-1], tape.slopes, strict=True):
        tilts.append(torch.bmm(tangents[-1], weight.mT))
        tangents.append(tilts[-1] * slope)
    hidden, (weight, _), (weight_slot, bias_slot) = tape.inputs[-1], layers[-1], slots[-1]
    weight_slot.add_(torch.bmm(weights[:, None], hidden)).add_(tangents[-1].sum(1, keepdim=True))
    bias_slot.add_(weights.sum(1, keepdim=True))
    back = weights[:, :, None] * weight
    for i in reversed(range(len(layers) - 1)):
        slope, pull = tape.slopes[i], tape.pulls[i]
        # CELU'' is slope / alpha where z < 0, which is where slope < 1, and 0 elsewhere.
        bend = tilts[i].mul_(pull).mul_(slope < 1).div_(CELU_ALPHA)
        z_back = bend.add_(back.mul_(slope))
        hidden = tape.inputs[i] if i else tape.inputs[0].expand(len(weights), *tape.inputs[0].shape)
        weight_slot, bias_slot = slots[i]
        weight_slot.baddbmm_(z_back.mT, hidden).baddbmm_(pull.mT, tangents[i])
        bias_slot.add_(z_back.sum(1))
        if i:
            back = torch.bmm(z_back, layers[i][0])
