"""Small real campaigns: labels (a pair potential, GPAW), walkers, trainings by two ranks. None knows of Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from campaign.lease import MARKER
from campaign.ledger import read_events, read_state
from shards.manifest import Manifest

ROOT = Path(__file__).parents[2]
COMMAND = "from campaign.cli import main; main()"
LONGEST_S = 400

LOOP = """
[campaign]
name = "slurm"
elements = ["Al"]
seed = 3
n_bootstrap = 8
holdout_fraction = 0.2
labels_per_task = {labels_per_task}
retrain_after = {retrain_after}
queue_target = 8
max_labels = {max_labels}
max_generations = {max_generations}

[potential]
radial_cutoff_A = 4.5
angular_cutoff_A = 3.5
n_radial = 4
n_angular_radial = 2
n_angular = 2
hidden = [4]
n_members = 2

[builder]
n_atoms = {n_atoms}
density_g_cm3 = [2.0, 2.8]
minimum_distance_A = 2.0

[sampler]
max_time_ps = 0.1
min_time_ps = 0.0
check_every = 5
walkers_per_task = 4
force_mean_threshold_eV_A = 0.001

[trainer]
ranks = 2
batch = 8
max_epochs = 5

[labeler]
time_limit_min = 2
"""
PAIRS = LOOP.format(max_labels=20, retrain_after=12, max_generations=2, n_atoms=[4, 6], labels_per_task=3) + (
    """
engine = "counting_calculator.Counting"
environment = { COUNT_FILE = "COUNT" }
"""
)
GPAW = LOOP.format(max_labels=11, retrain_after=2, max_generations=2, n_atoms=[1, 2], labels_per_task=4) + (
    """
[labeler.gpaw]
cutoff_eV = 100
kpoint_spacing_per_A = 2
smearing_eV = 0.5
energy_tolerance_eV = 1e-2
density_tolerance = 1e-2
eigenstates_tolerance_eV2 = 1e-2
"""
)


class Campaign:
    """A campaign in a folder, run by `smelt run` in a process of its own; `nodes_of_ranks` are those seen training."""

    def __init__(self, folder: Path, site: Path, config: str = PAIRS) -> None:
        self.run_dir = folder / "run"
        self._count = folder / "count"
        self._count.touch()
        self.config = folder / "c.toml"
        self.config.write_text(config.replace('"COUNT"', f'"{self._count}"'))
        self.arguments = [str(self.config), "--run-dir", str(self.run_dir), "--site", str(site)]
        paths = [str(ROOT), str(ROOT / "tests" / "calculators"), os.environ.get("PYTHONPATH", "")]
        self.environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        self.nodes_of_ranks: set[str] = set()

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """Exit code and output; `meanwhile` is called again and again."""
        command = [sys.executable, "-c", COMMAND, "run", *self.arguments]
        log = self._count.with_name("output")
        end = time.monotonic() + LONGEST_S
        with log.open("w") as output:
            driver = subprocess.Popen(command, env=os.environ | self.environment, stdout=output, stderr=output)
            try:
                while driver.poll() is None:
                    assert time.monotonic() < end, f"not within {LONGEST_S} s:\n{log.read_text()}"
                    self.look_for_ranks()
                    meanwhile()
                    time.sleep(0.5)
            finally:
                driver.kill()
                driver.wait()
        return driver.returncode, log.read_text()

    def allow(self, n_labels: int) -> None:
        """Of so many more labels; without it all are."""
        with self._count.with_suffix(".pace").open("a") as file:
            file.write("x" * n_labels)

    def look_for_ranks(self) -> None:
        for process in psutil.process_iter():
            try:
                if process.cmdline()[1:3] == ["-m", "trainer"] and process.environ()[MARKER] == str(self.run_dir):
                    self.nodes_of_ranks.add(process.environ()["SLURMD_NODENAME"])
            except (psutil.Error, KeyError):
                continue

    def computed(self) -> Counter[str]:
        """Frame -> how often it was computed."""
        return Counter(line.split()[0] for line in self._count.read_text().splitlines())

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir / "ledger.jsonl") if event["event"] == kind]

    def hosts(self, stage: str) -> set[str]:
        return {e["timing"]["host"] for e in self.events("task_finished") if e["task"].startswith(stage)}

    def check_labels(self, n_labels: int) -> None:
        """Every frame that was sent out is labeled once, none twice, none lost."""
        recorded = Counter(event["frame"] for event in self.events("labeled"))
        asked = {
            f for e in self.events("task_submitted") if e["task"].startswith("label") for f in e["inputs"]["frames"]
        }
        kept = [
            frame
            for part in ("train", "holdout")
            for shard in Manifest(self.run_dir / "data" / part / "manifest.jsonl").shards()
            for frame in shard.ids
        ]
        assert set(recorded.values()) == {1}
        assert set(recorded) == asked == set(kept)
        assert len(kept) == len(asked) == read_state(self.run_dir).n_labels == n_labels

    def check_nodes(self) -> None:
        """Each stage was on nodes of its own, and each training on two."""
        ranks, walkers, labels = self.nodes_of_ranks, self.hosts("sample"), self.hosts("label")
        assert len(ranks) == 2
        assert walkers
        assert labels
        assert self.hosts("train") <= ranks
        assert not ranks & walkers
        assert not ranks & labels
        assert not walkers & labels
