"""Which stage function does a task call, with which arguments? Derived from what the ledger holds about it, so that a
driver that takes up the task of a killed one makes the same call, with the same seed, to the same place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from campaign.config import CampaignConfig
from campaign.harvest import PARTS, manifest_path
from campaign.ledger import read_state
from campaign.site import Site
from campaign.state import Model, Task
from labeler.config import LabelerSettings

__all__ = [
    "Call",
    "candidates_path",
    "labeler_there",
    "model_folder",
    "parent_of",
    "progress_path",
    "run_dir_of",
    "scratch_folder",
    "stage_call",
]


@dataclass(frozen=True)
class Call:
    function: str  # "module:name"; by name, so that it is the worker's own version that runs
    arguments: Mapping[str, Any]
    bounded: bool = False  # takes a `deadline`, seconds since the epoch: begins nothing that would reach beyond


def scratch_folder(run_dir: Path, task: str) -> Path:
    return run_dir / "scratch" / task


def run_dir_of(scratch: Path) -> Path:
    return scratch.parent.parent


def progress_path(run_dir: Path, task: str) -> Path:
    """Where a sampling task tells how far it is."""
    return scratch_folder(run_dir, task) / "progress.json"


def candidates_path(run_dir: Path, task: str) -> Path:
    return run_dir / "candidates" / f"{task}.h5"


def model_folder(run_dir: Path, generation: int) -> Path:
    return run_dir / "models" / f"gen-{generation:03d}"


def stage_call(task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]) -> Call:
    other = _CALLS_WITH_PARENT if config.campaign.parent_run else {}
    function, arguments = other.get(task.stage) or _CALLS[task.stage]
    return Call(function, arguments(task, config, site, run_dir, models), bounded=task.stage == "label")


def _build(task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]) -> dict[str, Any]:
    return {
        "elements": config.campaign.elements,
        "settings": config.builder,
        "n_frames": task.inputs["n_frames"],
        "seed": task.inputs["seed"],
        "dest": candidates_path(run_dir, task.id),
    }


def _sample(task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]) -> dict[str, Any]:
    return {
        "model": _model(task, run_dir, models),
        "builder": config.builder,
        "settings": config.sampler,
        "n_walkers": config.sampler.walkers_per_task,
        "seed": task.inputs["seed"],
        "dest": candidates_path(run_dir, task.id),
        "progress": progress_path(run_dir, task.id),
    }


def _rank(task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]) -> dict[str, Any]:
    return {
        "model": _model(task, run_dir, models),
        "frames": [run_dir / path for path in task.inputs["paths"]],
        "settings": config.sampler,
    }


def _label(task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]) -> dict[str, Any]:
    return {
        "frames": run_dir / task.inputs["path"],
        "indices": task.inputs["indices"],
        "settings": labeler_there(config, site),
        "elements": config.campaign.elements,
        "dest": run_dir / "labels",
        "scratch": scratch_folder(run_dir, task.id),
    }


def labeler_there(config: CampaignConfig, site: Site) -> LabelerSettings:
    """The labeler's settings, with the site's way to start ranks, which changes no number."""
    launcher = site.label.launcher
    return config.labeler.model_copy(update={"launcher": launcher}) if launcher else config.labeler


def _train(task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]) -> dict[str, Any]:
    generation = task.inputs["generation"]
    warm = config.trainer.warm_start and generation > 1
    return {
        "manifest": manifest_path(run_dir, "train"),
        "potential": config.potential,
        "settings": config.trainer,
        "elements": config.campaign.elements,
        "dest": model_folder(run_dir, generation),
        "seed": task.inputs["seed"],
        "start": run_dir / models[generation - 2].path if warm else None,
        "launcher": site.train.launcher,
        "nice": site.train.nice,
    }


def _evaluate(
    task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]
) -> dict[str, Any]:
    return {"model": _model(task, run_dir, models), "manifests": [manifest_path(run_dir, "holdout")]}


def _model(task: Task, run_dir: Path, models: tuple[Model, ...]) -> Path:
    generation: int = task.inputs["generation"]
    return run_dir / models[generation - 1].path


def _choose(task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]) -> dict[str, Any]:
    dest, parent, labeled = (
        candidates_path(run_dir, task.id),
        parent_of(config, run_dir),
        manifest_path(run_dir, "train"),
    )
    first = task.stage == "build"
    return {
        "model": _parent_model(config, run_dir) if first else _model(task, run_dir, models),
        # What is held out there is held out here, by its id: but all of the first labels are for training.
        "lower": [manifest_path(parent, part) for part in (["train"] if first else PARTS)],
        "settings": config.sampler,
        "n_frames": task.inputs["n_frames"] if first else config.campaign.retrain_after,
        "seed": task.inputs["seed"],
        "dest": dest,
        "known": sorted(set(dest.parent.glob("*.h5")) - {dest}),
        "higher": labeled if labeled.exists() else None,
    }


def _transfer(
    task: Task, config: CampaignConfig, site: Site, run_dir: Path, models: tuple[Model, ...]
) -> dict[str, Any]:
    replayed = config.transfer.forces == "replayed"
    return {
        "manifest": manifest_path(run_dir, "train"),
        "model": _parent_model(config, run_dir),
        "settings": config.trainer,
        "transfer": config.transfer,
        "dest": model_folder(run_dir, task.inputs["generation"]),
        "seed": task.inputs["seed"],
        "replay": manifest_path(parent_of(config, run_dir), "train") if replayed else None,
        "launcher": site.train.launcher,
        "nice": site.train.nice,
    }


def parent_of(config: CampaignConfig, run_dir: Path) -> Path:
    return Path(os.path.normpath(run_dir / config.campaign.parent_run))


def _parent_model(config: CampaignConfig, run_dir: Path) -> Path:
    folder = parent_of(config, run_dir)
    return folder / read_state(folder).models[-1].path


_CALLS: Mapping[str, tuple[str, Callable[..., dict[str, Any]]]] = MappingProxyType(
    {
        "build": ("sampler.stage:build", _build),
        "sample": ("sampler.stage:sample", _sample),
        "rank": ("sampler.stage:rank", _rank),
        "label": ("labeler.stage:label", _label),
        "train": ("trainer.stage:train", _train),
        "evaluate": ("trainer.stage:evaluate", _evaluate),
    }
)
_CALLS_WITH_PARENT: Mapping[str, tuple[str, Callable[..., dict[str, Any]]]] = MappingProxyType(
    {
        "build": ("sampler.stage:choose", _choose),
        "sample": ("sampler.stage:choose", _choose),
        "train": ("trainer.stage:transfer", _transfer),
    }
)
