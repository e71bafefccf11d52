"""Who carries out what the policy decides? The one process that writes the ledger.

Every decision comes from the replayed ledger, every result is in it before anything is built on it.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType, MappingProxyType
from typing import Any

from campaign.config import (
    STOP_FIELDS,
    CampaignConfig,
    changed_fields,
    config_digest,
    load_campaign,
    to_toml,
)
from campaign.harvest import discard_unfinished, label_path, merge, published_label, reconcile, record_labels
from campaign.horizon import task_limits
from campaign.lease import Holder, Lease
from campaign.ledger import Ledger, read_state
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
    derive_seed,
    holdout_of,
    verdict,
    waits,
)
from campaign.pools import ParslPools, Pools, failure_class
from campaign.reference import document
from campaign.site import Site
from campaign.state import POOL_OF, Candidate, State, Task
from campaign.stop import Request, forget_stop, stop_request
from campaign.tasks import candidates_path, parent_of, scratch_folder, stage_call
from campaign.versions import revision, versions
from campaign.worker import forget_work, has_begun, perform, read_outcome
from sampler.triggers import severity
from shards.files import write_atomically
from shards.frame import Frame
from shards.outcome import Failure, FailureClass, Outcome, Timing
from shards.reader import ShardError, open_shard
from shards.settings import SettingsError
from shards.writer import write_frames

__all__ = ["run_campaign"]

SITE_HEADER = "The site of the last run on this directory: what its machine offered, with every field."
PER_FRAME = ("scores", "order", "failures", "postponed")
TICK_S = 0.5  # longest time between two decisions
LOOK_S = 5.0  # time between two looks at labels that tasks under way have published

OnEvent = Callable[[State], None]
Event = tuple[str, dict[str, Any]]
NewTask = tuple[str, str, Mapping[str, Any]]  # its id, stage and inputs


def run_campaign(
    config: Path | CampaignConfig, run_dir: Path, site: Site, on_event: OnEvent = lambda state: None
) -> State:
    """Start a campaign in `run_dir`, or go on with the one that is there, until it ends.

    `on_event` is called with the state after every decision and at least twice a second.

    Returns the last state: `finished` is the reason, `failed` whether the campaign could not go on.

    Raises:
        SettingsError: a configuration that cannot be used, or that is not the run directory's.
        MissingEngine: the quantum code or its data is not there.
        LeaseError: another driver is at work on `run_dir`.
        LedgerError, ShardError, ManifestError: files of the run directory that are damaged.
        KeyboardInterrupt: on SIGINT, SIGTERM and `smelt stop`, after all workers were stopped and the ledger closed.
    """
    if isinstance(config, Path):
        config = load_campaign(config)
    limits = task_limits(config, site)
    level = _check_environment(config, run_dir)
    with _lease(run_dir, config) as holder, Ledger(run_dir) as ledger:
        if not _open_campaign(config, run_dir, ledger, level):
            return ledger.replay.state()
        write_atomically(run_dir / "site.toml", document(SITE_HEADER, site).encode())
        reconcile(run_dir, ledger, level)
        with _interruptible() as interrupted, _session(config, site, ledger, holder):
            try:
                with ParslPools(site, run_dir, limits) as pools:
                    Driver(config, run_dir, site, ledger, level, pools, holder, on_event).run(interrupted)
            finally:
                # What workers published while they were being stopped.
                record_labels(run_dir, ledger, ledger.replay.in_flight, level)
                discard_unfinished(run_dir)
        return ledger.replay.state()


def _check_environment(config: CampaignConfig, run_dir: Path) -> str:
    """Find out before anything starts what would fail every task. Returns the digest of the level of theory."""
    from labeler.stage import level
    from sampler.starts import open_starts

    digest = level(config.labeler, config.campaign.elements).digest
    if config.campaign.parent_run:
        _check_parent(parent_of(config, run_dir), digest)
    else:
        open_starts(config.campaign.elements, config.builder)
    return digest


def _check_parent(parent: Path, level: str) -> None:
    state = read_state(parent)
    if not state.models:
        raise SettingsError(f"campaign.parent_run: {parent}: has no model yet: let it come to its end first")
    if state.level == level:
        raise SettingsError(f"campaign.parent_run: {parent}: is of this very level of theory: change the labeler")


@contextmanager
def _lease(run_dir: Path, config: CampaignConfig) -> Iterator[Holder]:
    """Hold the run directory; refuse one that belongs to another configuration."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with Lease(run_dir) as lease:
        _check_same_campaign(run_dir, config)
        forget_stop(run_dir)
        for folder in ("candidates", "labels", "models", "scratch", "logs"):
            (run_dir / folder).mkdir(exist_ok=True)
        yield lease.holder


def _check_same_campaign(run_dir: Path, config: CampaignConfig) -> None:
    path = run_dir / "config.toml"
    if not path.exists():
        if any(child.name != "lock" for child in run_dir.iterdir()):
            raise SettingsError(f"{run_dir}: not empty, and not a run directory: there is no config.toml in it")
        return
    changed = changed_fields(load_campaign(path), config)
    forbidden = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items() if not _may_change(name, config)]
    if forbidden:
        raise SettingsError(
            f"{run_dir}: was started with other settings ({'; '.join(forbidden)});"
            f" only {', '.join(sorted(STOP_FIELDS))} may change; use a new run directory"
        )


def _may_change(name: str, config: CampaignConfig) -> bool:
    """Does nothing of this run directory depend on the setting?"""
    of_higher = name.partition(".")[0] in ("higher", "transfer") and not config.campaign.parent_run
    return name in STOP_FIELDS or of_higher


def _open_campaign(config: CampaignConfig, run_dir: Path, ledger: Ledger, level: str) -> bool:
    """Record a new campaign, or check the one that is there. False: it has finished, and nothing has changed since."""
    state, digest = ledger.replay.state(), config_digest(config)
    if state.seq and state.level != level:
        raise SettingsError(
            f"{run_dir}: its labels are of level of theory {state.level}, now it would be {level}: the quantum code or"
            " its data has changed since; restore them, or use a new run directory"
        )
    if state.finished and not state.failed and state.config_digest == digest:
        return False
    write_atomically(run_dir / "config.toml", to_toml(config).encode())
    if not state.seq:
        ledger.append(
            "campaign_started",
            name=config.campaign.name,
            config_digest=digest,
            seed=config.campaign.seed,
            level=level,
            versions=versions(),
            revision=revision(),
        )
    return True


@contextmanager
def _session(config: CampaignConfig, site: Site, ledger: Ledger, holder: Holder) -> Iterator[None]:
    pools = {name: pool.size for name, pool in site.pools.items()}
    digest = config_digest(config)
    ledger.append("driver_started", host=holder.host, pid=holder.pid, config_digest=digest, pools=pools)
    try:
        yield
    except BaseException as error:
        reason = str(error) if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        ledger.append("driver_stopped", reason=reason)
        raise
    ledger.append("driver_stopped", reason="the campaign has ended")


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the driver stops between two steps and never inside of one."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Driver:
    """Decide, submit, wait, record, until the campaign ends."""

    def __init__(
        self,
        config: CampaignConfig,
        run_dir: Path,
        site: Site,
        ledger: Ledger,
        level: str,
        pools: Pools,
        holder: Holder,
        on_event: OnEvent,
    ) -> None:
        self._config = config
        self._settings = config.campaign
        self._run_dir = run_dir
        self._site = site
        self._ledger = ledger
        self._level = level
        self._pools = pools
        self._holder = holder
        self._on_event = on_event
        self._numbers = Counter({stage: ledger.replay.n_tasks(stage) for stage in POOL_OF})
        self._new: list[NewTask] = []
        self._tasks: dict[Future[dict[str, Any]], Task] = {}
        self._ended: SimpleQueue[Future[dict[str, Any]]] = SimpleQueue()
        self._looked = 0.0
        self._waits: dict[str, str] = {}

    def run(self, interrupted: threading.Event) -> None:
        """Raises KeyboardInterrupt, with the reason, once `interrupted` is set, or the run directory has a request to
        stop that is met: nothing that would have to end first is under way any more."""
        running = self._ledger.replay.state().running
        for folder in {*(self._run_dir / "scratch").iterdir()} - {scratch_folder(self._run_dir, t.id) for t in running}:
            if outcome := read_outcome(folder):
                _tidy(folder, outcome)
        self._start([(task.id, task.stage, self._left_of(task)) for task in running])
        while not (state := self._ledger.replay.state()).finished:
            request = stop_request(self._run_dir)
            if request:
                self._pools.hold()
            actions = [] if request else decide(state, self._settings, self._pools.slots, time.time())
            for action in actions:
                self._carry_out(action)
            self._start(self._new)
            self._new = []
            self._note_waits()
            self._on_event(self._ledger.replay.state())
            if not any(isinstance(action, Stop | Finish | Fail) for action in actions):
                self._wait()
            if request is Request.NOW or (request and not self._is_under_way()):
                raise KeyboardInterrupt("smelt stop")
            if interrupted.is_set():
                raise KeyboardInterrupt("interrupted")

    def _is_under_way(self) -> bool:
        return any(has_begun(scratch_folder(self._run_dir, task.id)) for task in self._tasks.values())

    def _note_waits(self) -> None:
        """Record what free slots wait for, when that has changed."""
        state = self._ledger.replay.state()
        reasons = waits(state, self._settings, self._pools.slots)
        if changed := {pool: reason for pool, reason in reasons.items() if reason != state.pools[pool].waits_for}:
            self._ledger.append("slots_idle", reasons=changed)

    def _wait(self) -> None:
        """Until tasks end, or a tick has passed; record what has come."""
        ended = [(self._tasks.pop(future), future) for future in self._next_ended()]
        self._settle([(task, self._outcome(task, future)) for task, future in ended])
        if time.monotonic() - self._looked > LOOK_S:
            record_labels(self._run_dir, self._ledger, self._ledger.replay.in_flight, self._level)
            self._looked = time.monotonic()
        waits = {pool: why for pool, why in self._pools.waits().items() if why != self._waits.get(pool, "")}
        self._ledger.append_all([("pool_waits", {"pool": pool, "reason": why}) for pool, why in waits.items()])
        self._waits |= waits
        if reason := self._pools.lost():
            self._ledger.append("campaign_finished", reason=reason, failed=True)

    def _next_ended(self) -> Iterator[Future[dict[str, Any]]]:
        """All that have ended by now; the first one to come, when there is none."""
        with suppress(Empty):
            yield self._ended.get(timeout=TICK_S)
            while True:
                yield self._ended.get_nowait()

    # What the policy asks for.

    def _carry_out(self, action: Action) -> None:
        match action:
            case Build(n_frames):
                self._submit("build", {"n_frames": n_frames})
            case Sample(generation):
                self._submit("sample", {"generation": generation})
            case Rank(generation, paths):
                self._submit("rank", {"generation": generation, "paths": list(paths)})
            case Label(candidates):
                self._submit_labels(candidates)
            case Train(generation):
                merge(self._run_dir, self._ledger)
                n_labels = self._ledger.replay.n_labels(holdout=False)
                self._submit("train", {"generation": generation, "n_labels": n_labels})
            case Evaluate(generation):
                merge(self._run_dir, self._ledger)
                n_labels = self._ledger.replay.n_labels(holdout=True)
                self._submit("evaluate", {"generation": generation, "n_labels": n_labels})
            case Stop(reason):
                self._ledger.append("stop_reached", reason=reason)
            case Finish(reason):
                self._ledger.append("campaign_finished", reason=reason, failed=False)
            case Fail(reason):
                self._ledger.append("campaign_finished", reason=reason, failed=True)

    def _submit(self, stage: str, inputs: dict[str, Any]) -> None:
        task, counter = self._next_task(stage)
        self._new.append((task, stage, {**inputs, "seed": derive_seed(self._settings.seed, stage, counter)}))

    def _submit_labels(self, candidates: Sequence[Candidate]) -> None:
        task, _ = self._next_task("label")
        path, indices = candidates[0].path, [candidate.index for candidate in candidates]
        if any(candidate.path != path for candidate in candidates):
            path, indices = self._gather(task, candidates), list(range(len(candidates)))
        frames = [candidate.frame for candidate in candidates]
        self._new.append((task, "label", {"path": path, "indices": indices, "frames": frames}))

    def _gather(self, task: str, candidates: Sequence[Candidate]) -> str:
        """Put frames of several shards into one; returns its path."""
        shards = {path: open_shard(self._run_dir / path) for path in {candidate.path for candidate in candidates}}
        dest = scratch_folder(self._run_dir, task) / "frames.h5"
        write_frames(dest, [shards[candidate.path].frame(candidate.index) for candidate in candidates])
        return dest.relative_to(self._run_dir).as_posix()

    def _next_task(self, stage: str) -> tuple[str, int]:
        self._numbers[stage] += 1
        return f"{stage}-{self._numbers[stage]:06d}", self._numbers[stage]

    def _start(self, tasks: Sequence[NewTask]) -> None:
        """Record tasks in one write and hand them to their pools; those that a former driver had submitted start again
        under their names."""
        self._ledger.append_all(
            [("task_submitted", {"task": id, "stage": stage, "inputs": dict(inputs)}) for id, stage, inputs in tasks]
        )
        for id, stage, _ in tasks:
            task = self._ledger.replay.task(id)
            call = stage_call(task, self._config, self._site, self._run_dir, self._ledger.replay.models)
            scratch = scratch_folder(self._run_dir, id)
            forget_work(scratch)
            future = self._pools.submit(POOL_OF[stage], perform, call, scratch, self._holder)
            self._tasks[future] = task
            future.add_done_callback(self._ended.put)

    def _left_of(self, task: Task) -> Mapping[str, Any]:
        """Inputs of a task that starts again: without frames whose labels are recorded, for their files may be merged
        before a worker looks for them."""
        if task.stage != "label":
            return task.inputs
        in_flight = self._ledger.replay.in_flight
        rows = zip(task.inputs["indices"], task.inputs["frames"], strict=True)
        left = [(index, frame) for index, frame in rows if frame in in_flight]
        return {**task.inputs, "indices": [index for index, _ in left], "frames": [frame for _, frame in left]}

    # What comes back.

    def _settle(self, ended: Sequence[tuple[Task, Outcome]]) -> None:
        """Record what tasks brought and that they have ended, in one write: a crash leaves both or neither.

        One that was withheld is submitted again by the next driver.
        """
        ended = [(task, outcome) for task, outcome in ended if not outcome.facts.get("withheld")]
        frames = [frame for task, _ in ended if task.stage == "label" for frame in self._held_by(task)]
        record_labels(self._run_dir, self._ledger, frames, self._level)
        events = [event for task, outcome in ended for event in self._events(task, outcome)]
        self._ledger.append_all(events)
        for task, outcome in ended:
            _tidy(scratch_folder(self._run_dir, task.id), outcome)

    def _events(self, task: Task, outcome: Outcome) -> list[Event]:
        end = _end_event(task, outcome)
        if task.stage == "label":
            return [*self._label_events(task, outcome), end]
        return [end] if outcome.failure else [*self._EVENTS_OF[task.stage](self, task, outcome), end]

    def _outcome(self, task: Task, future: Future[dict[str, Any]]) -> Outcome:
        error = future.exception()
        if error is None:
            return Outcome.from_dict(future.result())
        message = " ".join(f"{type(error).__name__}: {error}".split())
        log = str(self._run_dir / "logs" / "parsl.log")
        timing = Timing("", task.submitted, max(task.submitted, time.time()))
        return Outcome(task.stage, timing, failure=Failure(failure_class(error), message, log))

    def _label_events(self, task: Task, outcome: Outcome) -> list[Event]:
        """What becomes of every frame of a label task: its file, its own failure, or that of the whole task."""
        failures, postponed = outcome.facts.get("failures", {}), outcome.facts.get("postponed", [])
        events: list[Event] = []
        for frame in self._held_by(task):
            if frame in postponed:
                continue
            failure = failures.get(frame) or self._failure_without_label(frame, outcome)
            if failure["kind"] != FailureClass.MISSING:
                events.append(("label_failed", {"frame": frame, "failure": failure}))
                attempts = self._ledger.replay.in_flight[frame].failures(failure["kind"]) + 1
                if verdict(FailureClass(failure["kind"]), attempts, self._settings) is Verdict.QUARANTINE:
                    events.append(("quarantined", {"frame": frame, "failure": failure}))
        return events

    def _held_by(self, task: Task) -> list[str]:
        return [frame for frame in task.inputs["frames"] if frame in self._ledger.replay.in_flight]

    def _failure_without_label(self, frame: str, outcome: Outcome) -> dict[str, Any]:
        if outcome.failure is not None:
            return asdict(outcome.failure)
        try:
            published_label(self._run_dir, frame, self._level)
            message = "its task ended with neither a label nor a failure"
        except ShardError as error:
            message = str(error)
        return asdict(Failure(FailureClass.CRASH, message, str(label_path(self._run_dir, frame))))

    def _bootstrap_events(self, task: Task, outcome: Outcome) -> list[Event]:
        return self._queue_events(task, outcome, kind="bootstrap", generation=0)

    def _candidate_events(self, task: Task, outcome: Outcome) -> list[Event]:
        return self._queue_events(task, outcome, kind="walker", generation=task.inputs["generation"])

    def _queue_events(self, task: Task, outcome: Outcome, *, kind: str, generation: int) -> list[Event]:
        path = candidates_path(self._run_dir, task.id)
        frames = {frame.id: (index, frame) for index, frame in enumerate(open_shard(path).frames())}
        new = [frame for frame in frames if not self._ledger.replay.is_known(frame)]
        if not new:
            return []
        # The first model needs every bootstrap label, and what counts is the error where walkers go.
        held_out = holdout_of(new, self._settings.holdout_fraction) if kind == "walker" else ()
        rows = [[f, frames[f][0], frames[f][1].n_atoms, self._severity(frames[f][1]), f in held_out] for f in new]
        relative = path.relative_to(self._run_dir).as_posix()
        return [("frames_queued", {"path": relative, "kind": kind, "generation": generation, "frames": rows})]

    def _severity(self, frame: Frame) -> float:
        """By the committee that a walker stopped with; 0 when no model was asked."""
        origin = frame.origin
        found = severity(origin.energy_spread, origin.force_spread, self._config.sampler)
        return found if math.isfinite(found) else 0.0

    def _ranking_events(self, task: Task, outcome: Outcome) -> list[Event]:
        """Drop queued walker frames that the newest model is sure of, or that resemble a less sure one."""
        scores, order = outcome.facts["scores"], set(outcome.facts["order"])
        queue = self._ledger.replay.state().queue
        asked = [c.frame for c in queue if c.kind == "walker" and c.frame in scores]
        sure = [frame for frame in asked if not scores[frame][3]]
        similar = [frame for frame in asked if scores[frame][3] and frame not in order]
        settings = self._config.sampler
        spreads = {frame: severity(scores[frame][0], scores[frame][1], settings) for frame in asked if frame in order}
        return [
            ("frames_ranked", {"generation": task.inputs["generation"], "spreads": spreads}),
            ("frames_dropped", {"frames": sure, "reason": "sure"}),
            ("frames_dropped", {"frames": similar, "reason": "similar"}),
        ]

    def _model_events(self, task: Task, outcome: Outcome) -> list[Event]:
        path = Path(outcome.facts["model"]).resolve().relative_to(self._run_dir.resolve())
        return [
            (
                "model_trained",
                {
                    "generation": task.inputs["generation"],
                    "path": path.as_posix(),
                    "digest": outcome.facts["digest"],
                    "n_labels": task.inputs["n_labels"],
                    "metrics": _finite(outcome.facts),
                },
            )
        ]

    def _evaluation_events(self, task: Task, outcome: Outcome) -> list[Event]:
        inputs = {name: task.inputs[name] for name in ("generation", "n_labels")}
        return [("model_evaluated", {**inputs, "metrics": _finite(outcome.facts)})]

    _EVENTS_OF: Mapping[str, Callable[[Driver, Task, Outcome], list[Event]]] = MappingProxyType(
        {
            "build": _bootstrap_events,
            "sample": _candidate_events,
            "rank": _ranking_events,
            "train": _model_events,
            "evaluate": _evaluation_events,
        }
    )


def _tidy(scratch: Path, outcome: Outcome) -> None:
    """Remove what an ended task needed; logs of failures stay."""
    forget_work(scratch)
    if outcome.failure is None and not outcome.facts.get("failures"):
        shutil.rmtree(scratch, ignore_errors=True)


def _end_event(task: Task, outcome: Outcome) -> Event:
    timing = asdict(outcome.timing)
    if outcome.failure is not None:
        return "task_failed", {"task": task.id, "timing": timing, "failure": asdict(outcome.failure)}
    # Per-frame facts have been recorded as events of their own.
    facts = {key: value for key, value in outcome.facts.items() if key not in PER_FRAME}
    return "task_finished", {"task": task.id, "timing": timing, "facts": _finite(facts)}


def _finite(value: Any) -> Any:
    """JSON without NaN and infinity, which become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
