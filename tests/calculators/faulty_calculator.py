"""A calculator that misbehaves as real codes do, on frames of one size: the labeler's tests give it by dotted name."""

import ctypes
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from ase.calculators.calculator import CalculationFailed
from pair_calculator import PairRepulsion


class Faulty(PairRepulsion):
    def __init__(self, fault: str, n_atoms: int = 0, note: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.n_atoms = n_atoms
        self.note = note

    def calculate(self, atoms, properties, system_changes):
        super().calculate(atoms, properties, system_changes)
        if not self.n_atoms or len(atoms) == self.n_atoms:
            getattr(self, self.fault)()

    def sleep(self):
        """Hang, with a child in a session of its own that ignores the polite signal."""
        script = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        )
        child = subprocess.Popen(["python3", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
        child.stdout.readline()
        partial = Path(self.note + ".partial")
        partial.write_text(json.dumps([os.getpid(), child.pid]))
        partial.rename(self.note)
        time.sleep(600)

    def nap(self):
        time.sleep(1)

    def segfault(self):
        ctypes.string_at(0)

    def be_killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self):
        print("the code has had enough", flush=True)
        os._exit(3)

    def fail(self):
        raise CalculationFailed("the licence server did not answer")

    def fail_to_converge(self):
        raise CalculationFailed("SCF did not converge in 250 cycles")

    def go_on_unconverged(self):
        self.converged = False

    def want_memory(self):
        np.ones((1000, 1000, 4000))

    def give_nan(self):
        self.results["forces"][0, 0] = np.nan

    def give_huge_energy(self):
        self.results["free_energy"] = 531429.0

    def have_one_energy(self):
        del self.results["free_energy"], self.results["stress"]

    def write_environment(self):
        Path(self.note).write_text(json.dumps(dict(os.environ)))
