"""What metadata a search asks for, as SQL over the values of `json_each`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from search_r3.errors import DataError

BOUNDS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
"""What a filter may ask of a field besides equality."""
INT64 = 1 << 63  # SQLite's integers lie below
MOST = 30_000  # values of a field; SQLite takes a few more


def condition(key: str, wanted: Any) -> tuple[str, list[Any]]:
    """SQL that is true of a metadata value, `{0}`, that is wanted, and the values of its marks, which count from 2."""
    if isinstance(wanted, Mapping):
        return _within(key, wanted)
    values = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    if len(values) > MOST:
        raise DataError(f"where: field {key!r}: {len(values)} values are more than {MOST}; ask for fewer at once")
    for value in values:
        if not _storable(value):
            raise DataError(f"where: field {key!r}: {value!r} is no text, number of 64 bits, true or false")
    # SQLite reads true as 1, which is another value; bytes equal no text
    values = [json.dumps(value).encode() if isinstance(value, bool) else value for value in values]
    plain = "CASE WHEN {0}.type IN ('true', 'false') THEN CAST({0}.type AS BLOB) ELSE {0}.value END"
    return f"{plain} IN ({','.join(f'?{mark}' for mark in range(2, len(values) + 2))})", values


def _within(key: str, bounds: Mapping[str, Any]) -> tuple[str, list[Any]]:
    if not bounds or not BOUNDS.keys() >= bounds.keys():
        raise DataError(f"where: field {key!r}: {dict(bounds)} are no bounds; give some of {', '.join(BOUNDS)}")
    tests = []
    for mark, (name, bound) in enumerate(bounds.items(), 2):
        if isinstance(bound, bool) or not _storable(bound):
            raise DataError(f"where: field {key!r}: {bound!r} is no text or number of 64 bits")
        if isinstance(bound, str):
            tests.append(f"({{0}}.type = 'text' AND {{0}}.value {BOUNDS[name]} ?{mark})")
        else:  # compared with a NUMERIC, SQLite takes text that is a number for one; other text is above all numbers
            number = f"{{0}}.value {BOUNDS[name]} CAST(?{mark} AS NUMERIC) AND {{0}}.value <= CAST(9e999 AS NUMERIC)"
            tests.append(f"({{0}}.type IN ('integer', 'real', 'text') AND {number})")
    return f"({' AND '.join(tests)})", list(bounds.values())


def _storable(value: Any) -> bool:
    return -INT64 <= value < INT64 if isinstance(value, int) else isinstance(value, str | float)
