"""Dataclasses out of JSON documents, checked by the types of their fields."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from .disk.reading import is_unicode, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONGEST_TEXT = 500

Record = TypeVar("Record", bound="DataclassInstance")


def object_from(of: type[Record], raw: Any) -> Record:
    """The dataclass `of` from a JSON object; a newer version's fields are left out."""
    if not isinstance(raw, dict):
        raise ValueError(f"{of.__name__} is {shown(raw)}")
    needed = (f.name for f in fields(of) if f.default is f.default_factory is MISSING)
    if missing := [name for name in needed if name not in raw]:
        raise ValueError(f"{of.__name__} lacks {', '.join(missing)}")
    return of(**{f.name: _read(f.name, f.type, raw[f.name]) for f in fields(of) if f.name in raw})


def _read(name: str, kind: Any, value: Any) -> Any:
    """A JSON value as what the field `name` of type `kind` holds; ValueError names the field."""
    choices = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in choices:
        return None
    wanted = choices[0]
    if isinstance(wanted, type) and is_dataclass(wanted):
        return object_from(wanted, value)
    if get_origin(wanted) is tuple:
        return _list(name, get_args(wanted)[0], value)
    if wanted is Path and isinstance(value, str):
        return Path(_checked(name, str, value))
    if get_origin(wanted) is Mapping:
        return _checked(name, dict, value)
    if get_origin(wanted) is Literal and value not in get_args(wanted):
        raise ValueError(f"{name} is {shown(value)}; choose one of {', '.join(get_args(wanted))}")
    return _checked(name, str if get_origin(wanted) is Literal else wanted, value)


def _checked(name: str, wanted: type, value: Any) -> Any:
    accepted = int | float if wanted is float else wanted
    if isinstance(value, bool) is not (wanted is bool) or not isinstance(value, accepted):
        raise ValueError(f"{name} is {shown(value)}")
    if isinstance(value, str) and (len(value) > LONGEST_TEXT or not is_unicode(value)):
        raise ValueError(f"{name} is {shown(value)}")
    return value


def _list(name: str, kind: Any, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{name} is {shown(values)}, not a list")
    if kind not in (int, float):
        return tuple(_read(name, kind, value) for value in values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: {shown(value)} is not a number")
    return tuple(values)
