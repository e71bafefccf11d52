"""The verbs of sampling, files in and files out: build random cells, sample with walkers, rank candidates, and choose
frames for a higher level of theory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potential.committee import Committee
from potential.model_file import load_committee
from sampler.batch import Walker
from sampler.builder import CrowdedCellError
from sampler.config import BuilderSettings, SamplerSettings
from sampler.engine import Tally, run_walkers
from sampler.levels import expected_seconds, gaps, worth
from sampler.molecules import EmbeddingError
from sampler.schedules import draw_schedule
from sampler.scoring import fingerprints, measure_spreads, predict_energies
from sampler.selection import select
from sampler.starts import open_starts
from sampler.streams import derive_seed
from sampler.triggers import TRIGGERS, Spread, Verdict, is_wanted, severity
from shards.frame import Frame
from shards.label import Label
from shards.manifest import Manifest
from shards.outcome import Clock, Failure, FailureClass, Outcome
from shards.reader import open_shard
from shards.writer import write_frames

__all__ = ["build", "choose", "rank", "sample"]

PROGRESS_EVERY_s = 2.0
AT_A_TIME = 500  # frames whose fingerprints are compared with each other


def build(elements: Sequence[str], settings: BuilderSettings, n_frames: int, seed: int, dest: Path) -> Outcome:
    """Publish a shard of `n_frames` random cells or molecules at `dest`. facts: n_frames, n_atoms.

    Raises:
        SettingsError: settings that do not fit the elements, or cells too crowded to be built.
    """
    start_of = open_starts(elements, settings)
    clock = Clock()
    try:
        frames = [start_of(derive_seed(seed, index)) for index in range(n_frames)]
    except (CrowdedCellError, EmbeddingError) as error:
        return Outcome("build", clock.timing(), failure=Failure(FailureClass.GEOMETRY, str(error)))
    receipt = write_frames(dest, frames)
    return Outcome("build", clock.timing(), (receipt,), facts={"n_frames": n_frames, "n_atoms": receipt.n_atoms})


def sample(
    model: Path,
    builder: BuilderSettings,
    settings: SamplerSettings,
    n_walkers: int,
    seed: int,
    dest: Path,
    progress: Path | None = None,
) -> Outcome:
    """Run `n_walkers` from random cells or molecules on the committee at `model`; publish what they leave at `dest`.

    The shard may be empty. `progress` is a JSON file, replaced every few seconds while walkers run. facts: what
    `_facts` says, n_frames (published) and n_duplicates (dropped).

    Raises:
        SettingsError: builder settings that do not fit the committee's elements.
    """
    clock = Clock()
    committee = load_committee(model, device=settings.device, dtype=torch.float32)
    start_of = open_starts(committee.elements, builder)
    tally = Tally()
    try:
        with clock.phase("dynamics"):
            ended = run_walkers(
                _walkers(start_of, settings, n_walkers, seed),
                committee,
                settings,
                model_digest=committee.digest,
                tally=tally,
                report=_progress_writer(progress, tally, n_walkers),
            )
            candidates = [end.frame for end in ended if end.frame is not None]
    except (CrowdedCellError, EmbeddingError) as error:
        return Outcome("sample", clock.timing(), failure=Failure(FailureClass.GEOMETRY, str(error)))
    with clock.phase("selection"):
        if builder.molecules.given and builder.molecules.cut_molecules:
            from sampler.cutting import cut_clusters  # only here: it takes a third of a second

            candidates = cut_clusters(committee, candidates, builder.molecules.cut_molecules)
        origins = [frame.origin for frame in candidates]
        scores = np.array([severity(origin.energy_spread, origin.force_spread, settings) for origin in origins])
        chosen = select(fingerprints(committee, candidates), scores, distance=settings.duplicate_distance)
    receipt = write_frames(dest, [candidates[index] for index in chosen])
    facts = _facts(tally) | {"n_frames": len(chosen), "n_duplicates": len(candidates) - len(chosen)}
    return Outcome("sample", clock.timing(), (receipt,), facts=facts)


def rank(model: Path, frames: Sequence[Path], settings: SamplerSettings, known: Sequence[Path] = ()) -> Outcome:
    """Ask the committee at `model` about candidates. Shards of `known` frames (of either kind) hold what is labeled.

    facts: scores: {frame id: [energy spread (eV), mean and largest force spread (eV/A), whether this committee wants
    its label]}; order: ids of the wanted ones, without near-duplicates of each other or of known ones, most uncertain
    first.
    """
    clock = Clock()
    committee = load_committee(model, device=settings.device, dtype=torch.float32)
    candidates = _load(frames)
    spreads = measure_spreads(committee, candidates)
    wanted = [
        is_wanted(spread, frame.origin.trigger, settings) for frame, spread in zip(candidates, spreads, strict=True)
    ]
    scores = {
        frame.id: [spread.energy, spread.force_mean, spread.force_max, want]
        for frame, spread, want in zip(candidates, spreads, wanted, strict=True)
    }
    uncertain = [i for i, want in enumerate(wanted) if want]
    chosen = select(
        fingerprints(committee, [candidates[i] for i in uncertain]),
        np.array([severity(spreads[i].energy, spreads[i].force_mean, settings) for i in uncertain]),
        distance=settings.duplicate_distance,
        known=fingerprints(committee, _load(known)),
    )
    order = [candidates[uncertain[i]].id for i in chosen]
    return Outcome("rank", clock.timing(), facts={"scores": scores, "order": order})


def choose(
    model: Path,
    lower: Sequence[Path],
    settings: SamplerSettings,
    n_frames: int,
    seed: int,
    dest: Path,
    known: Sequence[Path] = (),
    higher: Path | None = None,
) -> Outcome:
    """Publish at `dest` `n_frames` frames of the manifests `lower`, at random among the quarter that most deserves a
    label of a higher level: the very first ones are often all of one molecule.

    model: the committee carried to the higher level; before there is one, that of the lower level. known: shards of
    frames chosen before. higher: manifest of labels of the higher level, which tell what one costs; before there are
    any, those of the lower one do. facts: n_frames; gap_meV, root mean square of the gap between the levels
    / sqrt(n_atoms); seconds, mean time of a label of each level; and those of `sample`, with places for frames in the
    stead of walkers: a place for which there was no frame has timed out.

    Raises:
        ManifestError, ShardError, ModelFileError: what cannot be read.
    """
    clock = Clock()
    committee = load_committee(model, device=settings.device, dtype=torch.float64)
    rows, labeled, before = _labels(lower), _labels([higher] if higher else []), _load(known)
    frames = [frame for frame, _ in rows]
    with clock.phase("scoring"):
        spreads = measure_spreads(committee, frames)
        gap = gaps(rows, predict_energies(committee, frames), committee.elements)
        seconds = expected_seconds(frames, labeled or rows)
        scores = worth(np.array([spread.energy for spread in spreads]), gap, seconds)
    with clock.phase("selection"):
        old = {frame.id for frame in before}
        left = np.array([i for i in np.argsort(-scores) if frames[i].id not in old], dtype=np.int64)
        np.random.default_rng(seed).shuffle(left[: max(n_frames, len(left) // 4)])
        kept = _unlike(committee, [frames[i] for i in left], before, n_frames, settings.duplicate_distance)
        chosen = [_marked(frames[left[i]], spreads[left[i]], committee.digest) for i in kept]
    facts = {
        "n_frames": len(chosen),
        "gap_meV": 1000 * float(np.sqrt((gap**2).mean())),
        "seconds": {name: _seconds(part) for name, part in (("lower", rows), ("higher", labeled)) if part},
        "walkers": n_frames,
        "triggers": {"chosen": len(chosen)},
        "timeouts": n_frames - len(chosen),
    }
    facts |= dict.fromkeys(("steps", "atom_steps", "exploded", "too_close"), 0)
    return Outcome("choose", clock.timing(), (write_frames(dest, chosen),), facts=facts)


def _walkers(
    start_of: Callable[[int], Frame], settings: SamplerSettings, n_walkers: int, seed: int
) -> Iterator[Walker]:
    for index in range(n_walkers):
        walker_seed = derive_seed(seed, index)
        yield Walker(walker_seed, start_of(walker_seed), draw_schedule(settings, walker_seed))


def _load(shards: Sequence[Path]) -> list[Frame]:
    return [frame for path in shards for frame in open_shard(path).frames()]


def _labels(manifests: Sequence[Path]) -> list[tuple[Frame, Label]]:
    return [row for manifest in manifests for shard in Manifest(manifest).shards() for row in shard.rows()]


def _seconds(rows: Sequence[tuple[Frame, Label]]) -> float:
    return float(np.mean([label.seconds for _, label in rows]))


def _unlike(
    committee: Committee, frames: Sequence[Frame], known: Sequence[Frame], count: int, distance: float
) -> list[int]:
    """The first `count` frames that are near-duplicates neither of known ones nor of one before them."""
    kept: list[int] = []
    prints = fingerprints(committee, known)
    for start in range(0, len(frames), AT_A_TIME):
        new = fingerprints(committee, frames[start : start + AT_A_TIME])
        chosen = select(new, -np.arange(len(new), dtype=np.float64), distance=distance, known=prints)
        prints = np.concatenate([prints, new[chosen]])
        kept += [start + i for i in chosen]
        if len(kept) >= count:
            break
    return kept[:count]


def _marked(frame: Frame, spread: Spread, model: str) -> Frame:
    origin = replace(frame.origin, model=model, energy_spread=spread.energy, force_spread=spread.force_mean)
    return replace(frame, origin=origin)


def _facts(tally: Tally) -> dict[str, Any]:
    """walkers that ended, their steps and atom_steps, how they ended, and how long they lasted on average."""
    n_walkers = tally.ended.total()
    return {
        "walkers": n_walkers,
        "steps": tally.n_steps,
        "atom_steps": tally.n_atom_steps,
        "triggers": {str(kind): tally.ended[kind] for kind in TRIGGERS},
        "timeouts": tally.ended[Verdict.TIMEOUT],
        "exploded": tally.ended[Verdict.RUNAWAY],
        "too_close": tally.ended[Verdict.TOO_CLOSE],
        "mean_time_ps": tally.simulated_fs / 1000 / max(n_walkers, 1),
    }


def _progress_writer(path: Path | None, tally: Tally, n_walkers: int) -> Callable[[], None]:
    """Something to call often; it replaces the file every few seconds and when the last walker has ended."""
    start = time.time()
    last = 0.0

    def write() -> None:
        nonlocal last
        now = time.time()
        if path is None or (now - last < PROGRESS_EVERY_s and tally.ended.total() < n_walkers):
            return
        last = now
        table = _facts(tally) | {"n_walkers": n_walkers, "active": tally.n_active, "n_frames": tally.n_frames}
        beside = path.with_name(f"{path.name}.partial")
        beside.write_text(json.dumps(table | {"seconds": now - start, "updated": now}), encoding="utf-8")
        os.replace(beside, path)

    return write
