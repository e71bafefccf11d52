"""What should a campaign do next? A pure function from its state: no clock, no file, no task of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from campaign.accounting import Wait
from campaign.config import CampaignSettings
from campaign.state import POOL_OF, Candidate, State
from shards.outcome import FailureClass

__all__ = [
    "Action",
    "Build",
    "Evaluate",
    "Fail",
    "Finish",
    "Label",
    "Rank",
    "Sample",
    "Stop",
    "Train",
    "Verdict",
    "decide",
    "derive_seed",
    "holdout_of",
    "verdict",
    "waits",
]


@dataclass(frozen=True)
class Build:
    """Make the bootstrap frames."""

    n_frames: int


@dataclass(frozen=True)
class Sample:
    """Run walkers with the newest model."""

    generation: int


@dataclass(frozen=True)
class Rank:
    """Score queued candidates by the newest model."""

    generation: int
    paths: tuple[str, ...]  # the shards they are in


@dataclass(frozen=True)
class Label:
    """Label some frames in one task."""

    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Train:
    """Train the next generation on all labels that are there."""

    generation: int


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on the held-out set."""

    generation: int


@dataclass(frozen=True)
class Stop:
    """Sample and label no more; train once more on everything."""

    reason: str


@dataclass(frozen=True)
class Finish:
    reason: str


@dataclass(frozen=True)
class Fail:
    reason: str


Action = Build | Sample | Rank | Label | Train | Evaluate | Stop | Finish | Fail


def decide(state: State, settings: CampaignSettings, slots: Mapping[str, int], now: float) -> list[Action]:
    """Actions to take at once. slots: pool -> tasks that it runs at a time. now: seconds since the epoch."""
    if state.finished:
        return []
    if reason := _failure(state, settings):
        return [Fail(reason)]
    if not state.stopping and (reason := _stop(state, settings, now)):
        return [Stop(reason)]
    if state.stopping and _is_done(state, settings):
        return [Finish(state.stopping)]
    free = _free(state, slots)
    rank = [] if settings.parent_run else _rank(state, free["sample"])
    return [
        *rank,
        *_sampling(state, settings, free["sample"] - len(rank)),
        *_labeling(state, settings, free["label"], ranking=bool(rank) or state.n_running["rank"] > 0),
        *[*_evaluation(state), *_training(state, settings)][: max(0, free["train"])],
    ]


def _failure(state: State, settings: CampaignSettings) -> str:
    """Why the campaign cannot go on; empty when it can."""
    if state.blocked:
        return state.blocked
    for stage, tally in state.stages.items():
        if stage != "label" and tally.failed_in_a_row >= settings.attempts:
            return f"{stage} failed {tally.failed_in_a_row} times in a row; {tally.last_failure}"
        if stage != "label" and tally.lost_in_a_row >= settings.losses:
            return f"{stage} lost its node {tally.lost_in_a_row} times in a row; {tally.last_failure}"
    return _label_failure(state, settings) or _sampling_failure(state, settings)


def _label_failure(state: State, settings: CampaignSettings) -> str:
    recent = state.recent[-settings.failure_window :]
    n_bad = recent.count(False)
    newest = ""
    if state.quarantined:
        last = state.quarantined[-1]
        newest = f"; the last one: {last.kind}: {last.message}" + (f" (log: {last.log})" if last.log else "")
    if len(recent) >= settings.failure_first and n_bad == len(recent) and state.n_labels == 0:
        return f"the first {n_bad} frames all failed to be labeled{newest}"
    if len(recent) == settings.failure_window and n_bad > settings.failure_fraction * len(recent):
        return f"{n_bad} of the last {len(recent)} frames failed to be labeled{newest}"
    if state.n_train == 0 and _bootstrap_is_settled(state):
        return f"no bootstrap frame for training could be labeled{newest}"
    if state.stopping and not state.in_flight and state.n_train == 0:
        return f"there are no labels to train on, and no time to make them ({state.stopping})"
    return ""


def _sampling_failure(state: State, settings: CampaignSettings) -> str:
    walkers = state.walkers_newest
    if walkers.run >= settings.quiet_walkers and walkers.exploded + walkers.too_close == walkers.run:
        if any(candidate.generation == state.generation for candidate in (*state.queue, *state.in_flight)):
            return ""
        return (
            f"all {walkers.run} walkers of generation {state.generation} ran away ({walkers.exploded}) or came too"
            f" close ({walkers.too_close}): use a smaller sampler.timestep_fs, lower temperatures, more labels"
        )
    return ""


def _stop(state: State, settings: CampaignSettings, now: float) -> str:
    """Why to stop sampling and labeling; empty when there is no reason."""
    if state.n_labels >= settings.max_labels:
        return f"max_labels: {state.n_labels} labels"
    active_s = state.active_s + max(0.0, now - state.time)
    if active_s >= settings.max_hours * 3600:
        return f"max_hours: {active_s / 3600:.2f} hours of work"
    if state.generation >= settings.max_generations - 1 and _is_worth_training(state, settings):
        return f"max_generations: the next model is number {settings.max_generations}"
    if state.generation >= settings.max_generations:
        return f"max_generations: {state.generation} models"
    if settings.parent_run:
        done = _has_run_out(state) and not _is_under_way(state, settings)
        return f"nothing left to choose: no other frame of {settings.parent_run} deserves a label" if done else ""
    walkers = state.walkers_newest
    if walkers.run >= settings.quiet_walkers and walkers.timeouts >= settings.quiet_fraction * walkers.run:
        return (
            f"nothing left to learn: {walkers.timeouts} of {walkers.run} walkers of generation {state.generation}"
            " ran to their end without a trigger"
        )
    return ""


def _has_run_out(state: State) -> bool:
    """With a parent run, whose frames take the place of walkers: did the newest model find fewer than it asked for?"""
    return state.walkers_newest.timeouts > 0


def _is_under_way(state: State, settings: CampaignSettings) -> bool:
    """Labels or a model after which another frame may be worth choosing."""
    labels = state.queue or state.in_flight
    return bool(labels or state.n_running["train"] or _is_worth_training(state, settings))


def _is_done(state: State, settings: CampaignSettings) -> bool:
    return (
        not state.in_flight
        and state.n_running["train"] == 0
        and (_n_new(state) == 0 or state.generation >= settings.max_generations)
        and all(model.n_holdout == state.n_holdout for model in state.models)
    )


def _free(state: State, slots: Mapping[str, int]) -> dict[str, int]:
    """Pool -> slots in which no task is."""
    return {
        pool: n - sum(state.n_running[stage] for stage, home in POOL_OF.items() if home == pool)
        for pool, n in slots.items()
    }


def _n_new(state: State) -> int:
    """Training labels that the newest model has not seen."""
    return state.n_train - (state.models[-1].n_labels if state.models else 0)


def _bootstrap_is_settled(state: State) -> bool:
    waiting = any(candidate.kind == "bootstrap" for candidate in (*state.queue, *state.in_flight))
    return state.n_bootstrap > 0 and not waiting


def _is_worth_training(state: State, settings: CampaignSettings) -> bool:
    if state.n_running["train"]:
        return False
    if state.models:
        return _n_new(state) >= settings.retrain_after
    enough = state.n_train >= settings.bootstrap_fraction * settings.n_bootstrap
    return state.n_train > 0 and (enough or _bootstrap_is_settled(state))


def _training(state: State, settings: CampaignSettings) -> list[Action]:
    if state.generation >= settings.max_generations or state.n_running["train"]:
        return []
    last = state.stopping and not state.in_flight and _n_new(state) > 0
    if last or (not state.stopping and _is_worth_training(state, settings)):
        return [Train(state.generation + 1)]
    return []


def _evaluation(state: State) -> list[Action]:
    """The newest model once, for people who watch; at the end all models on the complete held-out set."""
    under_way = {task.inputs["generation"] for task in state.running if task.stage == "evaluate"}
    complete = state.stopping and not state.in_flight
    models = state.models if complete else state.models[-1:]
    return [
        Evaluate(model.generation)
        for model in models
        if model.generation not in under_way
        and (model.n_holdout < state.n_holdout if complete else model.n_holdout == 0 < state.n_holdout)
    ]


def _rank(state: State, free: int) -> list[Action]:
    if state.stopping or state.n_running["rank"] or free <= 0:
        return []
    newest = state.generation
    stale = [c for c in state.queue if c.kind == "walker" and c.generation < newest]
    paths = tuple(dict.fromkeys(candidate.path for candidate in stale))
    return [Rank(newest, paths)] if paths else []


def _sampling(state: State, settings: CampaignSettings, free: int) -> list[Action]:
    if state.stopping:
        return []
    if state.n_bootstrap == 0:
        return [Build(settings.n_bootstrap)] if state.n_running["build"] == 0 else []
    if not state.models:
        return []
    if settings.parent_run:
        return _choosing(state, settings, free)
    tally = state.stages.get("sample")
    n_finished = tally.finished if tally else 0
    yield_per_task = max(1.0, (state.n_candidates - state.n_bootstrap) / n_finished if n_finished else 1.0)
    n_wanted = min(settings.queue_target, _n_left(state, settings))
    n_expected = len(state.queue) + yield_per_task * state.n_running["sample"]
    n_tasks = min(free, math.ceil((n_wanted - n_expected) / yield_per_task))
    return [Sample(state.generation)] * n_tasks


def _choosing(state: State, settings: CampaignSettings, free: int) -> list[Action]:
    """One choice at a time, of as many frames as the next model wants."""
    n_wanted = min(settings.retrain_after, _n_left(state, settings))
    if free <= 0 or state.n_running["sample"] or _has_run_out(state) or len(state.queue) >= n_wanted:
        return []
    return [Sample(state.generation)]


def _labeling(state: State, settings: CampaignSettings, free: int, *, ranking: bool) -> list[Action]:
    """Bootstrap frames first, then what the newest model is least sure of. While a ranking is under way, candidates it
    has not seen wait for it; while the newest model is far behind the labels, all of them wait."""
    allowed = min(_n_left(state, settings), _n_ahead(state, settings))
    if state.stopping or free <= 0 or allowed <= 0:
        return []
    newest = state.generation
    ready = [c for c in state.queue if not ranking or c.kind == "bootstrap" or c.generation == newest]
    ready.sort(key=lambda c: (c.kind != "bootstrap", -c.generation, -c.spread, c.frame))
    ready = ready[:allowed]
    size = min(settings.labels_per_task, math.ceil(len(ready) / free))
    return [Label(batch) for batch in _batches(ready[: size * free], size)[:free]]


def _n_left(state: State, settings: CampaignSettings) -> int:
    """Labels that are still to be asked for in this campaign."""
    return settings.max_labels - state.n_labels - len(state.in_flight)


def _n_ahead(state: State, settings: CampaignSettings) -> int:
    """Labels that may be asked for before the next model."""
    if not state.models:
        return settings.max_labels
    return settings.labels_ahead - _n_new(state) - len(state.in_flight)


def _batches(candidates: Sequence[Candidate], size: int) -> list[tuple[Candidate, ...]]:
    """Split in order. One that failed or was lost before goes alone, so that it cannot take others with it again."""
    batches: list[list[Candidate]] = []
    for candidate in candidates:
        last = batches[-1] if batches else []
        if not last or len(last) >= size or any(c.attempts or c.losses for c in (candidate, last[-1])):
            batches.append([candidate])
        else:
            last.append(candidate)
    return [tuple(batch) for batch in batches]


class Verdict(StrEnum):
    """What becomes of a frame whose label failed."""

    RETRY = "retry"
    QUARANTINE = "quarantine"


def verdict(kind: FailureClass, attempts: int, settings: CampaignSettings) -> Verdict:
    """attempts: labels of the frame that have failed in this way (see Candidate.failures), this one included.

    A lost node says little about the frame, unless it happens again and again. Another node may help against crashes
    and time limits. The labeler has already tried its whole ladder
    when it reports memory or SCF: once more, then no more. A wrong geometry or result stays wrong.
    """
    allowed = {
        FailureClass.NODE_LOST: settings.losses,
        FailureClass.GEOMETRY: 1,
        FailureClass.BAD_LABEL: 1,
        FailureClass.MEMORY: min(2, settings.attempts),
        FailureClass.SCF: min(2, settings.attempts),
    }.get(kind, settings.attempts)
    return Verdict.RETRY if attempts < allowed else Verdict.QUARANTINE


def waits(state: State, settings: CampaignSettings, slots: Mapping[str, int]) -> dict[str, Wait]:
    """What the slots wait for that are free once the actions of `decide` were taken, for pools that have some."""
    reasons = {"sample": _sample_wait, "label": _label_wait, "train": _train_wait}
    return {pool: reasons[pool](state, settings) for pool, n_free in _free(state, slots).items() if n_free > 0}


def _sample_wait(state: State, settings: CampaignSettings) -> Wait:
    if state.stopping or _n_left(state, settings) < settings.queue_target:
        return Wait.END
    return Wait.LABELS if state.models else Wait.MODEL


def _label_wait(state: State, settings: CampaignSettings) -> Wait:
    if state.stopping or _n_left(state, settings) <= 0:
        return Wait.END
    if _n_ahead(state, settings) <= 0 or (state.n_bootstrap and not state.models and not state.queue):
        return Wait.MODEL
    return Wait.RANKING if state.queue and state.n_running["rank"] else Wait.FRAMES


def _train_wait(state: State, settings: CampaignSettings) -> Wait:
    return Wait.END if state.stopping and not state.in_flight else Wait.LABELS


def derive_seed(seed: int, stage: str, counter: int) -> int:
    """The seed of the counter-th task of a stage, in 0 .. 2^31 - 1."""
    digest = hashlib.sha256(f"{seed}/{stage}/{counter}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def holdout_of(frames: Sequence[str], fraction: float) -> frozenset[str]:
    """Which of these frames are held out, by a hash of their ids that shares nothing with the trainer's folds.

    Each frame is decided for itself, so that the answer does not depend on which frames come together.
    """
    return frozenset(frame for frame in frames if _unit_hash(frame) < fraction)


def _unit_hash(frame: str) -> float:
    digest = hashlib.sha256(f"holdout/{frame}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
