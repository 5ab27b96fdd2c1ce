"""Columns of numbers in few bytes: scaled to integers, as differences, by byte planes, compressed.

`inflate` and `unpack` in static/report.js read them. All columns share one compressed block.
"""

import base64
import zlib
from typing import Any

import numpy as np

LARGEST = 2**47
"""Integers stay below it, and six bytes hold one."""
_PLANES = 6


def find_scale(values: np.ndarray, digits: int) -> int:
    """Return the power of ten that makes integers of the values, with so many significant digits at most."""
    finite = np.abs(values[np.isfinite(values)])
    top = float(finite.max()) if finite.size else 0.0
    if top == 0.0:
        return 1
    most = min(max(digits - int(np.floor(np.log10(top))) - 1, 0), 12)
    for power in range(most):
        scaled = finite * 10.0**power
        if np.all(np.abs(scaled - np.rint(scaled)) <= 1e-9 * np.maximum(scaled, 1)):
            return 10**power
    return 10**most


class Packer:
    """Collects columns of numbers in one block of bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, values: np.ndarray, digits: int = 9, scale: int | None = None, delta: bool = True) -> dict[str, Any]:
        """Add a column, and return its description: offset, length, scale, planes, flags."""
        values = np.asarray(values, np.float64)
        missing = ~np.isfinite(values)
        scale = find_scale(values, digits) if scale is None else scale
        whole = np.rint(np.where(missing, 0, np.clip(values * scale, -LARGEST, LARGEST))).astype(np.int64)
        steps = np.diff(whole, prepend=0) if delta else whole
        zigzag = (steps << 1) ^ (steps >> 63)
        planes = zigzag.astype("<u8").view(np.uint8).reshape(-1, 8).T
        count = max((k + 1 for k in range(_PLANES + 1) if planes[k].any()), default=0)
        begun = self._size
        for plane in planes[:count]:
            self._put(plane.tobytes())
        if missing.any():
            self._put(missing.astype(np.uint8).tobytes())
        found = {"o": begun, "n": len(values), "s": scale, "p": count}
        return found | ({"d": 1} if delta else {}) | ({"m": 1} if missing.any() else {})

    def add_words(self, words: list[str]) -> dict[str, Any]:
        """Add a column of texts: a list of the different ones, and numbers."""
        known = {word: i for i, word in enumerate(dict.fromkeys(words))}
        numbers = np.array([known[word] for word in words], np.float64)
        return self.add(numbers, scale=1, delta=False) | {"w": list(known)}

    def text(self) -> str:
        """Return the compressed block in base64."""
        return base64.b64encode(self.block()).decode()

    def block(self) -> bytes:
        """Return the compressed block."""
        return zlib.compress(b"".join(self._parts), 9)

    def _put(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)
