"""Does a transferred committee beat the DFT it was first trained on, and one trained on coupled cluster alone?

    python -m benchmarks.molecule_transfer configs/chno-small.toml LABELS DEST

docs/molecules.md says how LABELS is made: folders of labels to train on, xtb (GFN2-xTB; may be missing), dft
(wB97X/6-31G*) and cc (CCSD(T)*/CBS), and to test on, xtb-test, dft-test and cc-test, of molecules whose formulas no
level was trained on. Where they are there, xtb-larger, dft-larger and cc-larger hold such molecules that are larger
than any of dft and cc, dft-known and cc-known other geometries of molecules of cc, and dft-all what dft holds and
labels of other geometries of the molecules of the tests: those that coupled cluster alone does not know.

Errors in kcal/mol against coupled cluster, mean and standard deviation over seeds: of total energies, and of energy
differences between frames of one formula. What a lower level says is first raised by one constant per element, fitted
to the frames of cc that it labeled, too. What has been trained is not trained again, so that seeds can be trained at
the same time, each with its own --seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray

from benchmarks.molecule_frames import uncertainty
from campaign.config import load_campaign
from potential.model_file import load_committee
from potential.structures import Structures
from shards import Frame, Manifest
from shards.reader import Shard
from shards.schema import KCAL_MOL_eV
from trainer.dataset import fit_self_energies
from trainer.stage import train, transfer

Floats = NDArray[np.float64]
THEORIES = {"xtb": "GFN2-xTB", "dft": "wB97X/6-31G*"}
TESTS = {
    "test": "unknown molecules",
    "larger": "larger unknown molecules",
    "known": "other geometries of known molecules",
}
# Thousands of cheap labels want fewer epochs than hundreds of dear ones.
MANY_LABELS = {"batch": 64, "patience": 6, "max_epochs": 60}


@dataclass(frozen=True)
class Step:
    """One committee: trained on the labels of a level, from the start of another step or from random weights."""

    name: str
    title: str
    level: str
    start: str = ""
    freeze: bool = False


STEPS = (
    Step("xtb", "trained on GFN2-xTB", "xtb"),
    Step("parent", "GFN2-xTB, then wB97X: the parent", "dft", "xtb"),
    Step("transferred", "parent carried to CC, layers 1 and 3 frozen", "cc", "parent", freeze=True),
    Step("unfrozen", "parent carried to CC, nothing frozen", "cc", "parent"),
    Step("dft", "trained on wB97X alone", "dft"),
    Step("dft-transferred", "wB97X alone carried to CC, as above", "cc", "dft", freeze=True),
    Step("scratch", "trained on CC alone", "cc"),
    Step("informed", "parent that wB97X showed these molecules", "dft-all", "xtb"),
    Step("informed-transferred", "carried to CC, wB97X showed these molecules", "cc", "informed", freeze=True),
)


@dataclass(frozen=True)
class Labels:
    """Frames and energies, eV, by frame id; none where there is no such folder."""

    frames: dict[str, Frame]
    energies: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> Labels:
        return cls.of(Manifest(folder / "manifest.jsonl").shards())

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> Labels:
        rows = [row for shard in shards for row in shard.rows()]
        return cls({f.id: f for f, _ in rows}, {f.id: label.energy for f, label in rows})

    def without(self, formulas: Collection[str]) -> Labels:
        frames = {id: frame for id, frame in self.frames.items() if formula_of(frame) not in formulas}
        return Labels(frames, {id: self.energies[id] for id in frames})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", default=[step.name for step in STEPS], help="only these, in turn")
    options = parser.parse_args()
    config = load_campaign(options.config)
    data = {level: Labels.read(options.labels / level) for level in ("xtb", "dft", "cc", "dft-all")}
    tests = {name: _read_test(options.labels, name) for name in TESTS if (options.labels / f"cc-{name}").is_dir()}
    for name in tests.keys() - {"known"}:
        _refuse_known(data, tests[name]["cc"])
    for level, labels in data.items():
        print(f"{level}: {len(labels.frames)} frames of {len(_formulas(labels))} formulas")
    steps = [step for step in STEPS if step.name in options.steps and _possible(step, data)]
    models = {(step, seed): _train(step, seed, config, options) for seed in options.seeds for step in steps}
    errors = {name: _all_errors(test, data, models, config.campaign.elements) for name, test in tests.items()}
    for name, rows in errors.items():
        frames = list(tests[name]["cc"].frames.values())
        _print(TESTS[name], frames, rows)
        larger = [index for index, frame in enumerate(frames) if (frame.numbers > 1).sum() >= 3]
        if (step := next(each for each in STEPS if each.name == SURE)) in steps:
            spreads = [uncertainty(frames, [models[step, seed]]) for seed in options.seeds]
            sure = [np.sort(np.argsort(spread)[: len(frames) // 2]) for spread in spreads]
            _print("of these, the half that the transferred committee is surest of", frames, rows, sure)
        if name == "test":
            of_larger = {title: [off[larger] for off in by_seed] for title, by_seed in rows.items()}
            _print("of these, with three or more heavy atoms", [frames[index] for index in larger], of_larger)
    if errors.keys() >= {"test", "larger"}:
        both = [frame for name in ("test", "larger") for frame in tests[name]["cc"].frames.values()]
        pairs = {title: zip(off, errors["larger"][title], strict=True) for title, off in errors["test"].items()}
        _print("all unknown molecules", both, {title: [*map(np.concatenate, each)] for title, each in pairs.items()})
    table = {
        name: {"formulas": [formula_of(frame) for frame in tests[name]["cc"].frames.values()]}
        | {title: np.asarray(off).tolist() for title, off in rows.items()}
        for name, rows in errors.items()
    }
    (options.dest / "errors.json").write_text(json.dumps(table, indent=1))
    _plot(table, options.dest / "errors.png")
    return 0


def _read_test(labels: Path, name: str) -> dict[str, Labels]:
    """The frames that coupled cluster and, where there are any, all lower levels have labeled, in one order."""
    levels = {level: Labels.read(labels / f"{level}-{name}") for level in ("xtb", "dft", "cc")}
    levels = {level: each for level, each in levels.items() if each.frames}
    ids = sorted(set.intersection(*(set(each.frames) for each in levels.values())))
    return {
        level: Labels({id: each.frames[id] for id in ids}, {id: each.energies[id] for id in ids})
        for level, each in levels.items()
    }


def _refuse_known(data: dict[str, Labels], test: Labels) -> None:
    for level, labels in data.items():
        known = labels.frames.keys() & test.frames.keys() if level == "dft-all" else _formulas(labels) & _formulas(test)
        if known:
            sys.exit(f"{level}: holds {', '.join(sorted(known))}, which are to be tested on")


def _possible(step: Step, data: dict[str, Labels]) -> bool:
    """Without labels of GFN2-xTB everything that begins with them is left out."""
    starts = {each.name: each for each in STEPS}
    return bool(data[step.level].frames) and (not step.start or _possible(starts[step.start], data))


def _train(step: Step, seed: int, config: Any, options: argparse.Namespace) -> Path:
    """The model of a step; what was trained before is not trained again."""
    settings = config.trainer.model_copy(update={"warm_start": False, "ranks": 1})
    dest, labels = options.dest / f"{step.name}-{seed}", options.labels / step.level / "manifest.jsonl"
    if step.start:
        asked = config.transfer if step.freeze else config.transfer.model_copy(update={"freeze": ()})
        start = options.dest / f"{step.start}-{seed}" / "model.safetensors"
        outcome = transfer(labels, start, settings, asked, dest, seed=seed)
    else:
        settings = settings.model_copy(update=MANY_LABELS) if step.level == "xtb" else settings
        outcome = train(labels, config.potential, settings, config.campaign.elements, dest, seed=seed)
    if outcome.failure:
        sys.exit(f"{step.name}: {outcome.failure.message} ({outcome.failure.log})")
    print(f"{step.name}, seed {seed}: {outcome.facts['epochs']} epochs, {outcome.facts['seconds']:.0f} s", flush=True)
    return dest / "model.safetensors"


def _all_errors(
    test: dict[str, Labels], data: dict[str, Labels], models: dict[tuple[Step, int], Path], elements: tuple[str, ...]
) -> dict[str, list[Floats]]:
    """Errors of each frame, kcal/mol, by title and seed."""
    frames, exact = list(test["cc"].frames.values()), np.array(list(test["cc"].energies.values()))
    raised = {level: constants(data[level], data["cc"], frames, elements) for level in data}
    errors = {}
    for level, title in THEORIES.items():
        if level in test:
            errors[f"{title} itself"] = [np.array(list(test[level].energies.values())) + raised[level] - exact]
    for (step, _), model in models.items():
        errors.setdefault(step.title, []).append(energies_of(model, frames) + raised[step.level] - exact)
    return {title: [off / KCAL_MOL_eV for off in rows] for title, rows in errors.items()}


def constants(low: Labels, high: Labels, frames: list[Frame], elements: tuple[str, ...]) -> Floats:
    """What one constant per element adds to each frame, from training frames that have both labels."""
    both = sorted(set(low.energies) & set(high.energies))
    if low is high or not both:
        return np.zeros(len(frames))
    counts = _counts([high.frames[id] for id in both], elements)
    shift = fit_self_energies(counts, np.array([high.energies[id] - low.energies[id] for id in both]))
    return np.asarray(_counts(frames, elements) @ shift)


def _counts(frames: list[Frame], elements: tuple[str, ...]) -> NDArray[np.int64]:
    symbols = [[chemical_symbols[number] for number in frame.numbers] for frame in frames]
    return np.array([[each.count(element) for element in elements] for each in symbols])


def energies_of(model: Path, frames: list[Frame]) -> Floats:
    committee = load_committee(model)
    structures = Structures.from_frames(frames, committee.elements, torch.float64)
    return np.asarray(committee.evaluate(structures, forces="none").energy.numpy())


def _print(
    what: str, frames: list[Frame], rows: dict[str, list[Floats]], chosen: list[NDArray[np.int64]] | None = None
) -> None:
    """chosen: which frames, by seed."""
    formulas = [formula_of(frame) for frame in frames]
    size = f"{len(frames)} frames of {len(set(formulas))} formulas" if chosen is None else f"{len(chosen[0])} frames"
    print(f"\n{what}: {size}, kcal/mol")
    print(f"{'':44} total energies RMSE, MAE, median of errors        differences within a formula, the same")
    for title, by_seed in rows.items():
        parts = chosen or [np.arange(len(frames))] * len(by_seed)
        # What a level itself says has no seed: it is shown for the choice of every seed.
        each_seed = by_seed * len(parts) if len(by_seed) < len(parts) else by_seed
        figures = np.array(
            [_summary(off[part], [formulas[i] for i in part]) for off, part in zip(each_seed, parts, strict=True)]
        )
        means, spreads = figures.mean(axis=0), figures.std(axis=0, ddof=1 if len(figures) > 1 else 0)
        cells = [f"{mean:6.2f} +- {spread:4.2f}" for mean, spread in zip(means, spreads, strict=True)]
        print(f"{title:44} {'  '.join(cells)}")


def _summary(off: Floats, formulas: list[str]) -> list[float]:
    """RMSE, MAE and median error of all, then of what is left when the mean of each formula is taken off."""
    groups = [np.flatnonzero(np.array(formulas) == formula) for formula in sorted(set(formulas))]
    several = [off[rows] - off[rows].mean() for rows in groups if len(rows) > 1]
    within = np.concatenate(several or [np.array([np.nan])])
    sizes = np.abs(off), np.abs(within)
    return [float(figure) for each in sizes for figure in (np.sqrt((each**2).mean()), each.mean(), np.median(each))]


def _plot(tables: dict[str, dict[str, Any]], path: Path) -> None:
    """RMSE of total energies by formula and in all: mean over seeds, and their standard deviation as a bar."""
    from matplotlib.figure import Figure

    formulas = tables["test"]["formulas"]
    names = sorted(set(formulas), key=lambda name: (_n_heavy(name), name))
    groups = {name: ("test", [index for index, each in enumerate(formulas) if each == name]) for name in names}
    groups |= {f"all {name.replace('test', 'unknown')}": (name, slice(None)) for name in tables}
    titles = [f"{THEORIES['dft']} itself", *(step.title for step in STEPS if step.name in SHOWN)]
    titles = [title for title in titles if all(title in table for table in tables.values())]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, title in enumerate(titles):
        squares = [np.array(tables[name][title])[:, frames] ** 2 for name, frames in groups.values()]
        rmse = [np.sqrt(each.mean(axis=1)) for each in squares]
        means, spreads = [each.mean() for each in rmse], [each.std(ddof=min(1, len(each) - 1)) for each in rmse]
        width = 1 / (len(titles) + 1)
        x = np.arange(len(rmse)) + (place - (len(titles) - 1) / 2) * width
        axes.bar(x, means, width, yerr=spreads, color="0.4" if place == 0 else f"C{place - 1}", label=title, capsize=2)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.3)
    axes.set_ylabel("RMSE of total energies\nagainst CCSD(T)*/CBS, kcal/mol")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def _n_heavy(formula: str) -> int:
    return sum(int(count or 1) for _, count in re.findall(r"([CNO])(\d*)", formula))


SURE = "transferred"
SHOWN = ("parent", "transferred", "scratch", "informed-transferred")


def _formulas(labels: Labels) -> set[str]:
    return {formula_of(frame) for frame in labels.frames.values()}


def formula_of(frame: Frame) -> str:
    """Such as C2H6O."""
    counts = Counter(chemical_symbols[number] for number in frame.numbers)
    return "".join(f"{each}{counts[each] if counts[each] > 1 else ''}" for each in ("C", "H", "N", "O") if counts[each])


if __name__ == "__main__":
    sys.exit(main())
