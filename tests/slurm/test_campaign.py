"""Does the same campaign run on a Slurm cluster, and survive the loss of a block? The configuration knows no Slurm.

A small real one: EMT labels on one node, walkers on another, each training by two ranks on two more.
"""

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
from conftest import Cluster

from campaign.lease import MARKER
from campaign.ledger import read_events, read_state
from campaign.scheduler import job_prefix
from shards.manifest import Manifest

ROOT = Path(__file__).parents[2]
COMMAND = "from campaign.cli import main; main()"
LONGEST_S = 400

CONFIG = """
[campaign]
name = "slurm"
elements = ["Al"]
seed = 3
n_bootstrap = 8
holdout_fraction = 0.2
labels_per_task = 3
retrain_after = 6
queue_target = 8
max_labels = 20
max_generations = 3

[potential]
radial_cutoff_A = 4.5
angular_cutoff_A = 3.5
n_radial = 4
n_angular_radial = 2
n_angular = 2
hidden = [4]
n_members = 2

[builder]
n_atoms = [4, 6]
density_g_cm3 = [2.0, 2.8]
minimum_distance_A = 2.0

[sampler]
max_time_ps = 0.1
min_time_ps = 0.0
check_every = 5
walkers_per_task = 4
force_mean_threshold_eV_A = 0.001

[labeler]
engine = "counting_calculator.CountingEMT"
environment = { COUNT_FILE = "COUNT" }

[trainer]
ranks = 2
batch = 8
max_epochs = 5
"""


class Campaign:
    """A campaign in a folder, run by `smelt run` in a process of its own; `nodes_of_ranks` are those seen training."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.run_dir = folder / "run"
        self._count = folder / "count"
        self._count.touch()
        self._command = ["run", str(folder / "c.toml"), "--run-dir", str(self.run_dir), "--site", str(site)]
        (folder / "c.toml").write_text(CONFIG.replace('"COUNT"', f'"{self._count}"'))
        self.nodes_of_ranks: set[str] = set()

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """Exit code and output; `meanwhile` is called again and again."""
        paths = [str(ROOT), str(ROOT / "tests" / "workflow"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        log = self._count.with_name("output")
        end = time.monotonic() + LONGEST_S
        with log.open("w") as output:
            driver = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *self._command], env=environment, stdout=output, stderr=output
            )
            try:
                while driver.poll() is None:
                    assert time.monotonic() < end, f"not within {LONGEST_S} s:\n{log.read_text()}"
                    self._look_for_ranks()
                    meanwhile()
                    time.sleep(0.3)
            finally:
                driver.kill()
                driver.wait()
        return driver.returncode, log.read_text()

    def _look_for_ranks(self) -> None:
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
        assert set(recorded) == asked == set(self.computed()) == set(kept)
        assert len(kept) == len(asked) == read_state(self.run_dir).n_labels == n_labels


def test_campaign_runs_with_every_stage_on_nodes_of_its_own(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, site)
    assert campaign.run()[0] == 0, campaign.run_dir
    campaign.check_labels(20)
    assert set(campaign.computed().values()) == {1}
    assert campaign.nodes_of_ranks == {"node1", "node2"}
    assert campaign.hosts("train") == {"node1"}
    assert campaign.hosts("sample") | campaign.hosts("label") == {"node3", "node4"}
    assert not campaign.hosts("sample") & campaign.hosts("label")
    assert cluster.jobs() == {}


def test_cancelled_block_costs_only_the_labels_under_way(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    campaign, cancelled = Campaign(tmp_path, site), set[str]()

    def cancel_once() -> None:
        blocks = {
            job for job, name in cluster.jobs().items() if name.startswith(f"{job_prefix(campaign.run_dir)}label")
        }
        if not cancelled and len(campaign.computed()) >= 4 and blocks:
            cluster.run("scancel", *blocks)
            cancelled.update(blocks)

    code, output = campaign.run(cancel_once)
    assert code == 0, output
    campaign.check_labels(20)
    assert cancelled
    lost = {event["task"] for event in campaign.events("task_failed")}
    assert lost
    assert all(task.startswith("label") for task in lost)
    again = campaign.computed().total() - len(campaign.computed())
    assert again <= 2  # tasks that ran at the same time
