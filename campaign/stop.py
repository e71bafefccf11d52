"""How is a driver asked to stop, from any host that sees its run directory? By a file in it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

__all__ = ["Request", "forget_stop", "request_stop", "stop_request"]


class Request(StrEnum):
    DRAIN = "drain"  # start nothing more, let what runs end
    NOW = "now"  # end what runs; it is started again by the next driver


def request_stop(run_dir: Path, request: Request) -> None:
    _path(run_dir).write_text(request)


def stop_request(run_dir: Path) -> Request | None:
    try:
        return Request.NOW if _path(run_dir).read_text() == Request.NOW else Request.DRAIN
    except FileNotFoundError:
        return None


def forget_stop(run_dir: Path) -> None:
    _path(run_dir).unlink(missing_ok=True)


def _path(run_dir: Path) -> Path:
    return run_dir / "stop"
