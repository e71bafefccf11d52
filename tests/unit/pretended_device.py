"""A device that is not there: its tensors have shapes but hold nothing. To read one, or to mix devices, is an error."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"


@contextmanager
def pretended_device() -> Iterator[str]:
    """Name of the device; in here no tensor of outside can be used."""
    _register()
    with FakeTensorMode():
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=...) goes through the CPU
        try:
            yield NAME
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME)


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape and kind there."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=NAME)
