"""Where is the library of C++ kernels, how are its functions called, and which instruction set do they use?

The library has a plain C interface and is built beside this file at installation. SMELT_SIMD=plain|avx2|avx512|amx
forces an instruction set, for tests; otherwise the best one of the processor is used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from pathlib import Path

from potential.kernels.powers import DEGREE

__all__ = [
    "LEVELS",
    "AevPower",
    "AevShape",
    "Evaluate",
    "Layers",
    "LayersShape",
    "Motion",
    "Networks",
    "Response",
    "available",
    "best_level",
    "level",
    "library",
]

LIBRARY = Path(__file__).with_name(f"_aev{sysconfig.get_config_var('EXT_SUFFIX')}")
LEVELS = ("plain", "avx2", "avx512", "amx")
FORCED = os.environ.get("SMELT_SIMD", "")


class AevPower(ctypes.Structure):
    """AevPower of aev.h."""

    _fields_ = (("terms", ctypes.c_double * (DEGREE + 1)), ("n_squarings", ctypes.c_int64))


class AevShape(ctypes.Structure):
    """AevShape of aev.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("radial_cutoff", "angular_cutoff", "eta_radial", "eta_angular", "zeta")),
        *((name, ctypes.c_int64) for name in ("n_species", "n_radial", "n_angular_radial", "n_angular")),
        *(
            (name, ctypes.POINTER(ctypes.c_double))
            for name in ("radial_shifts", "angular_shifts", "angle_cos", "angle_sin")
        ),
        ("reach", ctypes.c_double),
        ("by_zeta", AevPower * 2),
    )


class Networks(ctypes.Structure):
    """NetworksJob of networks.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_members", "n_layers", "n_rows", "n_atoms")),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("weights", "biases")),
        ("packed", ctypes.c_void_p),
        ("celu_alpha", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("atoms", "aev", "energies", "gradient")),
        *((name, ctypes.c_int64) for name in ("mean", "filled_only")),
    )


class Evaluate(ctypes.Structure):
    """EvaluateJob of evaluate.cpp, with its PairList."""

    _fields_ = (
        ("shape", ctypes.POINTER(AevShape)),
        *(
            (name, ctypes.c_void_p)
            for name in ("row", "other", "shift", "frame_of_atom", "species", "positions", "cells")
        ),
        *((name, ctypes.c_int64) for name in ("n_atoms", "n_frames", "n_items")),
        ("first", ctypes.c_void_p),
        ("networks", ctypes.POINTER(Networks)),
        *((name, ctypes.c_void_p) for name in ("self_energies", "energy", "forces", "stress", "mean", "deviation")),
    )


class LayersShape(ctypes.Structure):
    """LayersShape of training.h."""

    _fields_ = (
        ("n_layers", ctypes.c_int64),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("widths", "offsets")),
    )


class Layers(ctypes.Structure):
    """LayersJob of training.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_members", "n_elements", "n_atoms", "step")),
        ("shapes", ctypes.POINTER(LayersShape)),
        ("celu_alpha", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "parameters",
                "atoms",
                "first",
                "aev",
                "rows",
                "energies",
                "g",
                "tape",
                "by_energy",
                "by_g",
                "gradient",
            )
        ),
        ("add", ctypes.c_int64),
    )


class Response(ctypes.Structure):
    """ResponseJob of training.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_members", "length", "n_atoms", "n_structures")),
        *((name, ctypes.c_void_p) for name in ("first", "jacobians", "known_forces", "known_virial", "scale")),
        *((name, ctypes.c_double) for name in ("force_scale", "virial_scale", "cap")),
        *((name, ctypes.c_void_p) for name in ("g", "forces", "virial", "v", "errors")),
    )


class Motion(ctypes.Structure):
    """MotionJob of motion.h."""

    _fields_ = (
        ("n_atoms", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "positions",
                "velocities",
                "forces",
                "inverse_mass",
                "noise_scale",
                "frame",
                "first",
                "key",
                "step",
            )
        ),
        *((name, ctypes.c_double) for name in ("push", "half_step", "damping")),
    )


def available() -> bool:
    """Whether the C++ kernels were built and can be loaded."""
    try:
        library()
    except (OSError, AttributeError):  # not built, or built from older sources
        return False
    return True


def level() -> int:
    """The instruction set to use, as a position in LEVELS."""
    best = best_level()
    if not FORCED:
        return best
    if FORCED not in LEVELS[: best + 1]:
        raise ValueError(f"SMELT_SIMD = {FORCED!r}: this processor has {', '.join(LEVELS[: best + 1])}")
    return LEVELS.index(FORCED)


@functools.cache
def best_level() -> int:
    level: int = library().smelt_level()
    return level


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(LIBRARY))
    integer, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    loaded.smelt_find_neighbours.restype = pointer
    loaded.smelt_find_neighbours.argtypes = [integer, long, *[pointer] * 4, ctypes.c_double, *[pointer] * 3]
    loaded.smelt_take_neighbours.argtypes = [pointer, integer, *[pointer] * 4]
    loaded.smelt_pair_vectors.argtypes = [*[integer] * 3, long, *[pointer] * 7]
    loaded.smelt_spread.argtypes = [integer, long, long, *[pointer] * 3]
    loaded.smelt_spread.restype = None
    loaded.smelt_moved.argtypes = [integer, long, *[pointer] * 5]
    loaded.smelt_shortest.argtypes = [integer, integer, long, *[pointer] * 8]
    loaded.smelt_normals.argtypes = [integer, ctypes.POINTER(Motion), pointer]
    loaded.smelt_drift.argtypes = [integer, ctypes.POINTER(Motion)]
    loaded.smelt_kick.argtypes = [integer, ctypes.POINTER(Motion), ctypes.c_double]
    loaded.smelt_pairs.argtypes = [*[integer] * 3, *[long] * 3, *[pointer] * 4]
    loaded.smelt_packed_bytes.restype = long
    loaded.smelt_packed_bytes.argtypes = [integer, integer, ctypes.POINTER(Networks)]
    loaded.smelt_pack.argtypes = [*[integer] * 3, ctypes.POINTER(Networks), pointer]
    loaded.smelt_networks.argtypes = [*[integer] * 3, ctypes.POINTER(Networks)]
    loaded.smelt_tape.restype = long
    loaded.smelt_tape.argtypes = [integer, integer, ctypes.POINTER(Layers)]
    loaded.smelt_layers.argtypes = [*[integer] * 4, ctypes.POINTER(Layers)]
    loaded.smelt_respond.argtypes = [*[integer] * 3, ctypes.POINTER(Response)]
    loaded.smelt_evaluate.argtypes = [*[integer] * 3, ctypes.POINTER(Evaluate)]
    loaded.smelt_aev.argtypes = [*[integer] * 4, ctypes.POINTER(AevShape), *[long] * 3, *[pointer] * 5]
    return loaded
