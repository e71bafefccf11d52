"""Does a campaign survive what happens to its driver? A small real one: Parsl, walkers, training, labels.

One story is told once (`story`): a second driver tries its luck, the first is interrupted, its successors are killed
with SIGKILL after a few ledger events each, and the last one comes to the end. Each test looks at one claim.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from campaign.lease import MARKER
from campaign.ledger import read_events, read_state
from campaign.site import load_site
from campaign.state import State
from shards.manifest import Manifest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SITE = ROOT / "configs" / "sites" / "local.toml"
KILL_AFTER = (5, 9, 14)  # events that a driver adds before it is killed

CONFIG = """
[campaign]
name = "killed"
elements = ["Al"]
seed = 3
n_bootstrap = 8
holdout_fraction = 0.2
labels_per_task = 3
retrain_after = 6
queue_target = 8
max_labels = 22
max_generations = 4

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
engine = "counting_calculator.Counting"
environment = { COUNT_FILE = "COUNT" }

[trainer]
ranks = 1
batch = 8
max_epochs = 5
"""


@dataclass
class Story:
    folder: Path
    second_driver: tuple[int, str] = (0, "")
    interrupted: tuple[int, float, list[int]] = (0, 0.0, [])  # exit code, seconds it took, processes left
    after_interrupt: str = ""  # last event
    last: tuple[int, str] = (0, "")
    published: dict[str, float] = field(default_factory=dict)  # frame -> when its file was first seen
    kills: int = 0

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def state(self) -> State:
        return read_state(self.run_dir)

    def computed(self) -> list[tuple[str, float]]:
        lines = (self.folder / "count").read_text().splitlines()
        return [(line.split()[0], float(line.split()[1])) for line in lines]

    def start(self) -> subprocess.Popen[str]:
        paths = [str(ROOT), str(HERE.parent / "calculators"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        command = [HERE / "campaign_driver.py", self.folder / "c.toml", self.run_dir, SITE]
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def n_events(self) -> int:
        ledger = self.run_dir / "ledger.jsonl"
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    def wait_for_events(self, driver: subprocess.Popen[str], n: int) -> None:
        """Until the ledger has n more events, or the driver has ended."""
        target = self.n_events() + n
        while driver.poll() is None and self.n_events() < target:
            time.sleep(0.05)

    def workers(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == str(self.run_dir.resolve()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def watch_labels(self, done: threading.Event) -> None:
        while not done.wait(0.05):
            for path in (self.run_dir / "labels").glob("*.h5"):
                self.published.setdefault(path.stem, time.time())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    told = Story(tmp_path_factory.mktemp("killed"))
    (told.folder / "c.toml").write_text(CONFIG.replace('"COUNT"', f'"{told.folder / "count"}"'))
    done = threading.Event()
    watcher = threading.Thread(target=told.watch_labels, args=(done,))
    watcher.start()
    try:
        _tell(told)
    finally:
        done.set()
        watcher.join()
    return told


def _tell(told: Story) -> None:
    driver = told.start()
    told.wait_for_events(driver, 7)
    _, complaint = (second := told.start()).communicate(timeout=200)
    told.second_driver = (second.returncode, complaint)
    start = time.monotonic()
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=200)
    told.interrupted = (driver.returncode, time.monotonic() - start, told.workers())
    told.after_interrupt = list(read_events(told.run_dir / "ledger.jsonl"))[-1]["event"]

    for n_events in KILL_AFTER:
        driver = told.start()
        told.wait_for_events(driver, n_events)
        told.kills += driver.poll() is None
        driver.kill()
        driver.communicate()
    driver = told.start()
    output, error = driver.communicate(timeout=400)
    told.last = (driver.returncode, output + error)


def test_second_driver_is_refused_in_one_line(story: Story) -> None:
    code, complaint = story.second_driver
    assert code == 2
    assert len(complaint.strip().splitlines()) == 1
    assert "another driver is at work on it (pid " in complaint


def test_interrupt_leaves_nothing_behind_within_seconds(story: Story) -> None:
    code, seconds, left = story.interrupted
    assert (code, left, story.after_interrupt) == (130, [], "driver_stopped")
    assert seconds < 15


def test_killed_campaign_comes_to_its_end(story: Story) -> None:
    assert story.kills == len(KILL_AFTER)
    assert story.last == (0, "max_labels: 22 labels\n")
    assert story.state.n_labels == 22
    assert story.state.models[-1].n_labels == story.state.n_train
    assert not story.workers()


def test_no_label_is_lost(story: Story) -> None:
    data = {
        part: [i for shard in Manifest(story.run_dir / "data" / part / "manifest.jsonl").shards() for i in shard.ids]
        for part in ("train", "holdout")
    }
    assert (len(data["train"]), len(data["holdout"])) == (story.state.n_train, story.state.n_holdout)
    assert {*data["train"], *data["holdout"]} >= set(story.published)
    assert not set(data["train"]) & set(data["holdout"])
    assert max(Counter(data["train"] + data["holdout"]).values()) == 1
    assert list((story.run_dir / "labels").iterdir()) == []


def test_no_label_is_computed_again_once_it_is_published(story: Story) -> None:
    late = [frame for frame, when in story.computed() if when > story.published.get(frame, float("inf"))]
    assert late == []


def test_every_label_is_recorded_once(story: Story) -> None:
    recorded = Counter(e["frame"] for e in read_events(story.run_dir / "ledger.jsonl") if e["event"] == "labeled")
    assert set(recorded.values()) == {1}
    assert set(recorded) == {frame for frame, _ in story.computed()}


def test_at_most_the_labels_under_way_are_computed_again_for_each_kill(story: Story) -> None:
    computed = Counter(frame for frame, _ in story.computed())
    assert computed.total() - len(computed) <= (story.kills + 1) * load_site(SITE).label.slots
