"""Compiled programs on disk, so that the next process of a command loads them instead of compiling them.

JAX keeps the entries and chooses their names: hashes of the program, of the options and of jaxlib. This module chooses
the folder. XLA compiles for one processor and one number of cores, so each kind of machine has a folder of its own.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import stat
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator

import jax
import jaxlib
import numpy as np

VARIABLE = "PERPJAX_CACHE"
"""Environment variable: 0 turns the cache off, another value is the folder of the cache."""
OFF = ("", "0", "false", "no", "off")
LARGEST = 2**30
"""Bytes of all machines' entries; the least recently used ones beyond are removed."""
CHECKED, PROBED = "checked", "probed"
"""Files in a machine's folder: the time of the last check of the entries, and the result of the probe."""
LOUD, QUIET, REJECTED = "loud", "quiet", "rejected"


def use_cache(wanted: bool = True) -> pathlib.Path | None:
    """Keep compiled programs in the user's cache folder, and load them from it.

    Nothing changes if JAX has a folder already, such as that of JAX_COMPILATION_CACHE_DIR. A folder that cannot be
    written, or that another user may write to, is not used: programs are code.

    Args:
      wanted: False for no cache.

    Returns:
      The folder, or None without a cache.
    """
    if not wanted or not jax.config.jax_enable_compilation_cache:
        return None
    if (there := jax.config.jax_compilation_cache_dir) is not None:
        return pathlib.Path(there)
    if (base := find_base()) is None:
        return None
    folder = base / f"{jaxlib.__version__}-{describe_machine()}"
    try:
        for part in (base, folder):
            _make_private(part)
        _remove_damaged(folder)
        _remove_oldest(base, LARGEST)
    except OSError:
        return None
    # Each is followed by a compilation: a damaged entry, a full disk.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    found = _probe_once(folder)
    if found == REJECTED:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if found == LOUD:
        _silence_loader()
    return folder


def find_base() -> pathlib.Path | None:
    """Return the folder of all machines' entries, or None if the user wants none or has no home."""
    if (value := os.environ.get(VARIABLE)) is not None:
        return None if value.strip().lower() in OFF else pathlib.Path(value).expanduser().absolute()
    try:
        if sys.platform == "darwin":
            return pathlib.Path.home() / "Library" / "Caches" / "perpjax"
        if sys.platform == "win32":
            return pathlib.Path(os.environ["LOCALAPPDATA"]) / "perpjax" / "cache"
        wanted = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (wanted if wanted.is_absolute() else pathlib.Path.home() / ".cache") / "perpjax"
    except (RuntimeError, KeyError):
        return None


def describe_machine() -> str:
    """Return a hash of everything about the machine for which XLA compiles: processor, instructions, cores."""
    facts = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        # Of the first core. "model name" and "flags" on x86, "CPU part" and "Features" on ARM.
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        wanted = ("model", "model name", "cpu family", "flags", "Features", "CPU part", "CPU implementer")
        facts += [line for line in first.splitlines() if line.split(":")[0].strip() in wanted]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts += [str(cores), *(os.environ.get(name, "") for name in ("NPROC", "PJRT_NPROC"))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _make_private(folder: pathlib.Path) -> None:
    """Make a folder with mode 0700, or give it to one that exists.

    Raises:
      OSError: it cannot be made or written, or it belongs to others, or others may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "geteuid"):
        facts = folder.stat()
        if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder}: others may write to it")
        folder.chmod(0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be written")


def _remove_damaged(folder: pathlib.Path) -> None:
    """Remove entries that a crash or a full disk has cut short. JAX would not write them again.

    Each entry is looked at once, by the first process after the one that has written it.
    """
    stamp, began = folder / CHECKED, time.time()
    last = stamp.stat().st_mtime if stamp.exists() else 0.0
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            if entry.stat().st_mtime >= last and not _is_whole(entry.read_bytes()):
                entry.unlink()
    stamp.touch()
    os.utime(stamp, (began, began))


def _is_whole(entry: bytes) -> bool:
    """Whether JAX can unpack an entry. It packs with zstd if there is one, else with zlib."""
    if entry.startswith(b"\x28\xb5\x2f\xfd"):
        return True  # too short, it fails to unpack: one more compilation in each process
    try:
        return len(zlib.decompress(entry)) > 0
    except zlib.error:
        return False


def _remove_oldest(base: pathlib.Path, most: int) -> None:
    """Remove the entries that were not read or written for the longest time, until the others are small enough."""
    found = []
    for path in base.glob("*/*-cache"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        left -= size


def _probe_once(folder: pathlib.Path) -> str:
    """Return whether XLA loads a stored program of this machine in silence, with an error message, or not at all.

    For some processors XLA calls its own programs those of another machine: it compares the instructions in use with
    all instructions, and takes a preference, such as "prefer-no-gather", for an instruction.
    """
    known = folder / PROBED
    with contextlib.suppress(OSError):
        if (text := known.read_text()) in (LOUD, QUIET, REJECTED):
            return text
    with warnings.catch_warnings(record=True) as refused, _catch_errors() as said:
        warnings.simplefilter("always")
        try:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                for _ in range(2):
                    jax.jit(lambda x: x * 2 + 1).lower(np.zeros(8, np.float32)).compile()
        except RuntimeError:  # JAX without its CPU
            return QUIET
    complaints = " ".join(str(x.message) for x in refused)
    if "Error writing persistent compilation cache" in complaints:
        return QUIET  # a full disk: the next process asks again
    if "Error reading persistent compilation cache" in complaints:
        found = REJECTED
    else:
        found = LOUD if b"machine type" in said.lower() else QUIET
    with contextlib.suppress(OSError):
        known.write_text(found)
    return found


@contextlib.contextmanager
def _catch_errors() -> Iterator[bytearray]:
    """A context in which descriptor 2 leads to a file; afterwards the bytes hold its content."""
    said = bytearray()
    try:
        before = os.dup(2)
    except OSError:  # closed
        yield said
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said += file.read()


def _silence_loader() -> None:
    """Let XLA's C++ log nothing but the last words of a crash. Its errors are exceptions of Python as before."""
    with contextlib.suppress(ImportError, AttributeError):
        from jaxlib import utils

        utils.absl_set_min_log_level(3)
