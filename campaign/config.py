"""What can be chosen about a campaign as a whole, and is a configuration fit to start from?"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers
from pydantic import Field, JsonValue, field_validator

from labeler.config import LabelerSettings
from potential.config import PotentialSettings
from sampler.config import BuilderSettings, SamplerSettings
from shards.settings import Settings, SettingsError, parse_settings, read_toml
from trainer.config import TrainerSettings, TransferSettings
from trainer.folds import N_BLOCKS

__all__ = [
    "STOP_FIELDS",
    "CampaignConfig",
    "CampaignSettings",
    "at_higher_level",
    "changed_fields",
    "config_digest",
    "load_campaign",
    "parse_campaign",
    "to_toml",
]


class CampaignSettings(Settings):
    """The loop: how much of everything, and when it ends."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the campaign, for people. Letters, digits, dot, dash, underscore."""
    elements: tuple[str, ...] = Field(min_length=1)
    """Chemical symbols the potential is made for."""
    parent_run: str = ""
    """Run directory, seen from this campaign's own, of a campaign at a lower level of theory: frames are chosen among
    its labeled ones, and every model is carried over from its newest as [transfer] says. [higher] sets this."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Every task derives its own seed from this one."""
    n_bootstrap: int = Field(default=100, ge=2)
    """Random cells that are labeled for training before there is any model; the held-out ones come on top."""
    bootstrap_fraction: float = Field(default=0.9, gt=0, le=1)
    """The first model is trained once this share of the bootstrap labels is there: a few slow ones hold up nobody."""
    holdout_fraction: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the walkers' labels that no model is ever trained on, chosen by frame id. Every generation is measured
    on them; 0 measures nothing."""
    labels_per_task: int = Field(default=4, ge=1)
    """Frames that one label task computes, one after the other. More saves start-up, fewer react faster."""
    retrain_after: int = Field(default=25, ge=1)
    """New training labels that make the next generation worth training."""
    labels_ahead: int = Field(default=100, ge=1)
    """Labeling pauses while the newest model lacks so many labels, made or under way: frames that an outdated model
    asked for teach less. At least retrain_after; more, so that labeling goes on during a training: what is under way at
    a time and what is made during two trainings."""
    queue_target: int = Field(default=50, ge=1)
    """Sampling pauses while so many candidates wait for their label. About what the labelers do during one training or
    one sampling task, and a third more, since newer models drop some."""
    max_labels: int = Field(default=1000, ge=1)
    """Stop: labels in all, held-out ones included. In-flight labels are counted so that this is met exactly."""
    max_generations: int = Field(default=20, ge=1)
    """Stop: models trained in all, the final one included."""
    max_hours: float = Field(default=24.0, gt=0)
    """Stop: hours of work, all drivers together. Labels under way and the final training come on top."""
    quiet_fraction: float = Field(default=0.95, gt=0, le=1)
    """Stop: nothing left to learn when this share of the newest model's walkers reached their end untriggered ..."""
    quiet_walkers: int = Field(default=200, ge=1)
    """... over at least so many walkers."""
    attempts: int = Field(default=3, ge=1)
    """A frame whose label failed so often is set aside (quarantined); another task that failed so often in a row ends
    the campaign. Unphysical frames and labels are set aside at once."""
    losses: int = Field(default=20, ge=1)
    """The same for tasks that are lost with their node or block (walltime, preemption, a dead node, scancel), which
    do not count as attempts: one that kills its nodes is noticed by this."""
    failure_first: int = Field(default=5, ge=1)
    """Systematic failure: the campaign ends when the first so many frames were all set aside."""
    failure_window: int = Field(default=50, ge=1, le=1000)
    """Systematic failure: of the newest so many frames ..."""
    failure_fraction: float = Field(default=0.5, gt=0, le=1)
    """... more than this share was set aside."""

    @field_validator("elements")
    @classmethod
    def _symbols(cls, elements: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [symbol for symbol in elements if atomic_numbers.get(symbol, 0) < 1]
        if unknown:
            raise ValueError(f"not chemical symbols: {', '.join(unknown)}")
        if len(set(elements)) < len(elements):
            raise ValueError("every element once")
        return elements


# Only these may change between two runs on one run directory: nothing that was computed depends on them.
STOP_FIELDS = frozenset(
    f"campaign.{name}" for name in ("max_labels", "max_generations", "max_hours", "quiet_fraction", "quiet_walkers")
)


class CampaignConfig(Settings):
    """A campaign's whole configuration, one table for each stage."""

    campaign: CampaignSettings
    """The loop: how much of everything, and when it ends."""
    potential: PotentialSettings = Field(default_factory=PotentialSettings)
    """The model."""
    builder: BuilderSettings = Field(default_factory=BuilderSettings)
    """Random cells, from which the bootstrap frames and all walkers start."""
    sampler: SamplerSettings = Field(default_factory=SamplerSettings)
    """The walkers and what stops them."""
    labeler: LabelerSettings = Field(default_factory=LabelerSettings)
    """The quantum code."""
    trainer: TrainerSettings = Field(default_factory=TrainerSettings)
    """Training of the committee."""
    transfer: TransferSettings = Field(default_factory=TransferSettings)
    """How `smelt transfer` carries a trained committee to a higher level of theory."""
    higher: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """A higher level of theory, at which the campaign goes on in RUN/higher when it has ended at its own: what differs
    there, table by table, such as campaign = { n_bootstrap = 40, max_labels = 99 }, labeler = { engine = "composite" }.
    Empty: there is none."""


def load_campaign(path: Path) -> CampaignConfig:
    """Raises SettingsError: no such file, not TOML, or any fault in it; one line per fault."""
    table = read_toml(path)
    molecules = table.get("builder", {}).get("molecules", {})
    if isinstance(molecules, dict) and isinstance(molecules.get("file"), str):
        molecules["file"] = str((path.parent / molecules["file"]).absolute()) if molecules["file"] else ""
    return parse_campaign(table)


def parse_campaign(table: dict[str, Any]) -> CampaignConfig:
    config = parse_settings(CampaignConfig, table)
    faults = _contradictions(config)
    if faults:
        raise SettingsError("\n".join(faults))
    if config.higher:
        at_higher_level(config)
    return config


def at_higher_level(config: CampaignConfig) -> CampaignConfig:
    """The configuration of the campaign in RUN/higher.

    Raises:
        SettingsError: what [higher] says does not fit.
    """
    table = config.model_dump(mode="json", exclude={"higher"})
    table["campaign"] |= {"name": f"{config.campaign.name}-higher", "parent_run": ".."}
    for name, changes in config.higher.items():
        table[name] = _overlaid(table.get(name, {}), changes)
    try:
        return parse_campaign(table)
    except SettingsError as error:
        raise SettingsError("\n".join(f"higher.{fault}" for fault in str(error).splitlines())) from error


def _overlaid(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    inner = {
        name: _overlaid(table[name], value)
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(table.get(name), dict)
    }
    return table | changes | inner


def _contradictions(config: CampaignConfig) -> list[str]:
    """Faults that show only between tables."""
    faults = []
    elements = set(config.campaign.elements)
    tables = {
        "builder.composition": config.builder.composition,
        "builder.density_by_element_g_cm3": config.builder.density_by_element_g_cm3,
        "builder.minimum_distance_by_element_A": config.builder.minimum_distance_by_element_A,
        "potential.hidden_by_element": config.potential.hidden_by_element,
    }
    for name, table in tables.items():
        strangers = sorted(set(table) - elements) if isinstance(table, dict) else []
        if strangers:
            faults.append(f"{name}: {', '.join(strangers)} not in campaign.elements ({', '.join(sorted(elements))})")
    n_first = math.ceil(config.campaign.bootstrap_fraction * config.campaign.n_bootstrap)
    if n_first < N_BLOCKS // 2:
        faults.append(
            f"campaign.n_bootstrap = {config.campaign.n_bootstrap}: with campaign.bootstrap_fraction ="
            f" {config.campaign.bootstrap_fraction} the first model would have {n_first} labels; cross-validation needs"
            f" at least {N_BLOCKS // 2}"
        )
    if config.campaign.max_labels < config.campaign.n_bootstrap:
        faults.append(
            f"campaign.max_labels = {config.campaign.max_labels}: must be at least campaign.n_bootstrap"
            f" = {config.campaign.n_bootstrap}"
        )
    if config.campaign.labels_ahead < config.campaign.retrain_after:
        faults.append(
            f"campaign.labels_ahead = {config.campaign.labels_ahead}: must be at least campaign.retrain_after"
            f" = {config.campaign.retrain_after}"
        )
    return faults


def config_digest(config: CampaignConfig) -> str:
    """16 hexadecimal digits over every setting."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def changed_fields(old: CampaignConfig, new: CampaignConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old value, new value) of every setting that differs."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    paths = [*before, *(path for path in after if path not in before)]
    return {path: (before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)}


def to_toml(config: CampaignConfig) -> str:
    """Every setting, defaults included, as TOML that `load_campaign` reads back to the same configuration."""
    tables = config.model_dump(mode="json")
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # JSON writes strings, numbers and booleans as TOML does.
    return json.dumps(value, ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _flat(table: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{where}{key}.")
        else:
            flat[f"{where}{key}"] = value
    return flat
