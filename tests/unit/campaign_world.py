"""A simulated campaign of a few dozen labels in which every task takes the same time and fails when it is told to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from campaign import simulation
from campaign.config import CampaignSettings
from campaign.policy import Action
from campaign.simulation import Fate
from campaign.state import Candidate, State, Task

SLOTS = {"sample": 1, "label": 2, "train": 1}
SECONDS = {"build": 1.0, "sample": 20.0, "rank": 1.0, "label": 5.0, "train": 60.0, "evaluate": 2.0}
WALKERS = 10


def settings(**changes: Any) -> CampaignSettings:
    fields = {
        "name": "world",
        "elements": ("Al",),
        "n_bootstrap": 20,
        "retrain_after": 10,
        "queue_target": 12,
        "max_labels": 80,
        "labels_per_task": 3,
        "quiet_walkers": 40,
    }
    return CampaignSettings(**(fields | changes))


@dataclass
class Script:
    """`label_fate(frame, attempt)` and `task_fate(stage, counter)` name a class of failure, or nothing; a label may
    also be "postponed". `triggers(generation)` says how many of ten walkers trigger."""

    label_fate: Callable[[str, int], str] = lambda frame, attempt: ""
    task_fate: Callable[[str, int], str] = lambda stage, counter: ""
    triggers: Callable[[int], int] = lambda generation: 5
    exploding: bool = False

    def fate(self, task: Task, candidates: Sequence[Candidate]) -> Fate:
        failure = self.task_fate(task.stage, int(task.id.partition("-")[2]))
        if task.stage == "label":
            fates = {c.frame: self.label_fate(c.frame, c.attempts + c.losses + 1) for c in candidates}
            postponed = frozenset(frame for frame, fate in fates.items() if fate == "postponed")
            failures = {frame: kind for frame, kind in fates.items() if kind and frame not in postponed}
            return Fate(SECONDS["label"] * len(candidates), failure=failure, failures=failures, postponed=postponed)
        walkers = self._walkers(task.inputs["generation"]) if task.stage == "sample" else {}
        return Fate(SECONDS[task.stage], failure=failure, walkers=walkers)

    def is_sure(self, candidate: Candidate) -> bool:
        return candidate.spread < 0.2

    def _walkers(self, generation: int) -> dict[str, Any]:
        n = 0 if self.exploding else self.triggers(generation)
        ends = {"exploded": WALKERS, "timeouts": 0} if self.exploding else {"exploded": 0, "timeouts": WALKERS - n}
        counts = {"walkers": WALKERS, "n_frames": n, "too_close": 0, "steps": 1, "atom_steps": 1}
        return counts | ends | {"triggers": {"force_mean": n}}


class World(simulation.World):
    """Remembers all actions and events."""

    def __init__(self, settings: CampaignSettings, slots: Mapping[str, int] = SLOTS, **script: Any) -> None:
        self.actions: list[tuple[float, Action]] = []
        self.events: list[dict[str, Any]] = []
        self.script = Script(**script)
        pools = {name: {"slots": n, "cores": n, "nodes": n} for name, n in slots.items()}
        super().__init__(settings, pools, self.script)

    def run(self, limit: int = 20_000) -> State:
        for _ in range(limit):
            if (state := self.step()).finished:
                return state
        raise AssertionError("the campaign does not end")

    def take(self, action: Action) -> None:
        self.actions.append((self.now, action))
        super().take(action)

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"seq": self.replay.seq + 1, "time": self.now, "event": event, **fields})
        super().emit(event, **fields)
