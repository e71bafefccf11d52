"""What can be chosen about the model: cutoffs, the resolution of the descriptor, the networks, the committee?"""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from shards.settings import Settings

__all__ = ["PotentialSettings"]


class PotentialSettings(Settings):
    """Defaults are those of the published ANI-Al committee (10.1038/s41467-021-21376-0)."""

    radial_cutoff_A: float = Field(7.0, gt=0, le=20)
    """Atoms farther away than this do not enter the radial part, A. Cost grows with its third power."""

    angular_cutoff_A: float = Field(5.0, gt=0, le=15)
    """Atoms farther away than this do not enter the angular part, A. Cost grows with its sixth power."""

    first_shift_A: float = Field(1.25, ge=0, le=5)
    """Centre of the first radial bin, A: a little under the shortest distance that will be met."""

    n_radial: int = Field(32, ge=2, le=128)
    """Radial bins between first_shift_A and radial_cutoff_A, for each element."""

    n_angular_radial: int = Field(8, ge=2, le=32)
    """Radial bins of the angular part, for each pair of elements."""

    n_angular: int = Field(8, ge=2, le=32)
    """Bins of the angle, for each pair of elements."""

    hidden: tuple[PositiveInt, ...] = Field((96, 96, 64), min_length=1, max_length=8)
    """Widths of the hidden layers of every network, first to last."""

    hidden_by_element: dict[str, tuple[PositiveInt, ...]] = Field(default_factory=dict)
    """Widths of the hidden layers for single elements, by symbol, where they differ from `hidden`."""

    n_members: int = Field(8, ge=1, le=64)
    """Networks in the committee. At least 2 for a spread; 8 is what the published thresholds were set with."""

    @model_validator(mode="after")
    def _angular_within_radial(self) -> PotentialSettings:
        if self.angular_cutoff_A > self.radial_cutoff_A:
            raise ValueError(
                f"angular_cutoff_A = {self.angular_cutoff_A}: must not exceed radial_cutoff_A = {self.radial_cutoff_A}"
            )
        if self.first_shift_A >= self.angular_cutoff_A:
            raise ValueError(
                f"first_shift_A = {self.first_shift_A}: must be below angular_cutoff_A = {self.angular_cutoff_A}"
            )
        return self
