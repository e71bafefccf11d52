"""How many labels does active learning save over random ones?

    python benchmarks/active_or_random.py configs/chno-small.toml runs/active-or-random [--plot PLOT.png]

A pool of frames of the configuration's molecules (conformers, normal modes, torsions) is labeled by GFN2-xTB. From the
same few labels, drawn at random, each way of choosing adds as many in every round: at random; the most uncertain ones
by the spread of the committee's energy / sqrt(n_atoms); or at random among the most uncertain quarter, both without
near-duplicates. Every committee is trained from random weights. Errors are measured on frames that are in no pool: of
the same molecules, and of molecules set aside. Labels needed for the same error are read off between rounds, along
straight lines in logarithms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from campaign.config import CampaignConfig, load_campaign
from labeler.config import LabelerSettings
from labeler.stage import label, level
from potential.model_file import load_committee
from sampler.scoring import fingerprints, measure_spreads
from sampler.selection import select
from sampler.stage import build
from shards import Frame, Label, Manifest, open_shard
from shards.writer import write_labels
from trainer.stage import evaluate, train

GFN2 = LabelerSettings(engine="tblite.ase.TBLite", arguments={"method": "GFN2-xTB", "verbosity": 0})
KINDS = {"conformer": 1.0, "normal_modes": 4.0, "torsion": 1.0}
N_POOL, N_TEST = 2400, 300
WAYS = ("random", "most uncertain", "among the uncertain")
TESTS = {"known": "same molecules", "unknown": "molecules set aside"}
ERRORS = {"force_rmse_eV_per_A": (1.0, "force RMSE, eV/Å"), "energy_rmse_eV_per_atom": (1e3, "energy RMSE, meV/atom")}
UNCERTAIN = 0.25  # share of the pool

Row = tuple[Frame, Label]
Floats = NDArray[np.float64]
Errors = dict[str, float]  # by "test/error"


@dataclass(frozen=True)
class Bench:
    config: CampaignConfig
    dest: Path
    pool: Sequence[Row]
    n_first: int
    n_more: int
    n_rounds: int

    @property
    def sizes(self) -> list[int]:
        return [self.n_first + self.n_more * k for k in range(self.n_rounds + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("dest", type=Path, help="a folder; what is in it already is not computed again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=100, help="labels to begin with")
    parser.add_argument("--more", type=int, default=100, help="labels that a round adds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/active-or-random.png"))
    options = parser.parse_args()
    config = _settings(load_campaign(options.config))
    pool = _labeled(config, options.dest / "pool", N_POOL, seed=1)
    for number, test in enumerate(TESTS, start=2):
        _labeled(config, options.dest / test, N_TEST, seed=number, unknown=test == "unknown")
    bench = Bench(config, options.dest, pool, options.first, options.more, options.rounds)
    errors: dict[str, list[list[Errors]]] = {way: [] for way in WAYS}
    for seed, way in product(range(options.seeds), WAYS):
        errors[way].append(_learn(bench, way, seed))
    (options.dest / "errors.json").write_text(json.dumps({"labels": bench.sizes} | errors, indent=1))
    keys = list(errors["random"][0][0])
    # (n_seeds, n_rounds + 1, n_keys)
    curves = {way: np.array([[list(row.values()) for row in rows] for rows in errors[way]]) for way in WAYS}
    _report(bench, curves, keys)
    _plot(bench.sizes, curves, keys, options.plot)
    return 0


def _settings(config: CampaignConfig) -> CampaignConfig:
    """Torsions too, labels in milliseconds, trainings in seconds."""
    molecules = config.builder.molecules.model_copy(update={"kinds": KINDS})
    short = {"ranks": 1, "warm_start": False, "patience": 15, "min_learning_rate": 2e-4, "max_epochs": 150}
    changed = {
        "builder": config.builder.model_copy(update={"molecules": molecules}),
        "labeler": GFN2,
        "trainer": config.trainer.model_copy(update=short),
    }
    return config.model_copy(update=changed)


def _labeled(config: CampaignConfig, dest: Path, n_frames: int, seed: int, unknown: bool = False) -> list[Row]:
    """Frames and their labels, in dest/labels.h5 and under dest/manifest.jsonl."""
    shard = dest / "labels.h5"
    if not shard.exists():
        molecules = config.builder.molecules.model_copy(update={"part": "test" if unknown else "train"})
        builder = config.builder.model_copy(update={"molecules": molecules})
        elements = config.campaign.elements
        dest.mkdir(parents=True, exist_ok=True)
        _done(build(elements, builder, n_frames, seed, dest / "frames.h5"))
        outcome = _done(label(dest / "frames.h5", range(n_frames), GFN2, elements, dest / "single", dest / "scratch"))
        rows = [row for receipt in outcome.receipts for row in open_shard(Path(receipt.path), verify=False).rows()]
        _append(config, dest, shard, rows)
    return list(open_shard(shard).rows())


def _learn(bench: Bench, way: str, seed: int) -> list[Errors]:
    """Errors of one way of choosing, after the first labels and after each round."""
    stream = np.random.default_rng(seed)
    chosen = stream.permutation(len(bench.pool))[: bench.n_first].tolist()
    model = _committee(bench, bench.dest / f"seed-{seed}" / "start", chosen, seed)
    errors = [_errors(bench, model)]
    for round_ in range(1, bench.n_rounds + 1):
        added = _more(bench, way, model, chosen, stream)
        chosen = chosen + added
        model = _committee(bench, bench.dest / f"seed-{seed}" / f"{way.replace(' ', '-')}-{round_}", chosen, seed)
        errors.append(_errors(bench, model))
        kind = _kind_of([bench.pool[i] for i in added])
        print(f"seed {seed}, {way}, {len(chosen)} labels: {errors[-1]}; the new ones: {kind}", flush=True)
    return errors


def _errors(bench: Bench, model: Path) -> Errors:
    facts = {test: _done(evaluate(model, [bench.dest / test / "manifest.jsonl"])).facts for test in TESTS}
    return {f"{test}/{error}": round(ERRORS[error][0] * facts[test][error], 5) for test in TESTS for error in ERRORS}


def _kind_of(rows: Sequence[Row]) -> str:
    """What was chosen: mean size, mean largest force, and the number of formulas, weighted (exp of the entropy)."""
    atoms = np.mean([frame.n_atoms for frame, _ in rows])
    force = np.mean([np.abs(label.forces).max() for _, label in rows])
    formulas = Counter(tuple(sorted(frame.numbers.tolist())) for frame, _ in rows)
    shares = np.array(list(formulas.values())) / len(rows)
    evenly = np.exp(-(shares * np.log(shares)).sum())
    return f"{atoms:.1f} atoms, largest force {force:.1f} eV/A, formulas as of {evenly:.1f} alike"


def _more(bench: Bench, way: str, model: Path, chosen: Sequence[int], stream: np.random.Generator) -> list[int]:
    """Indices of the frames of the pool that are labeled next."""
    left = sorted(set(range(len(bench.pool))) - set(chosen))
    if way == "random":
        return stream.permutation(left)[: bench.n_more].tolist()
    committee = load_committee(model, dtype=torch.float32)
    spreads = np.array([each.energy for each in measure_spreads(committee, [bench.pool[i][0] for i in left])])
    uncertain = np.argsort(-spreads)[: round(UNCERTAIN * len(left))]
    order = spreads[uncertain] if way == "most uncertain" else stream.random(len(uncertain))
    kept = select(
        fingerprints(committee, [bench.pool[left[i]][0] for i in uncertain]),
        order,
        distance=bench.config.sampler.duplicate_distance,
        known=fingerprints(committee, [bench.pool[i][0] for i in chosen]),
    )
    return [left[uncertain[i]] for i in kept[: bench.n_more]]


def _committee(bench: Bench, folder: Path, chosen: Sequence[int], seed: int) -> Path:
    shard = folder / f"labels-{len(chosen)}.h5"
    if not shard.exists():
        _append(bench.config, folder, shard, [bench.pool[i] for i in chosen])
    config = bench.config
    outcome = train(
        folder / "manifest.jsonl", config.potential, config.trainer, config.campaign.elements, folder, seed=seed
    )
    return Path(_done(outcome).facts["model"])


def _append(config: CampaignConfig, folder: Path, shard: Path, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    receipt = write_labels(shard, level(GFN2, config.campaign.elements), rows)
    Manifest(folder / "manifest.jsonl").append(receipt)


def _done(outcome: Any) -> Any:
    if outcome.failure:
        sys.exit(f"{outcome.stage}: {outcome.failure.message} ({outcome.failure.log})")
    return outcome


def labels_needed(sizes: Sequence[int], errors: Sequence[float], target: float) -> float:
    """Where the error falls to `target`, on straight lines in logarithms; NaN when it does not."""
    if errors[0] <= target:
        return float(sizes[0])
    for (n0, e0), (n1, e1) in pairwise(zip(sizes, errors, strict=True)):
        if e1 <= target:
            return float(n0 * (n1 / n0) ** (np.log(e0 / target) / np.log(e0 / e1)))
    return float("nan")


def _report(bench: Bench, curves: dict[str, Floats], keys: Sequence[str]) -> None:
    """For the mean error that random labels reach in the last round: how many labels each way, and each seed, needs."""
    for column, key in enumerate(keys):
        test, _, error = key.partition("/")
        target = float(curves["random"][:, -1, column].mean())
        print(f"\n{TESTS[test]}, {ERRORS[error][1]}: {target:.4g}, what {bench.sizes[-1]} random labels give")
        for way, values in curves.items():
            needed = labels_needed(bench.sizes, values[:, :, column].mean(axis=0).tolist(), target)
            single = [f"{labels_needed(bench.sizes, row, target):.0f}" for row in values[:, :, column].tolist()]
            last = values[:, -1, column]
            print(
                f"  {way:14} {needed:5.0f} labels ({', '.join(single)} by seed), ratio {bench.sizes[-1] / needed:.2f};"
                f" in the last round {last.mean():.4g} +- {last.std():.2g}"
            )


def _plot(sizes: Sequence[int], curves: dict[str, Floats], keys: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure = Figure(figsize=(9, 7), layout="constrained")
    for column, axes in enumerate(figure.subplots(2, 2).flat):
        test, _, error = keys[column].partition("/")
        for way, values in curves.items():
            mean, spread = values[:, :, column].mean(axis=0), values[:, :, column].std(axis=0)
            axes.loglog(sizes, mean, "o-", label=way)
            axes.fill_between(sizes, mean - spread, mean + spread, alpha=0.2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.set_xlabel("labels")
        axes.set_ylabel(ERRORS[error][1])
        axes.set_title(TESTS[test], fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
