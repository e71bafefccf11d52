"""What happens around a stage function on a worker? Imports no Parsl; the stage is imported when it is called.

The outcome is published as a file before the caller hears of it: if the driver is killed in between, the next one
reads it there.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from campaign.lease import Holder, is_alive, kill
from campaign.tasks import Call
from shards.outcome import Clock, Failure, FailureClass, Outcome

__all__ = ["perform", "read_outcome"]

WATCH_S = 1.0


def perform(call: Call, scratch: Path, driver: Holder) -> dict[str, Any]:
    """Call a stage function; its outcome as a dictionary, also in scratch/outcome.json. Never raises for its sake."""
    scratch.mkdir(parents=True, exist_ok=True)
    with _Watch(driver):
        outcome = read_outcome(scratch) or _run(call, scratch)
        _publish(outcome, scratch / "outcome.json")
    return outcome.to_dict()


def read_outcome(scratch: Path) -> Outcome | None:
    """The outcome that a worker has published there; None when there is none."""
    try:
        return Outcome.from_dict(json.loads((scratch / "outcome.json").read_text()))
    except FileNotFoundError:
        return None


def _run(call: Call, scratch: Path) -> Outcome:
    clock = Clock()
    module, _, name = call.function.partition(":")
    try:
        outcome = getattr(importlib.import_module(module), name)(**call.arguments)
        assert isinstance(outcome, Outcome), f"{call.function} returned {type(outcome).__name__}, not an Outcome"
        return outcome
    except Exception as error:
        log = scratch / "error.log"
        log.write_text(traceback.format_exc())
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(name, clock.timing(), failure=Failure(FailureClass.CRASH, message, str(log)))


def _publish(outcome: Outcome, path: Path) -> None:
    partial = path.with_suffix(".part")
    with partial.open("w") as file:
        json.dump(asdict(outcome), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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
