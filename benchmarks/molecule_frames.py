"""A few geometries of every molecule of a campaign, smallest molecules first, in turn: any first part is of use.

    python benchmarks/molecule_frames.py configs/chno-small.toml frames.h5 --rounds 2 --n-heavy 1 3

`smelt build` draws molecules at random; here each has the same number of frames. With --further FILE, larger molecules
of a list are added, unless they share a formula or a ring scaffold with the molecules set aside for tests.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from campaign.config import load_campaign
from sampler.config import MoleculeSettings
from sampler.geometries import molecule_frame
from sampler.molecules import EmbeddingError, Molecule, parse_molecule, read_library
from sampler.streams import derive_seed
from shards.writer import write_frames


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("dest", type=Path, help="the shard of frames to write")
    parser.add_argument("--rounds", type=int, default=1, help="frames of each molecule")
    parser.add_argument("--n-heavy", type=int, nargs=2, default=(0, 100), metavar=("LEAST", "MOST"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="of the molecules that the campaign never samples")
    parser.add_argument("--further", type=Path, help="SMILES, one a line, of molecules larger than the campaign's")
    options = parser.parse_args()
    config = load_campaign(options.config)
    elements, settings = config.campaign.elements, config.builder.molecules
    part = settings.model_copy(update={"part": "test" if options.test else "train"})
    least, most = options.n_heavy
    library = [molecule for molecule in read_library(elements, part) if least <= molecule.n_heavy <= most]
    if options.further:
        test = read_library(elements, settings.model_copy(update={"part": "test"}))
        library += _apart(options.further, settings, test)
    frames = []
    for index, molecule in enumerate(library * options.rounds):
        try:
            frames.append(molecule_frame([molecule], settings, derive_seed(options.seed, index)))
        except EmbeddingError as error:
            print(error, file=sys.stderr)
    write_frames(options.dest, frames)
    print(f"{len(frames)} frames of {len(library)} molecules, {len({each.formula for each in library})} formulas")
    return 0


def _apart(path: Path, settings: MoleculeSettings, test: tuple[Molecule, ...]) -> list[Molecule]:
    formulas, scaffolds = ({getattr(each, name) for each in test} for name in ("formula", "scaffold"))
    found = (parse_molecule(smiles, str(path)) for smiles in path.read_text().split())
    larger = (each for each in found if each.n_heavy > settings.n_heavy[1])
    return sorted(each for each in larger if each.formula not in formulas and each.scaffold not in scaffolds - {""})


if __name__ == "__main__":
    sys.exit(main())
