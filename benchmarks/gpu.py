"""What does a GPU do: forces of the committee on batched aluminium and on one large cell, training with forces, and
steps of walkers?

Run: python -m benchmarks.gpu [--device cuda] [--labels SHARD [--minutes LIMIT]]. Rates are those on the clock after
all work is done. Agreement is that with the same committee on the CPU. With --labels there is one row only: eight
networks are trained on a shard of labels with the published settings, and it says how long the published number of
epochs takes. --make SHARD makes such a shard on any machine: as many random cells as the published set has, of their
sizes, labeled by the committee. With --device cpu a little of everything runs, to try the script.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import aluminium, crystal
from benchmarks.harness import Row, Times, interleave, publish
from benchmarks.torchani_peer import deviation
from benchmarks.training import Ours, labeled
from potential.committee import Committee
from potential.config import PotentialSettings
from potential.neighbours import find_neighbours
from potential.structures import Structures
from sampler.batch import Batch, Walker, start_batch
from sampler.builder import random_frame
from sampler.config import BuilderSettings, SamplerSettings
from sampler.dynamics import Dynamics
from sampler.schedules import draw_schedule
from shards import Label, Level, Manifest, open_shard, write_labels
from shards.frame import Frame
from trainer.config import TrainerSettings
from trainer.stage import train

MEAN = (10e6, 25e6)  # atom-steps per second on an H200
TRAINING = (30_000.0, 60_000.0)  # structures per second
PUBLISHED_MIN = (30.0, 10.0)
PUBLISHED_CELLS, PUBLISHED_EPOCHS = 6351, 1348  # the latter of the network that took longest
PUBLISHED = BuilderSettings(
    density_g_cm3=(1.8, 4.05), n_atoms=(55, 193), minimum_distance_A=1.8
)  # 124 atoms on average
CELLS_AT_A_TIME = 64


def forces(committee: Committee, frames: list[Frame], work: str, bars: tuple[float, float] | None, kind: str) -> Row:
    """Atom-steps per second with the list kept, and the most memory that was taken."""
    structures = Structures.from_frames(frames, ["Al"], torch.float64, committee.device)
    pairs = find_neighbours(structures, committee.cutoff_A)
    few = Structures.from_frames(frames[:1], ["Al"], torch.float64)
    agreement = ""
    if len(frames[0].numbers) < 1000:
        expected = aluminium().evaluate(few).forces_mean
        found = committee.evaluate(few.to(device=committee.device)).forces_mean
        assert expected is not None
        assert found is not None
        agreement = deviation(found.cpu(), expected, "eV/A")
    times = timed(committee.device, lambda: committee.evaluate(structures, pairs, forces=kind))
    rate = len(structures.positions) / times.median
    ours = f"{rate:,.0f}/s, {memory_GB(committee.device)}"
    return Row(
        f"{name(committee.device)}: {work}", rate, "atom-steps/s", *(bars or (None, None)), ours, agreement=agreement
    )


def training(committee: Committee, n_cells: int, device: str) -> Row:
    """Structures per second of the whole committee, batch after batch of the same cells."""
    task = Ours(committee, labeled(n_cells), 0.0, device)
    rate = n_cells / timed(torch.device(device), task.step).median
    work = f"{name(device)}: training with forces, {n_cells} cells of 108 Al"
    return Row(work, rate, "structures/s", *TRAINING, f"{rate:,.0f}/s, {memory_GB(torch.device(device))}")


def walking(committee: Committee, n_walkers: int, device: str) -> Row:
    """Steps per second of a batch of walkers at 1000 K, with checks, thermostats, and lists that are found again."""
    settings = SamplerSettings(
        temperature_start_K=(1000.0, 1000.0), temperature_end_K=(1000.0, 1000.0), settle_steps=0, device=device
    )
    walkers = [Walker(seed, crystal(3, seed), draw_schedule(settings, seed)) for seed in range(n_walkers)]
    batch = start_batch(walkers, ("Al",), device)
    Dynamics(committee, settings).prepare(batch)
    recorded_s, launched_s = (
        timed(torch.device(device), partial(dynamics.advance, batch)).median / settings.check_every
        for dynamics in (Dynamics(committee, settings), Launching(committee, settings))
    )
    work = f"{name(device)}: {n_walkers} walkers of 108 Al, steps with their checks"
    ours, peer = f"{1e3 * recorded_s:.2f} ms a step", f"launched one by one {1e3 * launched_s:.2f} ms"
    return Row(work, len(batch.positions) / recorded_s, "atom-steps/s", None, None, ours, peer)


class Launching(Dynamics):
    """Dynamics without recordings."""

    def _recording(self, batch: Batch) -> None:
        return None


def published(labels: Path, device: str, minutes: float) -> Row:
    """Minutes of the published number of epochs of eight networks on `labels`, with the settings of ANI-Al."""
    settings = TrainerSettings(
        device=device, ranks=1, learning_rate=1e-3, patience=100, batch=128, max_minutes=minutes, memory_share=0.9
    )
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(Path(folder) / "manifest.jsonl")
        manifest.append(open_shard(labels).receipt())
        outcome = train(manifest.path, PotentialSettings(), settings, ["Al"], Path(folder) / "model", seed=0)
    if outcome.failure:
        raise SystemExit(f"the training failed: {outcome.failure.message}")
    facts = outcome.facts
    took_min, epochs, error = facts["seconds"] / 60, facts["epochs"], max(facts["valid"]["force_eV_per_A"])
    ours = f"{epochs} epochs in {took_min:.1f} min, {facts['n_frames']} cells, forces to {error:.3f} eV/A"
    value = took_min / epochs * PUBLISHED_EPOCHS
    return Row(
        f"{device}: {PUBLISHED_EPOCHS} epochs of 8 networks on {labels.name}",
        value,
        "min",
        *PUBLISHED_MIN,
        ours,
        less=True,
    )


def make_cells(path: Path) -> None:
    """As many random cells as the published set has, labeled by the committee."""
    committee = aluminium().double()
    with multiprocessing.Pool() as pool:
        frames = pool.map(partial(random_frame, ["Al"], PUBLISHED), range(PUBLISHED_CELLS), chunksize=16)
    rows = [
        row for k in range(0, len(frames), CELLS_AT_A_TIME) for row in _label(committee, frames[k:][:CELLS_AT_A_TIME])
    ]
    write_labels(path, Level("committee", committee.digest or "random"), rows)


def _label(committee: Committee, frames: list[Frame]) -> list[tuple[Frame, Label]]:
    structures = Structures.from_frames(frames, ["Al"])
    found = committee.evaluate(structures, stress=True)
    assert found.forces_mean is not None
    assert found.stress is not None
    forces = found.forces_mean.split(structures.n_atoms.tolist())
    labels = zip(found.energy.tolist(), forces, found.stress, strict=True)
    return [(frame, Label(e, f.numpy(), s.numpy())) for frame, (e, f, s) in zip(frames, labels, strict=True)]


def timed(device: torch.device, task: Callable[[], Any]) -> Times:
    def whole() -> None:
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return interleave({"": whole}, rounds=5, clock=time.perf_counter)[""]


def name(device: torch.device | str) -> str:
    return torch.cuda.get_device_name(device) if str(device).startswith("cuda") else str(device)


def memory_GB(device: torch.device) -> str:
    if device.type != "cuda":
        return "memory not measured"
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop the training on the labels after so many")
    parser.add_argument("--make", type=Path)
    arguments = parser.parse_args()
    if arguments.make:
        make_cells(arguments.make)
        return
    device, on_gpu = arguments.device, arguments.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use: see benchmarks/results/OPEN.md, or try --device cpu")
    if arguments.labels:
        publish([published(arguments.labels, device, arguments.minutes)])
        return
    n_cells, side, n_trained, n_walkers = (1024, 69, 128, 64) if on_gpu else (4, 5, 8, 2)
    batch, large = [crystal(3, seed) for seed in range(n_cells)], crystal(side)
    committee = aluminium().to(device)
    size = f"{n_cells} x 108 Al"
    rows = [
        forces(committee, batch, f"mean forces of 8, {size}", MEAN, "mean"),
        forces(committee, batch, f"forces of 8 members, {size}", None, "members"),
        training(aluminium(), n_trained, device),
        walking(committee, n_walkers, device),
        forces(committee, [large], f"mean forces of 8, one cell of {large.n_atoms:,} Al", None, "mean"),
    ]
    publish(rows)


if __name__ == "__main__":
    main()
