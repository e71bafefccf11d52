"""Pools without Parsl, for tests that run a whole campaign in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from campaign.site import Site


class ThreadPools:
    """Pools of one thread each; remembers how many tasks each was holding at most."""

    slots: Mapping[str, int] = {"sample": 1, "label": 2, "train": 1}

    def __init__(self, site: Site, run_dir: Path, limits: Mapping[str, float]) -> None:
        self._threads = {pool: ThreadPoolExecutor(n) for pool, n in self.slots.items()}

    def __enter__(self) -> ThreadPools:
        return self

    def __exit__(self, *error: object) -> None:
        for threads in self._threads.values():
            threads.shutdown()

    def submit(self, pool: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]:
        return self._threads[pool].submit(function, *arguments)

    def lost(self) -> str:
        return ""

    def waits(self) -> Mapping[str, str]:
        return {}

    def hold(self) -> None: ...
