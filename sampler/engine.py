"""How is the batch kept full, and what does each walker leave behind? Walkers in, frames out; no file.

At every check each walker is judged; one that ends is replaced at once by the next one that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sampler.batch import Batch, Snapshot, Walker, join, start_batch
from sampler.config import SamplerSettings
from sampler.dynamics import Dynamics, ForceModel
from sampler.triggers import TRIGGERS, Spread, Verdict, is_elevated, judge, severity
from shards.frame import Frame, Origin

__all__ = ["Ended", "Tally", "run_walkers"]


@dataclass(frozen=True)
class Ended:
    """A walker that is over: why, after how long, and the frame it leaves, if any."""

    seed: int
    verdict: Verdict
    time_fs: float
    frame: Frame | None


@dataclass
class Tally:
    """What was done so far."""

    n_active: int = 0
    n_steps: int = 0  # of single walkers, added up
    n_atom_steps: int = 0
    n_frames: int = 0
    simulated_fs: float = 0.0  # of walkers that ended
    ended: Counter[str] = field(default_factory=Counter)  # by verdict

    def count(self, ended: Sequence[Ended]) -> None:
        self.ended.update(str(end.verdict) for end in ended)
        self.n_frames += sum(end.frame is not None for end in ended)
        self.simulated_fs += sum(end.time_fs for end in ended)


def run_walkers(
    walkers: Iterable[Walker],
    model: ForceModel,
    settings: SamplerSettings,
    *,
    model_digest: str = "",
    tally: Tally,
    report: Callable[[], None] = lambda: None,
) -> Iterator[Ended]:
    """Run all walkers, at most `slots` together; each comes back when it ends.

    `tally` is kept up to date, and `report` is called, at every check.
    """
    dynamics = Dynamics(model, settings)
    waiting = iter(walkers)
    batch: Batch | None = None
    while True:
        batch = _refill(batch, waiting, dynamics)
        if batch is None:
            return
        verdicts = [_promote(walker, settings) for walker in batch.walkers]
        ended = [
            _end(walker, verdict, settings, model_digest)
            for walker, verdict in zip(batch.walkers, verdicts, strict=True)
            if verdict
        ]
        if ended:
            batch = batch.keep([i for i, verdict in enumerate(verdicts) if not verdict])
        else:
            dynamics.advance(batch)
            tally.n_steps += settings.check_every * len(batch.walkers)
            tally.n_atom_steps += settings.check_every * len(batch.positions)
        tally.n_active = len(batch.walkers)
        tally.count(ended)
        report()
        yield from ended


def _refill(batch: Batch | None, waiting: Iterator[Walker], dynamics: Dynamics) -> Batch | None:
    """Put waiting walkers into the free slots; None when all are done."""
    n_active = len(batch.walkers) if batch else 0
    newcomers = list(islice(waiting, dynamics.settings.slots - n_active))
    if not newcomers:
        return batch if n_active else None
    fresh = start_batch(newcomers, dynamics.model.elements, dynamics.settings.device)
    dynamics.prepare(fresh)
    return join(batch, fresh) if batch else fresh


def _promote(walker: Walker, settings: SamplerSettings) -> Verdict:
    """Judge a walker by its last reading; when it may go on, its current geometry becomes its last good one."""
    if walker.blown:
        return Verdict.RUNAWAY
    verdict = judge(walker.reading, walker.time_fs(settings), settings)
    # A start from which the model runs away at once is a sound geometry: the model is wrong there.
    if not verdict or (verdict == Verdict.RUNAWAY and walker.n_steps == 0):
        walker.last_good = walker.current
    if verdict in (Verdict.RUNNING, Verdict.TIMEOUT):
        best = walker.most_uncertain
        if best is None or _severity(walker.current.spread, settings) > _severity(best.spread, settings):
            walker.most_uncertain = walker.current
    return verdict


def _severity(spread: Spread, settings: SamplerSettings) -> float:
    return severity(spread.energy, spread.force_mean, settings)


def _end(walker: Walker, verdict: Verdict, settings: SamplerSettings, model_digest: str) -> Ended:
    snapshot = _snapshot_left(walker, verdict, settings)
    frame = None if snapshot is None else _frame(walker, verdict, snapshot, model_digest)
    return Ended(walker.seed, verdict, walker.time_fs(settings), frame)


def _snapshot_left(walker: Walker, verdict: Verdict, settings: SamplerSettings) -> Snapshot | None:
    """The geometry that deserves a label: the one that triggered, or the last elevated one before a blow-up."""
    if verdict in TRIGGERS:
        return walker.current
    if verdict == Verdict.TIMEOUT:
        return {"none": None, "most_uncertain": walker.most_uncertain, "last": walker.current}[settings.on_timeout]
    last_good = walker.last_good
    return last_good if last_good and is_elevated(last_good.spread, settings) else None


def _frame(walker: Walker, verdict: Verdict, snapshot: Snapshot, model_digest: str) -> Frame:
    start = walker.start
    origin = Origin(
        kind="walker",
        seed=walker.seed,
        model=model_digest,
        trigger=str(verdict),
        time_fs=snapshot.time_fs,
        energy_spread=snapshot.spread.energy,
        force_spread=snapshot.spread.force_mean,
    )
    positions = _wrapped(snapshot.positions, snapshot.cell, start.pbc)
    return Frame(start.numbers, positions, snapshot.cell, start.pbc, start.charge, start.spin, origin)


def _wrapped(positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bring atoms back into the cell along periodic axes."""
    turns = np.floor(positions @ np.linalg.pinv(cell)) * pbc
    return positions - turns @ cell
