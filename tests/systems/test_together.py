"""Rows of several collections, asked of one engine: each where it belongs, none twice."""

from io import StringIO

import pyarrow as pa
import pytest
from rich.console import Console

from reasonembed.artifacts import Artifact
from reasonembed.config import LLMConfig, LLMPool, RuntimeConfig
from reasonembed.progress import Reporter
from reasonembed.systems.local import LocalWork
from reasonembed.systems.together import Share, ask_together

SCHEMA = pa.schema([("id", pa.string()), ("said", pa.string()), ("status", pa.string())])


class Make:
    """A stage that says whose it is; notes its blocks, and how often it was made."""

    def __init__(self, name, status="ok"):
        self.name, self.status, self.blocks, self.made = name, status, [], 0

    def __call__(self, engine):
        self.made += 1

        def map_block(block):
            ids = block.column("id").to_pylist()
            assert block.column_names == ["id"]
            self.blocks.append(ids)
            rows = [{"id": one, "said": self.name, "status": self.status} for one in ids]
            return pa.Table.from_pylist(rows, schema=SCHEMA)

        return map_block


@pytest.fixture
def artifacts(tmp_path):
    found = [Artifact(tmp_path / n, schema=SCHEMA, key=("id",), name=n) for n in "abc"]
    for one in found:
        one.begin({})
    return found


def ask(artifacts, makes, ids=("1234", "", "12"), **settings):
    shares = [
        Share(pa.table({"id": pa.array(list(own), pa.string())}), artifact, make)
        for own, artifact, make in zip(ids, artifacts, makes, strict=True)
    ]
    ask_together(
        shares,
        LLMConfig(model="scripted", engine="scripted"),
        pool=LLMPool(batch_rows=3),
        runtime=RuntimeConfig(),
        work=LocalWork(Reporter(Console(file=StringIO())), **settings),
        label="ask",
    )


def test_equal_ids_of_two_collections_are_kept_apart(artifacts):
    makes = [Make(name) for name in "abc"]
    ask(artifacts, makes)
    assert [make.blocks for make in makes] == [[["1", "2", "3"], ["4"]], [], [["1", "2"]]]
    assert [make.made for make in makes] == [1, 0, 1]
    said = [one.read().to_pylist() for one in artifacts]
    assert [(row["id"], row["said"]) for row in said[2]] == [("1", "c"), ("2", "c")]
    assert [len(rows) for rows in said] == [4, 0, 2]


def test_what_is_there_is_not_asked_again_unless_it_failed(artifacts):
    ask(artifacts, [Make("a"), Make("b"), Make("c", status="error")], ids=("12", "", "12"))
    before = len(artifacts[2].commits())
    makes = [Make(name) for name in "abc"]
    ask(artifacts, makes)
    assert [make.blocks for make in makes] == [[["3", "4"]], [], []]
    assert len(artifacts[2].commits()) == before
    ask(artifacts, makes, retry=frozenset({"error"}))
    assert makes[2].blocks == [["1", "2"]] and artifacts[2].statuses() == {"ok": 2}
    assert sum(commit.rows for commit in artifacts[2].commits()[before:]) == 2


def test_nothing_is_asked_of_no_collection():
    ask([], [], ids=())
