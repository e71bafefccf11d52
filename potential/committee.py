"""What does the committee say about a batch of structures: energies, forces, stress, and how far its members differ?

All members are one stack of parameters. They share neighbours, AEVs and the features behind the derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from potential.aev import AEVParameters
from potential.config import PotentialSettings
from potential.kernels import Stack, evaluate, spread
from potential.neighbours import Neighbours, find_neighbours
from potential.structures import Structures

if TYPE_CHECKING:
    from potential.calculator import CommitteeCalculator

__all__ = ["CELU_ALPHA", "Committee", "Evaluation"]

CELU_ALPHA = 0.1
LOWEST_ACTIVATION = -40 * CELU_ALPHA  # exp(-40) is as good as 0, exp(-90) would be a denormal number, and slow


@dataclass(frozen=True)
class Evaluation:
    """Hold what M members say about B structures with N atoms in all.

    energy_members: (M, B), eV, float64, with self energies. forces_mean: (N, 3), forces_members: (M, N, 3), eV/A.
    forces_deviation: (N, 3), eV/A, over the members. stress: (B, 3, 3), mean over members, stress_members:
    (M, B, 3, 3), eV/A^3, not a number where the cell has no volume. n_atoms: (B,). What was not asked for is None.
    """

    n_atoms: torch.Tensor
    energy_members: torch.Tensor
    forces_mean: torch.Tensor | None = None
    forces_members: torch.Tensor | None = None
    stress: torch.Tensor | None = None
    stress_members: torch.Tensor | None = None
    forces_deviation: torch.Tensor | None = None

    @property
    def energy(self) -> torch.Tensor:
        """(B,), eV: mean over members."""
        return self.energy_members.mean(0)

    def energy_spread(self) -> torch.Tensor:
        """(B,), eV: population standard deviation over members of the total energy / sqrt(n_atoms)."""
        return spread(self.energy_members)[1] / self.n_atoms.sqrt()

    def force_spread(self) -> torch.Tensor:
        """(N, 3), eV/A: population standard deviation over members of each component.

        Raises ValueError when forces of the members were not asked for.
        """
        if self.forces_members is None:
            raise ValueError('force_spread: evaluate with forces="members"')
        return spread(self.forces_members)[1] if self.forces_deviation is None else self.forces_deviation


class _Network(torch.nn.Module):
    """Networks of all members for one element: linear layers with CELU between them, one output, eV."""

    def __init__(self, n_members: int, n_inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [n_inputs, *hidden, 1]
        pairs = list(itertools.pairwise(widths))
        self.weights = torch.nn.ParameterList(torch.zeros(n_members, out, n) for n, out in pairs)
        self.biases = torch.nn.ParameterList(torch.zeros(n_members, out) for _, out in pairs)
        # The same parameters: to iterate over a ParameterList takes as long as the forces of two atoms.
        self.stack = Stack(list(self.weights), list(self.biases))

    def forward(self, aev: torch.Tensor) -> torch.Tensor:
        """(M, n), eV, from (n, L)."""
        value = aev.expand(len(self.weights[0]), -1, -1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            value = torch.baddbmm(bias[:, None], value, weight.transpose(1, 2))
            if layer < last:
                slope = (value.clamp(min=LOWEST_ACTIVATION, max=0) / CELU_ALPHA).exp()
                value = torch.add(value.relu(), slope - 1, alpha=CELU_ALPHA)
        return value.squeeze(2)


class Committee(torch.nn.Module):
    """Hold M stacks of per-element networks behind one AEV.

    elements: symbols, in the order of `species`. self_energies: (n_elements,), eV, float64 whatever the dtype of the
    networks. digest: of the file it was loaded from or saved to, else "".
    """

    self_energies: torch.Tensor

    def __init__(
        self, elements: Sequence[str], aev: AEVParameters, hidden: Sequence[Sequence[int]], n_members: int
    ) -> None:
        """Parameters are zero. hidden: widths of the hidden layers, one sequence per element."""
        super().__init__()
        if not (len(elements) == len(hidden) == aev.n_species) or n_members < 1:
            raise ValueError(
                f"committee: {len(elements)} elements, {len(hidden)} networks, {aev.n_species} species in the AEV, "
                f"{n_members} members; the first three must be equal and the last at least 1"
            )
        self.elements = tuple(elements)
        self.aev = aev
        self.hidden = tuple(tuple(widths) for widths in hidden)
        self.n_members = n_members
        self.self_energies = torch.zeros(len(elements), dtype=torch.float64)
        self.digest = ""
        self.networks = torch.nn.ModuleList(_Network(n_members, aev.length, widths) for widths in hidden)
        self.stacks = tuple(network.stack for network in self._stacks())

    @classmethod
    def from_settings(cls, settings: PotentialSettings, elements: Sequence[str], seed: int) -> Committee:
        """Make a committee with random weights; member m depends on (seed, m) alone.

        Raises ValueError when settings.hidden_by_element names an element that is not among `elements`.
        """
        unknown = set(settings.hidden_by_element) - set(elements)
        if unknown:
            raise ValueError(f"hidden_by_element names {sorted(unknown)}: elements are {list(elements)}")
        hidden = [settings.hidden_by_element.get(element, settings.hidden) for element in elements]
        aev = AEVParameters.from_settings(settings, len(elements))
        committee = cls(elements, aev, hidden, settings.n_members)
        committee.reset_parameters(seed)
        return committee

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw weights from a normal distribution of variance 1 / n_inputs; biases are zero."""
        for member in range(self.n_members):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + member)
            for network in self._stacks():
                for weight, bias in zip(network.weights, network.biases, strict=True):
                    drawn = torch.randn(weight.shape[1:], generator=generator, dtype=torch.float64)
                    weight[member] = drawn / weight.shape[2] ** 0.5
                    bias[member] = 0.0

    def _apply(self, fn: Any, recurse: bool = True) -> Committee:
        """Self energies go where the networks go, and stay in float64."""
        moved: Committee = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved.self_energies = moved.self_energies.to(moved.device)
        return moved

    @property
    def cutoff_A(self) -> float:
        """Within which atoms matter to each other."""
        return max(self.aev.radial_cutoff_A, self.aev.angular_cutoff_A)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def atomic_energies(self, aev: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
        """(M, N), eV, without self energies. aev: (N, L). species: (N,). Differentiable by parameters and aev."""
        parts = [network(rows) for network, rows in self._by_element(aev, species)]
        return self._in_order(parts, species)

    def evaluate(
        self,
        structures: Structures,
        neighbours: Neighbours | None = None,
        *,
        forces: Literal["none", "mean", "members"] = "mean",
        stress: bool = False,
    ) -> Evaluation:
        """Evaluate all members. Pairs beyond the cutoff (of a skin list) may be among `neighbours`.

        The work is done in the dtype of the networks; positions may be float64 beside float32 networks, so that
        nothing is lost in large cells.
        """
        if neighbours is None:
            neighbours = find_neighbours(structures, self.cutoff_A)
        # Without the members' forces one gradient will do, that of the mean energy.
        n_gradients = self.n_members if forces == "members" else int(forces == "mean" or stress)
        pairs = neighbours.row, neighbours.other, neighbours.shift
        energies, by_atom, stresses, spread_of_forces = evaluate(
            structures, *pairs, self.aev, self.stacks, self.self_energies, CELU_ALPHA, n_gradients, stress
        )
        if forces == "members":
            mean, deviation = spread_of_forces or spread(by_atom)
            stress_mean = None if stresses is None else stresses.mean(0)
            return Evaluation(structures.n_atoms, energies, mean, by_atom, stress_mean, stresses, deviation)
        return Evaluation(
            n_atoms=structures.n_atoms,
            energy_members=energies,
            forces_mean=by_atom[0] if forces == "mean" else None,
            stress=None if stresses is None else stresses[0],
        )

    def calculator(self, dtype: str = "float64", skin_A: float = 1.0) -> CommitteeCalculator:
        """An ASE calculator. It works on a copy of the committee in `dtype`, "float32" or "float64"."""
        # ASE's calculators are only needed here, and batched MD must not pay for importing them.
        from potential.calculator import CommitteeCalculator

        return CommitteeCalculator(self, dtype=dtype, skin_A=skin_A)

    def _by_element(self, aev: torch.Tensor, species: torch.Tensor) -> Iterator[tuple[_Network, torch.Tensor]]:
        """Each element's networks with the AEVs of its atoms."""
        if len(self.elements) == 1:
            yield self._stacks()[0], aev
            return
        for element, network in enumerate(self._stacks()):
            yield network, aev.index_select(0, (species == element).nonzero().squeeze(1))

    def _in_order(self, parts: Sequence[torch.Tensor], species: torch.Tensor) -> torch.Tensor:
        """Join what _by_element took apart, back into the order of the atoms; atoms are the second axis."""
        if len(parts) == 1:
            return parts[0]
        place = species.argsort(stable=True).argsort()
        return torch.cat(list(parts), 1).index_select(1, place)

    def _stacks(self) -> list[_Network]:
        return [network for network in self.networks if isinstance(network, _Network)]
