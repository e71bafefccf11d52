"""Committees carried from one level of theory to another, from files to files, by the real rank program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import SMALL, emt_rows, write_manifest

from potential.model_file import load_committee, read_metadata, save_committee
from potential.structures import Structures
from shards import FailureClass, Frame, Label, Manifest, Outcome
from shards.settings import SettingsError
from trainer.config import TrainerSettings, TransferSettings
from trainer.dataset import Dataset, DatasetError, load_dataset
from trainer.networks import Networks
from trainer.stage import evaluate, train, transfer
from trainer.transfer import borrow_forces, check_levels, layer_factors

ELEMENTS = ("Al", "Cu")
QUICK = TrainerSettings(ranks=1, steps_per_epoch=4, max_epochs=100, learning_rate=3e-3)
# What the second level adds for each atom of an element, eV: much more than any error.
SHIFT_eV = np.array([-5.0, 7.0])
LAYERS = {"hidden1": "0", "hidden2": "1", "output": "2"}


def _counts(frame: Frame) -> np.ndarray:
    return np.array([(frame.numbers == 13).sum(), (frame.numbers == 29).sum()])


def _higher(row: tuple[Frame, Label]) -> tuple[Frame, Label]:
    """The same frame at a level that differs by a constant per atom and a tenth in every energy; no forces."""
    frame, label = row
    return frame, Label(1.1 * label.energy + SHIFT_eV @ _counts(frame), np.full_like(label.forces, np.nan))


def _transfer(data: Path, model: Path, dest: Path, replay=None, settings=QUICK, **fields) -> Outcome:
    fields = {"freeze": ("hidden1",), "max_epochs": 40, "learning_rate": 2e-3} | fields
    return transfer(data, model, settings, TransferSettings(**fields), dest, seed=1, replay=replay)


@pytest.fixture(scope="module")
def rows() -> list[tuple[Frame, Label]]:
    return emt_rows(50, elements=ELEMENTS)


@pytest.fixture(scope="module")
def parent(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    outcome = train(write_manifest(folder / "low", rows), SMALL, QUICK, ELEMENTS, folder, seed=1)
    assert outcome.failure is None, (folder / "train.log").read_text()
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def few(rows, tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("few"), [_higher(row) for row in rows[:20]], level="2")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    rows = [_higher(row) for row in emt_rows(20, seed=9, elements=ELEMENTS)]
    return write_manifest(tmp_path_factory.mktemp("held-out"), rows, level="2")


def _error(model: Path, labels: Path) -> float:
    return evaluate(model, [labels]).facts["energy_rmse_eV_per_atom"]


def test_frozen_layers_stay_bit_by_bit_and_the_report_says_what_moved(parent, few, tmp_path):
    settings = QUICK.model_copy(update={"ranks": 2})
    outcome = _transfer(few, parent, tmp_path, settings=settings, max_epochs=3)
    assert outcome.failure is None, (tmp_path / "train.log").read_text()
    assert outcome.stage == "transfer"
    before, after = load_file(parent), load_file(tmp_path / "model.safetensors")
    layers = outcome.facts["layers"]
    assert list(layers) == list(LAYERS)
    for name, index in LAYERS.items():
        tensors = [key for key in before if key.split(".")[-1] == index]
        assert len(tensors) == 4  # weight and bias of two elements
        assert layers[name]["parameters"] == sum(before[key].numel() for key in tensors)
        n_changed = sum(int((before[key] != after[key]).sum()) for key in tensors)
        assert layers[name]["changed"] == n_changed
        assert (n_changed == 0) == (name == "hidden1")
    frozen = [key for key in before if key.split(".")[-1] == "0"]
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in frozen)
    assert layers["hidden1"]["relative_change"] == 0.0
    assert 0 < layers["hidden2"]["relative_change"] < 1


@pytest.fixture(scope="module")
def shifted(parent, few, tmp_path_factory) -> Path:
    """The parent with the best constants per element: all that is possible without a weight."""
    folder = tmp_path_factory.mktemp("shifted")
    outcome = _transfer(few, parent, folder, max_epochs=1, learning_rate=1e-9, min_learning_rate=1e-10)
    assert outcome.facts["parent"] == str(parent)
    return folder / "model.safetensors"


def test_self_energies_take_up_what_differs_by_composition(parent, shifted):
    shift = load_committee(shifted).self_energies - load_committee(parent).self_energies
    # Beside the shift there is a tenth of EMT's energies, which are some 0.1 eV per atom here.
    np.testing.assert_allclose(shift.numpy(), SHIFT_eV, atol=0.3)


def test_transfer_beats_its_parent_and_a_training_from_scratch(parent, shifted, few, held_out, tmp_path):
    _transfer(few, parent, tmp_path / "transfer", max_epochs=100, patience=40)
    transferred = _error(tmp_path / "transfer" / "model.safetensors", held_out)
    train(few, SMALL, QUICK, ELEMENTS, tmp_path / "scratch", seed=1)
    assert transferred < 0.8 * _error(shifted, held_out)
    assert transferred < 0.8 * _error(tmp_path / "scratch" / "model.safetensors", held_out)


def _forces(model: Path, rows: list[tuple[Frame, Label]]) -> np.ndarray:
    structures = Structures.from_frames([frame for frame, _ in rows], ELEMENTS, torch.float64)
    return load_committee(model).evaluate(structures).forces_mean.numpy()


def test_borrowed_forces_are_learnt_and_not_looked_at_in_validation(rows, parent, few, tmp_path):
    low = write_manifest(tmp_path / "low", rows[:20])
    free = _transfer(few, parent, tmp_path / "free", learning_rate=1e-2)
    replayed = _transfer(few, parent, tmp_path / "replayed", replay=low, learning_rate=1e-2, forces="replayed")
    distilled = _transfer(few, parent, tmp_path / "distilled", learning_rate=1e-2, forces="distilled")
    assert [each.facts["n_borrowed_forces"] for each in (free, replayed, distilled)] == [0, 20, 20]
    free_forces, replayed_forces, distilled_forces = (
        _forces(tmp_path / name / "model.safetensors", rows[:20]) for name in ("free", "replayed", "distilled")
    )
    # Replayed forces are labels, distilled ones the parent's.
    for taught, source in (
        (replayed_forces, np.concatenate([label.forces for _, label in rows[:20]])),
        (distilled_forces, _forces(parent, rows[:20])),
    ):
        assert np.square(taught - source).mean() < 0.8 * np.square(free_forces - source).mean()
    # With borrowed forces in it the loss would be much more than what the energies give.
    energies = np.array(replayed.facts["valid"]["energy_meV_per_atom"]) / 1000
    assert replayed.facts["valid"]["loss"] == pytest.approx((energies**2 * 12).tolist(), rel=0.7)


def test_replay_without_labels_and_labels_without_replay_are_refused(parent, few, tmp_path):
    with pytest.raises(SettingsError, match=r"transfer\.forces = 'replayed'"):
        _transfer(few, parent, tmp_path, forces="replayed")
    with pytest.raises(SettingsError, match=r"transfer\.forces = 'labels'"):
        _transfer(few, parent, tmp_path, replay=few)


def _loaded(manifest: Path) -> Dataset:
    return load_dataset(Manifest(manifest).receipts(), ELEMENTS, verify=True)


def test_replayed_labels_of_other_frames_are_refused(parent, few, tmp_path):
    other = write_manifest(tmp_path / "other", emt_rows(8, seed=5, elements=ELEMENTS))
    settings = TransferSettings(forces="replayed")
    with pytest.raises(DatasetError, match="no frame of the labels has forces in the replayed ones"):
        borrow_forces(load_committee(parent), _loaded(few), settings, Manifest(other).receipts())


def test_levels_meet_only_when_asked(rows, parent, few, tmp_path):
    metadata, low = read_metadata(parent), _loaded(write_manifest(tmp_path / "low", rows[:20]))
    check_levels(metadata, "parent", low, transfer=False)
    check_levels(metadata, "parent", _loaded(few), transfer=True)
    check_levels({}, "of unknown level", low, transfer=True)
    with pytest.raises(DatasetError, match=r"parent: was trained on this very level of theory \(emt 1\)"):
        check_levels(metadata, "parent", low, transfer=True)
    warm = QUICK.model_copy(update={"warm_start": True})
    failure = train(few, SMALL, warm, ELEMENTS, tmp_path / "warm", seed=1, start=parent).failure
    assert failure.kind is FailureClass.BAD_LABEL
    assert "was trained on another level of theory (emt 1): carry it to these labels with `smelt transfer`" in (
        failure.message
    )


def test_an_imported_committee_of_no_known_level_is_carried_too(parent, few, tmp_path):
    committee = load_committee(parent)
    save_committee(committee, tmp_path / "imported.safetensors", {})
    assert _transfer(few, tmp_path / "imported.safetensors", tmp_path, max_epochs=1).failure is None
    assert read_metadata(tmp_path / "model.safetensors")["level"]["version"] == "2"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": ("hidden3",)}, "no layer hidden3: there are hidden1, hidden2, output"),
        ({"rate_factors": {"first": 0.1}}, "no layer first"),
        ({"freeze": ("hidden1", "hidden2", "output")}, "every layer is frozen"),
    ],
)
def test_impossible_layers_are_named(fields, words):
    networks = Networks([[(16, 10), (8, 16), (1, 8)]] * 2)
    with pytest.raises(ValueError, match=words):
        layer_factors(networks, TransferSettings(**({"freeze": ()} | fields)))
