"""What does a GPU do: forces of the committee on batched aluminium and on one large cell, and training with forces?

Run: python -m benchmarks.gpu [--device cuda] [--labels SHARD]. Rates are those on the clock after all work is done.
Agreement is that with the same committee on the CPU. With --labels eight networks are trained on a shard of labels with
the published settings. With --device cpu a little of everything runs, to try the script.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
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
from shards import Manifest, open_shard
from shards.frame import Frame
from trainer.config import TrainerSettings
from trainer.stage import train

MEAN = (10e6, 25e6)  # atom-steps per second on an H200
TRAINING = (30_000.0, 60_000.0)  # structures per second
PUBLISHED_MIN = (30.0, 10.0)


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
    return Row(f"{committee.device}: {work}", rate, "atom-steps/s", *(bars or (None, None)), ours, agreement=agreement)


def training(committee: Committee, n_cells: int, device: str, kept: bool) -> Row:
    """Structures per second of the whole committee, batch after batch of the same cells."""
    task = Ours(committee, labeled(n_cells), 1e3 if kept else 0.0, device)
    rate = n_cells / timed(torch.device(device), task.step).median
    work = f"{device}: training with forces, {n_cells} cells of 108 Al, derivatives {'kept' if kept else 'recomputed'}"
    ours = f"{rate:,.0f}/s, {memory_GB(torch.device(device))}"
    return Row(work, rate, "structures/s", *(TRAINING if kept else (None, None)), ours)


def published(labels: Path, device: str) -> Row:
    """Minutes to train a committee of eight on `labels` with the settings of ANI-Al."""
    room = {"jacobian_memory_GB": 140.0, "memory_share": 0.92}
    settings = TrainerSettings(device=device, ranks=1, learning_rate=1e-3, patience=100, batch=128, **room)
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(Path(folder) / "manifest.jsonl")
        manifest.append(open_shard(labels).receipt())
        start = time.perf_counter()
        outcome = train(manifest.path, PotentialSettings(), settings, ["Al"], Path(folder) / "model", seed=0)
    minutes = (time.perf_counter() - start) / 60
    if outcome.failure:
        raise SystemExit(f"the training failed: {outcome.failure.message}")
    facts = outcome.facts
    error = max(facts["valid"]["force_eV_per_A"])
    ours = f"{minutes:.1f} min, {facts['epochs']} epochs, {facts['n_frames']} cells, forces to {error:.3f} eV/A"
    return Row(f"{device}: training of 8 networks on {labels}", minutes, "min", *PUBLISHED_MIN, ours, less=True)


def timed(device: torch.device, task: Callable[[], Any]) -> Times:
    def whole() -> None:
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return interleave({"": whole}, rounds=5, clock=time.perf_counter)[""]


def memory_GB(device: torch.device) -> str:
    if device.type != "cuda":
        return "memory not measured"
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--labels", type=Path)
    arguments = parser.parse_args()
    device, on_gpu = arguments.device, arguments.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use: see benchmarks/results/OPEN.md, or try --device cpu")
    n_cells, side, n_trained = (1024, 69, 128) if on_gpu else (4, 5, 8)
    batch, large = [crystal(3, seed) for seed in range(n_cells)], crystal(side)
    committee = aluminium().to(device)
    size = f"{n_cells} x 108 Al"
    rows = [
        forces(committee, batch, f"mean forces of 8, {size}", MEAN, "mean"),
        forces(committee, batch, f"forces of 8 members, {size}", None, "members"),
        forces(committee, [large], f"mean forces of 8, one cell of {large.n_atoms:,} Al", None, "mean"),
        *(training(aluminium(), n_trained, device, kept) for kept in (True, False)),
    ]
    if arguments.labels:
        rows.append(published(arguments.labels, device))
    publish(rows)


if __name__ == "__main__":
    main()
