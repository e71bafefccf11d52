"""When does a walker stop, and is its frame worth a label? Pure decisions on the figures of one check.

An uncertain frame triggers; a frame no quantum code should be asked about ends the run; so does the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from sampler.config import SamplerSettings

__all__ = ["TRIGGERS", "Reading", "Spread", "Verdict", "is_elevated", "is_wanted", "judge", "severity", "trigger_of"]


class Verdict(StrEnum):
    RUNNING = ""
    FORCE_MEAN = "force_mean"
    FORCE_MAX = "force_max"
    ENERGY = "energy"
    TOO_CLOSE = "too_close"
    RUNAWAY = "runaway"
    TIMEOUT = "timeout"


TRIGGERS = (Verdict.FORCE_MEAN, Verdict.FORCE_MAX, Verdict.ENERGY)


@dataclass(frozen=True)
class Spread:
    """Disagreement of the committee about one frame: standard deviations over its members."""

    energy: float  # of the total energy, / sqrt(n_atoms), eV
    force_mean: float  # of the force components, mean over the frame, eV/A
    force_max: float  # of the force components, largest of the frame, eV/A


@dataclass(frozen=True)
class Reading:
    """What one check found about one walker."""

    spread: Spread
    shortest_A: float  # shortest distance, periodic images included
    temperature_K: float  # of the atoms, not of the thermostat
    largest_force_eV_A: float  # largest component of the mean force; NaN when not finite


def judge(reading: Reading, time_fs: float, settings: SamplerSettings) -> Verdict:
    """Decide about a walker after `time_fs`. The guards come first: an unphysical frame is never a trigger."""
    if reading.shortest_A < settings.minimum_distance_A:
        return Verdict.TOO_CLOSE
    # Written so that NaN runs away.
    if not (
        reading.largest_force_eV_A <= settings.max_force_eV_A and reading.temperature_K <= settings.max_temperature_K
    ):
        return Verdict.RUNAWAY
    trigger = trigger_of(reading.spread, settings)
    if trigger and time_fs >= 1000 * settings.min_time_ps:
        return trigger
    if time_fs >= 1000 * settings.max_time_ps:
        return Verdict.TIMEOUT
    return Verdict.RUNNING


def trigger_of(spread: Spread, settings: SamplerSettings, fraction: float = 1.0) -> Verdict:
    """The first threshold, scaled by `fraction`, that the spread is above; RUNNING when it is above none.

    A spread that is not a number is above every threshold.
    """
    threshold = fraction * settings.force_mean_threshold_eV_A
    if not spread.force_mean <= threshold:
        return Verdict.FORCE_MEAN
    if not spread.force_max <= settings.force_max_factor * threshold:
        return Verdict.FORCE_MAX
    energy_threshold = fraction * settings.energy_threshold_meV / 1000 or math.inf
    if not spread.energy <= energy_threshold:
        return Verdict.ENERGY
    return Verdict.RUNNING


def severity(energy_spread: float, force_spread: float, settings: SamplerSettings) -> float:
    """How unsure a committee is of a frame, to compare frames by.

    That is the larger of its energy spread, eV, and its mean force spread, eV/A, in units of their thresholds.

    The force spread alone would call it sure of crystals, where all forces are zero by symmetry.
    """
    force = force_spread / settings.force_mean_threshold_eV_A
    energy_threshold = settings.energy_threshold_meV / 1000
    return max(force, energy_spread / energy_threshold) if energy_threshold else force


def is_elevated(spread: Spread, settings: SamplerSettings) -> bool:
    """Whether the last good frame of a run that blew up deserves a label."""
    return bool(trigger_of(spread, settings, settings.elevated_fraction))


def is_wanted(spread: Spread, trigger: str, settings: SamplerSettings) -> bool:
    """Whether a candidate that a walker left because of `trigger` is still worth its label by a newer spread."""
    if trigger == Verdict.TIMEOUT:
        return settings.on_timeout != "none"
    if trigger in (Verdict.TOO_CLOSE, Verdict.RUNAWAY):
        return is_elevated(spread, settings)
    return bool(trigger_of(spread, settings))
