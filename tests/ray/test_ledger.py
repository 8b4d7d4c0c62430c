"""Planned rows through storage and a pool: blocks, replays, and what a driver leaves behind."""

import errno
import io
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

import ray
from ray_jobs.ledger import Worker, numbers_for_calls, run_planned
from reasonembed.artifacts import TODO, Artifact
from reasonembed.blocks import write_blocks
from reasonembed.config import PoolConfig
from reasonembed.errors import QualityError, StorageError, explain
from reasonembed.progress import Reporter
from reasonembed.remixer.annotate import PAIRS, query_blocks
from reasonembed.storage import Place

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        ("status", pa.string()),
        ("process", pa.int64()),
    ]
)


class Driver:
    """Stands in for a `Job`."""

    def __init__(self, owner, *, retry=()):
        from rich.console import Console

        self.owner, self.retry = str(owner), frozenset(retry)
        self.reporter = Reporter(Console(quiet=True))


class Maps:
    """Notes every block in a file; may end its process with the first block of some queries."""

    def __init__(self, log, *, status="ok", poison=()):
        self.log, self.status, self.poison = Path(log), status, poison

    def __call__(self):
        return self.map

    def map(self, block):
        keys = [f"{row['query_id']}|{row['doc_id']}" for row in block.to_pylist()]
        with self.log.open("a") as stream:
            stream.write("".join(f"{key}\n" for key in keys))
        for query in set(self.poison) & {key.partition("|")[0] for key in keys}:
            mark = self.log.with_name(f"poisoned-{query}")
            if not mark.exists():
                mark.touch()
                os._exit(1)
        columns = {"status": [self.status] * len(keys), "process": [os.getpid()] * len(keys)}
        return pa.table({name: block[name] for name in ("query_id", "doc_id")} | columns)


def artifact(folder):
    return Artifact(folder, schema=SCHEMA, key=("query_id", "doc_id"), name="pairs")


def pairs(queries, documents=3):
    rows = [{"query_id": f"q{q}", "doc_id": f"d{d}"} for q in queries for d in range(documents)]
    return pa.Table.from_pylist(rows, schema=PAIRS)


def computed(log):
    return Counter(log.read_text().split()) if log.exists() else Counter()


@pytest.fixture
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
             object_store_memory=100_000_000)  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().target_max_block_size = None
    yield
    ray.shutdown()


def test_blocks_of_a_stream_are_those_of_the_whole(tmp_path):
    whole = pa.concat_tables([pairs(range(40), 7), pairs(range(40, 44), 30), pairs([44], 1)])
    for rows in (1, 5, 16, 1_000):
        for size in (1, 3, 50):
            stream = (whole.slice(i, size) for i in range(0, whole.num_rows, size))
            blocks = write_blocks(
                Place(tmp_path), stream, keep=lambda table: table, rows=rows, cut=query_blocks
            )
            found = [blocks.read(number) for number in range(len(blocks))]
            assert [one.to_pylist() for one in found] == [
                one.to_pylist() for one in query_blocks(whole, rows)
            ]
            assert (blocks.planned, blocks.rows) == (whole.num_rows, whole.num_rows)
    (left,) = (tmp_path / TODO).iterdir()  # each attempt of one driver has deleted the last one's
    assert left.name == blocks.place.name
    write_blocks(Place(tmp_path), whole, keep=lambda table: table, rows=9, owner="another")
    assert len(list((tmp_path / TODO).iterdir())) == 2


def test_nothing_to_do_is_no_block(tmp_path):
    for planned in (pairs([]), [], [pairs([1])]):
        blocks = write_blocks(
            Place(tmp_path), planned, keep=lambda table: table.slice(0, 0), rows=2
        )
        assert (len(blocks), blocks.rows) == (0, 0)


@pytest.mark.parametrize("count", [0, 1, 5, 1_024, 3_000, 156_250])
def test_numbers_are_cut_into_calls(count):
    calls = [call["blocks"].to_pylist()[0] for call in numbers_for_calls(count, in_flight=8)]
    assert [number for call in calls for number in call] == list(range(count))
    assert all(len(call) == 1 for call in calls[-min(count, 1_024) :])
    assert len(calls) <= min(count, 8_000)


def test_a_repeated_block_finds_its_commit(tmp_path):
    log, out = tmp_path / "log", artifact(tmp_path / "pairs")
    blocks = write_blocks(out.place, pairs([1, 2]), keep=lambda table: table, rows=3)
    noted = []

    def worker():
        return Worker(
            make=Maps(log), blocks=blocks, artifact=out, label="x",
            on_commit=lambda label, table, seconds: noted.append((label, table.num_rows)),
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_jobs.ledger.on_this_node", lambda make: make)
        both = pa.table({"blocks": [[0, 1]]})
        assert worker()(both)["rows"].to_pylist() == [3, 3]
        assert worker()(pa.table({"blocks": [[1]]}))["rows"].to_pylist() == [3]
    assert computed(log) == Counter(dict.fromkeys(computed(log), 1)) and len(computed(log)) == 6
    assert len(out.commits()) == 2 and noted == [("x", 3)] * 2


def test_who_ends_late_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.ledger.on_this_node", lambda make: make)
    out, numbers = artifact(tmp_path / "pairs"), pa.table({"blocks": [[0]]})
    blocks = write_blocks(out.place, pairs([1]), keep=lambda table: table, rows=3)

    def straggler(block):  # its block is repeated elsewhere before it ends
        Worker(make=Maps(tmp_path / "log"), blocks=blocks, artifact=out, label="x")(numbers)
        return Maps(tmp_path / "log", status="error").map(block)

    late = Worker(make=lambda: straggler, blocks=blocks, artifact=out, label="x")(numbers)
    assert out.statuses() == {"ok": 3} and late["rows"].to_pylist() == [3]


def test_only_what_cannot_be_written_is_told_as_such(tmp_path, monkeypatch):
    def unreadable():
        yield pairs([1])
        raise StorageError("cannot read seeds")

    with pytest.raises(StorageError, match=r"^cannot read seeds$"):
        write_blocks(Place(tmp_path), unreadable(), keep=lambda table: table, rows=1)

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 1_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    opened = "reasonembed.blocks._Writer._opened"
    monkeypatch.setattr(opened, lambda self: pa.PythonFile(Full(), mode="w"))
    with pytest.raises(StorageError, match=r"cannot write .*_todo: the disk is full"):
        write_blocks(Place(tmp_path), pairs(range(99)), keep=lambda table: table, rows=9)


@pytest.mark.timeout(240)
def test_a_pool_commits_what_is_missing(tmp_path, cluster):
    log, out = tmp_path / "log", artifact(tmp_path / "pairs")
    pool = PoolConfig(min_actors=2, max_actors=2, batch_rows=3, num_cpus=0.5)
    driver, plan = Driver(tmp_path), pairs(range(8))
    # An actor that dies takes the blocks with it that it had begun, and no others.
    poisoned = Maps(log, poison=("q1", "q4"))
    assert run_planned(driver, plan, out, poisoned, pool, label="x", cut=query_blocks) == 24
    assert out.missing(plan).num_rows == 0 and not (tmp_path / "pairs" / TODO).exists()
    assert sum(commit.rows for commit in out.commits()) == 24
    again = [key for key, count in computed(log).items() if count > 1]
    assert {key.partition("|")[0] for key in again} == {"q1", "q4"}
    # The same plan again, as a stream: nothing. A longer one: what is new, on overlapping actors.
    more = (pairs([number]) for number in range(10))
    assert run_planned(driver, plan, out, Maps(log), pool, label="x") == 0
    assert run_planned(driver, more, out, Maps(log), pool, label="x", overlap=2) == 6
    assert computed(log).total() == 24 + 6 + 6
    # Failed rows are computed again where that is asked for.
    failing = artifact(tmp_path / "failing")
    run_planned(driver, plan, failing, Maps(log, status="error"), pool, label="x")
    assert run_planned(driver, plan, failing, Maps(log), pool, label="x") == 0
    retry = Driver(tmp_path, retry=["error"])
    assert run_planned(retry, plan, failing, Maps(log), pool, label="x") == 24
    assert failing.statuses() == {"ok": 24}


class _Refused:
    def __call__(self):
        raise QualityError("no such model")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_a_stage_refuses_is_said_and_many_parts_are_merged(tmp_path, cluster):
    pool = PoolConfig(batch_rows=1, num_cpus=0.5)
    with pytest.raises(Exception, match="no such model") as caught:
        run_planned(Driver(tmp_path), pairs([1]), artifact(tmp_path / "a"), _Refused(), pool,
                    label="x")  # fmt: skip
    message, code = explain(caught.value)
    assert (message, code) == ("no such model", 3)
    out = artifact(tmp_path / "pairs")
    plan = pairs(range(201))
    run_planned(Driver(tmp_path), plan, out, Maps(tmp_path / "log"), pool, label="x")
    assert len(out.commits()) == 1 and out.missing(plan).num_rows == 0
    # Where another driver may write as well, nothing is merged.
    shared = artifact(tmp_path / "shared" / "pairs")
    run_planned(Driver(tmp_path / "run"), pairs(range(168)), shared, Maps(tmp_path / "log"), pool,
                label="x")  # fmt: skip
    assert len(shared.commits()) == 504
