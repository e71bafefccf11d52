"""Where do bootstrap frames and walkers start: from random cells, or from molecules?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sampler.builder import check_builder, random_frame
from sampler.config import BuilderSettings
from shards.frame import Frame

__all__ = ["open_starts"]


def open_starts(elements: Sequence[str], settings: BuilderSettings) -> Callable[[int], Frame]:
    """What makes a frame of a seed, the same frame of the same seed.

    Raises:
        SettingsError: settings that do not fit the elements, cells too crowded to be built, or no molecules.
    """
    if settings.molecules.given:
        # Only here: they take a third of a second, and random cells do without.
        from sampler.geometries import molecule_frame
        from sampler.molecules import read_library

        return partial(molecule_frame, read_library(elements, settings.molecules), settings.molecules)
    check_builder(elements, settings)
    return partial(random_frame, elements, settings)
