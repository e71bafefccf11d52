"""How does a campaign go when nothing is computed? The real policy and the real replay; tasks take simulated time only.

What tasks cost and how they end is for a `Nature` to say.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

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
    waits,
)
from campaign.state import Candidate, Replay, State, Task
from shards.outcome import FailureClass

__all__ = ["Fate", "Nature", "World", "decide_with_barriers"]

NOTHING_RUNS_S = 60.0  # what passes then
Policy = Callable[[State, CampaignSettings, Mapping[str, int], float], list[Action]]


@dataclass(frozen=True)
class Fate:
    """What becomes of a task."""

    seconds: float
    wait_s: float = 0.0  # before it starts
    failure: str = ""  # FailureClass of the whole task
    failures: Mapping[str, str] = field(default_factory=dict)  # of single frames of a label task: frame -> FailureClass
    postponed: frozenset[str] = frozenset()  # frames of a label task that it left undone
    walkers: Mapping[str, Any] = field(default_factory=dict)  # of a sample task: its facts, as n_frames


class Nature(Protocol):
    """What the world does with tasks."""

    def fate(self, task: Task, candidates: Sequence[Candidate]) -> Fate:
        """candidates: those of a label task, or those that a rank task is to judge."""

    def is_sure(self, candidate: Candidate) -> bool:
        """Does the newest model need no label of this one?"""


class World:
    """A campaign from its start: `step` until its state is finished.

    pools: slots, cores and nodes of each. loop_s: what the driver takes for one decision; what ends meanwhile waits
    for it.
    """

    def __init__(
        self,
        settings: CampaignSettings,
        pools: Mapping[str, Mapping[str, int]],
        nature: Nature,
        policy: Policy = decide,
        loop_s: float = 0.0,
    ) -> None:
        self.settings = settings
        self.slots = {name: size["slots"] for name, size in pools.items()}
        self.replay = Replay()
        self.now = 1000.0
        self._nature = nature
        self._policy = policy
        self._loop_s = loop_s
        self._ends: list[tuple[float, int, Task, Fate]] = []
        self._n_tasks = self._n_frames = 0
        self.emit("campaign_started", name="", config_digest="", seed=0, level="", versions={}, revision="")
        self.emit("driver_started", host="", pid=0, config_digest="", pools=pools)

    @property
    def state(self) -> State:
        return self.replay.state()

    def emit(self, event: str, **fields: Any) -> None:
        self.replay.apply({"seq": self.replay.seq + 1, "time": self.now, "event": event, **fields})

    def step(self) -> State:
        """Decide once, as a driver does, and let time pass until there is news. Returns what was known before that."""
        actions = self._policy(self.state, self.settings, self.slots, self.now)
        for action in actions:
            self.take(action)
        state = self.state
        reasons = waits(state, self.settings, self.slots)
        if changed := {pool: reason for pool, reason in reasons.items() if reason != state.pools[pool].waits_for}:
            self.emit("slots_idle", reasons=changed)
        if not any(isinstance(action, Stop | Finish | Fail) for action in actions):
            self._advance()
        return state

    def take(self, action: Action) -> None:
        match action:
            case Build(n_frames):
                self._submit("build", {"n_frames": n_frames})
            case Sample(generation):
                self._submit("sample", {"generation": generation})
            case Rank(generation, paths):
                self._submit("rank", {"generation": generation, "paths": paths})
            case Label(candidates):
                self._submit("label", {"frames": [candidate.frame for candidate in candidates]})
            case Train(generation):
                self._submit("train", {"generation": generation, "n_labels": self.replay.n_labels(holdout=False)})
            case Evaluate(generation):
                self._submit("evaluate", {"generation": generation, "n_labels": self.replay.n_labels(holdout=True)})
            case Stop(reason):
                self.emit("stop_reached", reason=reason)
            case Finish(reason):
                self.emit("campaign_finished", reason=reason, failed=False)
            case Fail(reason):
                self.emit("campaign_finished", reason=reason, failed=True)

    def _submit(self, stage: str, inputs: dict[str, Any]) -> None:
        id = f"{stage}-{self.replay.n_tasks(stage) + 1}"
        self.emit("task_submitted", task=id, stage=stage, inputs=inputs)
        task = self.replay.task(id)
        fate = self._nature.fate(task, self._candidates(task))
        self._n_tasks += 1  # decides between ends at the same moment
        heapq.heappush(self._ends, (self.now + fate.wait_s + fate.seconds, self._n_tasks, task, fate))

    def _candidates(self, task: Task) -> list[Candidate]:
        if task.stage == "label":
            return [self.replay.in_flight[frame] for frame in task.inputs["frames"]]
        return self._stale(task) if task.stage == "rank" else []

    def _stale(self, task: Task) -> list[Candidate]:
        paths, generation = set(task.inputs["paths"]), task.inputs["generation"]
        return [c for c in self.state.queue if c.path in paths and c.generation < generation]

    def _advance(self) -> None:
        self.now = self._ends[0][0] + self._loop_s if self._ends else self.now + NOTHING_RUNS_S
        while self._ends and self._ends[0][0] <= self.now:
            _, _, task, fate = heapq.heappop(self._ends)
            self._end(task, fate)

    def _end(self, task: Task, fate: Fate) -> None:
        start = task.submitted + fate.wait_s
        host = "" if fate.failure == FailureClass.NODE_LOST else "node"
        timing = {"host": host, "start": start, "end": start + fate.seconds, "phases": {}}
        if not fate.failure:
            getattr(self, f"_end_{task.stage}")(task, fate)
            self.emit("task_finished", task=task.id, timing=timing, facts=fate.walkers)
            return
        if task.stage == "label" and fate.failure != FailureClass.MISSING:
            self._end_label(task, replace(fate, failures=dict.fromkeys(task.inputs["frames"], fate.failure)))
        self.emit("task_failed", task=task.id, timing=timing, failure=_failure(fate.failure))

    def _end_build(self, task: Task, fate: Fate) -> None:
        self._queue(task, task.inputs["n_frames"], "bootstrap", 0)

    def _end_sample(self, task: Task, fate: Fate) -> None:
        if n_frames := fate.walkers["n_frames"]:
            self._queue(task, n_frames, "walker", task.inputs["generation"])

    def _queue(self, task: Task, n_frames: int, kind: str, generation: int) -> None:
        ids = [f"{self._n_frames + i:032x}" for i in range(n_frames)]
        self._n_frames += n_frames
        held_out = holdout_of(ids, self.settings.holdout_fraction) if kind == "walker" else ()
        rows = [[frame, i, 10, (i * 7 % 10) / 10, frame in held_out] for i, frame in enumerate(ids)]
        self.emit("frames_queued", path=task.id, kind=kind, generation=generation, frames=rows)

    def _end_rank(self, task: Task, fate: Fate) -> None:
        stale = self._stale(task)
        sure = {c.frame for c in stale if self._nature.is_sure(c)}
        spreads = {c.frame: c.spread for c in stale if c.frame not in sure}
        self.emit("frames_ranked", generation=task.inputs["generation"], spreads=spreads)
        self.emit("frames_dropped", frames=sorted(sure), reason="sure")

    def _end_label(self, task: Task, fate: Fate) -> None:
        for frame in task.inputs["frames"]:
            if frame in fate.postponed:
                continue
            if frame not in fate.failures:
                self.emit("labeled", frame=frame, receipt={"path": frame})
                continue
            kind = FailureClass(fate.failures[frame])
            attempts = self.replay.in_flight[frame].failures(kind) + 1
            self.emit("label_failed", frame=frame, failure=_failure(kind))
            if verdict(kind, attempts, self.settings) is Verdict.QUARANTINE:
                self.emit("quarantined", frame=frame, failure=_failure(kind))

    def _end_train(self, task: Task, fate: Fate) -> None:
        inputs = {name: task.inputs[name] for name in ("generation", "n_labels")}
        self.emit("model_trained", **inputs, path="", digest="", metrics={})

    def _end_evaluate(self, task: Task, fate: Fate) -> None:
        inputs = {name: task.inputs[name] for name in ("generation", "n_labels")}
        self.emit("model_evaluated", **inputs, metrics={})


def _failure(kind: str) -> dict[str, str]:
    return {"kind": kind, "message": "simulated", "log": ""}


def decide_with_barriers(
    state: State, settings: CampaignSettings, slots: Mapping[str, int], now: float
) -> list[Action]:
    """The same decisions, but a stage begins when the one before it has ended: sample queue_target candidates, label
    all of them, train. For comparison only."""
    actions = decide(state, settings, slots, now)
    kinds = {type(action) for action in actions}
    sampling, training, labeling = state.n_running["sample"], state.n_running["train"], bool(state.in_flight)
    n_round = min(settings.queue_target, settings.max_labels - state.n_labels)
    # A round of labels goes on until its queue is empty, with what failed and returned to it.
    round_is_open = labeling or _has_new_labels(state) or len(state.queue) >= n_round
    forbidden: set[type[Action]] = set()
    if sampling or training or not round_is_open:
        forbidden.add(Label)
    if sampling or labeling or Label in kinds - forbidden:
        forbidden.add(Train)
    if training or labeling or kinds & {Label, Train} - forbidden:
        forbidden.add(Sample)
    return [action for action in actions if type(action) not in forbidden]


def _has_new_labels(state: State) -> bool:
    return not state.models or state.n_train > state.models[-1].n_labels
