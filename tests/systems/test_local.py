import sys
import weakref
from io import StringIO
from types import SimpleNamespace

import pyarrow as pa
import pytest
from rich.console import Console

from reasonembed.artifacts import Artifact
from reasonembed.config import PoolConfig
from reasonembed.progress import Reporter
from reasonembed.systems.local import LocalWork

SCHEMA = pa.schema([("id", pa.string()), ("status", pa.string())])


class Make:
    """Makes a mapper that notes what it was asked; what it loads notes that it was closed."""

    def __init__(self, key="a", status="ok", fails_at=None):
        self.key, self._status, self._fails_at = key, status, fails_at
        self.blocks, self.loaded, self.closed = [], 0, 0

    def load(self):
        self.loaded += 1
        return self

    def close(self):
        self.closed += 1

    def mapper(self, loaded):
        def map_block(block):
            if len(self.blocks) == self._fails_at:
                raise RuntimeError("stopped")
            self.blocks.append(block.column("id").to_pylist())
            ids = block.column("id")
            return pa.table({"id": ids, "status": [self._status] * len(ids)}, schema=SCHEMA)

        return map_block

    def __call__(self):
        return self.mapper(self.load())


@pytest.fixture
def artifact(tmp_path):
    made = Artifact(tmp_path / "rows", schema=SCHEMA, key=("id",), name="rows")
    made.begin({})
    return made


def test_memory_that_torch_keeps_is_given_back_once_a_model_is_gone(artifact, monkeypatch):
    alive, seen = [], []

    class Model:
        pass

    class Loading(Make):
        def load(self):
            model = Model()
            model.itself = model  # as modules and their hooks, which only the collector frees
            alive.append(weakref.ref(model))
            return model

    cuda = SimpleNamespace(is_initialized=lambda: True, empty_cache=lambda: seen.append(alive[0]()))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    here = work()
    compute(here, artifact, Loading("a"), ids="a")
    compute(here, artifact, Make("b"), ids="b")
    assert seen == [None]
    monkeypatch.delitem(sys.modules, "torch")
    here.close()
    assert "torch" not in sys.modules


def compute(work, artifact, make, ids="abcdefg"):
    planned = pa.table({"id": list(ids)})
    return work.compute(planned, artifact, make, PoolConfig(batch_rows=3), label="rows")


def work(**settings):
    return LocalWork(Reporter(Console(file=StringIO())), **settings)


def test_blocks_are_committed_as_they_come(artifact):
    stopped = Make(fails_at=2)
    with pytest.raises(RuntimeError):
        compute(work(), artifact, stopped)
    assert stopped.blocks == [["a", "b", "c"], ["d", "e", "f"]]
    rest = Make()
    assert compute(work(), artifact, rest) == 1
    assert rest.blocks == [["g"]] and artifact.keys() == set("abcdefg")


def test_nothing_is_loaded_where_nothing_is_missing(artifact):
    compute(work(), artifact, Make())
    idle = Make()
    assert compute(work(), artifact, idle) == 0
    assert idle.loaded == 0


def test_failed_rows_are_computed_again_where_asked(artifact):
    compute(work(), artifact, Make(status="error"), ids="ab")
    assert compute(work(), artifact, Make(), ids="ab") == 0
    assert compute(work(retry=frozenset({"error"})), artifact, Make(), ids="ab") == 2
    assert artifact.statuses() == {"ok": 2}


def test_one_thing_is_loaded_at_a_time(artifact):
    here, first, same, other = work(), Make("a"), Make("a"), Make("b")
    for make, ids in ((first, "a"), (same, "b"), (other, "c")):
        compute(here, artifact, make, ids=ids)
    assert (first.loaded, same.loaded, other.loaded) == (1, 0, 1)
    assert first.closed == 1 and other.closed == 0
    here.close()
    assert other.closed == 1
