"""A run folder, read with `json` and `pathlib` alone: no import here loads JAX. `train.runs` is the way in."""

import dataclasses
import datetime
import difflib
import json
import os
import pathlib
import re
from typing import Any

FORMAT = 1
"""Version of config.json that is read here."""
CONFIG, METRICS, EVALUATIONS, CLOSING = "config.json", "metrics.jsonl", "evaluations.jsonl", "evaluation.json"
CHECKPOINTS = "checkpoints"
FORMER_NAMES = {"hold": "flat"}
"""Names of policies in the files of older runs, and the names now."""
LATEST = "latest"
"""Link to the newest run, beside the runs. Without links in the file system it is a file with the name."""

_SHOWN = 5
_MADE_NAME = re.compile(r".+-seed-?\d+-\d{8}-\d{6}(-\d+)?")


def clean(value: Any) -> str:
    """Return a value as text for a terminal: control, format and other unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, finished or not. Every method reads the files anew, so a run that is still going on can be watched.

    Attributes:
      path: of the run folder; `find_run` finds it by name.
    """

    path: pathlib.Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    def config(self) -> dict[str, Any]:
        """Return config.json: settings, dataset, versions, device, commit, sessions.

        Raises:
          ValueError: the file is missing, damaged or of another format. The message names file and line.
        """
        path = self.path / CONFIG
        record = _read_object(path)
        if record is None:
            raise ValueError(f"{clean(path)}: missing")
        if record.get("format") != FORMAT:
            found = clean(json.dumps(record.get("format")))[:40]
            raise ValueError(f"{clean(path)}: format is {found}; this version of perpjax reads format {FORMAT}")
        return record

    def settings(self) -> dict[str, Any]:
        """Return the settings by name; those of the environment are in the dictionaries `env` and `params`.

        Raises:
          ValueError: as `config`.
        """
        return read_part(self.config(), "settings", self.path / CONFIG)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, one an update. A last line that is cut is left out.

        Raises:
          ValueError: a line is damaged. The message names file and line.
        """
        return _read_lines(self.path / METRICS)[0]

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines of evaluations.jsonl, one a look at the validation split; otherwise as `metrics`."""
        return _read_lines(self.path / EVALUATIONS)[0]

    def closing(self) -> dict[str, Any] | None:
        """Return evaluation.json, the comparison at the end of the run; None before the end.

        Raises:
          ValueError: it is damaged. The message names file and line.
        """
        closing = _read_object(self.path / CLOSING)
        if closing is not None:
            policies = read_part(closing, "policies", self.path / CLOSING)
            for name, figures in policies.items():
                if not isinstance(figures, dict):
                    raise ValueError(f"{clean(self.path / CLOSING)}: policy {clean(name)} is not a JSON object")
            closing["policies"] = {FORMER_NAMES.get(name, name): figures for name, figures in policies.items()}
        return closing

    def checkpoint_steps(self) -> list[int]:
        """Return the environment steps at which the kept checkpoints were saved, ascending."""
        folder = self.path / CHECKPOINTS
        if not folder.is_dir():
            return []
        names = [p.name for p in folder.iterdir() if p.is_dir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def status(self) -> str:
        """Return "finished", or the share of the steps that are done, such as "31 % done".

        Raises:
          ValueError: a file is damaged. The message names file and line.
        """
        return describe_status(self.settings(), self.metrics(), self.closing())

    def began(self) -> str:
        """Return the start of the run in UTC, such as "2026-11-28T08:15:49Z"; of a damaged one the folder's time."""
        try:
            began = str(self.config().get("began"))
            datetime.datetime.fromisoformat(began)
            return began
        except (ValueError, OSError):
            changed = datetime.datetime.fromtimestamp(self.path.stat().st_mtime, datetime.UTC)
            return f"{changed:%Y-%m-%dT%H:%M:%SZ}"

    def cuts(self) -> list[str]:
        """Return the files whose last line is cut, with the line: the run is writing it, or was killed.

        Raises:
          ValueError: another line is damaged.
        """
        found = ((name, _read_lines(self.path / name)[1]) for name in (METRICS, EVALUATIONS))
        return [f"{name}, line {line}: cut" for name, line in found if line is not None]


def find_run(name: str | os.PathLike[str], folder: str | os.PathLike[str] = "runs") -> pathlib.Path:
    """Return the folder of a run.

    Args:
      name: a path, the name of a run in `folder`, the beginning of one name only, or "latest".
      folder: holds the runs.

    Raises:
      ValueError: there is no such run, or several names begin so. The message names the nearest runs.
    """
    text, folder = os.fspath(name), pathlib.Path(folder)
    plain = text not in ("", ".", "..") and not re.search(r"[/\\]", text)
    if text == LATEST:
        return _follow_latest(folder)
    if plain and os.path.isdir(folder / text):
        return folder / text
    path = pathlib.Path(text)
    if text and path.name == LATEST and os.path.lexists(path):
        return _follow_latest(path.parent)
    if text and os.path.isdir(path):
        if _is_run(path):
            return path
        if not plain:
            raise ValueError(f"{clean(path)} is not the folder of a run: it has no {CONFIG}")
    names = [run.name for run in list_runs(folder)]
    found = [known for known in names if plain and known.startswith(text)]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise ValueError(f"{clean(text)} begins the names of {len(found)} runs: {_tell_runs(found, folder)}")
    near = difflib.get_close_matches(text, names, n=_SHOWN, cutoff=0.0)
    raise ValueError(f"no run {clean(text) or repr(text)}: {_tell_runs(near, folder)}")


def list_runs(folder: pathlib.Path) -> list[Run]:
    """Return the runs in a folder, the newest first; damaged ones, too."""
    if not os.path.lexists(folder):
        return []
    runs = [Run(path) for path in folder.iterdir() if path.name != LATEST and path.is_dir() and _is_run(path)]
    return sorted(runs, key=lambda run: (run.began(), run.name), reverse=True)


def read_latest(folder: pathlib.Path) -> str | None:
    """Return the name of the run to which `latest` points, or None. The run may be gone."""
    latest = folder / LATEST
    if latest.is_symlink():
        return pathlib.Path(os.readlink(latest)).name
    if latest.is_file():
        return latest.read_bytes()[:1000].decode(errors="replace").strip() or None
    return None


def describe_status(settings: dict[str, Any], metrics: list[dict[str, Any]], closing: dict[str, Any] | None) -> str:
    """Return the text of `Run.status`, from files that are already read.

    A finished run that goes on with more steps has an evaluation.json that is older than its metrics.
    """
    done = metrics[-1]["steps"] if metrics else 0
    if closing is not None:
        step = closing["policies"].get("final", {}).get("step")
        if not is_count(step) or step >= done:
            return "finished"
    total = count_total(settings)
    return f"{min(100, 100 * done // total)} % done" if total else "? % done"


def count_total(settings: dict[str, Any]) -> int | None:
    """Return the environment steps of the whole run: `total_steps` in whole updates; None without these settings."""
    total, *size = (settings.get(name) for name in ("total_steps", "num_envs", "num_steps"))
    if not all(is_count(x) for x in (total, *size)):
        return None
    update = size[0] * size[1]
    return total // update * update if 0 < update <= total else None


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_part(record: dict[str, Any], name: str, path: pathlib.Path) -> dict[str, Any]:
    """Return an object inside a JSON object.

    Raises:
      ValueError: it is missing or something else. The message names the file.
    """
    part = record.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"{clean(path)}: it has no {name}")
    return part


def _is_run(path: pathlib.Path) -> bool:
    files = (CONFIG, METRICS, EVALUATIONS, CLOSING, CHECKPOINTS)
    return bool(_MADE_NAME.fullmatch(path.name)) or any(os.path.lexists(path / name) for name in files)


def _follow_latest(folder: pathlib.Path) -> pathlib.Path:
    name = read_latest(folder)
    where = clean(folder / LATEST)
    names = [run.name for run in list_runs(folder)]
    if name is None:
        raise ValueError(f"{where} is not there: {_tell_runs(names, folder)}")
    if name not in names:
        raise ValueError(f"{where} points to {clean(name)}, which is not there: {_tell_runs(names, folder)}")
    return folder / name


def _tell_runs(names: list[str], folder: pathlib.Path) -> str:
    if not names:
        return f"{clean(folder)} has no runs; `python -m train.ppo` makes one"
    more = ", ..." if len(names) > _SHOWN else ""
    option = "" if folder == pathlib.Path("runs") else f" --dir {clean(folder)}"
    shown = ", ".join(clean(name) for name in names[:_SHOWN])
    return f"{clean(folder)} has {shown}{more}; see `python -m train.runs list{option}`"


def _read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """The JSON object of a file; None if there is no file."""
    if not os.path.lexists(path):
        return None
    return _parse(path.read_bytes(), path, 1)


def _read_lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], int | None]:
    """The objects of a file of JSON lines, and the number of its last line if that is cut."""
    if not os.path.lexists(path):
        return [], None
    *whole, last = path.read_bytes().split(b"\n")
    lines = [_parse_line(line, path, number) for number, line in enumerate(whole, 1)]
    if not last:
        return lines, None
    try:
        return [*lines, _parse_line(last, path, len(whole) + 1)], None
    except ValueError:
        return lines, len(whole) + 1


def _parse_line(text: bytes, path: pathlib.Path, number: int) -> dict[str, Any]:
    line = _parse(text, path, number)
    if not is_count(line.get("steps")):
        raise ValueError(f"{clean(path)}, line {number}: it has no number of steps")
    return line


def _parse(text: bytes, path: pathlib.Path, number: int) -> dict[str, Any]:
    """The object that begins in line `number` of a file."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        fault = "empty" if not text.strip() else f"not JSON: {error.msg}"
        raise ValueError(f"{clean(path)}, line {number + error.lineno - 1}: {fault}") from None
    except UnicodeDecodeError as error:
        line = number + text.count(b"\n", 0, error.start)
        raise ValueError(f"{clean(path)}, line {line}: not UTF-8 text") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
        raise ValueError(f"{clean(path)}, line {number}: not JSON of a run") from None
    if not isinstance(value, dict):
        raise ValueError(f"{clean(path)}, line {number}: not a JSON object")
    return value
