"""The event files that TensorBoard reads."""

import pathlib
import struct
import sys

import pytest

from train.hooks import RunInfo
from train.hooks.tensorboard import TensorBoard

RUN = RunInfo(pathlib.Path("runs/one"), "btc-1h", "MLP", "cpu", 8, 1000, 0, 0, 1.0)


def read_events(folder: pathlib.Path) -> list:
    """All events of the folder's files: records of length, checksum, data, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs pip install 'perpjax[tensorboard]'")
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def read_points(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    return [(v.tag, e.step, v.simple_value) for e in read_events(folder) for v in e.summary.value]


def test_metrics_and_evaluations_are_written_over_steps(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs pip install 'perpjax[tensorboard]'")
    with TensorBoard(tmp_path / "new") as hook:
        hook.on_start(RUN)
        hook.on_updates([{"update": u, "steps": 100 * u, "kl": 0.5 * u} for u in (1, 2)])
        hook.on_evaluation({"update": 2, "steps": 200, "windows": 4, "best": True, "closed_return": 0.25})
    assert read_points(tmp_path / "new") == [
        ("train/kl", 100, 0.5),
        ("train/kl", 200, 1.0),
        ("validation/windows", 200, 4.0),
        ("validation/closed_return", 200, 0.25),
    ]


def test_a_resumed_session_hides_later_points(tmp_path):
    """TensorBoard drops earlier points at or after the step of a session's start."""
    pytest.importorskip("tensorboardX", reason="needs pip install 'perpjax[tensorboard]'")
    hook = TensorBoard(tmp_path)
    hook.on_start(RUN._replace(first_update=5, first_step=500))
    hook.on_end("done")
    starts = [e for e in read_events(tmp_path) if e.session_log.status == e.session_log.START]
    assert [e.step for e in starts] == [501]


def test_without_tensorboardx_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"needs tensorboardX: pip install 'perpjax\[tensorboard\]'"):
        TensorBoard(tmp_path)
