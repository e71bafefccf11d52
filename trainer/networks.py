"""What do the stacked networks say, and how does a loss on energies and forces move their parameters?

Forces are products of the descriptor's derivatives with g = dE/dAEV, so their loss reaches the parameters through g
alone: the descriptor is never differentiated twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potential.committee import CELU_ALPHA, Committee
from potential.kernels import Inputs, Layout, backward_layers, forward_layers

__all__ = ["Networks", "Tape"]


@dataclass(frozen=True)
class Tape:
    """What the gradient pass needs: the input, and what the kernels kept."""

    seen: Inputs
    kept: object


class Networks:
    """Stacked per-element networks on parameters (n_members, n_parameters).

    shapes: (out, in) of each layer of each element. Parameters lie element by element, layer by layer, weight
    (out, in) before bias (out).
    """

    def __init__(self, shapes: Sequence[Sequence[tuple[int, int]]]) -> None:
        sizes = [out * (width + 1) for layers in shapes for out, width in layers]
        offsets = iter([0, *itertools.accumulate(sizes)])
        self._layouts = tuple(
            Layout((layers[0][1], *(out for out, _ in layers)), tuple(next(offsets) for _ in layers))
            for layers in shapes
        )
        self.n_parameters = sum(sizes)

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
        return [layout.layers(flat) for layout in self._layouts]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """hidden1, hidden2, ... of the deepest network, and output."""
        depth = max(len(layout.offsets) for layout in self._layouts)
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

    def forward(
        self, flat: Tensor, seen: Inputs, former: Tape | None = None, room: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tape]:
        """Return atomic energies (M, n_atoms), g = dE/dAEV (M, n_atoms, L), and what `gradient` needs.

        former: of an earlier call, whose memory may be used again. room: like g, which may be written there.
        """
        kept = None if former is None else former.kept
        energies, g, kept = forward_layers(flat, self._layouts, CELU_ALPHA, seen, kept, room)
        return energies, g, Tape(seen, kept)

    def gradient(
        self, flat: Tensor, tape: Tape, by_energy: Tensor, by_g: Tensor, into: Tensor, *, add: bool = True
    ) -> None:
        """Write to `into`, shaped like `flat`, the gradient of sum(by_energy * energies) + sum(by_g * g), or add it.

        by_energy: (M, n_atoms). by_g: (M, n_atoms, L).
        """
        backward_layers(flat, self._layouts, CELU_ALPHA, tape.kept, tape.seen, by_energy, by_g, into, add)


def _stacks(committee: Committee) -> list[list[tuple[Tensor, Tensor]]]:
    """Weight and bias of each layer of each element."""
    return [
        [
            (committee.get_parameter(f"networks.{e}.weights.{i}"), committee.get_parameter(f"networks.{e}.biases.{i}"))
            for i in range(len(hidden) + 1)
        ]
        for e, hidden in enumerate(committee.hidden)
    ]
