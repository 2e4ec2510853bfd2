"""What events carry: JSON, copied, and bounded in size.

The rule kept here: data is made plain once, where it is sent, so that it is the same in memory, in a database and on the
wire. Later changes of the sender's objects are not seen.

What JSON cannot hold is told in the nearest way it can: NaN and infinities as null, half characters (undecodable file
names have them) as "?", NUL characters, which PostgreSQL refuses, as U+FFFD.
"""

from __future__ import annotations

import dataclasses
import json
import re
import traceback
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

__all__ = ["MAX_BYTES", "about_error", "plain", "readable"]

MAX_BYTES = 1 << 20
"""What the data of one event may take as JSON in UTF-8."""

_INSTEAD = "send a part of it, or where it is to be found"
_TEXT = 2_000
"""Characters kept of a text in data that was too large."""
_ROWS = 100
"""Entries kept of a list in data that was too large."""
_DEPTH = 20
"""Levels kept of data that was too large."""
_FRAMES = 20
"""Entries of a traceback, the innermost ones."""
_TRACE = 8_000
"""Characters of a traceback."""

_AS_TEXT = (PurePath, UUID, Decimal, Fraction)
_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")


def plain(data: Any, what: str) -> Any:
    """A copy of `data` made of JSON's types; `what` is its name in errors.

    Besides what JSON knows: dataclasses, enums, sets, dates, paths, UUIDs, decimals, NumPy's arrays and numbers, and all
    that has a `to_dict()`. Raises TypeError for the rest, ValueError for more than 1 MiB. Costs about 5 µs for a small
    dict.
    """
    if _least_size(data) > MAX_BYTES:  # seen at once, also where it would take minutes to write it down
        raise ValueError(f"{what} takes more than {MAX_BYTES:,} bytes as JSON: {_INSTEAD} (or does it contain itself?)")
    try:
        copy, size = _through_json(data, _nearest)
    except TypeError as error:
        raise TypeError(f"{what} must be JSON: {error}; send numbers, texts, lists and dicts") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be made JSON: {error}") from None
    if size > MAX_BYTES:
        raise ValueError(f"{what} takes {size:,} bytes as JSON, and {MAX_BYTES:,} is the most: {_INSTEAD}")
    return copy


def readable(data: Any) -> Any:
    """As `plain`, for data that nobody has chosen to send, such as results: it never fails.

    What is no JSON is told by its `repr`, and what is too large is shortened.
    """
    try:
        if _least_size(data) > MAX_BYTES:
            data = _shortened(data)
        copy, size = _through_json(data, _nearest_or_repr)
    except Exception:  # keys that are no texts, circles, too deep; or a dict or a text with code of its own
        copy, size = _through_json(_told_by_repr(data), _nearest_or_repr)
    if size > MAX_BYTES:
        copy, size = _through_json(_shortened(copy), _nearest_or_repr)
    if size > MAX_BYTES:
        return {"too_large": size}
    return copy


def about_error(error: BaseException) -> dict[str, Any]:
    """Its type, its message and the innermost part of its traceback, as texts. It never fails."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        told = traceback.TracebackException.from_exception(error, limit=-_FRAMES)
        message, trace = str(told), "".join(told.format())
    except Exception:  # code of the error's own, or a SyntaxError whose fields are of other types than Python's
        message, trace = _repr(error), "".join(traceback.format_tb(error.__traceback__, -_FRAMES))
    return readable({"message": _cut(message, _TEXT) or name, "type": name, "traceback": trace[-_TRACE:]})


def _through_json(data: Any, default: Any) -> tuple[Any, int]:
    text = json.dumps(data, default=default, ensure_ascii=False)
    encoded = text.encode("utf-8", "replace")
    if b"\\u0000" in encoded:
        encoded = _NUL.sub(rb"\1\\ufffd", encoded)
    return json.loads(encoded, parse_constant=_nothing), len(encoded)


def _least_size(data: Any) -> int:
    """Characters that it has as JSON at least, counted until there are too many."""
    size, left = 0, [data]
    while left:
        one = left.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, (dict, list, tuple)):
            many = cast("dict[Any, Any] | list[Any] | tuple[Any, ...]", one)
            size += 2 * len(many) + 1
            if size <= MAX_BYTES:
                left.extend(many.values() if isinstance(many, dict) else many)
        if size > MAX_BYTES:
            break
    return size


def _nothing(_: str) -> None:
    """For NaN and the infinities."""


def _nearest(value: Any) -> Any:
    """The next simpler form of one value that JSON does not know."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return list(cast("set[Any]", value))
    if isinstance(value, Mapping):
        return dict(cast("Mapping[Any, Any]", value))
    if isinstance(value, type):
        raise TypeError(f"{value!r} is a class")
    if getattr(value, "nbytes", 0) > MAX_BYTES:
        raise TypeError(f"a {type(value).__qualname__} of {value.nbytes:,} bytes is too large")
    for method in ("to_dict", "tolist"):
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__qualname__} is no type of JSON")


def _nearest_or_repr(value: Any) -> Any:
    try:
        return _nearest(value)
    except Exception:  # code of the value's own: whatever it raises, the value is told in another way
        return _repr(value)


def _told_by_repr(value: Any) -> Any:
    try:
        return _shortened(value)
    except Exception:
        return _repr(value)


def _repr(value: Any) -> str:
    try:
        return _cut(repr(value), _TEXT)
    except Exception:
        return f"<{type(value).__qualname__}, whose repr fails>"


def _shortened(value: Any, depth: int = _DEPTH) -> Any:
    if isinstance(value, str):
        return _cut(value, _TEXT)
    if isinstance(value, float) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 64 else f"an integer of {value.bit_length():,} bits"
    if depth == 0:
        return _repr(value) if not isinstance(value, (dict, list, tuple)) else "…"
    if isinstance(value, dict):
        pairs = list(cast("dict[Any, Any]", value).items())[:_ROWS]
        return {_cut(key if isinstance(key, str) else _repr(key), _TEXT): _shortened(one, depth - 1) for key, one in pairs}
    if isinstance(value, (list, tuple)):
        rows = cast("list[Any] | tuple[Any, ...]", value)
        more = [f"… {len(rows) - _ROWS:,} more"] if len(rows) > _ROWS else []
        return [_shortened(one, depth - 1) for one in rows[:_ROWS]] + more
    return _repr(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
