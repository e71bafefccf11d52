"""How is a committee carried from the level of theory it was trained on to a higher one?

Its networks go on from where they are, some layers frozen. The self energies take up what differs by composition alone.
Energies are always of the higher level. Forces may be borrowed from the lower one: they are then a term of their own,
which training follows but validation does not look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from potential.committee import Committee, Evaluation
from potential.structures import Structures
from shards.label import Level
from shards.outcome import Receipt
from trainer.config import TransferSettings
from trainer.dataset import Dataset, DatasetError, fit_self_energies, load_dataset
from trainer.networks import Networks

__all__ = ["borrow_forces", "check_levels", "compare_layers", "layer_factors", "shift_self_energies"]

FRAMES_PER_BATCH = 64


def check_levels(parent: Mapping[str, Any], parent_path: str, dataset: Dataset, transfer: bool) -> None:
    """Refuse a start that would mix levels unasked, or a transfer that goes nowhere.

    parent: metadata of the model; without a level (an imported committee) nothing is known and nothing refused.

    Raises:
        DatasetError
    """
    level = parent.get("level")
    if not level:
        return
    same = Level(**level) == dataset.level
    named = f"{level['engine']} {level['version']}"
    if same and transfer:
        raise DatasetError(
            f"{parent_path}: was trained on this very level of theory ({named}): go on with `smelt train` and"
            " trainer.warm_start, or name labels of another level"
        )
    if not same and not transfer:
        raise DatasetError(
            f"{parent_path}: was trained on another level of theory ({named}): carry it to these labels with"
            " `smelt transfer`, or set trainer.warm_start = false"
        )


def layer_factors(networks: Networks, settings: TransferSettings) -> Tensor:
    """By what each parameter's step is multiplied, (n_parameters,): 0 where frozen.

    Raises:
        ValueError: a layer that the networks do not have, or all frozen.
    """
    named = [*settings.freeze, *settings.rate_factors]
    if unknown := sorted(set(named) - set(networks.layer_names)):
        raise ValueError(f"transfer: no layer {', '.join(unknown)}: there are {', '.join(networks.layer_names)}")
    factors = dict(settings.rate_factors) | dict.fromkeys(settings.freeze, 0.0)
    spread = networks.spread(factors)
    if not spread.any():
        raise ValueError("transfer: every layer is frozen: leave one out of transfer.freeze")
    return spread


def shift_self_energies(committee: Committee, dataset: Dataset) -> NDArray[np.float64]:
    """Self energies, (n_elements,), eV, with which the committee as it is fits the dataset best."""
    evaluations = _evaluations(committee, dataset, np.arange(len(dataset)), "none")
    predicted = np.concatenate([evaluation.energy.numpy() for _, evaluation in evaluations])
    shift = fit_self_energies(dataset.counts, dataset.energy - predicted)
    return np.asarray(committee.self_energies.numpy() + shift, dtype=np.float64)


def borrow_forces(
    committee: Committee, dataset: Dataset, settings: TransferSettings, replay: Sequence[Receipt]
) -> dict[int, NDArray[np.float64]]:
    """Forces of the lower level for frames of the dataset that have none: index -> (n_atoms, 3), eV/A.

    Raises:
        DatasetError: no frame of the dataset has forces in `replay`.
    """
    without = np.flatnonzero(np.isnan(dataset.max_force))
    if settings.forces == "labels" or not len(without):
        return {}
    if settings.forces == "replayed":
        return _replayed(dataset, without, load_dataset(replay, committee.elements, verify=True))
    found: dict[int, NDArray[np.float64]] = {}
    for part, evaluation in _evaluations(committee, dataset, without, "mean"):
        assert evaluation.forces_mean is not None
        forces = np.split(evaluation.forces_mean.double().numpy(), np.cumsum(dataset.n_atoms[part])[:-1])
        found |= zip(part.tolist(), forces, strict=True)
    return found


def _replayed(dataset: Dataset, without: NDArray[np.int64], lower: Dataset) -> dict[int, NDArray[np.float64]]:
    place = {lower.id(j): j for j in np.flatnonzero(np.isfinite(lower.max_force)).tolist()}
    places = {i: place[dataset.id(i)] for i in without.tolist() if dataset.id(i) in place}
    if not places:
        raise DatasetError("transfer.forces = 'replayed': no frame of the labels has forces in the replayed ones")
    return {i: lower.gather(np.array([j])).forces for i, j in places.items()}


def compare_layers(networks: Networks, before: Tensor, after: Tensor) -> dict[str, dict[str, float]]:
    """What became of each layer, all elements and members together: number of weights and biases, how many changed,
    and the root mean square of the change relative to that of the layer before."""
    changes = {}
    for name in networks.layer_names:
        chosen = networks.spread(dict.fromkeys(set(networks.layer_names) - {name}, 0.0)) > 0
        old, new = before[:, chosen].double(), after[:, chosen].double()
        changes[name] = {
            "parameters": old.numel(),
            "changed": int((old != new).sum()),
            "relative_change": float((new - old).square().mean().sqrt() / old.square().mean().sqrt().clamp(min=1e-300)),
        }
    return changes


def _evaluations(
    committee: Committee, dataset: Dataset, indices: NDArray[np.int64], forces: Literal["none", "mean"]
) -> Iterator[tuple[NDArray[np.int64], Evaluation]]:
    for start in range(0, len(indices), FRAMES_PER_BATCH):
        part = indices[start : start + FRAMES_PER_BATCH]
        structures = Structures.from_batch(dataset.gather(part), committee.elements).to(device=committee.device)
        yield part, committee.evaluate(structures, forces=forces)
