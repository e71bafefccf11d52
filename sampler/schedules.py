"""How do the temperature and the density of a walker change with time? The published law, drawn once per walker.

    T(t)   = (1 - t/t_max) T_start + (t/t_max) T_end + T_amplitude sin^2(pi t / T_period)
    rho(t) = rho_0 [ (1 - t/t_max) + (t/t_max) end_factor + amplitude_factor sin^2(pi t / rho_period) ]

after https://github.com/lanl/ALF. The sine is squared and its argument carries pi, so that a pulse returns every
period; both density parameters are factors on the density at the start, rho_0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sampler.config import SamplerSettings
from sampler.streams import Purpose, open_stream

__all__ = ["Schedule", "draw_schedule"]


@dataclass(frozen=True)
class Schedule:
    max_time_fs: float
    temperature_start_K: float
    temperature_end_K: float
    temperature_amplitude_K: float
    temperature_period_fs: float
    density_end_factor: float
    density_amplitude_factor: float
    density_period_fs: float

    def temperature_K(self, time_fs: float) -> float:
        progress = time_fs / self.max_time_fs
        drift = (1 - progress) * self.temperature_start_K + progress * self.temperature_end_K
        return drift + self.temperature_amplitude_K * math.sin(math.pi * time_fs / self.temperature_period_fs) ** 2

    def density_factor(self, time_fs: float) -> float:
        """rho(t) / rho_0."""
        progress = time_fs / self.max_time_fs
        drift = (1 - progress) + progress * self.density_end_factor
        return drift + self.density_amplitude_factor * math.sin(math.pi * time_fs / self.density_period_fs) ** 2


def draw_schedule(settings: SamplerSettings, seed: int) -> Schedule:
    """Draw every parameter uniformly from its range; the same seed gives the same schedule."""
    stream = open_stream(seed, Purpose.SCHEDULE)

    def draw(limits: tuple[float, float]) -> float:
        return float(stream.uniform(*limits))

    return Schedule(
        max_time_fs=1000 * settings.max_time_ps,
        temperature_start_K=draw(settings.temperature_start_K),
        temperature_end_K=draw(settings.temperature_end_K),
        temperature_amplitude_K=draw(settings.temperature_amplitude_K),
        temperature_period_fs=1000 * draw(settings.temperature_period_ps),
        density_end_factor=draw(settings.density_end_factor),
        density_amplitude_factor=draw(settings.density_amplitude_factor),
        density_period_fs=1000 * draw(settings.density_period_ps),
    )
