"""An audit in a file: what `shardlab compile --save` wrote, read back and looked over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardlab.mesh.faults import DeclarationError, suggestion

# What every audit has, and what its rows have, that a report or a comparison reads.
_KEYS = (
    *("config", "overrides", "target", "num_devices", "mesh", "versions", "plan", "parameters", "memory"),
    *("hbm_bytes", "hbm_capacity_bytes", "fits", "categories", "largest", "collectives", "wire_bytes"),
    *("wire_bytes_by_axis", "layout", "estimate_seconds", "mfu", "bound_by", "estimate", "lints", "remedies"),
)
_ROWS = {
    "collectives": ("kind", "axes", "count", "payload_bytes", "wire_bytes", "async", "cause", "exact", "in_branch"),
    "lints": ("code", "message", "path", "bytes", "seconds", "fix"),
    "parameters": ("path", "count", "shape", "dtype", "spec", "storage", "bytes_per_device"),
}


def read_audit(path: str | Path) -> dict[str, Any]:
    """The facts of an audit in a file.

    Raises:
      DeclarationError: there is no such file, it is not JSON, not an audit, or lacks something: what.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(other) for other in file.parent.glob("*.json")) if file.parent.is_dir() else []
        hint = suggestion(str(path), near)
        raise DeclarationError(f"audit {str(path)!r}: there is no such file; {hint}{_WAY_OUT}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeclarationError(f"audit {str(path)!r}: cannot be read ({error}); {_WAY_OUT}") from None
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise DeclarationError(
            f"audit {str(path)!r}: is not JSON ({error.msg} in line {error.lineno}, column {error.colno}); {_WAY_OUT}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists without end
        raise DeclarationError(f"audit {str(path)!r}: cannot be read ({error}); {_WAY_OUT}") from None
    problem = _problem(facts)
    if problem:
        raise DeclarationError(f"audit {str(path)!r}: {problem}; {_WAY_OUT}")
    return facts


_WAY_OUT = "give a file that `shardlab compile --save` wrote"


def _problem(facts: Any) -> str:
    """What is wrong with what is to be an audit; nothing where nothing is."""
    if not isinstance(facts, Mapping):
        return f"is not an audit: a JSON {_KINDS[type(facts)]}, not an object"
    missing = [name for name in _KEYS if name not in facts]
    if len(missing) > len(_KEYS) // 2:
        return f"is not an audit: an object that lacks {', '.join(missing)}"
    if missing:
        return f"lacks {', '.join(missing)}"
    for name, keys in _ROWS.items():
        for place, row in enumerate(facts[name]):
            missing = [key for key in keys if key not in row]
            if missing:
                return f"lacks {', '.join(missing)} in {name}[{place}]"
    return ""


_KINDS = {list: "array", str: "string", int: "number", float: "number", bool: "truth value", type(None): "null"}
