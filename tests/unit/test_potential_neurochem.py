"""Import of the NeuroChem layout, on a committee of several elements that the tests write themselves."""

from __future__ import annotations

import bz2
import itertools
from pathlib import Path

import brute_force
import numpy as np
import pytest
import torch

from potential.model_file import load_committee
from potential.neurochem import HARTREE_EV, NeuroChemError, import_neurochem
from potential.structures import Structures
from shards.frame import Frame

PARAMS = """TM = 1
Rcr = 4.6000e+00
Rca = 3.5000e+00
EtaR = [1.6000e+01]
ShfR = [9.0000e-01,1.9000e+00,2.9000e+00]
Zeta = [1.4100e+01]
ShfZ = [7.8539816e-01,2.3561945e+00]
EtaA = [8.0000e+00]
ShfA = [9.0000e-01,2.2000e+00]
Atyp = [H,Al,Cu]
"""
N_INPUTS = 3 * 3 + 6 * 4
WIDTHS = {"H": (5,), "Al": (6, 4), "Cu": (7, 3)}
SELF_ENERGIES = {"Al": -2.5, "H": -0.5, "Cu": -196.25}  # not in the order of Atyp


def write_network(folder: Path, element: str, layers, activation: int = 9) -> None:
    text = f"inputsize={N_INPUTS};\natom_net {element} $\n"
    for number, (weight, bias) in enumerate(layers, start=1):
        stem = f"ANN-{element}.nnf-l{number}"
        weight.astype("<f4").tofile(folder / f"{stem}.wparam")
        bias.astype("<f4").tofile(folder / f"{stem}.bparam")
        kind = 6 if number == len(layers) else activation
        text += (
            f"layer [\nnodes={len(bias)};\nactivation={kind};\ntype=0;\nblocksize={weight.shape[1]};\n"
            f"weights=FILE:{stem}.wparam[{weight.size}];\nbiases=FILE:{stem}.bparam[{bias.size}];\n]\n"
        )
    packed = bz2.compress((text + "\n $\0").encode())
    (folder / f"ANN-{element}.nnf").write_bytes(f"{len(text)}=\n".encode() + packed)


@pytest.fixture
def published(tmp_path):
    """A folder in the published layout, and what was written into it: networks[member][element]."""
    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    (tmp_path / "set.info").write_text("set/r.params\nset/sae_linfit.dat\nset/train\n2\n")
    (tmp_path / "set" / "r.params").write_text(PARAMS)
    lines = [f"{element},{k}={energy}\n" for k, (element, energy) in enumerate(SELF_ENERGIES.items())]
    (tmp_path / "set" / "sae_linfit.dat").write_text("".join(lines))
    networks = []
    for member in range(2):
        folder = tmp_path / "set" / f"train{member}" / "networks"
        folder.mkdir(parents=True)
        networks.append([])
        for element, hidden in WIDTHS.items():
            widths = [N_INPUTS, *hidden, 1]
            layers = [
                (rng.normal(size=(out, n)).astype("f4") / 3, rng.normal(size=out).astype("f4") / 3)
                for n, out in itertools.pairwise(widths)
            ]
            write_network(folder, element, layers)
            networks[member].append(layers)
    return tmp_path, networks


def test_several_elements_give_the_energies_of_the_formula(published, tmp_path):
    source, networks = published
    dest = tmp_path / "model.safetensors"
    digest = import_neurochem(source, dest)
    committee = load_committee(dest, dtype=torch.float64)
    assert (committee.elements, committee.hidden, committee.digest) == (
        ("H", "Al", "Cu"),
        tuple(WIDTHS.values()),
        digest,
    )
    in_eV = [
        [[*layers[:-1], tuple(HARTREE_EV * values.astype(float) for values in layers[-1])] for layers in member]
        for member in networks
    ]
    formula = brute_force.Formula(
        numbers=[1, 13, 29],
        radial_cutoff=4.6,
        angular_cutoff=3.5,
        eta_radial=16.0,
        eta_angular=8.0,
        zeta=14.1,
        radial_shifts=np.array([0.9, 1.9, 2.9]),
        angular_shifts=np.array([0.9, 2.2]),
        angle_shifts=np.array([0.78539816, 2.3561945]),
        networks=in_eV,
        self_energies=[SELF_ENERGIES[element] * HARTREE_EV for element in WIDTHS],
    )
    rng = np.random.default_rng(3)
    for length in (3.5, 6.0):
        arrays = brute_force.random_frame_arrays(rng, [1, 13, 29], 5, length, (True, False, True), closest=1.3)
        structures = Structures.from_frames([Frame(*arrays)], committee.elements)
        got = committee.evaluate(structures, forces="none").energy_members[:, 0]
        np.testing.assert_allclose(got, formula.energies(*arrays), rtol=0, atol=1e-6 * 5)


def test_info_file_can_be_named_itself(published, tmp_path):
    source, _ = published
    assert import_neurochem(source / "set.info", tmp_path / "a") == import_neurochem(source, tmp_path / "b")


def test_gaussian_activation_is_refused_by_name(published, tmp_path):
    source, networks = published
    write_network(source / "set" / "train1" / "networks", "Al", networks[1][1], activation=5)
    with pytest.raises(NeuroChemError, match=r"train1/networks/ANN-Al\.nnf: layer 1: activation 5; supported are 9"):
        import_neurochem(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_cut_short_are_refused_by_name(published, tmp_path):
    source, _ = published
    path = source / "set" / "train0" / "networks" / "ANN-Cu.nnf-l2.wparam"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(NeuroChemError, match=r"ANN-Cu\.nnf-l2\.wparam: 20 values, 21 announced; the layer has 21"):
        import_neurochem(source, tmp_path / "model")


def test_members_of_different_shape_are_refused(published, tmp_path):
    source, networks = published
    wider = [(np.vstack([w, w]), np.hstack([b, b])) for w, b in networks[1][0][:1]]
    wider.append((np.hstack([networks[1][0][1][0]] * 2), networks[1][0][1][1]))
    write_network(source / "set" / "train1" / "networks", "H", wider)
    with pytest.raises(NeuroChemError, match="member 1 is not built like the others"):
        import_neurochem(source, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set/r.params", PARAMS.replace("EtaA", "Eta"), "no EtaA"),
        ("set/r.params", PARAMS.replace("[1.4100e+01]", "[8.0,14.1]"), "several values of Zeta"),
        ("set/r.params", PARAMS.replace("1.9000e+00", "x"), "could not convert"),
        ("set/sae_linfit.dat", "Al,0=-2.5\nH,1=-0.5\n", "no self energy of Cu"),
        ("set.info", "set/r.params\n", "must hold parameter file"),
        ("set/train0/networks/ANN-H.nnf", "12=\nBZh9 not a stream", "damaged layer table"),
        ("set/train0/networks/ANN-H.nnf", "plain text", "does not begin with a number"),
    ],
)
def test_damaged_files_are_refused_by_name(published, tmp_path, name, content, message):
    source, _ = published
    (source / name).write_text(content)
    with pytest.raises(NeuroChemError, match=f"{name}.*{message}"):
        import_neurochem(source, tmp_path / "model")


def test_missing_file_is_refused_by_name(published, tmp_path):
    source, _ = published
    (source / "set" / "sae_linfit.dat").unlink()
    with pytest.raises(NeuroChemError, match=r"sae_linfit\.dat: cannot be read: No such file"):
        import_neurochem(source, tmp_path / "model")


def test_folder_with_two_committees_asks_for_one(published, tmp_path):
    source, _ = published
    (source / "other.info").write_text("")
    with pytest.raises(NeuroChemError, match=r"holds 2 \.info files; name the one to import"):
        import_neurochem(source, tmp_path / "model")
