"""How is a committee carried from the level of theory it was trained on to a higher one?

Its networks go on from where they are, some layers frozen. The self energies take up what differs by composition alone.
Energies are always of the higher level. Forces may be borrowed from the lower one: they are then a term of their own,
which training follows but validation does not look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potential.committee import Committee, Evaluation
from potential.structures import Structures
from shards.frame import Frame
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
    frames = [dataset.row(i)[0] for i in range(len(dataset))]
    predicted = np.concatenate([evaluation.energy.numpy() for evaluation in _evaluations(committee, frames, "none")])
    shift = fit_self_energies(dataset.counts, dataset.energy - predicted)
    return np.asarray(committee.self_energies.numpy() + shift, dtype=np.float64)


def borrow_forces(
    committee: Committee, dataset: Dataset, settings: TransferSettings, replay: Sequence[Receipt]
) -> dict[str, NDArray[np.float64]]:
    """Forces of the lower level for frames of the dataset that have none: frame id -> (n_atoms, 3), eV/A.

    Raises:
        DatasetError: no frame of the dataset has forces in `replay`.
    """
    without = [i for i in range(len(dataset)) if np.isnan(dataset.max_force[i])]
    if settings.forces == "labels" or not without:
        return {}
    if settings.forces == "replayed":
        lower = load_dataset(replay, committee.elements, verify=True)
        place = {id: i for i, id in enumerate(lower.ids)}
        rows = {dataset.ids[i]: lower.row(place[dataset.ids[i]])[1] for i in without if dataset.ids[i] in place}
        found = {id: label.forces for id, label in rows.items() if label.has_forces}
        if not found:
            raise DatasetError("transfer.forces = 'replayed': no frame of the labels has forces in the replayed ones")
        return found
    frames = [dataset.row(i)[0] for i in without]
    by_batch = [evaluation.forces_mean for evaluation in _evaluations(committee, frames, "mean")]
    forces = torch.cat([each for each in by_batch if each is not None]).double().numpy()
    parts = np.split(forces, np.cumsum([frame.n_atoms for frame in frames])[:-1])
    return {frame.id: part for frame, part in zip(frames, parts, strict=True)}


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
    committee: Committee, frames: Sequence[Frame], forces: Literal["none", "mean"]
) -> Iterator[Evaluation]:
    for start in range(0, len(frames), FRAMES_PER_BATCH):
        part = frames[start : start + FRAMES_PER_BATCH]
        structures = Structures.from_frames(part, committee.elements, torch.float64, committee.device)
        yield committee.evaluate(structures, forces=forces)
