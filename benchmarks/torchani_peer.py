"""The peer: TorchANI with the weights of one of our committees, so that answers can be compared in the same run."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from potential.committee import Committee
from potential.neighbours import find_neighbours
from potential.structures import Structures

__all__ = ["deviation", "half_list", "torchani_model"]


def torchani_model(committee: Committee, members: list[int] | None = None) -> Any:
    """A torchani.arch.ANI of these members (all), in eV and float32, one thread, best of its neighbour lists.

    Raises SystemExit when TorchANI is not installed.
    """
    os.environ.setdefault("TORCHANI_NO_WARN_EXTENSIONS", "1")
    warnings.filterwarnings("ignore", module="torchani")
    try:
        from torchani.aev import AEVComputer
        from torchani.arch import ANI
        from torchani.nn import ANINetworks, Ensemble
        from torchani.nn._core import AtomicNetwork
        from torchani.sae import SelfEnergy
    except ImportError as error:
        raise SystemExit(f"{error}: install what the benchmarks compare with: pip install 'smelt[bench]'") from error
    p, elements = committee.aev, committee.elements
    aev = AEVComputer.from_constants(
        p.radial_cutoff_A, p.angular_cutoff_A, p.eta_radial, list(p.radial_shifts), p.eta_angular, p.zeta,
        list(p.angular_shifts), list(p.angle_shifts), num_species=p.n_species, cutoff_fn="cosine",
        neighborlist="cell_list" if len(elements) == 1 else "all_pairs",
    )  # fmt: skip
    state = committee.state_dict()
    networks = []
    for member in range(committee.n_members) if members is None else members:
        atomics = {}
        for e, element in enumerate(elements):
            sizes = (p.length, *committee.hidden[e], 1)
            network = AtomicNetwork(sizes, activation="celu", bias=True)
            with torch.no_grad():
                for k, layer in enumerate([*network.layers, network.final_layer]):
                    layer.weight.copy_(state[f"networks.{e}.weights.{k}"][member])
                    layer.bias.copy_(state[f"networks.{e}.biases.{k}"][member])
            atomics[element] = network
        networks.append(ANINetworks(atomics))
    shifts = SelfEnergy(list(elements), [0.0] * len(elements))
    ensemble = Ensemble(networks) if len(networks) > 1 else networks[0]
    return ANI(list(elements), aev, ensemble, shifts, periodic_table_index=True).float()


def half_list(structures: Structures, cutoff_A: float) -> tuple[Tensor, Tensor]:
    """Each pair once, as compute_from_external_neighbors wants it: indices (2, P), shifts (P, 3), A, float32."""
    found = find_neighbours(structures, cutoff_A)
    i, j, shift = found.centre, found.other, found.shift
    sign = torch.where(shift[:, 0] != 0, shift[:, 0], torch.where(shift[:, 1] != 0, shift[:, 1], shift[:, 2]))
    kept = (i < j) | ((i == j) & (sign > 0))
    moves = torch.einsum(
        "pk,pkx->px", shift[kept].double(), structures.cell.double()[structures.frame_of_atom[i[kept]]]
    )
    return torch.stack([i[kept], j[kept]]), -moves.float()


def deviation(ours: Tensor, theirs: Tensor, unit: str) -> str:
    """Largest difference, and the root mean square of what is compared."""
    theirs = theirs.detach().double()
    difference = float((ours.detach().double() - theirs).abs().max())
    return f"{difference:.1e} of {float(theirs.square().mean().sqrt()):.2g} {unit}"
