"""An EMT that tells a file which frame it has computed, and when."""

import os
import time
from pathlib import Path

from ase.calculators.emt import EMT

from shards.convert import from_atoms


class CountingEMT(EMT):
    def calculate(self, atoms, properties, system_changes):
        super().calculate(atoms, properties, system_changes)
        time.sleep(float(os.environ.get("COUNT_NAP_S", "0.1")))
        with Path(os.environ["COUNT_FILE"]).open("a") as file:
            file.write(f"{from_atoms(atoms).id} {time.time()}\n")
