"""Is a run directory one driver's alone, and rid of its predecessors' processes?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from campaign.lease import MARKER, Holder, Lease, LeaseError, holder_of, is_alive, reap

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from campaign.lease import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]


def hold(run_dir: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_driver_is_told_who_is_at_work_and_a_dead_one_is_succeeded(tmp_path: Path) -> None:
    first = hold(tmp_path)
    try:
        assert holder_of(tmp_path) == Holder(**json.loads((tmp_path / "lock").read_text()))
        with (
            pytest.raises(LeaseError, match=rf"another driver is at work on it \(pid {first.pid} on "),
            Lease(tmp_path),
        ):
            pass
    finally:
        first.kill()
        first.wait()
    assert holder_of(tmp_path) is None
    with Lease(tmp_path) as lease:
        assert holder_of(tmp_path) == lease.holder
    assert holder_of(tmp_path) is None


def test_driver_on_another_host_is_seen_by_its_lock(tmp_path: Path) -> None:
    driver = hold(tmp_path)
    elsewhere = replace(Holder(**json.loads((tmp_path / "lock").read_text())), host="elsewhere")
    (tmp_path / "lock").write_text(json.dumps(asdict(elsewhere)))  # the same file, so that it stays locked
    try:
        assert holder_of(tmp_path) == elsewhere
    finally:
        driver.kill()
        driver.wait()
    assert holder_of(tmp_path) is None


def test_reused_process_number_is_not_the_driver() -> None:
    this = Holder.this_process()
    assert is_alive(this)
    assert not is_alive(replace(this, created=this.created - 100))
    assert is_alive(replace(this, host="elsewhere", pid=1))


def test_processes_of_a_dead_driver_are_ended_and_no_others(tmp_path: Path) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "run-2"
    for folder in (run_dir / "scratch" / "label-1", other):
        folder.mkdir(parents=True)
    marked = os.environ | {MARKER: str(run_dir.resolve())}
    foreign = os.environ | {MARKER: str(other.resolve())}
    nested = [sys.executable, "-c", f"import subprocess; subprocess.run({SLEEP!r}, env={{}}, start_new_session=True)"]
    theirs = [
        subprocess.Popen(SLEEP, env=marked, stdout=subprocess.PIPE),
        subprocess.Popen(SLEEP, cwd=run_dir / "scratch" / "label-1", stdout=subprocess.PIPE),
        subprocess.Popen(nested, env=marked, stdout=subprocess.PIPE),
    ]
    bystander = subprocess.Popen(SLEEP, env=foreign, stdout=subprocess.PIPE)
    try:
        for process in (*theirs, bystander):
            assert process.stdout is not None
            process.stdout.readline()
        reap(run_dir)
        assert all(process.poll() is not None for process in theirs)
        assert bystander.poll() is None
        assert theirs[2].stdout is not None
        assert theirs[2].stdout.read() == b""  # its child has closed the pipe, too
    finally:
        for process in (*theirs, bystander):
            process.kill()
            process.wait()


def test_leash_ends_a_helper_with_its_driver(tmp_path: Path) -> None:
    leash = ROOT / "campaign" / "leash.py"
    command = [sys.executable, str(leash), *SLEEP]
    code = f"import subprocess, time; print(subprocess.Popen({command!r}).pid, flush=True); time.sleep(60)"
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    driver.stdout.readline()  # the helper is up
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the helper outlived its driver"
        time.sleep(0.01)


def test_holder_survives_its_file(tmp_path: Path) -> None:
    this = Holder.this_process()
    (tmp_path / "lock").write_text(json.dumps(asdict(this)))
    assert holder_of(tmp_path) == this
    (tmp_path / "lock").write_text("{")
    assert holder_of(tmp_path) is None
