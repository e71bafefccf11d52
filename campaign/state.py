"""What is known about a campaign after a given history? Events in, state out; touches no file and no clock."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from campaign.accounting import Delay, DelayMeter, PoolMeter, PoolUse
from shards.outcome import FailureClass

__all__ = [
    "EVENTS",
    "POOL_OF",
    "Candidate",
    "Driver",
    "Model",
    "Quarantine",
    "Replay",
    "StageTally",
    "State",
    "Task",
    "Walkers",
    "replay",
]

# Every event and its fields. Each ledger line also has `seq`, `time` (seconds since the epoch) and `event`.
# Paths are relative to the run directory, so that it can be moved.
EVENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "campaign_started": ("name", "config_digest", "seed", "level", "versions", "revision"),  # level: digest
        "driver_started": ("host", "pid", "config_digest", "pools"),  # pools: {pool: {slots, cores, nodes}}
        "driver_stopped": ("reason",),
        "slots_idle": ("reasons",),  # reasons: {pool: Wait}: what its free slots wait for from now on
        "task_submitted": ("task", "stage", "inputs"),  # again with the same task: a new driver took it up
        "task_finished": ("task", "timing", "facts"),
        "task_failed": ("task", "timing", "failure"),  # failure: kind, message, log
        "frames_queued": ("path", "kind", "generation", "frames"),  # frames: [id, index, n_atoms, spread, holdout]
        "frames_ranked": ("generation", "spreads"),  # spreads: {frame: in units of its threshold}
        "frames_dropped": ("frames", "reason"),
        "labeled": ("frame", "receipt"),
        "label_failed": ("frame", "failure"),
        "quarantined": ("frame", "failure"),
        "merged": ("part", "receipt", "frames"),  # part: train | holdout
        "model_trained": ("generation", "path", "digest", "n_labels", "metrics"),
        "model_evaluated": ("generation", "n_labels", "metrics"),  # on n_labels held-out labels
        "stop_reached": ("reason",),
        "pool_waits": ("pool", "reason"),  # why its tasks wait for nodes; empty: no more
        "campaign_finished": ("reason", "failed"),
    }
)

# Which pool of workers runs which stage. Ranking is the sampler's, on the device of the walkers.
POOL_OF: Mapping[str, str] = MappingProxyType(
    {"build": "sample", "sample": "sample", "rank": "sample", "label": "label", "train": "train", "evaluate": "train"}
)

RECENT = 1000  # verdicts on frames that are remembered for the detector of systematic failures


@dataclass(frozen=True, slots=True)
class Candidate:
    """A frame that waits for its label, or that a label task holds."""

    frame: str
    path: str  # frames shard, relative to the run directory
    index: int
    n_atoms: int
    kind: str  # bootstrap | walker
    holdout: bool
    spread: float  # by the model of `generation`, in units of its threshold (its severity); 0 for bootstrap frames
    generation: int  # model that ranked it last; 0: none
    attempts: int = 0  # labels of it that failed, by its own fault or that of the code
    losses: int = 0  # labels of it that went with their node or block

    def failures(self, kind: str) -> int:
        """How many of its labels failed in this way: lost with their node, or any other."""
        return self.losses if kind == FailureClass.NODE_LOST else self.attempts


@dataclass(frozen=True, slots=True)
class Task:
    """A task that was submitted and has not ended."""

    id: str
    stage: str  # build | sample | rank | label | train | evaluate
    inputs: Mapping[str, Any]
    submitted: float  # seconds since the epoch


@dataclass(frozen=True)
class Model:
    generation: int
    path: str
    digest: str
    n_labels: int  # labels it was trained on
    finished: float  # seconds since the epoch
    metrics: Mapping[str, Any]  # facts of trainer.stage.train
    # Facts of trainer.stage.evaluate on the held-out set, and its size; empty and 0: not evaluated yet.
    holdout: Mapping[str, Any] = field(default_factory=dict)
    n_holdout: int = 0


@dataclass(frozen=True)
class Quarantine:
    """A frame that no label will be asked for again."""

    frame: str
    kind: str  # class of its last failure
    message: str
    log: str


@dataclass(frozen=True)
class StageTally:
    tasks: int = 0  # different tasks submitted; task ids count from it
    finished: int = 0
    failed: int = 0
    failed_in_a_row: int = 0  # by anything but a lost node, which does not end the row either
    lost_in_a_row: int = 0  # with their node or block
    failures: Mapping[str, int] = field(default_factory=dict)  # class -> tasks
    seconds: float = 0.0  # sum over ended tasks of end - start
    phases: Mapping[str, float] = field(default_factory=dict)
    last_failure: str = ""  # class, message, log


@dataclass(frozen=True)
class Walkers:
    """How walkers of one model, or of all models, ended."""

    run: int = 0
    timeouts: int = 0
    triggers: Mapping[str, int] = field(default_factory=dict)
    exploded: int = 0
    too_close: int = 0
    steps: int = 0
    atom_steps: int = 0


@dataclass(frozen=True)
class Driver:
    host: str
    pid: int
    started: float


@dataclass(frozen=True)
class State:
    """Everything the policy and the views may know. A value: later events make another one."""

    name: str = ""
    config_digest: str = ""
    seed: int = 0
    level: str = ""  # digest of the level of theory of all labels
    versions: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""
    seq: int = 0  # of the last event
    started: float = 0.0  # time of the first event
    time: float = 0.0  # time of the last event
    active_s: float = 0.0  # seconds during which a driver was at work, up to the last event
    driver: Driver | None = None  # the driver at work; None after it stopped in good order
    blocked: str = ""  # what is missing, so that every task would fail alike
    stopping: str = ""  # why no new frame is sampled or labeled any more
    finished: str = ""  # why the campaign has ended
    failed: bool = False  # it ended because it could not go on
    queue: tuple[Candidate, ...] = ()
    in_flight: tuple[Candidate, ...] = ()
    running: tuple[Task, ...] = ()
    models: tuple[Model, ...] = ()  # models[i].generation == i + 1
    quarantined: tuple[Quarantine, ...] = ()
    n_train: int = 0  # labels in the training set, merged or not
    n_holdout: int = 0  # labels in the held-out set, merged or not
    n_unmerged: int = 0  # labels that still are files of their own
    n_bootstrap: int = 0  # frames the builder made
    n_candidates: int = 0  # frames ever queued
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> frames
    label_failures: Mapping[str, int] = field(default_factory=dict)  # class -> failed attempts
    waits: Mapping[str, str] = field(default_factory=dict)  # pool -> why its tasks wait for nodes
    recent: tuple[bool, ...] = ()  # newest verdicts on frames, oldest first: labeled or quarantined
    stages: Mapping[str, StageTally] = field(default_factory=dict)
    walkers: Walkers = field(default_factory=Walkers)  # of all models
    walkers_newest: Walkers = field(default_factory=Walkers)  # of the newest model
    pools: Mapping[str, PoolUse] = field(default_factory=dict)  # up to `time`
    delay: Delay = field(default_factory=Delay)

    @property
    def n_labels(self) -> int:
        return self.n_train + self.n_holdout

    @property
    def generation(self) -> int:
        """Of the newest model; 0 before the first."""
        return len(self.models)

    @cached_property
    def n_running(self) -> Counter[str]:
        """Tasks under way, by stage."""
        return Counter(map(attrgetter("stage"), self.running))


def replay(events: Iterable[Mapping[str, Any]]) -> State:
    """Derive the state from a whole history."""
    accumulator = Replay()
    for event in events:
        accumulator.apply(event)
    return accumulator.state()


class Replay:
    """Take in events one at a time, at constant cost each; `state()` is a frozen copy of what they add up to.

    A million labeled frames leave one small entry each: candidates and receipts are forgotten once merged.
    """

    def __init__(self) -> None:
        self._state = State()  # the fields that single events overwrite
        self._session_started = 0.0
        self._active_before_s = 0.0
        self._known: dict[str, bool] = {}  # every frame ever queued -> held out?
        self._queue: dict[str, Candidate] = {}
        self._in_flight: dict[str, Candidate] = {}
        self._unmerged: dict[str, dict[str, Any]] = {}  # frame -> receipt
        self._merged_paths: set[str] = set()
        self._running: dict[str, Task] = {}
        self._models: list[Model] = []
        self._quarantines: list[Quarantine] = []
        self._labels = {False: 0, True: 0}  # held out? -> count
        self._n_bootstrap = 0
        self._dropped: dict[str, int] = {}
        self._label_failures: dict[str, int] = {}
        self._waits: dict[str, str] = {}
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._stages: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._walkers = _WalkerTally()
        self._walkers_newest = _WalkerTally()
        self._pools = {pool: PoolMeter() for pool in POOL_OF.values()}
        self._delay = DelayMeter()
        self._handlers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            name: getattr(self, f"_{name}") for name in EVENTS
        }
        self.seq = 0
        self.time = self._previous = 0.0
        self.started = 0.0

    def apply(self, event: Mapping[str, Any]) -> None:
        self.seq = event["seq"]
        self._previous, self.time = self.time, event["time"]
        self._handlers[event["event"]](event)

    def state(self) -> State:
        active_s = self._active_before_s + (self.time - self._session_started if self._state.driver else 0.0)
        return replace(
            self._state,
            seq=self.seq,
            started=self.started,
            time=self.time,
            active_s=active_s,
            queue=tuple(self._queue.values()),
            in_flight=tuple(self._in_flight.values()),
            running=tuple(self._running.values()),
            models=tuple(self._models),
            quarantined=tuple(self._quarantines),
            n_train=self._labels[False],
            n_holdout=self._labels[True],
            n_unmerged=len(self._unmerged),
            n_bootstrap=self._n_bootstrap,
            n_candidates=len(self._known),
            dropped=MappingProxyType(dict(self._dropped)),
            label_failures=MappingProxyType(dict(self._label_failures)),
            waits=MappingProxyType(dict(self._waits)),
            recent=tuple(self._recent),
            stages=MappingProxyType({name: tally.frozen() for name, tally in self._stages.items()}),
            walkers=self._walkers.frozen(),
            walkers_newest=self._walkers_newest.frozen(),
            pools=MappingProxyType({pool: meter.frozen(self.time) for pool, meter in self._pools.items()}),
            delay=self._delay.frozen(),
        )

    # What the driver must ask about single frames, which a State would be too large to hold.

    @property
    def models(self) -> tuple[Model, ...]:
        return tuple(self._models)

    @property
    def in_flight(self) -> Mapping[str, Candidate]:
        """What label tasks hold, by frame; changes with the next event."""
        return MappingProxyType(self._in_flight)

    def n_tasks(self, stage: str) -> int:
        """Different tasks of a stage ever submitted."""
        return self._stages[stage].tasks if stage in self._stages else 0

    def task(self, id: str) -> Task:
        """A task that is running."""
        return self._running[id]

    def n_labels(self, *, holdout: bool) -> int:
        return self._labels[holdout]

    def is_known(self, frame: str) -> bool:
        """Was this frame ever queued?"""
        return frame in self._known

    def unmerged(self, *, holdout: bool) -> dict[str, dict[str, Any]]:
        """Receipts of labels that still are files of their own, by frame, in the order they were recorded."""
        return {frame: receipt for frame, receipt in self._unmerged.items() if self._known[frame] is holdout}

    def is_merged(self, path: str) -> bool:
        """Is this shard, relative to the run directory, recorded as part of the data?"""
        return path in self._merged_paths

    def awaits(self, frame: str) -> bool:
        """Is the label of this frame still to come?"""
        return frame in self._in_flight or frame in self._queue

    def is_unmerged(self, frame: str) -> bool:
        return frame in self._unmerged

    # One method per event.

    def _campaign_started(self, event: Mapping[str, Any]) -> None:
        self.started = event["time"]
        self._state = replace(
            self._state,
            name=event["name"],
            seed=event["seed"],
            level=event["level"],
            config_digest=event["config_digest"],
            versions=MappingProxyType(dict(event["versions"])),
            revision=event["revision"],
        )

    def _driver_started(self, event: Mapping[str, Any]) -> None:
        driver = Driver(event["host"], event["pid"], event["time"])
        if self._state.driver:  # the last one was killed: it was at work up to its last event
            self._stop_work(self._previous)
        for pool, meter in self._pools.items():
            meter.start(event["time"], event.get("pools", {}).get(pool, {}))  # older ledgers do not say
        self._session_started = event["time"]
        # A stop is decided anew: its limits may have been moved since.
        self._state = replace(
            self._state,
            driver=driver,
            config_digest=event["config_digest"],
            blocked="",
            stopping="",
            finished="",
            failed=False,
        )
        for tally in self._stages.values():
            tally.failed_in_a_row = tally.lost_in_a_row = 0
        self._recent.clear()
        self._waits.clear()

    def _driver_stopped(self, event: Mapping[str, Any]) -> None:
        self._stop_work(event["time"])
        self._state = replace(self._state, driver=None)
        self._waits.clear()

    def _stop_work(self, time: float) -> None:
        self._active_before_s += time - self._session_started
        for meter in self._pools.values():
            meter.stop(time)

    def _slots_idle(self, event: Mapping[str, Any]) -> None:
        for pool, reason in event["reasons"].items():
            self._pools[pool].wait_for(event["time"], reason)

    def _task_submitted(self, event: Mapping[str, Any]) -> None:
        task = Task(event["task"], event["stage"], MappingProxyType(event["inputs"]), event["time"])
        if task.id not in self._running:
            self._stages[task.stage].tasks += 1
            if task.stage == "train":
                self._delay.train()
        self._running[task.id] = task
        self._pools[POOL_OF[task.stage]].take(event["time"])
        if task.stage == "label":
            for frame in event["inputs"]["frames"]:
                if frame in self._queue:
                    self._in_flight[frame] = self._queue.pop(frame)

    def _task_finished(self, event: Mapping[str, Any]) -> None:
        task, tally = self._end(event)
        tally.finished += 1
        tally.failed_in_a_row = tally.lost_in_a_row = 0
        if task.stage == "sample":
            self._walkers.add(event["facts"])
            if task.inputs["generation"] == len(self._models):
                self._walkers_newest.add(event["facts"])

    def _task_failed(self, event: Mapping[str, Any]) -> None:
        tally, kind = self._end(event)[1], event["failure"]["kind"]
        tally.failed += 1
        tally.failures[kind] = tally.failures.get(kind, 0) + 1
        if kind == FailureClass.NODE_LOST:
            tally.lost_in_a_row += 1
        else:
            tally.failed_in_a_row += 1
        tally.last_failure = describe_failure(event["failure"])
        if kind == FailureClass.MISSING:
            self._state = replace(self._state, blocked=tally.last_failure)

    def _end(self, event: Mapping[str, Any]) -> tuple[Task, _Tally]:
        """Frames of a label task that nothing has been said about go back as they were."""
        task = self._running.pop(event["task"])
        for frame in task.inputs["frames"] if task.stage == "label" else ():
            if frame in self._in_flight:
                self._queue[frame] = self._in_flight.pop(frame)
        tally = self._stages[task.stage]
        tally.add_timing(event["timing"])
        self._pools[POOL_OF[task.stage]].give_back(event["time"], task.stage, task.submitted, event["timing"])
        return task, tally

    def _frames_queued(self, event: Mapping[str, Any]) -> None:
        path, kind, generation = event["path"], event["kind"], event["generation"]
        for frame, index, n_atoms, spread, holdout in event["frames"]:
            self._known[frame] = holdout
            self._queue[frame] = Candidate(frame, path, index, n_atoms, kind, holdout, spread, generation)
        if kind == "bootstrap":
            self._n_bootstrap += len(event["frames"])

    def _frames_ranked(self, event: Mapping[str, Any]) -> None:
        for frame, spread in event["spreads"].items():
            candidate = self._queue.get(frame)
            if candidate is not None:
                self._queue[frame] = replace(candidate, spread=spread, generation=event["generation"])

    def _frames_dropped(self, event: Mapping[str, Any]) -> None:
        for frame in event["frames"]:
            if self._queue.pop(frame, None) is not None:
                self._dropped[event["reason"]] = self._dropped.get(event["reason"], 0) + 1

    def _labeled(self, event: Mapping[str, Any]) -> None:
        frame = event["frame"]
        self._in_flight.pop(frame, None)
        self._queue.pop(frame, None)
        self._unmerged[frame] = event["receipt"]
        self._labels[self._known[frame]] += 1
        if not self._known[frame]:
            self._delay.label(event["time"])
        self._recent.append(True)

    def _label_failed(self, event: Mapping[str, Any]) -> None:
        kind = event["failure"]["kind"]
        self._label_failures[kind] = self._label_failures.get(kind, 0) + 1
        candidate = self._in_flight.pop(event["frame"])
        lost = kind == FailureClass.NODE_LOST
        self._queue[candidate.frame] = replace(
            candidate, attempts=candidate.attempts + (not lost), losses=candidate.losses + lost
        )

    def _quarantined(self, event: Mapping[str, Any]) -> None:
        failure = event["failure"]
        self._in_flight.pop(event["frame"], None)
        self._queue.pop(event["frame"], None)
        self._quarantines.append(Quarantine(event["frame"], failure["kind"], failure["message"], failure["log"]))
        self._recent.append(False)

    def _merged(self, event: Mapping[str, Any]) -> None:
        self._merged_paths.add(event["receipt"]["path"])
        for frame in event["frames"]:
            self._unmerged.pop(frame, None)

    def _model_trained(self, event: Mapping[str, Any]) -> None:
        metrics = MappingProxyType(dict(event["metrics"]))
        self._models.append(
            Model(event["generation"], event["path"], event["digest"], event["n_labels"], event["time"], metrics)
        )
        self._walkers_newest = _WalkerTally()
        self._delay.model(event["time"])

    def _model_evaluated(self, event: Mapping[str, Any]) -> None:
        position = event["generation"] - 1
        metrics = MappingProxyType(dict(event["metrics"]))
        self._models[position] = replace(self._models[position], holdout=metrics, n_holdout=event["n_labels"])

    def _stop_reached(self, event: Mapping[str, Any]) -> None:
        self._state = replace(self._state, stopping=event["reason"])

    def _pool_waits(self, event: Mapping[str, Any]) -> None:
        self._waits.pop(event["pool"], None)
        if event["reason"]:
            self._waits[event["pool"]] = event["reason"]

    def _campaign_finished(self, event: Mapping[str, Any]) -> None:
        self._state = replace(self._state, finished=event["reason"], failed=event["failed"])


def describe_failure(failure: Mapping[str, Any]) -> str:
    log = f" (log: {failure['log']})" if failure["log"] else ""
    return f"{failure['kind']}: {failure['message']}{log}"


class _Tally:
    """StageTally while it grows."""

    def __init__(self) -> None:
        self.tasks = self.finished = self.failed = self.failed_in_a_row = self.lost_in_a_row = 0
        self.failures: dict[str, int] = {}
        self.seconds = 0.0
        self.phases: dict[str, float] = {}
        self.last_failure = ""

    def add_timing(self, timing: Mapping[str, Any]) -> None:
        self.seconds += timing["end"] - timing["start"]
        for phase, seconds in timing["phases"].items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def frozen(self) -> StageTally:
        return StageTally(
            self.tasks,
            self.finished,
            self.failed,
            self.failed_in_a_row,
            self.lost_in_a_row,
            MappingProxyType(dict(self.failures)),
            self.seconds,
            MappingProxyType(dict(self.phases)),
            self.last_failure,
        )


class _WalkerTally:
    """Walkers while they are counted."""

    COUNTS = (("run", "walkers"), ("timeouts", "timeouts"), ("exploded", "exploded"), ("too_close", "too_close"))
    STEPS = (("steps", "steps"), ("atom_steps", "atom_steps"))

    def __init__(self) -> None:
        self._counts = {name: 0 for name, _ in (*self.COUNTS, *self.STEPS)}
        self._triggers: dict[str, int] = {}

    def add(self, facts: Mapping[str, Any]) -> None:
        for name, fact in (*self.COUNTS, *self.STEPS):
            self._counts[name] += facts[fact]
        for trigger, count in facts["triggers"].items():
            self._triggers[trigger] = self._triggers.get(trigger, 0) + count

    def frozen(self) -> Walkers:
        return Walkers(triggers=MappingProxyType(dict(self._triggers)), **self._counts)
