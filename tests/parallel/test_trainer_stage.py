"""Trainings from files to files, by the real rank program; on two ranks by real Horovod under mpirun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from safetensors.torch import load_file
from trainer_cases import SMALL, emt_rows, write_manifest

from potential.model_file import load_committee
from shards import FailureClass, Frame, Label, Outcome
from trainer.config import TrainerSettings
from trainer.stage import evaluate, train

QUICK = {"ranks": 1, "steps_per_epoch": 8, "max_epochs": 3, "learning_rate": 3e-3}
WHOLE = {"ranks": 2, "max_epochs": 40, "checkpoint_every_s": 0.0, "jacobian_memory_GB": 0.0}  # cut or not


def _train(manifest: Path, dest: Path, elements=("Al",), start=None, **settings) -> Outcome:
    return train(manifest, SMALL, TrainerSettings(**(QUICK | settings)), elements, dest, seed=1, start=start)


def _metrics(dest: Path) -> list[dict]:
    return [json.loads(line) for line in (dest / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("labels"), emt_rows(40))


@pytest.fixture(scope="module")
def trained(labels, tmp_path_factory) -> tuple[Path, Outcome]:
    dest = tmp_path_factory.mktemp("trained")
    return dest, _train(labels, dest, max_epochs=150)


def test_training_learns_emt_and_says_how_well(trained, tmp_path):
    dest, outcome = trained
    assert outcome.failure is None, (dest / "train.log").read_text()
    rows = _metrics(dest)
    assert np.mean(rows[-1]["valid"]["loss"]) < 0.1 * np.mean(rows[0]["valid"]["loss"])
    assert outcome.facts["n_frames"] == 40
    assert len(outcome.facts["valid"]["force_eV_per_A"]) == SMALL.n_members
    assert list((dest / "tensorboard").iterdir())
    assert not (dest / "checkpoint.safetensors").exists()
    test = evaluate(dest / "model.safetensors", [write_manifest(tmp_path / "test", emt_rows(10, seed=9))])
    assert test.facts["force_rmse_eV_per_A"] < 0.3
    assert test.facts["by_origin"]["walker/energy"]["n_frames"] == 10


def test_errors_of_evaluate_equal_those_of_the_calculator(trained, labels):
    dest, _ = trained
    facts = evaluate(dest / "model.safetensors", [labels]).facts
    calculator = load_committee(dest / "model.safetensors").calculator()
    energy, force, stress = [], [], []
    for frame, label in emt_rows(40):
        atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc, calculator=calculator)
        energy.append((atoms.get_potential_energy() - label.energy) / len(atoms))
        force.extend((atoms.get_forces() - label.forces).ravel())
        stress.extend((atoms.get_stress(voigt=False) - label.stress).ravel())
    # float32 against float64: a few 1e-6 eV, eV/A.
    assert facts["energy_rmse_eV_per_atom"] == pytest.approx(np.sqrt(np.mean(np.square(energy))), abs=1e-5)
    assert facts["force_rmse_eV_per_A"] == pytest.approx(np.sqrt(np.mean(np.square(force))), abs=1e-5)
    assert facts["stress_rmse_eV_per_A3"] == pytest.approx(np.sqrt(np.mean(np.square(stress))), abs=1e-6)


def test_a_finished_training_is_handed_back_and_not_repeated(trained, labels):
    dest, outcome = trained
    before = (dest / "model.safetensors").stat().st_mtime_ns
    again = _train(labels, dest, max_epochs=150)
    assert again.facts == outcome.facts
    assert (dest / "model.safetensors").stat().st_mtime_ns == before


def test_a_warm_start_begins_where_the_earlier_model_ended(trained, labels, tmp_path):
    dest, outcome = trained
    warm = _train(labels, tmp_path, start=dest / "model.safetensors", warm_start=True, max_epochs=1, learning_rate=1e-6)
    assert np.mean(_metrics(tmp_path)[0]["valid"]["loss"]) < 1.1 * np.mean(outcome.facts["valid"]["loss"])
    assert warm.facts["warm_start"]


def test_two_ranks_train_like_one(labels, tmp_path):
    solo = _train(labels, tmp_path / "solo", dtype="float64")
    pair = _train(labels, tmp_path / "pair", dtype="float64", ranks=2)
    assert pair.failure is None, (tmp_path / "pair" / "train.log").read_text()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("solo", "pair"))
    # Sums in another order differ by 1e-16; Adam divides small gradients by smaller numbers, 24 times.
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)
    losses = [[row["valid"]["loss"] for row in _metrics(tmp_path / name)] for name in ("solo", "pair")]
    assert np.allclose(*losses, rtol=1e-7)
    assert (solo.facts["n_ranks"], pair.facts["n_ranks"]) == (1, 2)


def _ranks_of(dest: Path) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(dest / "job.json").encode() in command and b"trainer" in command:
                found.append(int(folder.name))
    return found


def _wait_for_epochs(dest: Path, n: int) -> None:
    deadline = time.monotonic() + 120
    while not (dest / "metrics.jsonl").exists() or len(_metrics(dest)) < n:
        failed = (dest / "result.json").exists() or time.monotonic() > deadline
        assert not failed, (dest / "train.log").read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(labels, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("whole")
    outcome = _train(labels, dest, **WHOLE)
    assert outcome.failure is None, (dest / "train.log").read_text()
    return dest


def _assert_bitwise_equal(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_streamed_training_gives_the_same_weights_bit_by_bit(whole, labels, tmp_path):
    outcome = _train(labels, tmp_path, **WHOLE | {"memory_share": 0.0})
    assert outcome.failure is None, (tmp_path / "train.log").read_text()
    assert " 0 GB allowed: streamed from the shards" in (tmp_path / "train.log").read_text()
    _assert_bitwise_equal(whole, tmp_path)


def test_a_rank_killed_with_sigkill_is_a_failure_and_the_resumed_training_ends_bitwise_as_if_it_had_not_been(
    whole, labels, tmp_path
):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_train, labels, tmp_path, **WHOLE)
        _wait_for_epochs(tmp_path, 3)
        os.kill(max(_ranks_of(tmp_path)), signal.SIGKILL)
    assert first.result().failure.kind in (FailureClass.MEMORY, FailureClass.CRASH)
    assert not (tmp_path / "model.safetensors").exists()
    assert _ranks_of(tmp_path) == []
    outcome = _train(labels, tmp_path, **WHOLE)
    assert outcome.failure is None, (tmp_path / "train.log").read_text()
    assert "resumed after epoch" in (tmp_path / "train.log").read_text()
    _assert_bitwise_equal(whole, tmp_path)
    assert [row["epoch"] for row in _metrics(tmp_path)] == list(range(40))


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer_stage import _train
_train(Path({manifest!r}), Path({dest!r}), ranks=2, max_epochs=100000)
"""


def test_a_caller_that_is_killed_takes_its_ranks_with_it_and_they_leave_a_checkpoint(labels, tmp_path):
    program = RUN.format(tests=str(Path(__file__).parent), manifest=str(labels), dest=str(tmp_path))
    caller = subprocess.Popen([sys.executable, "-c", program])
    _wait_for_epochs(tmp_path, 1)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 15  # a silent caller of another host would be waited for longer
    while _ranks_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads((tmp_path / "result.json").read_text())["state"] == "stopped"
    assert (tmp_path / "checkpoint.safetensors").exists()


def _without_forces(row: tuple[Frame, Label]) -> tuple[Frame, Label]:
    frame, label = row
    return frame, Label(label.energy, np.full_like(label.forces, np.nan))


def test_energies_alone_and_frames_without_forces_are_enough(tmp_path):
    rows = [_without_forces(row) if i % 2 else row for i, row in enumerate(emt_rows(20))]
    mixed = _train(write_manifest(tmp_path / "a", rows), tmp_path / "mixed")
    assert np.isfinite(mixed.facts["valid"]["loss"]).all()
    alone = _train(write_manifest(tmp_path / "b", [_without_forces(row) for row in rows]), tmp_path / "alone")
    assert alone.failure is None
    assert alone.facts["valid"]["force_eV_per_A"] == [None] * SMALL.n_members


def test_two_elements_are_learnt_together(tmp_path):
    manifest = write_manifest(tmp_path / "labels", emt_rows(20, elements=("Al", "Cu")))
    outcome = _train(manifest, tmp_path / "model", elements=("Al", "Cu"), max_epochs=20)
    rows = _metrics(tmp_path / "model")
    assert outcome.failure is None
    assert np.mean(rows[-1]["train"]["loss"]) < 0.5 * np.mean(rows[0]["train"]["loss"])


def test_labels_of_two_levels_are_refused_by_name(tmp_path):
    write_manifest(tmp_path / "labels", emt_rows(8))
    manifest = write_manifest(tmp_path / "labels", emt_rows(8, seed=1), level="2")
    failure = _train(manifest, tmp_path / "model", ranks=2).failure
    assert failure.kind is FailureClass.BAD_LABEL
    assert "labels of 2 levels of theory cannot be mixed" in failure.message
    assert "emt 1" in failure.message
    assert "emt 2" in failure.message


def test_a_diverging_loss_is_reported_with_its_epoch(tmp_path):
    rows = [(frame, Label(label.energy * 1e30, label.forces)) for frame, label in emt_rows(20)]
    failure = _train(write_manifest(tmp_path / "labels", rows), tmp_path / "model").failure
    assert failure.kind is FailureClass.CRASH
    assert "epoch 0: the train loss of member 0, 1, 2, 3 is not finite" in failure.message
    assert Path(failure.log).exists()


def test_a_launcher_that_is_not_there_is_a_failure(labels, tmp_path):
    settings = TrainerSettings(**(QUICK | {"ranks": 2}))
    outcome = train(labels, SMALL, settings, ("Al",), tmp_path, seed=1, launcher=("no-such-launcher", "{ranks}"))
    assert outcome.failure.kind is FailureClass.MISSING
    assert "no-such-launcher" in outcome.failure.message
