"""What happens around a stage function on a worker? Imports no Parsl; the stage is imported when it is called.

The outcome is published as a file before the caller hears of it: if the driver is killed in between, the next one
reads it there. Another file says where and since when the task is at work.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from campaign.horizon import BLOCK_END
from campaign.lease import Holder, is_alive, kill
from campaign.stop import stop_request
from campaign.tasks import Call, run_dir_of
from shards.files import write_atomically
from shards.outcome import Clock, Failure, FailureClass, Outcome

__all__ = ["GPUS", "PIN", "Work", "forget_work", "has_begun", "one_gpu", "perform", "read_outcome", "work_under_way"]

OUTCOME, WORK = "outcome.json", "work.json"
# Variables of workers that have a node to themselves: that they do, and how many GPUs they share.
PIN, GPUS = "SMELT_PIN", "SMELT_GPUS"
AMD_DRIVER = Path("/dev/kfd")
WATCH_S = 1.0


@dataclass(frozen=True)
class Work:
    """A task that a worker is at."""

    task: str
    host: str
    since: float  # seconds since the epoch
    job: str  # of Slurm; empty outside of one


def perform(call: Call, scratch: Path, driver: Holder) -> dict[str, Any]:
    """Call a stage function; its outcome as a dictionary, also in scratch/outcome.json. Never raises for its sake.

    Nothing is begun once the driver was asked to stop: then facts["withheld"] is true, and nothing published.
    """
    _pin()
    scratch.mkdir(parents=True, exist_ok=True)
    work = Work(scratch.name, socket.gethostname(), time.time(), os.environ.get("SLURM_JOB_ID", ""))
    write_atomically(scratch / WORK, json.dumps(asdict(work)).encode())
    # In this order: a driver that sees the request and no such file knows that the task will not begin.
    if stop_request(run_dir_of(scratch)):
        forget_work(scratch)
        return Outcome(call.function, Clock().timing(), facts={"withheld": True}).to_dict()
    with _Watch(driver):
        outcome = read_outcome(scratch) or _run(call, scratch)
        write_atomically(scratch / OUTCOME, json.dumps(asdict(outcome)).encode())
    return outcome.to_dict()


def work_under_way(run_dir: Path) -> list[Work]:
    """Tasks that workers are at, those that a killed one was at included."""
    paths = (run_dir / "scratch").glob(f"*/{WORK}")
    found = [_read_json(path) for path in sorted(paths) if not path.with_name(OUTCOME).exists()]
    return [Work(**table) for table in found if table]


def has_begun(scratch: Path) -> bool:
    """Has a worker begun with a task that has not been settled?"""
    return (scratch / WORK).exists()


def forget_work(scratch: Path) -> None:
    """A task is not under way: it is about to be submitted, or was lost."""
    (scratch / WORK).unlink(missing_ok=True)


def read_outcome(scratch: Path) -> Outcome | None:
    """The outcome that a worker has published there; None when there is none."""
    table = _read_json(scratch / OUTCOME)
    return Outcome.from_dict(table) if table else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return table


@functools.cache
def _pin() -> None:
    """Keep to this worker's part of its node's cores, and to one of its GPUs, with all that it starts.

    MPI binds ranks to the first cores that it sees: those of two tasks would share them while others are idle.
    """
    if not os.environ.get(PIN) or "PARSL_WORKER_COUNT" not in os.environ:
        return
    n_workers, rank = int(os.environ["PARSL_WORKER_COUNT"]), int(os.environ["PARSL_WORKER_RANK"])
    cores = sorted(os.sched_getaffinity(0))
    if each := len(cores) // n_workers:
        os.sched_setaffinity(0, cores[rank * each : (rank + 1) * each])
    if n_gpus := int(os.environ.get(GPUS, 0)):
        os.environ |= one_gpu(rank * n_gpus // max(n_gpus, n_workers), os.environ, amd=AMD_DRIVER.exists())


def one_gpu(number: int, given: Mapping[str, str], *, amd: bool) -> dict[str, str]:
    """Return the variables that leave a process one of the GPUs which the batch system has named in `given`, or has."""
    name = "ROCR_VISIBLE_DEVICES" if amd else "CUDA_VISIBLE_DEVICES"
    names = given[name].split(",") if given.get(name) else []
    own = {name: names[number] if number < len(names) else str(number)}
    # ROCm counts in these among what is left by the other.
    return own | {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"} if amd else own


def _run(call: Call, scratch: Path) -> Outcome:
    clock = Clock()
    module, _, name = call.function.partition(":")
    try:
        bounds = {"deadline": float(os.environ.get(BLOCK_END, "inf"))} if call.bounded else {}
        outcome = getattr(_import(module), name)(**call.arguments, **bounds)
        assert isinstance(outcome, Outcome), f"{call.function} returned {type(outcome).__name__}, not an Outcome"
        return outcome
    except Exception as error:
        log = scratch / "error.log"
        log.write_text(traceback.format_exc())
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(name, clock.timing(), failure=Failure(FailureClass.CRASH, message, str(log)))


@functools.cache
def _import(name: str) -> ModuleType:
    """What is imported stays: to look through it for garbage takes a fifth of the time."""
    gc.disable()
    try:
        module = importlib.import_module(name)
        gc.freeze()
        return module
    finally:
        gc.enable()


class _Watch:
    """While entered: when the driver dies, end this process with all it has started."""

    def __init__(self, driver: Holder) -> None:
        self._driver = driver
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="driver-watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(WATCH_S):
            if not is_alive(self._driver):
                kill(psutil.Process().children(recursive=True))
                os._exit(1)
