"""Does the ledger keep a history through crashes, and refuse one that was damaged?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from campaign.ledger import Ledger, LedgerError, read_events, read_state

STARTED: dict[str, Any] = {
    "name": "a",
    "config_digest": "c",
    "seed": 1,
    "level": "l",
    "versions": {"ase": "3"},
    "revision": "r",
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    with Ledger(tmp_path, clock=lambda: 5.0) as ledger:
        ledger.append("campaign_started", **STARTED)
        rows = [[f"{i:032x}", i, 4, 0.5, i == 2] for i in range(4)]
        ledger.append("frames_queued", path="c.h5", kind="bootstrap", generation=0, frames=rows)
        ledger.append_all([("labeled", {"frame": f"{i:032x}", "receipt": {"path": "p"}}) for i in (1, 2)])
    return tmp_path


def test_replayed_state_is_the_writers_state(run_dir: Path) -> None:
    with Ledger(run_dir) as ledger:
        assert ledger.replay.state() == read_state(run_dir)
        assert (read_state(run_dir).n_train, read_state(run_dir).n_holdout) == (1, 1)
        assert read_state(run_dir).time == 5.0


@pytest.mark.parametrize("n_torn", [1, 20, 60])
def test_torn_last_line_is_passed_over_and_cut_off_by_the_next_driver(run_dir: Path, n_torn: int) -> None:
    path = run_dir / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-n_torn])
    assert read_state(run_dir).n_labels == 1
    with Ledger(run_dir) as ledger:
        ledger.append("labeled", frame=f"{3:032x}", receipt={"path": "q"})
    assert [event["seq"] for event in read_events(path)] == [1, 2, 3, 4]
    assert read_state(run_dir).n_labels == 2


def test_torn_first_line_leaves_an_empty_history(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(b'{"seq": 1, "ti')
    with Ledger(tmp_path) as ledger:
        ledger.append("campaign_started", **STARTED)
    assert read_state(tmp_path).name == "a"


@pytest.mark.parametrize("damage", [b"#", b'{"seq": 2, "event": "unheard_of"}', b'{"seq": 7, "event": "labeled"}'])
def test_damaged_line_is_refused_by_file_and_number(run_dir: Path, damage: bytes) -> None:
    path = run_dir / "ledger.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:], b""]))
    with pytest.raises(LedgerError, match=r"ledger\.jsonl:2: not an event of this version"):
        read_state(run_dir)


def test_lost_line_is_noticed(run_dir: Path) -> None:
    path = run_dir / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(LedgerError, match="expected seq 2"):
        read_state(run_dir)


def test_event_is_on_disk_before_it_counts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Ledger(run_dir) as ledger:
        before = (run_dir / "ledger.jsonl").read_bytes()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.append("driver_stopped", reason="x")
        monkeypatch.undo()
        assert (run_dir / "ledger.jsonl").read_bytes() == before
        ledger.append("driver_stopped", reason="x")
    assert read_state(run_dir).seq == 5


def test_folder_without_a_ledger_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"not a run directory: there is no ledger\.jsonl in it"):
        read_state(tmp_path)


def test_event_with_wrong_fields_is_a_programming_error(run_dir: Path) -> None:
    with Ledger(run_dir) as ledger, pytest.raises(AssertionError, match="driver_stopped: fields"):
        ledger.append("driver_stopped", why="x")
