"""What a command says to other programs."""

from __future__ import annotations

import json
import math
import sys
from typing import Any


def to_json(data: Any) -> str:
    """`data` as one line, with escapes where the output's encoding is not Unicode's: what stands in for a character that
    it lacks is no JSON."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(finite(data), ensure_ascii=not unicode)


def finite(data: Any) -> Any:
    """Plain data with null in place of NaN and infinities, for which JSON has no word."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, list | tuple) else data
