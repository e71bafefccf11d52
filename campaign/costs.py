"""What do the tasks of a campaign cost, and how do they end? Measured in an earlier run or assumed, drawn at random."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, linear_regression, pstdev
from typing import Any

from campaign.config import CampaignConfig
from campaign.ledger import read_run
from campaign.simulation import Fate
from campaign.state import Candidate, Task
from shards.outcome import FailureClass

__all__ = ["Chance", "Costs", "Spread", "measure"]

STRAGGLERS, TAIL_EXPONENT = 0.02, 1.5
MOST_TRIGGERED = 0.995  # beyond it the formula for a task's length tends to nothing


@dataclass(frozen=True)
class Spread:
    """Seconds that are log-normal, and in some cases longer by a Pareto factor."""

    median_s: float
    sigma: float = 0.1  # of the logarithm
    tail: float = 0.0  # share of the longer cases

    @classmethod
    def of(cls, seconds: Sequence[float], tail: float = 0.0) -> Spread:
        logs = [math.log(max(value, 1e-3)) for value in seconds]
        return cls(math.exp(fmean(logs)), pstdev(logs) if len(logs) > 1 else cls.sigma, tail)

    def draw(self, rng: random.Random) -> float:
        factor = rng.paretovariate(TAIL_EXPONENT) if rng.random() < self.tail else 1.0
        return self.median_s * math.exp(rng.gauss(0.0, self.sigma)) * factor


@dataclass(frozen=True)
class Costs:
    """The defaults are assumed: labels of ten minutes on a node each, walkers and trainings on GPUs. What waits for the
    machine, or for convergence, has stragglers; an earlier run may have been too short to meet them."""

    wait: Spread = Spread(0.1, 0.5, STRAGGLERS)  # from handing over a task to its start
    build: Spread = Spread(60.0)
    rank: Spread = Spread(20.0)
    evaluate: Spread = Spread(20.0)
    label: Spread = Spread(600.0, 0.6, STRAGGLERS)  # one frame
    failures: Mapping[str, float] = field(
        default_factory=lambda: {FailureClass.SCF: 0.01, FailureClass.CRASH: 0.003}
    )  # share of labels that end so; those that take too long come on top
    lost_per_hour: float = 1e-4  # tasks that go down with their node
    train_once_s: float = 60.0
    train_label_s: float = 0.15  # on top, for each label
    quiet_task: Spread = Spread(900.0)  # a sampling task none of whose walkers triggers
    triggered: Sequence[float] = (0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # share of walkers that do, by generation
    duplicates: float = 0.05  # share of frames too similar to others of their task
    sure: float = 0.25  # share of waiting candidates that the next model drops


class Chance:
    """The Nature of a campaign whose tasks have these costs."""

    def __init__(self, config: CampaignConfig, costs: Costs, seed: int = 0) -> None:
        self._config = config
        self._costs = costs
        self._rng = random.Random(seed)

    def fate(self, task: Task, candidates: Sequence[Candidate]) -> Fate:
        fates = {"label": self._label, "sample": self._sample, "train": self._train}
        fate = fates.get(task.stage, self._other)(task)
        lost_s = 3600 * self._rng.expovariate(self._costs.lost_per_hour) if self._costs.lost_per_hour else math.inf
        if lost_s < fate.seconds:
            fate = Fate(lost_s, failure=FailureClass.NODE_LOST)
        return replace(fate, wait_s=self._costs.wait.draw(self._rng))

    def is_sure(self, candidate: Candidate) -> bool:
        return self._rng.random() < self._costs.sure

    def _other(self, task: Task) -> Fate:
        return Fate(getattr(self._costs, task.stage).draw(self._rng))

    def _train(self, task: Task) -> Fate:
        return Fate(
            Spread(self._costs.train_once_s + self._costs.train_label_s * task.inputs["n_labels"]).draw(self._rng)
        )

    def _label(self, task: Task) -> Fate:
        limit_s = 60 * self._config.labeler.time_limit_min
        seconds, failures = 0.0, {}
        for frame in task.inputs["frames"]:
            own_s = self._costs.label.draw(self._rng)
            seconds += min(own_s, limit_s)
            kinds, shares = [*self._costs.failures, ""], [*self._costs.failures.values()]
            kind = self._rng.choices(kinds, [*shares, 1 - sum(shares)])[0]
            if own_s > limit_s or kind:
                failures[frame] = FailureClass.WALLTIME if own_s > limit_s else kind
        return Fate(seconds, failures=failures)

    def _sample(self, task: Task) -> Fate:
        sampler = self._config.sampler
        n, generations = sampler.walkers_per_task, self._costs.triggered
        share = generations[min(task.inputs["generation"], len(generations)) - 1]
        n_triggered = sum(self._rng.random() < share for _ in range(n))
        n_left = n if sampler.on_timeout != "none" else n_triggered
        n_duplicates = round(n_left * self._costs.duplicates)
        facts = {
            "walkers": n,
            "timeouts": n - n_triggered,
            "triggers": {"force_mean": n_triggered},
            "n_frames": n_left - n_duplicates,
            "n_duplicates": n_duplicates,
        } | dict.fromkeys(("exploded", "too_close", "steps", "atom_steps"), 0)
        return Fate(_duration(share) * self._costs.quiet_task.draw(self._rng), walkers=facts)


def _duration(share: float) -> float:
    """Mean life of walkers, in units of the longest, when this share of them triggers, at a constant rate, before."""
    share = min(share, MOST_TRIGGERED)
    return share / -math.log1p(-share) if share else 1.0


def measure(run_dir: Path) -> Costs:
    """Costs as they were in an earlier run; what it has none of is assumed.

    Raises:
        LedgerError: not a run directory, or one that cannot be read.
    """
    ended = list(_ended_tasks(run_dir))
    kept = [task for task in ended if task.host]
    measured: dict[str, Any] = {
        stage: Spread.of(seconds, STRAGGLERS if stage == "label" else 0.0)
        for stage in ("build", "rank", "evaluate", "label")
        if (seconds := [task.seconds / task.size for task in kept if task.stage == stage and task.done])
    }
    if ended:
        measured["wait"] = Spread.of([task.wait_s for task in kept], STRAGGLERS)
        measured["lost_per_hour"] = (len(ended) - len(kept)) / max(sum(task.seconds for task in ended) / 3600, 1e-9)
    measured |= _training([task for task in kept if task.stage == "train" and task.done])
    measured |= _walkers([task for task in kept if task.stage == "sample" and task.done])
    return replace(Costs(), **measured, **_shares(run_dir))


@dataclass(frozen=True)
class _Ended:
    stage: str
    inputs: Mapping[str, Any]
    host: str
    wait_s: float
    seconds: float
    done: bool
    facts: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Frames of a label task."""
        return len(self.inputs["frames"]) if self.stage == "label" else 1


def _ended_tasks(run_dir: Path) -> Iterator[_Ended]:
    submitted: dict[str, Mapping[str, Any]] = {}
    for event in read_run(run_dir):
        if event["event"] == "task_submitted":
            submitted[event["task"]] = event
        elif event["event"] in ("task_finished", "task_failed"):
            task, timing = submitted.pop(event["task"]), event["timing"]
            wait_s, seconds = timing["start"] - task["time"], timing["end"] - timing["start"]
            done = event["event"] == "task_finished"
            facts = event.get("facts", {})
            yield _Ended(task["stage"], task["inputs"], timing["host"], wait_s, seconds, done, facts)


def _training(tasks: Sequence[_Ended]) -> dict[str, float]:
    """A straight line through the trainings, that neither starts nor goes below zero."""
    if not tasks:
        return {}
    sizes, seconds = [task.inputs["n_labels"] for task in tasks], [task.seconds for task in tasks]
    line = linear_regression(sizes, seconds) if len(set(sizes)) > 1 else (sum(seconds) / sum(sizes), 0.0)
    slope = max(0.0, line[0])
    return {"train_label_s": slope, "train_once_s": max(0.0, fmean(seconds) - slope * fmean(sizes))}


def _walkers(tasks: Sequence[_Ended]) -> dict[str, Any]:
    if not tasks:
        return {}
    newest = max(task.inputs["generation"] for task in tasks)
    n_walkers, n_triggered = Counter[int](), Counter[int]()
    for task in tasks:
        n_walkers[task.inputs["generation"]] += task.facts["walkers"]
        n_triggered[task.inputs["generation"]] += sum(task.facts["triggers"].values())
    shares = [n_triggered[g] / n_walkers[g] if n_walkers[g] else MOST_TRIGGERED for g in range(1, newest + 1)]
    n_frames, n_duplicates = (sum(task.facts[name] for task in tasks) for name in ("n_frames", "n_duplicates"))
    return {
        "triggered": shares,
        "quiet_task": Spread.of([task.seconds / _duration(shares[task.inputs["generation"] - 1]) for task in tasks]),
        "duplicates": n_duplicates / max(1, n_frames + n_duplicates),
    }


def _shares(run_dir: Path) -> dict[str, Any]:
    """How labels failed, but for want of time or of a node; and how many candidates newer models dropped."""
    failures, n_labels, n_ranked, n_dropped = Counter[str](), 0, 0, 0
    for event in read_run(run_dir):
        match event["event"]:
            case "labeled":
                n_labels += 1
            case "label_failed":
                failures[event["failure"]["kind"]] += 1
            case "frames_ranked":
                n_ranked += len(event["spreads"])
            case "frames_dropped":
                n_dropped += len(event["frames"])
    n_tried = max(1, n_labels + failures.total())
    failures.pop(FailureClass.WALLTIME, None)
    failures.pop(FailureClass.NODE_LOST, None)
    measured: dict[str, Any] = {"failures": {kind: n / n_tried for kind, n in failures.items()}}
    return measured | ({"sure": n_dropped / (n_ranked + n_dropped)} if n_ranked + n_dropped else {})
