"""A diary of looks at market data: one JSON object a line, appended to one file of the user.

It is no proof: the user may edit it. It knows no looks on other machines, through `split=None` or in the source files.
"""

import contextlib
import datetime
import json
import math
import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl
else:
    fcntl = None

FORMAT = 1
"""Version of a line."""
NAME = "ledger.jsonl"
LEAST_OVERLAP = 0.5
"""Least part of the shorter of two spans that both must share to count as the same data."""
_BAR_MS = 900_000
_PATIENCE_S = 10.0
"""Seconds to wait for another writer. A line is one write in append mode, so it is then written without the lock."""

Span = Mapping[str, Any]
"""`venue` ("" if unknown), `symbol`, and UTC milliseconds: `first`, and `last`, which is not included."""


def data_folder() -> Path:
    """Return the user's folder: $PERPJAX_DATA, or the platform's folder for the data of a program.

    Raises:
      RuntimeError: the user has no home.
    """
    if given := os.environ.get("PERPJAX_DATA"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "perpjax"
    if os.path.isabs(xdg := os.environ.get("XDG_DATA_HOME", "")):  # the standard ignores a relative path
        return Path(xdg) / "perpjax"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "perpjax"
    return Path.home() / ".local" / "share" / "perpjax"


class Ledger:
    """The ledger in a file; by default the user's own. Its methods warn where the file fails, and do not raise."""

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.path: Path | None = None
        with contextlib.suppress(RuntimeError):
            self.path = Path(path) if path is not None else data_folder() / NAME

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries in the order of writing. A damaged line is skipped with a warning that names it."""
        if self.path is None:
            return []
        try:
            with open(self.path, "rb") as file, _locked(file.fileno(), self.path, shared=True):
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            _warn(f"{self.path}: the ledger cannot be read ({_reason(error)}); earlier looks are not counted")
            return []
        found = []
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                found.append(_check(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError):
                _warn(f"{self.path}:{number}: a damaged line of the ledger, skipped")
        return found

    def append(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Append an entry and return it as written: with `format`, `time` and `id`, and null for NaN.

        Raises:
          ValueError: the entry lacks `kind` or `spans`, or holds an object that JSON does not know.
        """
        now = datetime.datetime.now(datetime.UTC)
        stamp = {"format": FORMAT, "time": f"{now:%Y-%m-%dT%H:%M:%SZ}", "id": uuid.uuid4().hex}
        try:
            whole = _check(_clean(stamp | dict(entry)))
            line = json.dumps(whole, allow_nan=False, separators=(",", ":")).encode()
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an entry of the ledger: {error!r}") from error
        try:
            if self.path is None:
                raise OSError("there is no home folder; set PERPJAX_DATA")
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _append_line(self.path, line)
        except OSError as error:
            _warn(f"{self.path or NAME}: the ledger cannot be written ({_reason(error)}); this look is not recorded")
        return whole


def _append_line(path: Path, line: bytes) -> None:
    """Append a line in one write. A last line that was cut is ended first."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with _locked(file, path) as locked:
            size = os.lseek(file, 0, os.SEEK_END)
            cut = False
            if size:
                os.lseek(file, size - 1, os.SEEK_SET)
                cut = os.read(file, 1) != b"\n"
            data = b"\n" * cut + line + b"\n"
            written = os.write(file, data)
            if written < len(data):
                if locked:
                    os.ftruncate(file, size)
                raise OSError("the disk is full")
            os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _locked(file: int, path: Path, shared: bool = False) -> Iterator[bool]:
    """A context with a lock on the file; it gives whether there is one. Without `fcntl` a file beside is the lock."""
    if fcntl is None:
        with _beside(path, shared) as locked:
            yield locked
        return
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    locked, end = False, time.monotonic() + _PATIENCE_S
    while not locked:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            if time.monotonic() > end:
                break
            time.sleep(0.005)
        except OSError:  # a file system without locks
            break
    try:
        yield locked
    finally:
        if locked:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _beside(path: Path, shared: bool) -> Iterator[bool]:
    """The lock of a system without `fcntl`: a file that one writer alone can create. Readers need none."""
    lock, locked, end = path.with_name(f"{path.name}.lock"), False, time.monotonic() + _PATIENCE_S
    while not (locked or shared):
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            locked = True
        except (FileExistsError, PermissionError):
            if time.monotonic() > end:  # left behind by a program that died
                with contextlib.suppress(OSError):
                    lock.unlink()
                break
            time.sleep(0.005)
    try:
        yield locked
    finally:
        if locked:
            with contextlib.suppress(OSError):
                lock.unlink()


def _check(entry: Any) -> dict[str, Any]:
    """Return the entry if its kind and spans can be read."""
    if not isinstance(entry, dict) or not isinstance(entry["kind"], str) or not isinstance(entry["spans"], list):
        raise TypeError("no kind, or no list of spans")
    for span in entry["spans"]:
        if not (isinstance(span["venue"], str) and isinstance(span["symbol"], str)):
            raise TypeError("a span without venue and symbol")
        if not all(isinstance(span[name], int) for name in ("first", "last")):
            raise TypeError("a span without milliseconds")
    return entry


def _clean(value: Any) -> Any:
    """Return plain JSON: numbers of NumPy become Python's, and those that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(name): _clean(x) for name, x in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_clean(x) for x in value] if isinstance(value, list | tuple) else value


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


# What counts as the same data.


def market_spans(market: Any, venues: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the decision bars of each symbol of a market as a span; the bars of history before are not in it.

    Args:
      market: a `Market` with numbers, outside `jit`.
      venues: of each symbol.
    """
    segments = market.segments
    starts, firsts, lasts = (getattr(segments, name).tolist() for name in ("start", "first", "last"))
    spans = []
    for origin in market.origins:
        own = [i for i, row in enumerate(starts) if row == origin.row]
        if own:
            first, last = min(firsts[i] for i in own), max(lasts[i] for i in own) + 1
            times = (origin.start_ms + _BAR_MS * (bar - origin.row) for bar in (first, last))
            names = {"venue": (venues or {}).get(origin.symbol, ""), "symbol": origin.symbol}
            spans.append(names | dict(zip(("first", "last"), times, strict=True)))
    return spans


def same_symbol(a: Span, b: Span) -> bool:
    """Return whether two spans are of one contract. An unknown venue is any venue but the synthetic one."""
    venues = {a["venue"], b["venue"]}
    return a["symbol"] == b["symbol"] and (len(venues) == 1 or ("" in venues and "synthetic" not in venues))


def shared_part(a: Span, b: Span) -> float:
    """Return the part of the shorter span that two spans of one contract share, 0 to 1."""
    common = min(a["last"], b["last"]) - max(a["first"], b["first"])
    shorter = min(a["last"] - a["first"], b["last"] - b["first"])
    return common / shorter if same_symbol(a, b) and common > 0 and shorter > 0 else 0.0


def spans_match(a: Sequence[Span], b: Sequence[Span], least: float = LEAST_OVERLAP) -> bool:
    """Return whether any span of one look shares so large a part with any of the other."""
    return any(shared_part(x, y) >= least for x in a for y in b)


def spans_touch(a: Sequence[Span], b: Sequence[Span]) -> bool:
    """Return whether two looks share any moment of one contract."""
    return any(shared_part(x, y) > 0 for x in a for y in b)


_opened: set[str] = set()
"""The spans that this process has entered as opened."""


def enter_opened(source: str, split: str, spans: Sequence[Span], ledger: Ledger | None = None) -> None:
    """Enter that a sealed split was loaded, once for each process and ledger."""
    ledger = ledger or Ledger()
    key = json.dumps([str(ledger.path), split, list(spans)], sort_keys=True)
    if key not in _opened:
        _opened.add(key)
        ledger.append({"kind": "opened", "source": source, "split": split, "spans": list(spans)})
