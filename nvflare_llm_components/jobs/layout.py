"""JSON as people lay it out: what fits a line stands on one."""

import json
from typing import Any

WIDTH = 110
_INDENT = "  "


def layout(value: Any, width: int = WIDTH) -> str:
    r"""A value as JSON text; objects and lists are broken where they are longer than a line.

    The outermost object is always broken, so that a job's variables stand one below the other.

    >>> print(layout({"a": [1, 2], "b": {"c": None}}))
    {
      "a": [1, 2],
      "b": {"c": null}
    }
    """
    return _laid_out(value, 0, width, is_outermost=True)


def _laid_out(value: Any, used: int, width: int, depth: int = 0, is_outermost: bool = False) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not (isinstance(value, dict | list) and value) or (not is_outermost and used + len(line) < width):
        return line
    inner = _INDENT * (depth + 1)
    keys = [f"{json.dumps(key, ensure_ascii=False)}: " if isinstance(value, dict) else "" for key in value]
    items = value.values() if isinstance(value, dict) else value
    lines = [
        inner + key + _laid_out(item, len(inner) + len(key), width, depth + 1)
        for key, item in zip(keys, items, strict=True)
    ]
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return f"{opened}\n" + ",\n".join(lines) + f"\n{_INDENT * depth}{closed}"
