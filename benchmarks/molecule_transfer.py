"""Does a transferred committee beat the DFT it was first trained on, and one trained on coupled cluster alone?

    smelt build configs/chno-small.toml train.h5 --frames 300 --seed 1
    smelt build configs/chno-small.toml test.h5 --frames 40 --seed 2 --test
    smelt label configs/chno-small.toml train.h5 low            # wB97X/6-31G*
    smelt label configs/chno-small.toml test.h5 low-test
    sed 's/engine = "pyscf"/engine = "composite"/' configs/chno-small.toml > high.toml
    smelt label high.toml train.h5 high                         # CCSD(T)*/CBS; --index to label fewer frames
    smelt label high.toml test.h5 high-test
    python benchmarks/molecule_transfer.py configs/chno-small.toml low high low-test high-test runs/transfer

Molecules of the test frames are unknown to both sets of training frames. Errors in kcal/mol, mean and standard
deviation over seeds: of total energies, after one constant per element (for the DFT: fitted to the coupled-cluster
training frames), and of energy differences between geometries of one formula, where no constant helps.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from campaign.config import load_campaign
from potential.model_file import load_committee
from potential.structures import Structures
from shards import Frame, Manifest
from shards.schema import KCAL_MOL_eV
from trainer.dataset import fit_self_energies
from trainer.stage import train, transfer

Floats = NDArray[np.float64]
LOWER = "committee on the lower level"


@dataclass(frozen=True)
class Labels:
    """Frames and energies, eV, by frame id."""

    frames: dict[str, Frame]
    energies: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> Labels:
        rows = [row for shard in Manifest(folder / "manifest.jsonl").shards() for row in shard.rows()]
        return cls({f.id: f for f, _ in rows}, {f.id: label.energy for f, label in rows})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    for name in ("low", "high", "low_test", "high_test", "dest"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    config = load_campaign(options.config)
    elements = config.campaign.elements
    high, test_low, test_high = map(Labels.read, (options.high, options.low_test, options.high_test))
    ids = sorted(set(test_low.energies) & set(test_high.energies))
    frames = [test_high.frames[id] for id in ids]
    exact = np.array([test_high.energies[id] for id in ids])
    low, formulas = Labels.read(options.low), {_formula(frame) for frame in frames}
    print(
        f"{len(low.frames)} frames at the lower level, {len(high.frames)} at the higher;"
        f" tested on {len(ids)} frames of {len(formulas)} formulas unknown to both"
    )
    raised = _constants(low, high, frames, elements)
    dft = np.array([test_low.energies[id] for id in ids]) + raised
    results = {"wB97X/6-31G*, the labels themselves": [_errors(dft - exact, frames)]}
    for seed in range(options.seeds):
        for name, model in _models(config, options, seed).items():
            energies = _energies(model, frames) + (raised if name == LOWER else 0.0)
            results.setdefault(name, []).append(_errors(energies - exact, frames))
    print(f"{'':38} total energies RMSE, MAE      differences within a formula RMSE, MAE   (kcal/mol)")
    for name, rows in results.items():
        means, spreads = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1 if len(rows) > 1 else 0)
        figures = [f"{mean:6.2f} +- {spread:4.2f}" for mean, spread in zip(means, spreads, strict=True)]
        print(f"{name:38} {figures[0]}  {figures[1]}    {figures[2]}  {figures[3]}")
    table = {name: np.array(rows).tolist() for name, rows in results.items()}
    (options.dest / "errors.json").write_text(json.dumps(table))
    return 0


def _models(config, options: argparse.Namespace, seed: int) -> dict[str, Path]:
    """One committee of each kind; what was trained before is not trained again."""
    elements, shape, settings = config.campaign.elements, config.potential, config.trainer
    settings = settings.model_copy(update={"warm_start": False, "ranks": 1})
    folders = {name: options.dest / f"{name}-{seed}" for name in ("parent", "transferred", "distilled", "scratch")}
    models = {name: folder / "model.safetensors" for name, folder in folders.items()}
    low, high = options.low / "manifest.jsonl", options.high / "manifest.jsonl"
    outcomes = [train(low, shape, settings, elements, folders["parent"], seed=seed)]
    for name, forces in (("transferred", "labels"), ("distilled", "distilled")):
        asked = config.transfer.model_copy(update={"forces": forces})
        outcomes.append(transfer(high, models["parent"], settings, asked, folders[name], seed=seed))
    outcomes.append(train(high, shape, settings, elements, folders["scratch"], seed=seed))
    for outcome in outcomes:
        if outcome.failure:
            sys.exit(f"{outcome.stage}: {outcome.failure.message} ({outcome.failure.log})")
    named = {"parent": LOWER, "transferred": "transferred, energies alone"}
    named |= {"distilled": "transferred, forces distilled", "scratch": "committee on the higher level alone"}
    return {named[name]: model for name, model in models.items()}


def _constants(low: Labels, high: Labels, frames: list[Frame], elements: tuple[str, ...]) -> Floats:
    """What one constant per element adds to each frame, from training frames that have both labels."""
    both = sorted(set(low.energies) & set(high.energies))
    counts = _counts([high.frames[id] for id in both], elements)
    shift = fit_self_energies(counts, np.array([high.energies[id] - low.energies[id] for id in both]))
    return np.asarray(_counts(frames, elements) @ shift)


def _counts(frames: list[Frame], elements: tuple[str, ...]) -> NDArray[np.int64]:
    from ase.data import atomic_numbers

    return np.array([[(frame.numbers == atomic_numbers[each]).sum() for each in elements] for frame in frames])


def _energies(model: Path, frames: list[Frame]) -> Floats:
    committee = load_committee(model)
    structures = Structures.from_frames(frames, committee.elements, torch.float64)
    return np.asarray(committee.evaluate(structures, forces="none").energy.numpy())


def _errors(off: Floats, frames: list[Frame]) -> list[float]:
    """RMSE and MAE of all, then of what is left when the mean of each formula is taken off, kcal/mol."""
    groups: dict[str, list[int]] = {}
    for index, frame in enumerate(frames):
        groups.setdefault(_formula(frame), []).append(index)
    within = np.concatenate([off[rows] - off[rows].mean() for rows in groups.values() if len(rows) > 1])
    figures = [figure for each in (off, within) for figure in (np.sqrt((each**2).mean()), np.abs(each).mean())]
    return [float(figure) / KCAL_MOL_eV for figure in figures]


def _formula(frame: Frame) -> str:
    return " ".join(map(str, sorted(frame.numbers.tolist())))


if __name__ == "__main__":
    sys.exit(main())
