"""Does a transferred committee beat its parent's DFT on every formula that coupled cluster kept from it, each in turn?

    python -m benchmarks.molecule_folds CONFIG LABELS DEST

LABELS holds shards of labels: xtb.h5 (GFN2-xTB) and dft.h5 (wB97X/6-31G*) to train parents on, cc.h5 (CCSD(T)*/CBS) and
dft-tested.h5 (wB97X), both of the frames that are tested on, none of which is in the others. The tested formulas, those
of three or more heavy atoms, are dealt into ten folds; for each a committee is carried over, and one trained from
random weights, on what cc.h5 has of all other formulas, and tested on the formulas of the fold. The parent has seen
other geometries of them; with --strict there are also parents from which wB97X kept the fold's formulas, too.

Errors of total energies in kcal/mol against coupled cluster: mean and standard deviation over seeds. What a lower level
says is first raised by one constant per element, fitted to the other formulas. Differences are also those of 10,000
draws of as many formulas, each with all its frames, with replacement. What has been trained is not trained again, so
that seeds can be trained at the same time, each with its own --seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.molecule_transfer import MANY_LABELS, THEORIES, Labels, constants, energies_of, formula_of
from campaign.config import CampaignConfig, load_campaign
from shards import Manifest
from shards.outcome import Outcome
from shards.reader import open_shard
from shards.schema import KCAL_MOL_eV
from shards.writer import write_labels
from trainer.stage import train, transfer

Floats = NDArray[np.float64]
N_FOLDS = 10
N_DRAWS = 10_000
FEWEST_HEAVY = 3

ITSELF = f"{THEORIES['dft']} itself"
PARENT = "GFN2-xTB, then wB97X: the parent"
CARRIED = "parent carried to CC, layers 1 and 3 frozen"
SCRATCH = "trained on CC alone"
STRICT = "carried to CC, parent without these formulas"
FIGURES: dict[str, Callable[[Floats], Any]] = {
    "RMSE": lambda off: np.sqrt((off**2).mean()),
    "MAE": lambda off: np.abs(off).mean(),
    "median": lambda off: np.median(np.abs(off)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strict", action="store_true", help="also parents from which wB97X kept the tested formulas")
    options = parser.parse_args()
    config = load_campaign(options.config)
    exact, low = (Labels.of([open_shard(options.labels / f"{name}.h5")]) for name in ("cc", "dft-tested"))
    ids = [id for id, frame in exact.frames.items() if id in low.frames and (frame.numbers > 1).sum() >= FEWEST_HEAVY]
    formulas = [formula_of(exact.frames[id]) for id in ids]
    folds = [fold for fold in deal(set(formulas), N_FOLDS) if fold]
    _refuse_trained(options.labels, set(exact.frames))
    errors: dict[str, list[Floats]] = {ITSELF: [np.full(len(ids), np.nan)]}
    for place, seed in enumerate(options.seeds):
        chains = Chains(config, options.labels, options.dest / str(seed), seed)
        for number, fold in enumerate(folds):
            tested = [index for index, formula in enumerate(formulas) if formula in fold]
            frames, asked = [exact.frames[ids[index]] for index in tested], [exact.energies[ids[i]] for i in tested]
            known = exact.without(fold)
            raised = constants(low, known, frames, config.campaign.elements) - np.array(asked)
            errors[ITSELF][0][tested] = [low.energies[frame.id] for frame in frames] + raised
            for title, model in chains.of_fold(number, fold, options.strict).items():
                rows = errors.setdefault(title, [])
                if len(rows) == place:
                    rows.append(np.full(len(ids), np.nan))
                rows[place][tested] = energies_of(model, frames) + (raised if title == PARENT else -np.array(asked))
    errors = {title: [off / KCAL_MOL_eV for off in rows] for title, rows in errors.items()}
    report(formulas, errors)
    table = {"formulas": formulas, "frames": ids} | {title: np.array(off).tolist() for title, off in errors.items()}
    (options.dest / "errors.json").write_text(json.dumps(table, indent=1))
    _plot(errors, options.dest / "errors.png")
    return 0


def deal(formulas: Collection[str], n_folds: int) -> list[set[str]]:
    """Formulas in the order of their hashes, as a campaign sets them aside, one to each fold in turn."""
    ordered = sorted(formulas, key=lambda formula: hashlib.sha256(formula.encode()).digest())
    return [set(ordered[start::n_folds]) for start in range(n_folds)]


class Chains:
    """All committees of one seed. What was trained before is handed back by the stages as it is."""

    def __init__(self, config: CampaignConfig, labels: Path, dest: Path, seed: int) -> None:
        self._config = config
        self._settings = config.trainer.model_copy(update={"warm_start": False, "ranks": 1})
        self._labels, self._dest, self._seed = labels, dest, seed
        many = self._settings.model_copy(update=MANY_LABELS)
        self._xtb = self._train("xtb", self._manifest("xtb"), many)
        self._parent = self._carry("parent", self._manifest("dft"), self._xtb, freeze=False)

    def of_fold(self, number: int, fold: set[str], strict: bool) -> dict[str, Path]:
        """Models by title, none of which has seen coupled cluster on these formulas."""
        others = self._manifest("cc", number, fold)
        models = {
            PARENT: self._parent,
            CARRIED: self._carry(f"carried-{number}", others, self._parent, freeze=True),
            SCRATCH: self._train(f"scratch-{number}", others, self._settings),
        }
        if strict:
            parent = self._carry(f"parent-{number}", self._manifest("dft", number, fold), self._xtb, freeze=False)
            models[STRICT] = self._carry(f"strict-{number}", others, parent, freeze=True)
        return models

    def _manifest(self, level: str, number: int = -1, left_out: Collection[str] = ()) -> Path:
        """A list of one shard: all labels of a level, or those that are not of the formulas of a fold."""
        shard = self._labels / f"{level}.h5"
        path = self._dest / (f"{level}-without-{number}.jsonl" if left_out else f"{level}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        receipt = open_shard(shard).receipt()
        if left_out:
            theory = open_shard(shard).labels_level
            rows = [row for row in open_shard(shard).rows() if formula_of(row[0]) not in left_out]
            receipt = write_labels(path.with_suffix(".h5"), theory, rows)
        Manifest(path).append(receipt)
        return path

    def _train(self, name: str, manifest: Path, settings: Any) -> Path:
        dest, elements = self._dest / name, self._config.campaign.elements
        return _model(dest, train(manifest, self._config.potential, settings, elements, dest, seed=self._seed))

    def _carry(self, name: str, manifest: Path, start: Path, *, freeze: bool) -> Path:
        asked = self._config.transfer if freeze else self._config.transfer.model_copy(update={"freeze": ()})
        dest = self._dest / name
        return _model(dest, transfer(manifest, start, self._settings, asked, dest, seed=self._seed))


def _model(dest: Path, outcome: Outcome) -> Path:
    if outcome.failure:
        sys.exit(f"{dest}: {outcome.failure.message} ({outcome.failure.log})")
    print(f"{dest}: {outcome.facts['epochs']} epochs, {outcome.facts['seconds']:.0f} s", file=sys.stderr, flush=True)
    return dest / "model.safetensors"


def _refuse_trained(labels: Path, tested: set[str]) -> None:
    for level in ("xtb", "dft"):
        if both := tested & set(open_shard(labels / f"{level}.h5").ids):
            sys.exit(f"{level}.h5: holds {len(both)} of the frames that are to be tested on, such as {min(both)}")


def report(formulas: Sequence[str], errors: dict[str, list[Floats]]) -> None:
    """Print figures of every row of errors, by title and seed, and how sure the differences from CARRIED are."""
    print(f"{len(formulas)} frames of {len(set(formulas))} formulas, kcal/mol: {', '.join(FIGURES)}")
    for title, by_seed in errors.items():
        cells = []
        for figure in FIGURES.values():
            values = np.array([figure(off) for off in by_seed])
            cells.append(f"{values.mean():6.2f} +- {values.std(ddof=1) if len(values) > 1 else 0:4.2f}")
        print(f"{title:46} {'  '.join(cells)}")
    for title in [each for each in errors if each != CARRIED]:
        print(f"\n{CARRIED}, against: {title}")
        for name, figure in FIGURES.items():
            drawn = differences(formulas, errors[title], errors[CARRIED], figure)
            low, high = np.percentile(drawn, [2.5, 97.5])
            share = 100 * (drawn > 0).mean()
            print(
                f"  {name:6} smaller by {low:.2f} to {high:.2f} in 95 % of draws, and smaller at all in {share:.1f} %"
            )


def differences(
    formulas: Sequence[str], those: list[Floats], these: list[Floats], figure: Callable[[Floats], Any]
) -> Floats:
    """By how much `those` are worse than `these` by a figure, mean over seeds, for draws of other formulas."""
    names = np.array(formulas)
    groups = [np.flatnonzero(names == name) for name in sorted(set(formulas))]
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(N_DRAWS):
        rows = np.concatenate([groups[index] for index in random.integers(len(groups), size=len(groups))])
        means = [np.mean([figure(off[rows]) for off in each]) for each in (those, these)]
        drawn.append(means[0] - means[1])
    return np.array(drawn)


def _plot(errors: dict[str, list[Floats]], path: Path) -> None:
    """What share of the frames, those of all seeds together, is within an error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for place, (title, by_seed) in enumerate(errors.items()):
        sizes = np.sort(np.abs(np.concatenate(by_seed)))
        share = np.arange(1, len(sizes) + 1) / len(sizes)
        axes.step(sizes, share, where="post", color="0.3" if title == ITSELF else f"C{place - 1}", label=title)
    axes.set_xscale("log")
    axes.set_xlim(left=0.1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("error of the total energy against CCSD(T)*/CBS, kcal/mol")
    axes.set_ylabel("share of frames within it")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
