"""Kill a campaign's driver with SIGKILL at random moments, start it again each time, and count its labels.

    python tests/chaos/kill_campaign.py configs/aluminum-demo.toml RUN [--kills 5] [--seed 1] [--longest 120]

For campaigns whose labels take seconds (real quantum codes): computations are seen by looking at the labelers' folders
ten times a second. Prints one line per kill and a summary; exit code 1 when a label was lost, recorded twice, or
computed again after its file was there.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from campaign.ledger import read_events, read_state
from shards.manifest import Manifest

INTERVAL_S = 0.1


class Watch(threading.Thread):
    """When was each computation first seen, and when the file of each label?"""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self._run_dir = run_dir
        self._over = threading.Event()
        self.computations: dict[Path, float] = {}
        self.published: dict[str, float] = {}

    def run(self) -> None:
        while not self._over.wait(INTERVAL_S):
            now = time.monotonic()
            for path in self._run_dir.glob("scratch/label-*/label-*/*/"):
                self.computations.setdefault(path, now)
            for path in self._run_dir.glob("labels/*.h5"):
                self.published.setdefault(path.stem, now)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def computed_after_publication(self) -> list[str]:
        never = float("inf")
        return [
            path.name
            for path, start in self.computations.items()
            if start > self.published.get(path.name, never) + 2 * INTERVAL_S
        ]


def start(config: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-c",
        "from campaign.cli import main; main()",
        "run",
        str(config),
        "--run-dir",
        str(run_dir),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def in_data(run_dir: Path) -> Counter[str]:
    """How often each frame stands in the training or the held-out set."""
    manifests = [Manifest(run_dir / "data" / part / "manifest.jsonl") for part in ("train", "holdout")]
    return Counter(frame for manifest in manifests for shard in manifest.shards() for frame in shard.ids)


def report(run_dir: Path, watch: Watch) -> bool:
    """Print what became of the labels; was every one kept, once?"""
    data = in_data(run_dir)
    recorded = Counter(event["frame"] for event in read_events(run_dir / "ledger.jsonl") if event["event"] == "labeled")
    lost = set(watch.published) - set(data)
    twice = [frame for counts in (data, recorded) for frame, n in counts.items() if n > 1]
    again = watch.computed_after_publication()
    state = read_state(run_dir)
    print(
        f"{state.finished}: {state.n_labels} labels recorded, {len(data)} in the data, {len(watch.computations)}"
        f" computations started (those under way at a kill start again); lost {len(lost)}, twice {len(twice)},"
        f" computed after their file was there {len(again)}"
    )
    return not (lost or twice or again) and state.n_labels == len(data) and bool(state.finished) and not state.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=120.0, help="seconds a driver lives at most before its kill")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    watch = Watch(arguments.run_dir)
    watch.start()
    for number in range(1, arguments.kills + 1):
        driver = start(arguments.config, arguments.run_dir)
        life_s = rng.uniform(1.0, arguments.longest)
        try:
            driver.wait(life_s)
        except subprocess.TimeoutExpired:
            driver.kill()
        driver.wait()
        print(f"kill {number} after {life_s:.0f} s: {read_state(arguments.run_dir).n_labels} labels", flush=True)
    code = start(arguments.config, arguments.run_dir).wait()
    watch.stop()
    return 0 if report(arguments.run_dir, watch) and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
