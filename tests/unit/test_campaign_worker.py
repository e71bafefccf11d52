"""Does a worker hand back an outcome whatever the stage does, publish it first, and end with its driver?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from campaign.lease import Holder
from campaign.tasks import Call
from campaign.worker import GPUS, PIN, one_gpu, perform, read_outcome
from shards.outcome import FailureClass, Outcome

ROOT = Path(__file__).parents[2]
STAGE = """
import os
from pathlib import Path
from shards.outcome import Clock, Outcome

def count(path, by):
    n = int(path.read_text()) + by if path.exists() else by
    path.write_text(str(n))
    return Outcome("count", Clock().timing(), facts={"n": n})

def cores():
    return Outcome("cores", Clock().timing(), facts={"cores": sorted(os.sched_getaffinity(0))})

def fail(path):
    raise RuntimeError("no luck\\nat all")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_outcome_is_published_and_a_task_that_has_one_is_not_run_again(folder: Path) -> None:
    call = Call("a_stage:count", {"path": folder / "n", "by": 2})
    first = perform(call, folder / "scratch", Holder.this_process())
    again = perform(call, folder / "scratch", Holder.this_process())
    assert Outcome.from_dict(first).facts == {"n": 2}
    assert Outcome.from_dict(again) == read_outcome(folder / "scratch") == Outcome.from_dict(first)
    assert (folder / "n").read_text() == "2"


def test_exception_of_a_stage_is_a_failure_with_its_traceback_in_a_log(folder: Path) -> None:
    outcome = Outcome.from_dict(perform(Call("a_stage:fail", {"path": 1}), folder / "s", Holder.this_process()))
    assert outcome.failure is not None
    assert (outcome.failure.kind, outcome.failure.message) == (FailureClass.CRASH, "RuntimeError: no luck")
    assert "at all" in Path(outcome.failure.log).read_text()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_workers_of_a_node_keep_to_cores_of_their_own_and_share_its_gpus(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code = """
import os
from pathlib import Path
from campaign.lease import Holder
from campaign.tasks import Call
from campaign.worker import perform
for scratch in "12":
    cores = perform(Call("a_stage:cores", {}), Path(scratch), Holder.this_process())["facts"]["cores"]
    print(os.environ["CUDA_VISIBLE_DEVICES"], cores)
"""
    everything = sorted(os.sched_getaffinity(0))
    half = len(everything) // 2
    for rank, n_workers, cores, gpu in (
        (0, 2, everything[:half], "5"),
        (1, 2, everything[half : 2 * half], "7"),
        (2, 4, None, "7"),
        (3, 4, None, "7"),
        (1, 4, None, "5"),
    ):
        worker = {PIN: "1", GPUS: "2", "PARSL_WORKER_COUNT": str(n_workers), "PARSL_WORKER_RANK": str(rank)}
        paths = os.pathsep.join([str(ROOT), str(folder)])
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path_factory.mktemp("node"),
            env=os.environ | worker | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "5,7"},
            capture_output=True,
            text=True,
        )
        seen = {line.partition(" ")[::2] for line in done.stdout.splitlines()}
        assert len(seen) == 1, done.stderr
        seen_gpu, seen_cores = seen.pop()
        assert seen_gpu == gpu
        assert cores is None or seen_cores == str(cores)


@pytest.mark.parametrize(
    ("number", "given", "amd", "expected"),
    [
        (1, {}, False, {"CUDA_VISIBLE_DEVICES": "1"}),
        (1, {"CUDA_VISIBLE_DEVICES": "4,6"}, False, {"CUDA_VISIBLE_DEVICES": "6"}),
        (0, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, False, {"CUDA_VISIBLE_DEVICES": "GPU-a"}),
        (
            1,
            {"CUDA_VISIBLE_DEVICES": "2,3", "ROCR_VISIBLE_DEVICES": "2,3"},
            True,
            {"ROCR_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"},
        ),
    ],
)
def test_a_worker_sees_one_of_the_gpus_that_the_batch_system_gave(number, given, amd, expected) -> None:
    assert one_gpu(number, given, amd=amd) == expected


def test_stage_that_is_not_there_is_a_failure(folder: Path) -> None:
    outcome = Outcome.from_dict(perform(Call("no_stage:count", {}), folder / "s", Holder.this_process()))
    assert outcome.failure is not None
    assert "No module named 'no_stage'" in outcome.failure.message


def has_ended(pid: int) -> bool:
    """Also true of a zombie, which stays where nobody reaps orphans."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_worker_and_its_children_end_soon_after_their_driver(tmp_path: Path) -> None:
    (tmp_path / "slow_stage.py").write_text(
        "import subprocess, sys\n"
        "def sleep(path):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "    path.write_text(str(child.pid))\n"
        "    child.wait()\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    holder = Holder(Holder.this_process().host, driver.pid, psutil.Process(driver.pid).create_time())
    code = (
        "import sys; from pathlib import Path; from campaign.lease import Holder\n"
        "from campaign.tasks import Call; from campaign.worker import perform\n"
        f"perform(Call('slow_stage:sleep', {{'path': Path({str(tmp_path / 'pid')!r})}}), Path('s'), {holder!r})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    worker = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert worker.poll() is None
        driver.kill()
        driver.wait()
        assert worker.wait(30) == 1
        child, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
        while not has_ended(child):  # it was killed, which takes a while on a busy machine
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        worker.kill()
        driver.kill()
