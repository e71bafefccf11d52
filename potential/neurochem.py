"""How does a committee published in the NeuroChem layout become one of ours?

NAME.info             four lines: parameter file, self energies, prefix of the member folders, number of members
*.params              constants of the AEV and the elements (Atyp), in their order
sae_linfit.dat        self energies, hartree: Al,0=-2.7058640291888105
trainK/networks/      ANN-X.nnf, a layer table as a bzip2 stream behind a number and "=", and the float32 weights
                      (row-major, out x in) and biases it names, one file per layer
"""

from __future__ import annotations

import bz2
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from potential.aev import AEVParameters
from potential.committee import Committee
from potential.model_file import save_committee

__all__ = ["HARTREE_EV", "NeuroChemError", "import_neurochem"]

HARTREE_EV = 27.211386245988  # CODATA 2018
CELU, LINEAR = 9, 6  # activations, by their number in the layer table; 9 is CELU with alpha 0.1
SCALARS = ("Rcr", "Rca", "EtaR", "EtaA", "Zeta")
LISTS = ("ShfR", "ShfA", "ShfZ")


class NeuroChemError(ValueError):
    """A published committee that is not complete or uses what we do not have. The message begins with the file."""


def import_neurochem(source: Path, dest: Path) -> str:
    """Read a published committee, write it as a model file at `dest`, and return its digest.

    source: the .info file, or a folder that holds exactly one. Weights are kept in float64, for the last layer is
    rescaled from hartree to eV.

    Raises:
        NeuroChemError: a file is missing or damaged, or an activation or layer type is not supported.
    """
    info = _find_info(Path(source))
    lines = _read_text(info).split()
    if len(lines) != 4 or not lines[3].isdigit() or int(lines[3]) < 1:
        raise NeuroChemError(f"{info}: must hold parameter file, self energies, folder prefix, number of members")
    params, self_energies, prefix = (info.parent / line for line in lines[:3])
    n_members = int(lines[3])
    elements, aev = _read_params(params)
    members = [
        [_read_network(Path(f"{prefix}{k}") / "networks" / f"ANN-{element}.nnf", aev.length) for element in elements]
        for k in range(n_members)
    ]
    hidden = [[len(layer.bias) for layer in layers[:-1]] for layers in members[0]]
    committee = Committee(elements, aev, hidden, n_members).double()
    _fill(committee, members, params)
    hartree = torch.tensor(_read_self_energies(self_energies, elements), dtype=torch.float64)
    committee.self_energies = hartree * HARTREE_EV
    return save_committee(committee, Path(dest), {"imported_from": f"NeuroChem layout, {info.name}"})


@dataclass(frozen=True)
class _Layer:
    weight: NDArray[np.float32]  # (out, in)
    bias: NDArray[np.float32]  # (out,)


def _find_info(source: Path) -> Path:
    if not source.is_dir():
        return source
    found = sorted(source.glob("*.info"))
    if len(found) != 1:
        raise NeuroChemError(f"{source}: holds {len(found)} .info files; name the one to import")
    return found[0]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NeuroChemError(f"{path}: cannot be read: {error.strerror}") from error


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise NeuroChemError(f"{path}: not a text file") from error


def _read_params(path: Path) -> tuple[list[str], AEVParameters]:
    entries = dict(re.findall(r"^\s*(\w+)\s*=\s*\[?([^\]\n]*)\]?", _read_text(path), re.MULTILINE))
    missing = [key for key in (*SCALARS, *LISTS, "Atyp") if key not in entries]
    if missing:
        raise NeuroChemError(f"{path}: no {', '.join(missing)}")
    elements = [symbol.strip() for symbol in entries["Atyp"].split(",")]
    try:
        lists = {key: tuple(float(value) for value in entries[key].split(",")) for key in (*SCALARS, *LISTS)}
    except ValueError as error:
        raise NeuroChemError(f"{path}: {error}") from error
    several = [key for key in SCALARS if len(lists[key]) != 1]
    if several:
        raise NeuroChemError(f"{path}: several values of {', '.join(several)}; one of each is supported")
    return elements, AEVParameters(
        radial_cutoff_A=lists["Rcr"][0],
        angular_cutoff_A=lists["Rca"][0],
        eta_radial=lists["EtaR"][0],
        eta_angular=lists["EtaA"][0],
        zeta=lists["Zeta"][0],
        radial_shifts=lists["ShfR"],
        angular_shifts=lists["ShfA"],
        angle_shifts=lists["ShfZ"],
        n_species=len(elements),
    )


def _read_self_energies(path: Path, elements: list[str]) -> list[float]:
    """Hartree, in the order of `elements`."""
    found = dict(re.findall(r"^\s*([A-Z][a-z]?)\s*,\s*\d+\s*=\s*(\S+)", _read_text(path), re.MULTILINE))
    missing = [element for element in elements if element not in found]
    if missing:
        raise NeuroChemError(f"{path}: no self energy of {', '.join(missing)}")
    try:
        return [float(found[element]) for element in elements]
    except ValueError as error:
        raise NeuroChemError(f"{path}: {error}") from error


def _read_network(path: Path, n_inputs: int) -> list[_Layer]:
    tables = re.findall(r"layer\s*\[(.*?)\n\s*\]", _read_layer_table(path), re.DOTALL)
    if not tables:
        raise NeuroChemError(f"{path}: no layers")
    layers = []
    for number, table in enumerate(tables, start=1):
        entries = dict(re.findall(r"(\w+)\s*=\s*([^;]*);", table))
        expected = LINEAR if number == len(tables) else CELU
        _check_layer(entries, expected, f"{path}: layer {number}")
        n_nodes = int(entries["nodes"])
        weight = _read_values(path.parent, entries["weights"], n_nodes * n_inputs)
        bias = _read_values(path.parent, entries["biases"], n_nodes)
        layers.append(_Layer(weight.reshape(n_nodes, n_inputs), bias))
        n_inputs = n_nodes
    if n_inputs != 1:
        raise NeuroChemError(f"{path}: {n_inputs} outputs; one, the energy, is supported")
    return layers


def _read_layer_table(path: Path) -> str:
    content = _read_bytes(path)
    head, equals, stream = content.partition(b"=")
    if not (equals and head.strip().isdigit()):
        raise NeuroChemError(f'{path}: does not begin with a number and "="')
    try:
        return bz2.decompress(stream.lstrip()).decode()
    except (OSError, ValueError) as error:
        raise NeuroChemError(f"{path}: damaged layer table: {error}") from error


def _check_layer(entries: dict[str, str], activation: int, where: str) -> None:
    missing = [key for key in ("nodes", "activation", "weights", "biases") if not entries.get(key)]
    if missing:
        raise NeuroChemError(f"{where}: no {', '.join(missing)}")
    if not entries["nodes"].isdigit():
        raise NeuroChemError(f"{where}: nodes = {entries['nodes']}: must be a number")
    if entries["activation"] != str(activation):
        raise NeuroChemError(
            f"{where}: activation {entries['activation']}; supported are {CELU} (CELU, alpha 0.1) in hidden layers"
            f" and {LINEAR} (linear) in the last"
        )
    if entries.get("type", "0") != "0":
        raise NeuroChemError(f"{where}: type {entries['type']}; only 0 (fully connected) is supported")


def _read_values(folder: Path, entry: str, n_values: int) -> NDArray[np.float32]:
    """Values of the file named as FILE:name[count]."""
    match = re.fullmatch(r"FILE:(.+)\[(\d+)\]", entry.strip())
    if match is None:
        raise NeuroChemError(f"{folder}: {entry}: expected FILE:name[count]")
    path = folder / match[1]
    content = _read_bytes(path)
    if int(match[2]) != n_values or len(content) != 4 * n_values:
        raise NeuroChemError(f"{path}: {len(content) / 4:g} values, {match[2]} announced; the layer has {n_values}")
    return np.frombuffer(content, dtype="<f4")


def _fill(committee: Committee, members: list[list[list[_Layer]]], source: Path) -> None:
    """Stack the members' layers into the committee; the last layer is the only one with a unit."""
    state = committee.state_dict()
    for member, networks in enumerate(members):
        for element, layers in enumerate(networks):
            for number, layer in enumerate(layers):
                scale = HARTREE_EV if number == len(layers) - 1 else 1.0
                for kind, values in (("weights", layer.weight), ("biases", layer.bias)):
                    place = state.get(f"networks.{element}.{kind}.{number}")
                    if place is None or place.shape[1:] != values.shape:
                        raise NeuroChemError(f"{source.parent}: member {member} is not built like the others")
                    place[member] = torch.from_numpy(values.astype(np.float64) * scale)
