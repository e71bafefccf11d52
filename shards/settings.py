"""How does a TOML table become typed settings, and how is a wrong one reported? Knows no stage."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

__all__ = ["Settings", "SettingsError", "parse_settings", "read_toml"]


class Settings(BaseModel):
    """Base of every stage's settings: frozen, strict, unknown keys refused.

    The string under each field is its documentation: meaning, unit, how to choose. configs/reference.toml is
    made from it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class SettingsError(ValueError):
    """A configuration that cannot be used; one line per fault: dotted path, value, what is allowed."""


S = TypeVar("S", bound=Settings)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises SettingsError when there is no such file or it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error


def parse_settings(kind: type[S], table: Mapping[str, Any], where: str = "") -> S:
    """Check `table` against `kind`; `where` is the dotted path that stands before every fault.

    Raises:
        SettingsError: all faults at once.
    """
    try:
        # As JSON, because TOML likewise has arrays for tuples and strings for enums and paths: strict stays strict.
        return kind.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        faults = "\n".join(_describe(kind, fault, where) for fault in error.errors())
        raise SettingsError(faults) from None


def _describe(kind: type[Settings], fault: ErrorDetails, where: str) -> str:
    path = ".".join([where, *map(str, fault["loc"])]).strip(".")
    if fault["type"] == "extra_forbidden":
        known = _fields_at(kind, fault["loc"][:-1])
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{path} = {fault['input']!r}: unknown key{hint} (known: {', '.join(known)})"
    if fault["type"] == "missing":
        return f"{path}: missing; it has no default"
    allowed = fault["msg"].removeprefix("Value error, ")
    return f"{path} = {fault['input']!r}: {allowed[0].lower()}{allowed[1:]}"


def _fields_at(kind: type[Settings], location: tuple[int | str, ...]) -> list[str]:
    """Names that are allowed in the table at `location`, as far as it is made of settings."""
    for step in location:
        field = kind.model_fields.get(str(step))
        annotation = field.annotation if field else None
        # A table that may be left out is typed Table | None.
        if NoneType in get_args(annotation):
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, Settings)):
            return []
        kind = annotation
    return list(kind.model_fields)
