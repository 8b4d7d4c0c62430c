import math
import struct
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from reasonembed.errors import ConfigError
from reasonembed.redapter import trackers
from reasonembed.redapter.trackers import Trackers, require, tag


def events(folder):
    """All events of TensorBoard's files: length, check sum, bytes, check sum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = proto.Event()
            event.ParseFromString(data[place + 12 : place + 12 + length])
            found.append(event)
            place += length + 16
    return found


def scalars(folder):
    return {
        (value.tag, event.step): value.simple_value
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def test_tensorboard_holds_every_finite_figure(tmp_path):
    pytest.importorskip("tensorboardX")
    made = Trackers(["tensorboard"], directory=tmp_path, settings={"train.seed": 1})
    made.write({"step": 0.0, "loss": 2.0, "batch": 7.0, "grad_norm": math.nan})
    made.write({"step": 1.0, "loss": 1.5, "held_out_ndcg@10": 0.25, "intensity_max": 5.0})
    made.close()
    assert scalars(tmp_path / "tensorboard") == {
        ("train/loss", 0): 2.0,
        ("train/loss", 1): 1.5,
        ("held_out/ndcg_at_10", 1): 0.25,
        ("intensity/max", 1): 5.0,
    }


def test_steps_taken_again_after_a_restart_hide_the_first_ones(tmp_path):
    pytest.importorskip("tensorboardX")
    for first in (0, 2):
        made = Trackers(["tensorboard"], directory=tmp_path, settings={})
        for step in range(first, first + 3):
            made.write({"step": float(step), "loss": 1.0})
        made.close()
    starts = [
        event.step
        for event in events(tmp_path / "tensorboard")
        if event.HasField("session_log") and event.session_log.status == 1
    ]
    assert starts[-1] == 2  # TensorBoard drops what was written from this step on before


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def test_wandb_goes_on_under_the_same_id(tmp_path, monkeypatch):
    begun, noted = [], []
    run = SimpleNamespace(
        log=lambda figures, step: noted.append((step, figures)), finish=lambda: noted.append("end")
    )
    module(monkeypatch, "wandb", init=lambda **options: begun.append(options) or run)
    require(["wandb"])
    for step in (0, 1):
        made = Trackers(["wandb"], directory=tmp_path / "train", settings={"train.seed": 1})
        made.write({"step": float(step), "loss": 2.0})
        made.close()
    assert noted == [(0, {"train/loss": 2.0}), "end", (1, {"train/loss": 2.0}), "end"]
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow" and begun[0]["name"] == tmp_path.name
    assert begun[0]["config"] == {"train.seed": 1}


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    calls = []

    def start_run(**options):
        calls.append(("start", options))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    module(
        monkeypatch,
        "mlflow",
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=start_run,
        log_params=lambda params: calls.append(("params", params)),
        log_metrics=lambda figures, step: calls.append((step, figures)),
        end_run=lambda: calls.append("end"),
    )
    for step in (0, 1):
        made = Trackers(["mlflow"], directory=tmp_path, settings={"a": 1})
        made.write({"step": float(step), "loss": 2.0})
        made.close()
    assert calls == [
        ("experiment", "reasonembed"),
        ("start", {"run_name": tmp_path.parent.name}),
        ("params", {"a": 1}),
        (0, {"train/loss": 2.0}),
        "end",
        ("experiment", "reasonembed"),
        ("start", {"run_id": "r1"}),
        (1, {"train/loss": 2.0}),
        "end",
    ]


def broken_mlflow(monkeypatch, *, at):
    """A module whose server is away from one call on; returns the names of the calls."""
    calls = []

    def call(name, answer=None):
        def made(*_, **__):
            calls.append(name)
            if name == at:
                raise ConnectionError(f"no server for {name}")
            return answer

        return made

    run = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    names = ("set_experiment", "log_params", "log_metrics", "end_run")
    content = {name: call(name) for name in names} | {"start_run": call("start_run", run)}
    module(monkeypatch, "mlflow", **content)
    return calls


@pytest.mark.parametrize("at", ["set_experiment", "log_metrics", "end_run"])
def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(tmp_path, monkeypatch, caplog, at):
    noted = []
    run = SimpleNamespace(
        log=lambda figures, step: noted.append(step), finish=lambda: noted.append("end")
    )
    module(monkeypatch, "wandb", init=lambda **_: run)
    calls = broken_mlflow(monkeypatch, at=at)
    made = Trackers(["mlflow", "wandb"], directory=tmp_path, settings={})
    for step in range(3):
        made.write({"step": float(step), "loss": 2.0})
    made.close()
    assert noted == [0, 1, 2, "end"]
    assert calls.count(at) == 1 and calls[-1] == at  # it is not asked again
    (record,) = caplog.records  # said once, with the cause
    assert record.levelname == "WARNING" and "mlflow" in record.message
    assert f"no server for {at}" in caplog.text


def test_a_missing_package_is_named_before_training(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="asks for mlflow, but mlflow is not installed"):
        require(["mlflow"])
    with pytest.raises(ConfigError, match="tensorboardX or tensorboard is not installed"):
        require(["tensorboard"])
    require([])


def test_trackers_that_were_never_used_write_nothing(tmp_path):
    made = Trackers(["tensorboard"], directory=tmp_path, settings={})
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_tags_are_grouped_and_have_no_signs_that_trackers_refuse():
    assert tag("held_out_ndcg@10") == "held_out/ndcg_at_10"
    assert tag("held_out_start_ndcg@10") == "held_out/start_ndcg_at_10"
    assert tag("intensity_median") == "intensity/median"
    assert tag("tokens_per_s") == "train/tokens_per_s"
