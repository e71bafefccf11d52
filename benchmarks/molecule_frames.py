"""A few geometries of every molecule of a campaign, smallest molecules first, in turn: any first part is of use.

    python benchmarks/molecule_frames.py configs/chno-small.toml frames.h5 --rounds 2 --n-heavy 1 3

`smelt build` draws molecules at random; here each has the same number of frames. With --further FILE ... they are of
larger molecules, those of these lists. Of the first list the campaign's rule sets a part aside for tests, which --test
takes; the others are those that share neither a formula nor a ring scaffold with them or with the campaign's tests.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from campaign.config import load_campaign
from potential.model_file import load_committee
from potential.structures import Structures
from sampler.config import MoleculeSettings
from sampler.geometries import molecule_frame
from sampler.molecules import EmbeddingError, Molecule, parse_molecule, read_library, split
from sampler.streams import derive_seed
from shards.frame import Frame
from shards.writer import write_frames


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("dest", type=Path, help="the shard of frames to write")
    parser.add_argument("--rounds", type=int, default=1, help="frames of each molecule")
    parser.add_argument("--n-heavy", type=int, nargs=2, default=(0, 100), metavar=("LEAST", "MOST"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="of the molecules that the campaign never samples")
    parser.add_argument("--further", type=Path, nargs="+", help="SMILES, one a line; smaller molecules are left out")
    parser.add_argument("--count", type=int, help="so many of these molecules, drawn at random")
    parser.add_argument("--per-formula", type=int, help="so many molecules of each formula; first one of each")
    parser.add_argument(
        "--uncertain", type=Path, nargs="+", help="models; only the quarter that they differ on most, in random order"
    )
    options = parser.parse_args()
    config = load_campaign(options.config)
    elements, settings = config.campaign.elements, config.builder.molecules
    part = settings.model_copy(update={"part": "test" if options.test else "train"})
    library = _further(options, elements, settings) if options.further else read_library(elements, part)
    least, most = options.n_heavy
    library = [molecule for molecule in library if least <= molecule.n_heavy <= most]
    if options.count:
        library = random.Random(options.seed).sample(library, options.count)
    if options.per_formula:
        library = of_each_formula(library, options.per_formula)
    frames = []
    for index, molecule in enumerate(library * options.rounds):
        try:
            frames.append(molecule_frame([molecule], settings, derive_seed(options.seed, index)))
        except EmbeddingError as error:
            print(error, file=sys.stderr)
    if options.uncertain:
        frames = _most_uncertain(frames, options.uncertain, options.seed)
    write_frames(options.dest, frames)
    print(f"{len(frames)} frames of {len(library)} molecules, {len({each.formula for each in library})} formulas")
    return 0


def _further(options: argparse.Namespace, elements: tuple[str, ...], settings: MoleculeSettings) -> list[Molecule]:
    """Larger molecules that are set aside, or those that are apart from all that are."""
    lists = [{parse_molecule(smiles, str(path)) for smiles in path.read_text().split()} for path in options.further]
    _, aside = split(lists[0], settings.test_fraction)
    aside = [molecule for molecule in aside if molecule.n_heavy > settings.n_heavy[1]]
    if options.test:
        return aside
    tests = [*aside, *read_library(elements, settings.model_copy(update={"part": "test"}))]
    formulas, scaffolds = ({getattr(each, name) for each in tests} for name in ("formula", "scaffold"))
    larger = {molecule for each in lists for molecule in each if molecule.n_heavy > settings.n_heavy[1]}
    return sorted(each for each in larger if each.formula not in formulas and each.scaffold not in scaffolds - {""})


def of_each_formula(library: Sequence[Molecule], count: int) -> list[Molecule]:
    """At most `count` molecules of every formula: one of each, then a second of each, and so on.

    Their order is random, but the same for any seed: another one gives other geometries of the same molecules.
    """
    place = Counter[str]()
    turns: list[list[Molecule]] = [[] for _ in range(count)]
    for molecule in sorted(library, key=lambda each: hashlib.sha256(each.smiles.encode()).digest()):
        if place[molecule.formula] < count:
            turns[place[molecule.formula]].append(molecule)
        place[molecule.formula] += 1
    return [molecule for turn in turns for molecule in turn]


def _most_uncertain(frames: list[Frame], models: list[Path], seed: int) -> list[Frame]:
    chosen = np.argsort(-uncertainty(frames, models))[: len(frames) // 4]
    return [frames[index] for index in np.random.default_rng(seed).permutation(chosen)]


def uncertainty(frames: list[Frame], models: list[Path]) -> NDArray[np.float64]:
    """How much the members of all models differ in energy, by the square root of the number of atoms, as walkers do."""
    energies = []
    for committee in map(load_committee, models):
        structures = Structures.from_frames(frames, committee.elements, torch.float64)
        energies.append(committee.evaluate(structures, forces="none").energy_members)
    return np.asarray(torch.cat(energies).std(dim=0).numpy() / np.sqrt([frame.n_atoms for frame in frames]))


if __name__ == "__main__":
    sys.exit(main())
