"""A device that is not there: its tensors have shapes but hold nothing. To read one, or to mix devices, is an error."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"


class Presence(_DummyBackendModule):
    """Of the device, which torch is to forget after use: whatever it does for every accelerator fails there."""

    now = False

    def is_available(self) -> bool:
        return Presence.now

    def device_count(self) -> int:
        return int(Presence.now)


@contextmanager
def pretended_device() -> Iterator[str]:
    """Name of the device; in here no tensor of outside can be used."""
    _register()
    with FakeTensorMode():
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=...) goes through the CPU
        Presence.now = True
        try:
            yield NAME
        finally:
            Presence.now = False
            torch._C._set_only_lift_cpu_tensors(before)


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=Presence())


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape and kind there."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=NAME)
