"""What does the driver add to a label, and how long does a history take to read? `python benchmarks/driver_overhead.py`

A campaign of labels that cost nothing, on this machine or on that of a site file: policy, ledger, Parsl, worker, a
label file for each frame, its record in the ledger; then the merge of all into the data set. Only the label stage is
another one: it publishes zeros at once. And a ledger of a million events, read as a driver does when it starts.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil

from campaign import driver
from campaign.config import parse_campaign
from campaign.driver import run_campaign
from campaign.harvest import merge
from campaign.ledger import LEDGER, Ledger, read_state
from campaign.site import Site, load_site, parse_site
from campaign.state import EVENTS, State
from campaign.tasks import Call, stage_call
from labeler.config import LabelerSettings
from labeler.stage import level
from shards.label import Label
from shards.outcome import Clock, Outcome
from shards.reader import open_shard
from shards.writer import write_labels

HERE = Path(__file__).resolve()
N_MARKS = 10
DIGEST = "0123456789abcdef"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", nargs="?", type=Path, help="a site file; this machine with --slots if not given")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--labels", type=int, default=10_000)
    parser.add_argument("--per-task", type=int, default=50, help="campaign.labels_per_task")
    parser.add_argument("--events", type=int, default=1_000_000)
    options = parser.parse_args()
    here = {"name": "here", "label": {"slots": options.slots}}
    site = load_site(options.site) if options.site else parse_site(here)
    with tempfile.TemporaryDirectory(prefix="smelt-overhead-", dir=Path.cwd()) as folder:
        if options.labels:
            measure_labels(Path(folder) / "run", site, options.labels, options.per_task)
        if options.events:
            measure_replay(Path(folder), options.events)


# The label stage that costs nothing.


def label(
    frames: Path, indices: Sequence[int], settings: LabelerSettings, elements: Sequence[str], dest: Path, **_: Any
) -> Outcome:
    """As labeler.stage.label, with zeros for every frame."""
    clock = Clock()
    theory, shard, host = level(settings, elements), open_shard(frames), socket.gethostname()
    receipts = []
    for frame in map(shard.frame, indices):
        zeros = Label(0.0, np.zeros((frame.n_atoms, 3)), host=host)
        receipts.append(write_labels(dest / f"{frame.id}.h5", theory, [(frame, zeros)]))
    return Outcome("label", clock.timing(), tuple(receipts), facts={"failures": {}})


def idle_call(*arguments: Any) -> Call:
    call = stage_call(*arguments)
    return replace(call, function=f"{HERE.stem}:label") if call.function == "labeler.stage:label" else call


class Enough(Exception):  # noqa: N818
    """All labels are there."""


class Watch:
    """Note, now and then: labels done, time, CPU seconds and memory (MB) of the driver."""

    def __init__(self, n_labels: int) -> None:
        self._n_labels = n_labels
        self.marks: list[tuple[int, float, float, float]] = []

    def __call__(self, state: State) -> None:
        due = not self.marks or state.n_labels >= self.marks[-1][0] + self._n_labels // N_MARKS
        if state.n_labels and due:  # not while workers start
            self.mark(state.n_labels)
        if state.finished:
            raise Enough

    def mark(self, n_labels: int) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        memory = psutil.Process().memory_info().rss / 1e6
        self.marks.append((n_labels, time.time(), usage.ru_utime + usage.ru_stime, memory))

    def merge(self, run_dir: Path, ledger: Ledger) -> None:
        """What the driver does with all labels before it trains on them."""
        self.mark(self._n_labels)
        merge(run_dir, ledger)
        self.mark(2 * self._n_labels)
        raise Enough


def measure_labels(run_dir: Path, site: Site, n_labels: int, per_task: int) -> None:
    # Workers find this file as a module; the driver sends them its stage in place of the labeler's.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    watch = Watch(n_labels)
    driver.stage_call, driver.merge = idle_call, watch.merge  # type: ignore[attr-defined]
    table = {
        "name": "overhead",
        "elements": ["Al"],
        "n_bootstrap": n_labels,
        "bootstrap_fraction": 1.0,
        "labels_per_task": per_task,
        "max_labels": n_labels + 1,
    }
    builder = {"n_atoms": [2, 2], "density_g_cm3": [2.0, 2.8], "minimum_distance_A": 2.0}
    config = parse_campaign({"campaign": table, "builder": builder, "labeler": {"engine": "emt"}})
    with suppress(Enough):
        run_campaign(config, run_dir, site, watch)
    state = read_state(run_dir)
    assert state.n_labels == n_labels, state.finished
    print(f"{n_labels} labels, {per_task} in a task, {site.label.slots} slots")
    print("labels   labels/s   driver CPU ms/label   driver memory MB")
    *marks, merged = watch.marks
    rows = [(str(after[0]), before, after) for before, after in pairwise(marks)]
    for name, before, after in [*rows, ("all", marks[0], marks[-1]), ("merge", marks[-1], merged)]:
        n, seconds, cpu_s, _ = (b - a for a, b in zip(before, after, strict=True))
        if n:
            print(f"{name:>6} {n / seconds:10.0f} {1e3 * cpu_s / n:21.2f} {after[3]:18.0f}")


def measure_replay(run_dir: Path, n_events: int) -> None:
    with (run_dir / LEDGER).open("wb") as file:
        for event in history(n_events):
            assert set(event) == {"seq", "time", "event", *EVENTS[event["event"]]}
            file.write(orjson.dumps(event) + b"\n")
    start, cpu = time.perf_counter(), time.process_time()
    state = read_state(run_dir)
    cpu_s, seconds = time.process_time() - cpu, time.perf_counter() - start
    size = (run_dir / LEDGER).stat().st_size / 1e6
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{state.seq} events, {size:.0f} MB, {state.n_labels} labels: read in {seconds:.1f} s ({cpu_s:.1f} s of CPU)")
    print(f"largest memory of this process: {memory:.0f} MB")


def history(n_events: int) -> Iterator[dict[str, Any]]:
    """A campaign with one label in a task, and a merge for every thousand."""
    size = {"slots": 64, "cores": 64, "nodes": 0}
    pools = dict.fromkeys(("sample", "label", "train"), size)
    campaign = {"name": "long", "config_digest": DIGEST, "seed": 0, "level": DIGEST, "versions": {}, "revision": ""}
    first = {"host": "login", "pid": 1, "config_digest": DIGEST, "pools": pools}
    beginning = [("campaign_started", campaign), ("driver_started", first)]
    stories = chain(beginning, chain.from_iterable(map(thousand, count())))
    for seq, (event, fields) in enumerate(islice(stories, n_events), start=1):
        yield {"seq": seq, "time": round(1.8e9 + 0.01 * seq, 3), "event": event, **fields}


def thousand(number: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A thousand frames, each labeled in a task of its own."""
    frames = [f"{1000 * number + i:032x}" for i in range(1000)]
    path = f"candidates/sample-{number:06d}.h5"
    rows = [[frame, i, 128, 0.0512, i % 10 == 0] for i, frame in enumerate(frames)]
    yield "frames_queued", {"path": path, "kind": "walker", "generation": 0, "frames": rows}
    for i, frame in enumerate(frames):
        task = f"label-{1000 * number + i + 1:06d}"
        inputs = {"path": path, "indices": [i], "frames": [frame], "seed": 1234567890}
        timing = {"host": "node0123", "start": 1.8e9, "end": 1.8e9, "phases": {"adopt": 0.012, "compute": 600.1}}
        facts = {"level": DIGEST, "adopted": 0, "seconds": {frame: 599.87}, "rungs": {frame: 0}}
        yield "task_submitted", {"task": task, "stage": "label", "inputs": inputs}
        yield "labeled", {"frame": frame, "receipt": receipt(f"labels/{frame}.h5", 1)}
        yield "task_finished", {"task": task, "timing": timing, "facts": facts}
    for part, merged in (("holdout", frames[::10]), ("train", [f for i, f in enumerate(frames) if i % 10])):
        shard = receipt(f"data/{part}/labels-{number:06d}.h5", len(merged))
        yield "merged", {"part": part, "receipt": shard, "frames": merged}


def receipt(path: str, n_frames: int) -> dict[str, Any]:
    counts = {"n_frames": n_frames, "n_atoms": 128 * n_frames, "n_bytes": 34_567 * n_frames}
    return {"path": path, "kind": "labels", **counts, "digest": 4 * DIGEST, "level": DIGEST}


if __name__ == "__main__":
    main()
