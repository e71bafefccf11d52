"""Is each label in the data exactly once, wherever a crash cuts the driver off?"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from campaign import harvest
from campaign.config import parse_campaign
from campaign.driver import Driver
from campaign.harvest import discard_unfinished, label_path, manifest_path, merge, reconcile, record_labels
from campaign.lease import Holder
from campaign.ledger import Ledger
from campaign.site import Site
from campaign.tasks import Call
from shards.frame import Frame
from shards.label import Label, Level
from shards.manifest import Manifest
from shards.writer import write_labels

LEVEL = Level("emt", "1")
FRAMES = [Frame(np.array([13]), np.array([[0.0, 0.0, float(i)]])) for i in range(5)]
HELD_OUT = {FRAMES[2].id, FRAMES[4].id}


class CrashError(Exception):
    pass


def publish(run_dir: Path, frame: Frame, level: Level = LEVEL) -> None:
    write_labels(label_path(run_dir, frame.id), level, [(frame, Label(1.0, np.zeros((1, 3))))])


def begin(run_dir: Path) -> None:
    """Five frames in one label task; four of them published, two of these recorded."""
    run_dir.mkdir(exist_ok=True)
    with Ledger(run_dir) as ledger:
        rows = [[frame.id, i, 1, 0.0, frame.id in HELD_OUT] for i, frame in enumerate(FRAMES)]
        ledger.append("frames_queued", path="c.h5", kind="bootstrap", generation=0, frames=rows)
        inputs = {"frames": [frame.id for frame in FRAMES], "path": "c.h5", "indices": list(range(5))}
        ledger.append("task_submitted", task="label-1", stage="label", inputs=inputs)
        for frame in FRAMES[:4]:
            publish(run_dir, frame)
        record_labels(run_dir, ledger, [frame.id for frame in FRAMES[:2]], LEVEL.digest)


def contents(run_dir: Path) -> dict[str, list[str]]:
    return {
        part: [i for shard in Manifest(manifest_path(run_dir, part)).shards() for i in shard.ids]
        for part in ("train", "holdout")
    }


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the step-th of the driver's lasting actions be followed by its death."""
    counter = itertools.count(1)

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if next(counter) == step:
                raise CrashError
            return result

        return call

    monkeypatch.setattr(harvest, "merge_labels", dying(harvest.merge_labels))
    monkeypatch.setattr(Manifest, "append", dying(Manifest.append))
    monkeypatch.setattr(Ledger, "append", dying(Ledger.append))
    monkeypatch.setattr(Ledger, "append_all", dying(Ledger.append_all))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


def test_crash_after_any_step_loses_and_repeats_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "begun")
    publish(tmp_path / "late", FRAMES[4])
    n_crashes = 0
    for step in itertools.count(1):
        run_dir = tmp_path / str(step)
        shutil.copytree(tmp_path / "begun", run_dir)
        crash_at(monkeypatch, step)
        try:
            with Ledger(run_dir) as ledger:
                reconcile(run_dir, ledger, LEVEL.digest)
                merge(run_dir, ledger)
            break
        except CrashError:
            n_crashes += 1
        finally:
            monkeypatch.undo()
        # A worker that outlived the driver publishes another one.
        shutil.copy(label_path(tmp_path / "late", FRAMES[4].id), label_path(run_dir, FRAMES[4].id))
        with Ledger(run_dir) as ledger:
            reconcile(run_dir, ledger, LEVEL.digest)
            merge(run_dir, ledger)
            assert ledger.replay.n_labels(holdout=False) == 3
            assert ledger.replay.n_labels(holdout=True) == 2
            assert not ledger.replay.in_flight
        data = contents(run_dir)
        assert set(data["holdout"]) == HELD_OUT
        assert set(data["train"]) == {frame.id for frame in FRAMES} - HELD_OUT
        assert max(Counter(data["train"] + data["holdout"]).values()) == 1
        assert list((run_dir / "labels").iterdir()) == []
    assert n_crashes >= 10  # two merges, two manifests, two events, their writes, five files, the adoption


def test_label_of_another_level_is_not_taken(tmp_path: Path) -> None:
    begin(tmp_path)
    label_path(tmp_path, FRAMES[3].id).unlink()
    publish(tmp_path, FRAMES[3], Level("emt", "2"))
    with Ledger(tmp_path) as ledger:
        reconcile(tmp_path, ledger, LEVEL.digest)
        assert set(ledger.replay.in_flight) == {FRAMES[3].id, FRAMES[4].id}


def test_damaged_label_is_not_taken(tmp_path: Path) -> None:
    begin(tmp_path)
    path = label_path(tmp_path, FRAMES[3].id)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-100])
    with Ledger(tmp_path) as ledger:
        reconcile(tmp_path, ledger, LEVEL.digest)
        assert set(ledger.replay.in_flight) == {FRAMES[3].id, FRAMES[4].id}


def test_merged_data_can_be_moved_with_its_run_directory(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    with Ledger(tmp_path / "a") as ledger:
        reconcile(tmp_path / "a", ledger, LEVEL.digest)
        merge(tmp_path / "a", ledger)
    (tmp_path / "a").rename(tmp_path / "b")
    with Ledger(tmp_path / "b") as ledger:
        reconcile(tmp_path / "b", ledger, LEVEL.digest)
        assert ledger.replay.seq == 8  # nothing to complete
    assert sum(map(len, contents(tmp_path / "b").values())) == 4


def test_task_that_starts_again_is_sent_only_frames_whose_labels_are_not_recorded(tmp_path: Path) -> None:
    """Their files may be merged, and gone, before a worker looks for them."""
    begin(tmp_path)
    (tmp_path / "scratch").mkdir()
    sent: list[Any] = []

    class Pools:
        slots: ClassVar = {"sample": 1, "label": 1, "train": 1}

        def submit(self, pool: str, function: Any, call: Call, *rest: Any) -> Future[dict[str, Any]]:
            sent.append(call.arguments["indices"])
            return Future()

        def lost(self) -> str:
            return ""

        def waits(self) -> dict[str, str]:
            return {}

    interrupted = threading.Event()
    interrupted.set()
    config = parse_campaign({"campaign": {"name": "again", "elements": ["H"]}, "labeler": {"engine": "emt"}})
    with Ledger(tmp_path) as ledger:
        merge(tmp_path, ledger)
        ledger.append("driver_started", host="", pid=0, config_digest="", pools={})
        driver = Driver(
            config, tmp_path, Site(name="x"), ledger, LEVEL.digest, Pools(), Holder("", 0, 0.0), lambda state: None
        )
        with pytest.raises(KeyboardInterrupt):
            driver.run(interrupted)
    assert sent == [[2, 3, 4]]


def test_what_a_killed_worker_began_to_write_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "labels").mkdir()
    for name in ("a.h5", "b.h5.1234abcd.partial"):
        (tmp_path / "labels" / name).touch()
    discard_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["a.h5"]
