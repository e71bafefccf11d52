"""The pure parts of the labeler: what is refused, which k-points a cell gets, what a code sees, and the guard."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import kptdensity2monkhorstpack
from hypothesis import given
from hypothesis import strategies as st

from labeler import guard
from labeler.checks import answer_fault, frame_fault
from labeler.config import LabelerSettings
from labeler.engine import Answer
from labeler.gpaw_engine import kpoint_mesh
from shards.frame import Frame

EMT = LabelerSettings(engine="emt", minimum_distance_A=2.0)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 2.0))
def test_kpoints_are_never_further_apart_than_asked_and_not_one_too_many(seed, spacing_per_A):
    cell = np.random.default_rng(seed).normal(size=(3, 3)) + 4 * np.eye(3)
    # An independent construction of the reciprocal vectors: b1 = 2 pi a2 x a3 / V.
    volume = np.linalg.det(cell)
    reciprocal = [2 * np.pi * np.cross(cell[i - 2], cell[i - 1]) / volume for i in range(3)]
    for n_points, length in zip(kpoint_mesh(cell, spacing_per_A), np.linalg.norm(reciprocal, axis=1), strict=True):
        assert length / n_points <= spacing_per_A * (1 + 1e-5)
        assert n_points == 1 or length / (n_points - 1) > spacing_per_A * (1 - 1e-5)


def test_kpoint_rule_is_that_of_ase_for_the_density_of_the_same_spacing():
    atoms = Atoms("Al", cell=[[4.0, 0, 0], [1.0, 5.0, 0], [0, 0.5, 7.0]], pbc=True)
    assert kpoint_mesh(np.array(atoms.cell), 0.4) == tuple(kptdensity2monkhorstpack(atoms, 1 / 0.4, even=False))


def test_round_off_in_the_cell_does_not_add_kpoints():
    exact = np.eye(3) * 2 * np.pi  # |b| = 1: two points at spacing 0.5
    assert kpoint_mesh(exact * (1 - 1e-12), 0.5) == kpoint_mesh(exact * (1 + 1e-12), 0.5) == (2, 2, 2)


@pytest.mark.parametrize("pbc", [True, False])
def test_minimum_distance_counts_periodic_images_of_periodic_cells_only(pbc):
    frame = Frame([13, 13], [[0.1, 0, 0], [4.9, 0, 0]], np.eye(3) * 5, pbc)
    assert bool(frame_fault(frame, EMT)) is pbc


def test_atom_too_close_to_its_own_image_is_refused():
    assert "1.500 A apart" in frame_fault(Frame([13], [[0, 0, 0]], np.eye(3) * [1.5, 5, 5], True), EMT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": float("nan")}, "energy nan eV"),
        ({"energy": -1e6}, "energy -1000000.0 eV for 2 atoms"),
        ({"forces": np.full((2, 3), np.inf)}, "forces not finite"),
        ({"forces": np.full((2, 3), -101.0)}, "force component of 101 eV/A"),
        ({"forces": np.zeros((3, 3))}, r"forces of shape (3, 3): must be (2, 3)"),
        ({"stress": np.full((3, 3), np.nan)}, "stress not finite"),
    ],
)
def test_answer_that_is_no_label_is_refused(change, message):
    good = {"energy": -7.0, "forces": np.zeros((2, 3)), "stress": np.zeros((3, 3))}
    assert answer_fault(Answer(**good), 2, EMT) == ""
    assert message in answer_fault(Answer(**good | change), 2, EMT)


def test_answer_without_forces_and_stress_is_a_label():
    assert answer_fault(Answer(-7.0, None, None), 2, EMT) == ""


def run_guard(parent, *command):
    return subprocess.run([sys.executable, "-I", "-S", guard.__file__, str(parent), "0.5", *command], timeout=20)


def test_guard_hands_on_the_exit_code():
    assert run_guard(os.getpid(), "sh", "-c", "exit 7").returncode == 7
    assert run_guard(os.getpid(), "sh", "-c", "kill -SEGV $$").returncode == 128 + signal.SIGSEGV


def test_guard_whose_parent_is_gone_starts_nothing(tmp_path):
    run_guard(2**22 - 1, "touch", str(tmp_path / "started"))
    assert not (tmp_path / "started").exists()


def test_guard_ends_what_a_command_left_running_in_another_session(tmp_path):
    note = tmp_path / "pid"
    run_guard(
        os.getpid(), "sh", "-c", f"setsid sh -c 'echo $$ > {note}; exec sleep 600' & while ! [ -s {note} ]; do :; done"
    )
    pid = int(note.read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
