"""Which polynomial serves as the power of the angular functions, 2 x^zeta, in single precision?

A logarithm and an exponential take twice as long. Where the power is below 2^-27 it is left at that, so the polynomial
has to follow it over a short range only, and less of it the more often its values are squared afterwards.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

__all__ = ["DEGREE", "fit_power", "reach_of"]

DEGREE = 9
BITS = 27
MOST_SQUARINGS = 4  # each doubles what rounding did before
LARGEST_ERROR = 5e-8  # beside 2


def reach_of(power: float) -> float:
    """How far below 1 x may be until x^power is 2^-27."""
    return 1 - 2 ** (-BITS / power) if power > 0 else 1.0


def fit_power(power: float, reach: float, degree: int = DEGREE) -> tuple[NDArray[np.float64], int] | None:
    """Terms of a polynomial in u, lowest first, and how often to square it for 2 x^power, x = 1 + reach (u - 1) / 2.

    The fewest squarings that are good enough for -1 <= u <= 1; None if none are.
    """
    if power < 0:
        return None
    u, nodes = np.linspace(-1, 1, 1001), chebyshev.chebpts1(degree + 1)
    exact = _power(u, power, reach)
    for n_squarings in range(MOST_SQUARINGS + 1):
        n_factors = 2**n_squarings
        series = chebyshev.chebfit(nodes, _power(nodes, power, reach) ** (1 / n_factors), degree)
        terms = np.zeros(degree + 1)
        found = chebyshev.cheb2poly(series)
        terms[: len(found)] = found  # zeros at the end are left out
        if np.abs(np.polyval(terms[::-1], u) ** n_factors - exact).max() < LARGEST_ERROR:
            return terms, n_squarings
    return None


def _power(u: NDArray[np.float64], power: float, reach: float) -> NDArray[np.float64]:
    values: NDArray[np.float64] = 2 * (1 + reach * (u - 1) / 2) ** power
    return values
