"""The job around training, with a stand-in for Ray: nothing is started."""

import math
from types import SimpleNamespace

import pytest

from ray_jobs import train
from reasonembed.artifacts import StageDirectory
from reasonembed.config import TrainRuntime
from reasonembed.errors import ConfigError
from reasonembed.redapter.log import TrainLog
from reasonembed.redapter.stepping import take_steps
from reasonembed.storage import Place


def test_a_checkpoint_is_registered_before_trackers_are_asked(tmp_path, monkeypatch):
    order = []
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(train.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(train.ray.train, "get_checkpoint", lambda: None)

    def register(metrics, saved, kept):
        # The line is there already: a run that goes on from this checkpoint takes no step twice.
        assert [row["step"] for row in TrainLog(tmp_path / "log.jsonl").steps()] == [0.0]
        order.append("registered")

    monkeypatch.setattr(train, "_register", register)
    trackers = SimpleNamespace(
        write=lambda metrics: order.append("tracked"), close=lambda: order.append("closed")
    )
    train.in_worker(
        lambda *, report, **_: report({"step": 0.0, "loss": 1.0}, SimpleNamespace()),
        storage=Place(tmp_path),
        folder=tmp_path,
        trackers=trackers,
    )
    assert order == ["registered", "tracked", "closed"]


@pytest.mark.parametrize(("until", "saved"), [(1_003.0, [3]), (1_004.0, []), (math.inf, [])])
def test_a_training_ends_by_a_checkpoint_when_its_time_is_over(tmp_path, monkeypatch, until, saved):
    """A clock second a step, four of them; the last one needs no other end."""
    clock, registered, closed = iter(range(1_001, 1_009)), [], []
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(train.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(train.ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(train.ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(train, "broadcast_from_rank_zero", lambda value: value)
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(train, "_register", lambda metrics, saved, kept: registered.append(saved))

    def loop(*, report, is_leaving, **_):
        checkpoints = SimpleNamespace(
            forget_after=lambda step: None,
            save=lambda done: SimpleNamespace(done=done, wait=lambda: None),
        )
        take_steps(
            lambda step: {"step": float(step), "loss": 1.0},
            checkpoints,
            start=0,
            total=4,
            runtime=TrainRuntime(checkpoint_every=10),
            report=report,
            is_leaving=is_leaving,
        )

    train.in_worker(
        loop,
        storage=Place(tmp_path),
        folder=tmp_path,
        trackers=SimpleNamespace(write=lambda metrics: None, close=lambda: closed.append(True)),
        until=until,
    )
    assert [one.done for one in registered] == (saved or [4]) and closed
    assert len(TrainLog(tmp_path / "log.jsonl").steps()) == (saved or [4])[-1]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 3),
        ({"num_workers": 4, "min_workers": 2}, 10),
        ({"num_workers": 4, "min_workers": 2, "max_failures": 0}, 0),
        ({"max_failures": -1}, -1),
    ],
)
def test_more_failures_are_borne_where_machines_may_go(settings, limit):
    assert train._max_failures(TrainRuntime.model_validate(settings)) == limit


class FakeRun:
    """A run whose training has an identity; begins as `Run` does while it grows."""

    def __init__(self, folder, *, identity):
        self.dir, self._identity = folder, {"settings": identity}
        self.place = Place(folder)
        section = SimpleNamespace(train=None)
        self.config = SimpleNamespace(train=None, runtime=section)

    def directory(self, stage):
        return StageDirectory(self.dir / stage, name=stage)

    def identity(self, stage):
        return self._identity


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A folder whose training is done; samples are not to be read again for it."""
    directory = StageDirectory(tmp_path / "train", name="train")
    directory.begin({"settings": 1})
    directory.finish({"steps": 7})

    def refuse(job, artifact):
        raise ConfigError("was read")

    monkeypatch.setattr(train, "finished_samples", lambda folder: None)
    monkeypatch.setattr(train, "_planned", refuse)
    return tmp_path


def test_a_finished_training_reads_no_samples(finished):
    job = SimpleNamespace(run=FakeRun(finished, identity=1))
    assert train.run(job) == {"steps": 7}


def test_what_is_refused_discards_no_finished_training(finished):
    job = SimpleNamespace(run=FakeRun(finished, identity=2))
    with pytest.raises(ConfigError, match="was read"):
        train.run(job)
    assert StageDirectory(finished / "train", name="train").finished() == {"steps": 7}
