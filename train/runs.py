"""stub"""

import dataclasses
import json
import pathlib


def find_run(name, folder="runs"):
    p = pathlib.Path(name)
    if p.is_dir():
        return p
    if (pathlib.Path(folder) / name).is_dir():
        return (pathlib.Path(folder) / name).resolve() if name == "latest" else pathlib.Path(folder) / name
    raise ValueError(f"{name}: no such run")


@dataclasses.dataclass(frozen=True)
class Run:
    path: pathlib.Path

    def config(self):
        return json.loads((self.path / "config.json").read_text())

    def settings(self):
        return self.config()["settings"]
