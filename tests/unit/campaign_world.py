"""A campaign without files and without work: actions of the policy become events after a simulated time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from campaign.config import CampaignSettings
from campaign.policy import (
    Action,
    Build,
    Evaluate,
    Fail,
    Finish,
    Label,
    Rank,
    Sample,
    Stop,
    Train,
    Verdict,
    decide,
    holdout_of,
    verdict,
)
from campaign.state import Replay, State
from shards.outcome import FailureClass

SLOTS = {"sample": 1, "label": 2, "train": 1}
SECONDS = {"build": 1.0, "sample": 20.0, "rank": 1.0, "label": 5.0, "train": 60.0, "evaluate": 2.0}


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


def failure(kind: str, message: str = "made to fail") -> dict[str, str]:
    return {"kind": kind, "message": message, "log": "some.log"}


@dataclass
class World:
    """Runs the policy until it ends. `label_fate(frame, attempt)` and `task_fate(stage, counter)` name a class of
    failure, or nothing; a label may also be "postponed". `triggers(generation)` says how many of ten walkers trigger.
    """

    settings: CampaignSettings
    slots: Mapping[str, int] = field(default_factory=lambda: dict(SLOTS))
    label_fate: Callable[[str, int], str] = lambda frame, attempt: ""
    task_fate: Callable[[str, int], str] = lambda stage, counter: ""
    triggers: Callable[[int], int] = lambda generation: 5
    exploding: bool = False

    def __post_init__(self) -> None:
        self.now = 1000.0
        self.replay = Replay()
        self.events: list[dict[str, Any]] = []
        self.actions: list[tuple[float, Action]] = []
        self.ends: list[tuple[float, int, str, str, dict[str, Any]]] = []
        self.order = itertools.count()
        self.frames = itertools.count()
        self.emit("campaign_started", name="world", config_digest="", seed=0, level="", versions={}, revision="")
        self.emit("driver_started", host="here", pid=1, config_digest="")

    @property
    def state(self) -> State:
        return self.replay.state()

    def emit(self, event: str, **fields: Any) -> None:
        row = {"seq": self.replay.seq + 1, "time": self.now, "event": event, **fields}
        self.events.append(row)
        self.replay.apply(row)

    def run(self, limit: int = 20_000) -> State:
        for _ in range(limit):
            state = self.state
            if state.finished:
                return state
            actions = decide(state, self.settings, self.slots, self.now)
            for action in actions:
                self.actions.append((self.now, action))
                self.take(action)
            if not any(isinstance(action, Stop | Finish | Fail) for action in actions):
                self.advance()
        raise AssertionError("the campaign does not end")

    def take(self, action: Action) -> None:
        match action:
            case Build(n_frames):
                self.submit("build", {"n_frames": n_frames})
            case Sample(generation):
                self.submit("sample", {"generation": generation})
            case Rank(generation, paths):
                self.submit("rank", {"generation": generation, "paths": list(paths)})
            case Label(candidates):
                self.submit("label", {"frames": [candidate.frame for candidate in candidates]})
            case Train(generation):
                self.submit("train", {"generation": generation, "n_labels": self.state.n_train})
            case Evaluate(generation):
                self.submit("evaluate", {"generation": generation, "n_labels": self.state.n_holdout})
            case Stop(reason):
                self.emit("stop_reached", reason=reason)
            case Finish(reason):
                self.emit("campaign_finished", reason=reason, failed=False)
            case Fail(reason):
                self.emit("campaign_finished", reason=reason, failed=True)

    def submit(self, stage: str, inputs: dict[str, Any]) -> None:
        counter = self.replay.n_tasks(stage) + 1
        task = f"{stage}-{counter}"
        self.emit("task_submitted", task=task, stage=stage, inputs=inputs)
        seconds = SECONDS[stage] * len(inputs["frames"]) if stage == "label" else SECONDS[stage]
        heapq.heappush(self.ends, (self.now + seconds, next(self.order), task, stage, inputs))

    def advance(self) -> None:
        if not self.ends:
            self.now += 60
            return
        start, (self.now, _, task, stage, inputs) = self.now, heapq.heappop(self.ends)
        timing = {"host": "here", "start": start, "end": self.now, "phases": {}}
        kind = self.task_fate(stage, self.replay.n_tasks(stage))
        if kind:
            self.emit("task_failed", task=task, timing=timing, failure=failure(kind))
            return
        facts = getattr(self, f"end_{stage}")(inputs) or {}
        self.emit("task_finished", task=task, timing=timing, facts=facts)

    def queue(self, n: int, kind: str, generation: int) -> None:
        ids = [f"{next(self.frames):032x}" for _ in range(n)]
        held_out = holdout_of(ids, self.settings.holdout_fraction) if kind == "walker" else ()
        rows = [[frame, i, 10, (i * 7 % 10) / 10, frame in held_out] for i, frame in enumerate(ids)]
        self.emit("frames_queued", path=f"{kind}-{ids[0]}.h5", kind=kind, generation=generation, frames=rows)

    def end_build(self, inputs: dict[str, Any]) -> None:
        self.queue(inputs["n_frames"], "bootstrap", 0)

    def end_sample(self, inputs: dict[str, Any]) -> dict[str, Any]:
        n = 0 if self.exploding else self.triggers(inputs["generation"])
        if n:
            self.queue(n, "walker", inputs["generation"])
        facts = {"walkers": 10, "timeouts": 10 - n, "exploded": 0, "too_close": 0, "steps": 1, "atom_steps": 1}
        if self.exploding:
            facts |= {"timeouts": 0, "exploded": 10}
        return facts | {"triggers": {"force_mean": n}}

    def end_rank(self, inputs: dict[str, Any]) -> None:
        stale = [c for c in self.state.queue if c.path in inputs["paths"] and c.generation < inputs["generation"]]
        self.emit("frames_ranked", generation=inputs["generation"], spreads={c.frame: c.spread for c in stale[1:]})
        self.emit("frames_dropped", frames=[c.frame for c in stale[:1]], reason="sure")

    def end_label(self, inputs: dict[str, Any]) -> None:
        for frame in inputs["frames"]:
            candidate = self.replay.in_flight[frame]
            kind = self.label_fate(frame, candidate.attempts + candidate.losses + 1)
            if not kind:
                self.emit("labeled", frame=frame, receipt={"path": frame})
                continue
            if kind == "postponed":
                continue
            self.emit("label_failed", frame=frame, failure=failure(kind))
            fate = verdict(FailureClass(kind), candidate.failures(kind) + 1, self.settings)
            if fate is Verdict.QUARANTINE:
                self.emit("quarantined", frame=frame, failure=failure(kind))

    def end_train(self, inputs: dict[str, Any]) -> None:
        model = {"path": "m", "digest": "d", "metrics": {}}
        self.emit("model_trained", generation=inputs["generation"], n_labels=inputs["n_labels"], **model)

    def end_evaluate(self, inputs: dict[str, Any]) -> None:
        self.emit("model_evaluated", metrics={}, **{name: inputs[name] for name in ("generation", "n_labels")})
