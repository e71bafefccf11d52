"""How good is a committee at what people compute with it? A suite of probes, against labels of the quantum code.

Frames go through the labeler like any others: labels that are in the folder already are kept, so that a second
committee costs nothing, and a label that fails costs its own probe only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from campaign.config import CampaignConfig
from campaign.molecule_suite import TESTS, Probe, frequencies_cm, molecule_probes
from campaign.reaction_suite import TESTS as REACTION_TESTS
from campaign.reaction_suite import barrier_probes, file_barriers, reaction_probes
from labeler.stage import label
from potential.calculator import CommitteeCalculator
from potential.committee import Committee
from potential.model_file import load_committee
from potential.structures import Structures
from sampler.config import MoleculeSettings
from sampler.molecules import read_library
from sampler.reactions import parse_reaction, path_ends
from shards.frame import Frame
from shards.label import Label
from shards.outcome import Clock, Outcome
from shards.reader import open_shard
from shards.schema import KCAL_MOL_eV
from shards.settings import SettingsError
from shards.writer import write_frames

__all__ = ["validate_molecules"]

Floats = NDArray[np.float64]

UNITS = dict.fromkeys((*TESTS, *REACTION_TESTS), "kcal/mol") | {"frequencies": "1/cm"}


@dataclass(frozen=True)
class Compared:
    """values of the reference and of the committee, (n_values,), in the test's unit, over `at`."""

    test: str
    molecule: str
    at: tuple[float, ...]
    reference: Floats
    predicted: Floats


def validate_molecules(
    config: CampaignConfig, model: Path, dest: Path, n_molecules: int, seed: int, reactions: Path | None = None
) -> Outcome:
    """Compare the committee at `model` with the labeler's level on molecules set aside for tests, on the paths of the
    configuration's reactions, and on what the file `reactions` lists.

    facts: per test its unit, number of values, mean absolute, root mean square and largest error; failures of labels.
    Also written: dest/validation.json with every value, and validation.png.

    Raises:
        SettingsError: no molecules in the configuration, or none set aside; a file of reactions that cannot be used.
        ModelFileError.
    """
    settings = config.builder.molecules
    if not settings.given and reactions is None:
        raise SettingsError("smelt validate --suite molecule: builder.molecules names no molecules")
    clock = Clock()
    committee = load_committee(model, dtype=torch.float64)
    test = settings.model_copy(update={"part": "test"})
    library = read_library(committee.elements, test)[:n_molecules] if settings.given else ()
    with clock.phase("paths"):
        probes = [*molecule_probes(library, seed), *_reactions(settings, committee, seed, reactions)]
    with clock.phase("label"):
        frames = [frame for probe in probes if probe.published is None for frame in probe.frames]
        labels, failures = _labels(config, committee.elements, frames, dest)
    compared = [each for probe in probes if (each := _compare(probe, committee, labels)) is not None]
    facts: dict[str, Any] = {"model": str(model), "digest": committee.digest, "tests": _summary(compared)}
    facts |= {"failures": failures, "n_molecules": len(library)}
    table = facts | {"values": [_row(each) for each in compared]}
    (dest / "validation.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    _plot(compared, dest / "validation.png")
    return Outcome("validate", clock.timing(), facts=facts)


def _reactions(settings: MoleculeSettings, committee: Committee, seed: int, path: Path | None) -> Iterator[Probe]:
    stream = np.random.default_rng(seed)
    barriers = [(smiles, path_ends(parse_reaction(smiles), stream)) for smiles in settings.reactions]
    if path is not None:
        yield from reaction_probes(path)
        barriers += file_barriers(path)
    for name, ends in barriers:
        yield from barrier_probes(name, ends, CommitteeCalculator(committee))


def _labels(
    config: CampaignConfig, elements: Sequence[str], frames: Sequence[Frame], dest: Path
) -> tuple[dict[str, Label], dict[str, Any]]:
    unique = list({frame.id: frame for frame in frames}.values())
    receipt = write_frames(dest / "frames.h5", unique)
    outcome = label(Path(receipt.path), range(len(unique)), config.labeler, elements, dest / "labels", dest / "scratch")
    if outcome.failure:
        raise SettingsError(f"{outcome.failure.message} {outcome.failure.log}")
    found = [row for each in outcome.receipts for row in open_shard(Path(each.path)).rows()]
    return {frame.id: value for frame, value in found}, outcome.facts["failures"]


def _compare(probe: Probe, committee: Committee, labels: dict[str, Label]) -> Compared | None:
    """None where a label is missing, or forces that are needed."""
    structures = Structures.from_frames(list(probe.frames), committee.elements, torch.float64)
    if probe.published is not None:
        predicted = probe.weights @ committee.evaluate(structures, forces="none").energy.numpy()
        return Compared(probe.test, probe.molecule, probe.at, probe.published / KCAL_MOL_eV, predicted / KCAL_MOL_eV)
    found = [labels[frame.id] for frame in probe.frames if frame.id in labels]
    vibrates = probe.test == "frequencies"
    if len(found) < len(probe.frames) or (vibrates and not all(each.has_forces for each in found)):
        return None
    evaluation = committee.evaluate(structures)
    if vibrates:
        assert evaluation.forces_mean is not None
        forces = evaluation.forces_mean.numpy().reshape(len(found), -1, 3)
        reference = frequencies_cm(probe.frames, [each.forces for each in found])
        return Compared(probe.test, probe.molecule, probe.at, reference, frequencies_cm(probe.frames, list(forces)))
    energies = np.array([each.energy for each in found]), evaluation.energy.numpy()
    values = (probe.weights @ each / KCAL_MOL_eV for each in energies)
    return Compared(probe.test, probe.molecule, probe.at, *values)


def _summary(compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    tests = {}
    for test, unit in UNITS.items():
        off = [each.predicted - each.reference for each in compared if each.test == test]
        if off:
            errors = np.concatenate(off)
            tests[test] = {
                "unit": unit,
                "n_molecules": len(off),
                "n_values": len(errors),
                "mae": float(np.abs(errors).mean()),
                "rmse": float(np.sqrt((errors**2).mean())),
                "largest": float(np.abs(errors).max()),
            }
    return tests


def _row(compared: Compared) -> dict[str, Any]:
    return {
        "test": compared.test,
        "molecule": compared.molecule,
        "at": list(compared.at),
        "reference": compared.reference.tolist(),
        "predicted": compared.predicted.tolist(),
    }


def _plot(compared: Sequence[Compared], path: Path) -> None:
    """One panel per test: curves over what is varied, dots for the reference; or predicted over reference."""
    from matplotlib.figure import Figure

    tests = [test for test in UNITS if any(each.test == test for each in compared)]
    figure = Figure(figsize=(4 * max(len(tests), 1), 3.6), layout="constrained")
    for axes, test in zip(figure.subplots(1, max(len(tests), 1), squeeze=False)[0], tests, strict=False):
        for number, each in enumerate(one for one in compared if one.test == test):
            colour = f"C{number % 10}"
            if test in ("torsion", "stretch", "dimer", "path"):
                axes.plot(each.at, each.predicted, color=colour, label=each.molecule)
                axes.plot(each.at, each.reference, "o", color=colour, markersize=3)
            else:
                axes.plot(each.reference, each.predicted, "o", color=colour, markersize=3, label=each.molecule)
                axes.axline((0, 0), slope=1, color="0.8", linewidth=0.8, zorder=0)
        axes.set_title(f"{test}, {UNITS[test]}", fontsize=9)
        axes.legend(fontsize=5)
    figure.savefig(path, dpi=150)
