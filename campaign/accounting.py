"""Where did the time of a pool's slots go? Moments in, slot-seconds out; knows no event, no setting and no clock.

While a driver is at work, every slot of a pool is at each moment in one state only, so that all shares together are
slots x seconds. Either a stage works in it, with whatever success; or it waits, for one of `Wait`. What a task's slot
did is known when the task ends: until then it is under way, and in neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

__all__ = ["Delay", "DelayMeter", "PoolMeter", "PoolUse", "Wait"]


class Wait(StrEnum):
    """What a slot waits for in which no stage works. The first five are reasons of the policy."""

    FRAMES = "frames"  # too few candidates to label
    LABELS = "labels"  # too few new ones to train on; or enough candidates wait for theirs
    MODEL = "model"  # there is none yet; or the newest one is too far behind the labels
    RANKING = "ranking"  # the newest model has still to judge the candidates
    END = "end"  # all work is handed out
    SCHEDULER = "scheduler"  # its task was handed over and had not started: no node yet, or its workers start
    DRIVER = "driver"  # its task had ended, or it was free, and the driver had not got to it
    LOST = "lost"  # nothing: its task went down with a node or a driver, and is done again


@dataclass(frozen=True)
class PoolUse:
    """Where the slot-seconds of one pool went, over all drivers."""

    # Those of the newest driver's site. No nodes where they are not the pool's own.
    slots: int = 0
    cores: int = 0
    nodes: int = 0
    busy: Mapping[str, float] = field(default_factory=dict)  # stage -> slot-seconds of tasks that have ended
    idle: Mapping[str, float] = field(default_factory=dict)  # Wait -> slot-seconds
    under_way: float = 0.0  # slot-seconds of tasks that have not ended
    waits_for: str = Wait.DRIVER  # what free slots wait for at present

    @property
    def seconds(self) -> float:
        """All slot-seconds."""
        return sum(self.busy.values()) + sum(self.idle.values()) + self.under_way

    def since(self, earlier: PoolUse) -> PoolUse:
        """What was added to an earlier state of it. Tasks under way, less those of then, count as one more stage."""
        busy = _difference(self.busy, earlier.busy) | {"under way": self.under_way - earlier.under_way}
        return replace(self, busy=busy, idle=_difference(self.idle, earlier.idle), under_way=0.0)


def _difference(table: Mapping[str, float], earlier: Mapping[str, float]) -> dict[str, float]:
    return {name: value - earlier.get(name, 0.0) for name, value in table.items()}


class PoolMeter:
    """PoolUse while it grows. Moments are seconds since the epoch and never go back."""

    def __init__(self) -> None:
        self._size: Mapping[str, int] = {}
        self._busy: dict[str, float] = {}
        self._idle: dict[str, float] = {}
        self._n_taken = self._n_free = 0  # slots; none is either without a driver
        self._taken_s = 0.0  # sum of the moments at which the taken ones were, from `_started` on
        self._started = 0.0
        self._since = 0.0  # free slots are accounted for up to here
        self._waits_for: str = Wait.DRIVER

    def start(self, now: float, size: Mapping[str, int]) -> None:
        """A driver starts, with all slots free. size: slots, cores and nodes."""
        self._size = size
        self._n_free, self._waits_for = size.get("slots", 0), Wait.DRIVER
        self._started = self._since = now

    def stop(self, now: float) -> None:
        """The driver is gone, and its tasks with it."""
        self._settle(now)
        self._wait(Wait.LOST, self._under_way(now))
        self._n_taken = self._n_free = 0
        self._taken_s = 0.0

    def take(self, now: float) -> None:
        """A task is handed over."""
        self._settle(now)
        self._n_taken += 1
        self._n_free -= 1
        self._taken_s += now - self._started
        if self._n_free <= 0:
            self._waits_for = Wait.DRIVER  # which has yet to look at the slot that is free next

    def give_back(self, now: float, stage: str, submitted: float, timing: Mapping[str, Any]) -> None:
        """The driver learns of a task's end. timing: host, start, end by the worker's clock; no host: it was lost."""
        self._settle(now)
        self._n_taken -= 1
        self._n_free += 1
        self._taken_s -= submitted - self._started
        if not timing["host"]:
            self._wait(Wait.LOST, now - submitted)
            return
        start = min(max(submitted, timing["start"]), now)
        end = min(max(start, timing["end"]), now)
        self._wait(Wait.SCHEDULER, start - submitted)
        self._busy[stage] = self._busy.get(stage, 0.0) + end - start
        self._wait(Wait.DRIVER, now - end)

    def wait_for(self, now: float, reason: str) -> None:
        """What free slots wait for from now on, until all were taken again."""
        self._settle(now)
        self._waits_for = reason

    def frozen(self, now: float) -> PoolUse:
        idle = dict(self._idle)
        if free_s := max(0, self._n_free) * (now - self._since):
            idle[self._waits_for] = idle.get(self._waits_for, 0.0) + free_s
        return PoolUse(
            **self._size,
            busy=MappingProxyType(dict(self._busy)),
            idle=MappingProxyType(idle),
            under_way=self._under_way(now),
            waits_for=self._waits_for,
        )

    def _under_way(self, now: float) -> float:
        return max(0.0, self._n_taken * (now - self._started) - self._taken_s)  # rounded

    def _settle(self, now: float) -> None:
        self._wait(self._waits_for, max(0, self._n_free) * (now - self._since))
        self._since = now

    def _wait(self, reason: str, seconds: float) -> None:
        if seconds:
            self._idle[reason] = self._idle.get(reason, 0.0) + seconds


@dataclass(frozen=True)
class Delay:
    """Time from a label to the first model that was trained on it, over all labels of which it is known."""

    n_labels: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0


class DelayMeter:
    """Delay while it grows."""

    def __init__(self) -> None:
        self._delay = Delay()
        self._new: list[float] = []  # when labels came that no training has taken yet
        self._taken: list[float] = []  # ... and those that one has

    def label(self, now: float) -> None:
        self._new.append(now)

    def train(self) -> None:
        """A training takes all labels that are there; they stay taken when it fails."""
        self._taken += self._new
        self._new = []

    def model(self, now: float) -> None:
        """It has become a model."""
        waits = [now - moment for moment in self._taken]
        if waits:
            old = self._delay
            longest_s = max(old.longest_s, *waits)
            self._delay = Delay(old.n_labels + len(waits), old.seconds + sum(waits), longest_s)
        self._taken = []

    def frozen(self) -> Delay:
        return self._delay
