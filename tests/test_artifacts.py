import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import reasonembed.artifacts as artifacts_module
import reasonembed.keyset as keyset_module
import reasonembed.storage as storage_module
from reasonembed.artifacts import (
    TODO,
    Artifact,
    StageDirectory,
    differences,
    link_tree,
    locked,
)
from reasonembed.config import fingerprint
from reasonembed.errors import DriftError, SchemaError, StorageError, explain
from reasonembed.keyset import ENTRY, Digests, KeySet, content_of, digests
from reasonembed.schemas import REWRITES, embeddings, from_rows
from reasonembed.shards import Shard, ShardRecords
from reasonembed.storage import Place, append_json_line, json_lines

STATUSES = {"q1": "ok", "q2": "error", "q3": "truncated"}
IDENTITY = {"generate.seed": 42, "lengths": [{"min": 1}], "weights": "abc", "none": None}
PLANNED = pa.table({"query_id": ["q1", "q2", "q3", "q4"]})


def rows(statuses, *, text="r"):
    """Rewrites from {query_id: status}."""
    return from_rows(
        [
            {
                "query_id": query_id,
                "rewritten_query": text,
                "status": status,
                "detail": None,
                "finish_reason": None,
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "cached_tokens": 0,
                "tries": 1,
                "seed": 0,
                "model": "m",
            }
            for query_id, status in statuses.items()
        ],
        REWRITES,
        where="test",
    )


def ok(*query_ids, text="r"):
    return rows(dict.fromkeys(query_ids, "ok"), text=text)


def texts(artifact):
    table = artifact.read(columns=["query_id", "rewritten_query"])
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


@pytest.fixture
def artifact(tmp_path):
    return Artifact.declared(tmp_path / "rewrites", "rewrites")


class TestCommits:
    def test_rows_come_back_as_they_went_in_sorted_by_key(self, artifact):
        commit = artifact.commit("p1", ok("q2", "q1"))
        assert (commit.part, commit.rows, commit.statuses) == ("p1", 2, {"ok": 2})
        assert artifact.read() == ok("q1", "q2")
        assert artifact.commits() == [commit]

    def test_nothing_was_ever_written(self, artifact):
        assert artifact.read() == ok()
        assert artifact.commits() == []
        assert artifact.keys() == set()
        assert artifact.statuses() == {}
        assert artifact.missing(PLANNED) == PLANNED

    def test_columns_can_be_chosen(self, artifact):
        artifact.commit("p1", ok("q1"))
        table = artifact.read(columns=["status", "query_id"])
        assert table.column_names == ["status", "query_id"]
        assert artifact.read(columns=["status"]).column_names == ["status"]

    def test_an_order_of_commits_does_not_show(self, artifact, tmp_path):
        other = Artifact.declared(tmp_path / "other", "rewrites")
        for part in ("q1", "q2", "q3"):
            artifact.commit(part, ok(part))
        for part in ("q3", "q1", "q2"):
            other.commit(part, ok(part))
        assert artifact.read() == other.read()
        assert artifact.content() == other.content()

    def test_data_comes_before_its_commit(self, artifact, monkeypatch):
        written = []
        write = StageDirectory._write
        monkeypatch.setattr(
            StageDirectory,
            "_write",
            lambda self, path, data: (written.append(path), write(self, path, data)),
        )
        artifact.commit("p1", ok("q1"))
        assert [Path(path).parent.name for path in written] == ["data", "_commits"]

    def test_a_part_without_a_commit_is_invisible_and_is_made_again(self, artifact, monkeypatch):
        artifact.commit("p0", ok("q1"))
        with monkeypatch.context() as patch:
            patch.setattr(storage_module, "_write_durably", crash_on("_commits"))
            with pytest.raises(Killed):
                artifact.commit("p1", ok("q2", "q3"))
        assert (artifact_path(artifact) / "data" / "p1.parquet").is_file()
        assert artifact.keys() == {"q1"}
        todo = artifact.missing(PLANNED)
        assert todo.column("query_id").to_pylist() == ["q2", "q3", "q4"]
        artifact.commit("p2", ok(*todo.column("query_id").to_pylist()))
        assert artifact.read() == ok("q1", "q2", "q3", "q4")

    def test_a_crash_before_the_data_leaves_nothing(self, artifact, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(storage_module, "_write_durably", crash_on("data"))
            with pytest.raises(Killed):
                artifact.commit("p1", ok("q1"))
        assert artifact.keys() == set()

    def test_the_first_good_row_of_a_key_stays(self, artifact):
        """A straggler of a killed attempt must not replace what later stages have used."""
        artifact.commit("p9", ok("q1", "q2", text="old"))
        content = artifact.content()
        artifact.commit("p1", ok("q2", "q3", text="new"))
        assert texts(artifact) == {"q1": "old", "q2": "old", "q3": "new"}
        assert artifact.statuses() == {"ok": 3}
        artifact.commit("p2", rows({"q1": "error"}))
        assert texts(artifact)["q1"] == "old"
        assert artifact.content() != content

    @pytest.mark.parametrize(("ids", "expected"), [(["q2", "q9"], ["q2"]), ([], [])])
    def test_some_rows(self, artifact, ids, expected):
        artifact.commit("p1", ok("q1", "q2"))
        artifact.commit("p2", ok("q2", "q3"))
        wanted = pc.field("query_id").isin(pa.array(ids, pa.string()))
        found = artifact.read(only=wanted)
        assert found.column("query_id").to_pylist() == expected
        assert found.schema.equals(artifact.schema)

    def test_the_latest_row_counts_where_the_artifact_says_so(self, tmp_path):
        schema = pa.schema([pa.field("id", pa.string(), nullable=False), ("value", pa.int8())])
        for latest_wins, expected in ((False, 1), (True, 2)):
            folder = tmp_path / str(latest_wins)
            two = Artifact(folder, schema=schema, key=("id",), name="x", latest_wins=latest_wins)
            for value in (1, 2):
                two.commit(f"p{value}", pa.table({"id": ["a"], "value": [value]}))
            assert two.read().to_pylist() == [{"id": "a", "value": expected}]

    def test_history_holds_replaced_rows_too(self, artifact):
        artifact.commit("p1", ok("q1", "q2"))
        artifact.commit("p2", ok("q2"))
        assert artifact.history(columns=["query_id"]).to_pydict() == {
            "query_id": ["q1", "q2", "q2"]
        }

    def test_content_is_of_the_rows_that_are_read_and_not_of_the_parts(self, artifact, tmp_path):
        other = Artifact.declared(tmp_path / "other", "rewrites")
        artifact.commit("all", ok("q1", "q2", text="x"))
        other.commit("b", ok("q2", text="x"))
        other.commit("a", ok("q1", text="x"))
        other.commit("late", ok("q1", text="straggler"))
        assert artifact.content() == other.content()

    def test_a_part_that_is_committed_again_replaces_itself(self, artifact):
        artifact.commit("p1", ok("q1", "q2", text="first"))
        artifact.commit("p1", ok("q1", "q2", text="second"))
        assert len(artifact.commits()) == 1
        assert texts(artifact) == {"q1": "second", "q2": "second"}

    def test_a_key_of_two_columns(self, tmp_path):
        schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in "abc"])
        artifact = Artifact(tmp_path, schema=schema, key=("a", "b"), name="pairs")
        made = pa.table({"a": ["x", "x", "y"], "b": ["1", "2", "1"], "c": ["", "", ""]})
        artifact.commit("p1", made)
        planned = pa.table({"b": ["1", "2", "2"], "a": ["x", "x", "y"], "extra": [0, 1, 2]})
        assert artifact.missing(planned).to_pylist() == [{"b": "2", "a": "y", "extra": 2}]

    def test_rows_without_a_status_count_once_too(self, tmp_path):
        artifact = Artifact(tmp_path, schema=embeddings(2), key=("id",), name="vectors")
        vectors = pa.table({"id": ["a", "b"], "vector": [[1.0, 2.0], [3.0, 4.0]]})
        artifact.commit("p1", vectors)
        artifact.commit("p2", vectors)
        assert artifact.statuses() == {"ok": 2}
        assert artifact.read().column("vector").to_pylist() == [[1.0, 2.0], [3.0, 4.0]]
        assert artifact.keys(retry=["error"]) == {"a", "b"}

    def test_a_column_of_any_size_can_be_read(self, artifact, monkeypatch):
        artifact.commit("p1", ok("q1", "q3", text="x" * 100))
        artifact.commit("p2", ok("q2", "q4", text="y" * 100))
        whole = artifact.read()
        monkeypatch.setattr(artifacts_module, "_BLOCK_BYTES", 150)
        assert artifact.read() == whole
        assert artifact.read().column("rewritten_query").num_chunks == 4

    def test_content_does_not_know_of_files_and_chunks(self, artifact, monkeypatch):
        """A file names the version of the library that wrote it."""
        artifact.commit("p1", rows({"q1": "ok", "q3": "error"}, text="x" * 100))
        artifact.commit("p2", ok("q2", "q4", text="yé" * 50))
        before = artifact.content()
        monkeypatch.setattr(artifacts_module, "_BLOCK_BYTES", 150)
        assert artifact.read().column("status").num_chunks > 1
        assert artifact.content() == before
        write = pq.write_table
        monkeypatch.setattr(pq, "write_table", lambda *args, **more: write(
            *args, **more | {"compression": "none"}))  # fmt: skip
        assert artifact.content() == before

    def test_content_follows_the_rows(self, artifact):
        artifact.commit("p1", ok("q1"))
        before = artifact.content()
        artifact.commit("p2", ok("q2"))
        assert artifact.content() != before


class TestRefusals:
    def test_a_key_twice_in_a_part(self, artifact):
        with pytest.raises(SchemaError, match=r"part p1: keys occur twice: \['q1'\]"):
            artifact.commit("p1", pa.concat_tables([ok("q1"), ok("q2"), ok("q1")]))
        assert artifact.commits() == []

    def test_columns_that_are_not_declared(self, artifact):
        with pytest.raises(SchemaError, match=r"rewrites part p1: .*unknown columns \['more'\]"):
            artifact.commit("p1", ok("q1").append_column("more", [["x"]]))

    def test_a_committed_part_that_was_deleted(self, artifact):
        artifact.commit("p1", ok("q1"))
        (artifact_path(artifact) / "data" / "p1.parquet").unlink()
        with pytest.raises(StorageError, match=r"p1\.parquet is committed but cannot be read"):
            artifact.read()

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
    def test_a_committed_part_that_was_cut(self, artifact, keep):
        artifact.commit("p1", ok("q1", "q2"))
        file = artifact_path(artifact) / "data" / "p1.parquet"
        os.truncate(file, int(file.stat().st_size * keep))
        with pytest.raises(StorageError, match=r"p1\.parquet is committed but cannot be read"):
            artifact.read()

    def test_a_committed_part_with_other_rows(self, artifact):
        artifact.commit("p1", ok("q1", "q2"))
        artifact.commit("p2", ok("q3"))
        data = artifact_path(artifact) / "data"
        (data / "p2.parquet").replace(data / "p1.parquet")
        with pytest.raises(StorageError, match="1 rows, its commit says 2"):
            artifact.read()

    def test_a_committed_part_in_the_place_of_another(self, artifact):
        artifact.commit("p1", ok("q1"))
        artifact.commit("p2", ok("q2"))
        data = artifact_path(artifact) / "data"
        (data / "p2.parquet").replace(data / "p1.parquet")
        with pytest.raises(StorageError, match=r"p1\.parquet holds other rows"):
            artifact.read()

    def test_a_flipped_bit_in_a_page(self, artifact):
        artifact.commit("p1", ok("q1", "q2"))
        file = artifact_path(artifact) / "data" / "p1.parquet"
        column = pq.ParquetFile(file).metadata.row_group(0).column(0)
        raw = bytearray(file.read_bytes())
        raw[column.data_page_offset + column.total_compressed_size // 4] ^= 1
        file.write_bytes(raw)
        with pytest.raises(StorageError, match=r"p1\.parquet is committed but cannot be read"):
            artifact.read()

    @pytest.mark.parametrize("name", ["_stage.json", "_done.json", "_commits/p1.json"])
    def test_a_damaged_record(self, artifact, name):
        artifact.begin({"a": 1})
        artifact.finish({})
        artifact.commit("p1", ok("q1"))
        (artifact_path(artifact) / name).write_text('{"part": ')
        with pytest.raises(StorageError, match=f"{name} is damaged"):
            (artifact.stage(), artifact.finished(), artifact.commits())

    @pytest.mark.parametrize("name", ["_stage.json", "_commits/p1.json"])
    def test_a_record_of_another_version(self, artifact, name):
        artifact.begin({"a": 1})
        artifact.commit("p1", ok("q1"))
        file = artifact_path(artifact) / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"colour": "red"}))
        with pytest.raises(StorageError, match=f"{name} has fields of another version.*colour"):
            (artifact.stage(), artifact.commits())


class TestResume:
    @pytest.mark.parametrize(
        ("retry", "expected"),
        [
            ((), ["q4"]),
            (("error",), ["q2", "q4"]),
            (("error", "truncated"), ["q2", "q3", "q4"]),
            (("invalid",), ["q4"]),
        ],
    )
    def test_missing_is_what_was_planned_and_is_not_done(self, artifact, retry, expected):
        artifact.commit("p1", rows(STATUSES))
        missing = artifact.missing(PLANNED, retry=retry)
        assert missing.column("query_id").to_pylist() == expected

    def test_a_retried_row_is_done_once_its_newest_row_is_good(self, artifact):
        artifact.commit("p1", rows(STATUSES))
        artifact.commit("p2", ok("q2"))
        missing = artifact.missing(PLANNED, retry=["error", "truncated"])
        assert missing.column("query_id").to_pylist() == ["q3", "q4"]
        assert artifact.statuses() == {"ok": 2, "truncated": 1}

    def test_rows_beyond_the_plan_do_no_harm(self, artifact):
        artifact.commit("p1", ok("q1", "of another plan"))
        assert artifact.missing(PLANNED).num_rows == 3


class TestIdentity:
    def test_the_same_identity_is_let_in_again(self, artifact):
        artifact.begin(IDENTITY, version="1")
        artifact.begin(dict(reversed(IDENTITY.items())), version="2")
        stage = artifact.stage()
        assert (stage.name, stage.version, stage.identity) == ("rewrites", "1", IDENTITY)
        assert stage.fingerprint == fingerprint(IDENTITY)

    def test_another_identity_is_refused_with_both_values_of_each_field(self, artifact):
        artifact.begin(IDENTITY)
        artifact.commit("p1", ok("q1"))
        changed = IDENTITY | {"generate.seed": 43, "prompt": "new"}
        del changed["weights"]
        with pytest.raises(DriftError) as caught:
            artifact.begin(changed)
        message = str(caught.value)
        assert "  generate.seed: made with 42, now 43\n" in message
        assert "  prompt: made with '(absent)', now 'new'\n" in message
        assert "  weights: made with 'abc', now '(absent)'\n" in message
        assert "lengths" not in message
        assert "--fresh" in message
        assert artifact.stage().identity == IDENTITY

    def test_a_directory_without_a_result_changes_hands(self, artifact, tmp_path):
        """A wrong path or a limit that was too low shows before anything has been made."""
        directory = StageDirectory(tmp_path / "train", name="train")
        for output in (artifact, directory):
            output.begin(IDENTITY)
            output.begin({"another": 1})
            assert output.stage().identity == {"another": 1}
            output.finish({})
            with pytest.raises(DriftError):
                output.begin(IDENTITY)

    def test_where_two_shards_have_begun_it_does_not_change_hands(self, artifact):
        shards = ShardRecords(artifact.place)
        shards.begin(Shard(1, 2))
        artifact.begin(IDENTITY)
        artifact.begin({"another": 1})  # alone
        shards.begin(Shard(2, 2))
        with pytest.raises(DriftError, match="another: made with 1"):
            artifact.begin(IDENTITY)
        artifact.begin({"another": 1})

    def test_rows_without_an_identity_belong_to_nobody(self, artifact):
        artifact.commit("p1", ok("q1"))
        with pytest.raises(DriftError, match="holds rows, but not whose they are"):
            artifact.begin(IDENTITY)
        assert artifact.stage() is None

    def test_what_may_change_is_noted_and_the_rows_stay(self, artifact):
        artifact.begin({"input.a": 1, "b": 2})
        artifact.commit("p1", ok("q1"))
        artifact.begin({"input.a": 9, "b": 2}, may_change=lambda field: field == "input.a")
        assert artifact.stage().identity == {"input.a": 9, "b": 2}
        assert artifact.keys() == {"q1"}
        with pytest.raises(DriftError, match="b: made with 2, now 3"):
            artifact.begin({"input.a": 10, "b": 3}, may_change=lambda field: field == "input.a")
        assert artifact.stage().identity == {"input.a": 9, "b": 2}

    def test_differences_of_equal_identities(self):
        assert differences(IDENTITY, dict(IDENTITY)) == []

    def test_a_finished_stage_says_what_it_found(self, artifact):
        assert artifact.finished() is None
        artifact.finish({"rows": 3, "note": "é"})
        assert artifact.finished() == {"rows": 3, "note": "é"}

    def test_discard_leaves_nothing_and_can_be_repeated(self, artifact):
        artifact.begin(IDENTITY)
        artifact.commit("p1", ok("q1"))
        artifact.finish({})
        artifact.discard()
        assert not artifact_path(artifact).exists()
        artifact.discard()
        artifact.begin({"another": 1})
        assert artifact.read() == ok()

    @pytest.mark.parametrize("survivors", range(1, 6))
    def test_a_discard_that_was_killed_never_passes_old_rows_for_new(
        self, tmp_path, monkeypatch, survivors
    ):
        artifact = Artifact.declared(tmp_path / "rewrites", "rewrites")
        artifact.begin(IDENTITY)
        artifact.commit("p1", ok("q1"))
        artifact.finish({})
        artifact._fs = KillingFileSystem(artifact._fs, after=5 - survivors)
        with pytest.raises(Killed):
            artifact.discard()
        again = Artifact.declared(tmp_path / "rewrites", "rewrites")
        try:
            again.begin({"another": 1})
        except DriftError:
            pass  # it still says whose it is
        else:
            assert again.read() == ok()
            assert again.finished() is None


class TestStorage:
    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "run").write_text("I was here first")
        artifact = Artifact.declared(tmp_path / "run" / "rewrites", "rewrites")
        for attempt in (lambda: artifact.begin({}), lambda: artifact.commit("p1", ok("q1"))):
            with pytest.raises(StorageError, match="a part of this path is a file; choose another"):
                attempt()
        assert (tmp_path / "run").read_text() == "I was here first"

    @pytest.mark.parametrize(
        ("code", "cure"),
        [
            (errno.ENOSPC, "the disk is full; free space and run again"),
            (errno.EROFS, "read-only; choose another run_dir"),
            (errno.EACCES, "no permission to write here; choose another run_dir"),
            (errno.EIO, "Input/output error"),
        ],
    )
    @pytest.mark.parametrize("where", ["fsync", "replace"])
    def test_a_disk_that_fails(self, artifact, monkeypatch, code, cure, where):
        artifact.commit("p0", ok("q1"))

        def fail(*_):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), fail)
            with pytest.raises(StorageError, match=f"cannot write .*p1.*: .*{cure}"):
                artifact.commit("p1", ok("q2"))
        assert leftovers(artifact_path(artifact)) == []
        assert artifact.keys() == {"q1"}
        artifact.commit("p1", ok("q2"))  # with room again, it goes on
        assert artifact.keys() == {"q1", "q2"}

    def test_an_interrupt_leaves_no_temporary_file(self, artifact, monkeypatch):
        def interrupt(_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                artifact.commit("p1", ok("q1"))
        assert leftovers(artifact_path(artifact)) == []

    def test_what_a_killed_writer_left_is_not_read(self, artifact):
        artifact.commit("p1", ok("q1"))
        for folder in ("data", "_commits"):
            (artifact_path(artifact) / folder / ".tmp-p2.json-1").write_bytes(b"half")
            (artifact_path(artifact) / folder / ".tmp-p2.json").write_bytes(b"half")
        assert artifact.read() == ok("q1")

    def test_an_empty_record_is_none(self, artifact):
        """As a kill leaves it where a store makes an object before it fills it."""
        artifact.commit("p1", ok("q1"))
        for name in ("_commits/p2.json", "_stage.json", "_done.json"):
            (artifact.place / name).write(b"")
        assert [commit.part for commit in artifact.commits()] == ["p1"]
        assert artifact.committed("p2") is artifact.stage() is artifact.finished() is None
        artifact.commit("p2", ok("q2"))
        assert artifact.keys() == {"q1", "q2"}

    @pytest.mark.parametrize(
        ("said", "code"), [("AWS Error SLOW_DOWN", 75), ("AWS Error EXPIRED_TOKEN", 2)]
    )
    def test_a_store_that_fails_is_explained_wherever_it_is_asked(
        self, tmp_path, monkeypatch, said, code
    ):
        artifact = Artifact.declared(tmp_path / "rewrites", "rewrites")
        artifact.begin(IDENTITY)
        artifact.commit("p1", ok("q1"))

        def fail(*_, **__):
            raise OSError(said)

        reads = [artifact.read, lambda: list(artifact.rows())]
        with monkeypatch.context() as patch:
            patch.setattr(pq, "read_table", fail)
            patch.setattr(pq, "ParquetFile", fail)
            for attempt in reads:
                with pytest.raises(StorageError, match=said) as found:
                    attempt()
                assert explain(found.value)[1] == code
        artifact.place.fs = FailingListing(artifact.place.fs, said)
        directory = StageDirectory(tmp_path / "rewrites", name="train")
        directory.place.fs = artifact.place.fs
        asks = [*reads, artifact.commits, artifact.compact]
        for attempt in [*asks, lambda: directory.begin({"another": 1})]:
            with pytest.raises(StorageError, match=said) as found:
                attempt()
            assert explain(found.value)[1] == code

    def test_a_file_uri_is_a_local_path(self, tmp_path):
        by_uri = Artifact.declared(f"file://{tmp_path}/rewrites", "rewrites")
        by_uri.begin({"a": 1})
        by_uri.commit("p1", ok("q1"))
        assert Artifact.declared(tmp_path / "rewrites", "rewrites").read() == ok("q1")
        assert leftovers(tmp_path) == []

    def test_a_relative_path_is_fixed_when_it_is_given(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        artifact = Artifact.declared("rewrites", "rewrites")
        monkeypatch.chdir("/")
        artifact.commit("p1", ok("q1"))
        assert (tmp_path / "rewrites" / "data" / "p1.parquet").is_file()

    def test_folders_that_look_like_partitions_are_only_folders(self, tmp_path):
        artifact = Artifact.declared(tmp_path / "status=error" / "model=x", "rewrites")
        artifact.commit("p1", ok("q1"))
        assert artifact.read() == ok("q1")

    def test_an_unknown_kind_of_storage(self):
        with pytest.raises(StorageError, match="bogus://bucket/run is not a storage location"):
            Artifact.declared("bogus://bucket/run", "rewrites")

    @pytest.mark.parametrize("kind", ["mock", "subtree"])
    def test_a_store_without_rename(self, tmp_path, monkeypatch, kind):
        """What is not a local file system is written with one PUT."""
        if kind == "mock":
            store, root = pafs.FileSystem.from_uri("mock:///bucket")
        else:
            store, root = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "bucket"
        monkeypatch.setattr(storage_module, "_filesystem", lambda _: (store, f"{root}/rewrites"))
        artifact = Artifact.declared("s3://bucket/rewrites", "rewrites")
        artifact.begin({"a": 1})
        artifact.commit("p1", rows({"q1": "ok", "q2": "error"}))
        artifact.commit("p2", ok("q2"))
        again = Artifact.declared("s3://bucket/rewrites", "rewrites")
        assert again.read() == ok("q1", "q2")
        with pytest.raises(DriftError):
            again.begin({"a": 2})
        again.discard()
        assert again.stage() is None
        assert again.read() == ok()


class TestLinkTree:
    def test_a_copy_shares_the_bytes_and_not_the_future(self, artifact, tmp_path):
        artifact.begin({"a": 1})
        artifact.commit("p1", ok("q1"))
        (artifact_path(artifact) / "data" / ".tmp-p2").write_text("half")
        link_tree(artifact_path(artifact), tmp_path / "copy")
        copy = Artifact.declared(tmp_path / "copy", "rewrites")
        assert copy.read().equals(artifact.read())
        assert not (tmp_path / "copy" / "data" / ".tmp-p2").exists()
        copy.commit("p2", ok("q2"))
        copy.begin({"a": 2}, may_change=lambda field: True)
        assert artifact.keys() == {"q1"}
        assert artifact.stage().identity == {"a": 1}

    def test_a_folder_that_cannot_be_written(self, artifact, tmp_path):
        artifact.commit("p1", ok("q1"))
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot take over"):
            link_tree(artifact_path(artifact), tmp_path / "file" / "copy")


class TestJsonLines:
    def test_no_log_yet(self, tmp_path):
        assert json_lines(tmp_path / "log.jsonl") == []

    def test_what_a_kill_has_torn_is_left_out(self, tmp_path):
        log = tmp_path / "log.jsonl"
        append_json_line(log, {"step": 1})
        with log.open("a") as stream:
            stream.write('[1]\n{"step": 2, "lo')
        append_json_line(log, {"step": 3, "detail": "a\u2028b"})
        assert json_lines(log) == [{"step": 1}, {"step": 3, "detail": "a\u2028b"}]


CELLS = pa.struct([("a", pa.string()), ("b", pa.float32())])
CONTENT = pa.schema(
    [
        ("text", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("number", pa.int8()),
        ("yes", pa.bool_()),
        ("half", pa.float16()),
        ("vector", pa.list_(pa.float32(), 2)),
        ("cells", pa.list_(CELLS)),
        ("cell", CELLS),
    ]
)
_text = st.none() | st.text(max_size=4)
_cell = st.fixed_dictionaries({"a": _text, "b": st.sampled_from([None, 0.0, 1.5])})
_rows = st.fixed_dictionaries(
    {
        "text": _text,
        "texts": st.none() | st.lists(_text, max_size=3),
        "number": st.none() | st.integers(-3, 3),
        "yes": st.none() | st.booleans(),
        "half": st.sampled_from([None, np.float16(0), np.float16(2)]),
        "vector": st.sampled_from([None, [0.0, 1.0], [1.0, 0.0]]),
        "cells": st.none() | st.lists(st.none() | _cell, max_size=3),
        "cell": st.none() | _cell,
    }
)


@settings(max_examples=300)
@given(one=st.lists(_rows, max_size=6), other=st.lists(_rows, max_size=6), cuts=st.data())
def test_content_is_the_same_exactly_where_the_rows_are(one, other, cuts):
    first, second = (pa.Table.from_pylist(rows, schema=CONTENT) for rows in (one, other))
    assert (content_of(first) == content_of(second)) is (one == other)
    places = sorted(cuts.draw(st.lists(st.integers(0, len(one)), max_size=3)))
    edges = [0, *places, len(one)]
    pieces = [first.slice(a, b - a) for a, b in pairwise(edges)]
    assert content_of(pa.concat_tables(pieces)) == content_of(first)
    doubled = pa.concat_tables([second, first]).combine_chunks().slice(len(other))
    assert content_of(doubled) == content_of(first)  # offsets within shared buffers
    for number in range(len(one)):
        if one[number] != one[0]:
            swapped = [one[number], *one[1:number], one[0], *one[number + 1 :]]
            assert content_of(pa.Table.from_pylist(swapped, schema=CONTENT)) != content_of(first)


def test_content_does_not_know_what_lies_below_a_null():
    numbers = pa.array([1, 2, 3], pa.int8())
    mask = pa.array([False, True, False])
    _, values = numbers.buffers()
    bits = pa.py_buffer(bytes([0b101]))
    hidden = pa.Array.from_buffers(pa.int8(), 3, [bits, values])
    clean = pc.if_else(mask, None, numbers)
    assert content_of(pa.table({"n": hidden})) == content_of(pa.table({"n": clean}))
    offsets, data = pa.array(["a", "b", "c"]).buffers()[1:]
    texts = pa.Array.from_buffers(pa.string(), 3, [bits, offsets, data])
    assert content_of(pa.table({"t": texts})) == content_of(pa.table({"t": ["a", None, "c"]}))


class FailingListing:
    """A file system whose listings fail."""

    def __init__(self, inner, said):
        self._inner, self._said = inner, said

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def get_file_info(self, asked):
        if isinstance(asked, pafs.FileSelector):
            raise OSError(self._said)
        return self._inner.get_file_info(asked)


class TestLock:
    HOLDER = (
        "import sys, time, pathlib\n"
        "from reasonembed.artifacts import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )

    def test_a_second_holder_is_refused(self, tmp_path):
        with (
            locked(tmp_path / "run"),
            pytest.raises(StorageError, match="run is in use by another driver"),
            locked(tmp_path / "run"),
        ):
            pass
        with locked(tmp_path / "run"):
            pass

    def test_it_is_free_again_after_an_error(self, tmp_path):
        with pytest.raises(RuntimeError), locked(tmp_path):
            raise RuntimeError
        with locked(tmp_path):
            pass

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "run").write_text("")
        with (
            pytest.raises(StorageError, match="a part of this path is a file"),
            locked(tmp_path / "run"),
        ):
            pass

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", fail)
        with pytest.raises(StorageError, match=r"cannot lock .*No locks"), locked(tmp_path):
            pass

    def test_a_killed_process_lets_go(self, tmp_path):
        holder = subprocess.Popen(
            [sys.executable, "-c", self.HOLDER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(StorageError, match="in use"), locked(tmp_path):
                pass
            holder.send_signal(signal.SIGKILL)
            assert holder.wait(10) == -signal.SIGKILL
            with locked(tmp_path):
                pass
        finally:
            holder.kill()
            holder.wait(10)
            holder.stdout.close()


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may catch it."""


def crash_on(folder):
    write = storage_module._write_durably

    def crashing(path, data):
        if path.parent.name == folder:
            raise Killed
        write(path, data)

    return crashing


def artifact_path(artifact):
    return Path(artifact.uri)


class KillingFileSystem:
    """A local file system on which the process dies after some deletions."""

    def __init__(self, inner, *, after):
        self._inner, self._left = inner, after

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def _delete(self, path, delete):
        if not self._left:
            raise Killed
        self._left -= 1
        delete(path)

    def delete_dir(self, path):
        self._delete(path, self._inner.delete_dir)

    def delete_file(self, path):
        self._delete(path, self._inner.delete_file)


KEYS = [f"q{i}" for i in range(8)]
subsets = st.lists(st.sampled_from(KEYS), min_size=1, unique=True)
row_statuses = st.sampled_from(["ok", "ok", "error", "truncated"])


class ExactlyOnce(RuleBasedStateMachine):
    """Commits, crashes and restarts in any order, against a dictionary."""

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.expected = {}
        self.parts = 0
        self.restart()

    @rule()
    def restart(self):
        self.artifact = Artifact.declared(Path(self.folder.name) / "rewrites", "rewrites")
        self.artifact.begin({"a": 1})

    def _write(self, keys, status):
        self.parts += 1
        part = f"p{self.parts * 7919 % 101:03d}"  # names in no order
        text = f"made by {self.parts}"
        table = rows(dict.fromkeys(keys, status), text=text)
        return part, table, {key: (status, text) for key in keys}

    @rule(keys=subsets, status=row_statuses)
    def commit(self, keys, status):
        part, table, made = self._write(keys, status)
        self.artifact.commit(part, table)
        self.keep(made)

    @rule(keys=subsets, status=row_statuses, folder=st.sampled_from(["data", "_commits"]))
    def crash(self, keys, status, folder):
        part, table, _ = self._write(keys, status)
        write = storage_module._write_durably
        storage_module._write_durably = crash_on(folder)
        try:
            self.artifact.commit(part, table)
        except Killed:
            self.restart()
        finally:
            storage_module._write_durably = write

    @rule(size=st.integers(1, 4), retry=st.sampled_from([(), ("error",), ("error", "truncated")]))
    def run_to_the_end(self, size, retry):
        planned = pa.table({"query_id": KEYS})
        todo = self.artifact.missing(planned, retry=retry).column("query_id").to_pylist()
        lacking = [
            key for key in KEYS if key not in self.expected or self.expected[key][0] in retry
        ]
        assert todo == lacking
        for start in range(0, len(todo), size):
            part, table, made = self._write(todo[start : start + size], "ok")
            self.artifact.commit(part, table)
            self.keep(made)
        assert self.artifact.read().column("query_id").to_pylist() == KEYS
        assert self.artifact.missing(planned).num_rows == 0

    def keep(self, made):
        good = {key for key, (status, _) in self.expected.items() if status == "ok"}
        self.expected |= {key: row for key, row in made.items() if key not in good}

    @invariant()
    def every_committed_key_stands_there_once_with_its_first_good_or_newest_row(self):
        if not hasattr(self, "expected"):
            return
        found = self.artifact.read().to_pylist()
        assert [row["query_id"] for row in found] == sorted(self.expected)
        assert {
            row["query_id"]: (row["status"], row["rewritten_query"]) for row in found
        } == self.expected

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestExactlyOnce = ExactlyOnce.TestCase
TestExactlyOnce.settings = settings(max_examples=25, stateful_step_count=12)


# ---- one row a key, resume ---------------------------------------------------------------------

PAIRS = [(query, doc) for query in ("q", "qq", "q ") for doc in ("", "d", " d", "long" * 9)]
history = st.lists(
    st.lists(
        st.tuples(st.sampled_from(PAIRS), st.sampled_from(["ok", "error", "truncated", "invalid"])),
        min_size=1,
        unique_by=lambda row: row[0],
    ),
    max_size=6,
)
retries = st.sampled_from([(), ("error",), ("error", "truncated"), ("ok",), ("unheard of",)])


def pairs_artifact(folder, *, latest_wins):
    schema = pa.schema(
        [
            pa.field("query_id", pa.string(), nullable=False),
            pa.field("doc_id", pa.string(), nullable=False),
            ("status", pa.string()),
            ("number", pa.int64()),
        ]
    )
    key = ("query_id", "doc_id")
    return Artifact(folder, schema=schema, key=key, name="pairs", latest_wins=latest_wins)


def pair_table(rows, *, start=0):
    return pa.table(
        {
            "query_id": pa.array([pair[0] for pair, _ in rows], pa.string()),
            "doc_id": pa.array([pair[1] for pair, _ in rows], pa.string()),
            "status": pa.array([status for _, status in rows], pa.string()),
            "number": pa.array(range(start, start + len(rows)), pa.int64()),
        }
    )


def effective(parts, *, latest_wins):
    """The rows that count, by the rule in words: the first that is ok, else the newest."""
    found, number = {}, 0
    for part in parts:
        for key, status in part:
            if latest_wins or key not in found or found[key][0] != "ok":
                found[key] = (status, number)
            number += 1
    return found


@settings(max_examples=60)
@given(parts=history, retry=retries, latest_wins=st.booleans(), planned=st.permutations(PAIRS),
       compacted=st.booleans(), small=st.booleans())  # fmt: skip
def test_resume_is_what_sets_in_memory_say(parts, retry, latest_wins, planned, compacted, small):
    done = effective(parts, latest_wins=latest_wins)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if small:  # so that keys are sorted in several lots
            patch.setattr(keyset_module, "STEP_ROWS", 2)
        artifact, number = pairs_artifact(folder, latest_wins=latest_wins), 0
        for name, part in enumerate(parts):
            artifact.commit(f"p{name * 7919 % 101:03d}", pair_table(part, start=number))
            number += len(part)
        if compacted:
            assert artifact.compact() == max(0, len(parts) - 1)
        expected = [pair for pair in planned if pair not in done or done[pair][0] in retry]
        table = pair_table([(pair, None) for pair in planned]).select(["doc_id", "query_id"])
        missing = artifact.missing(table, retry=retry)
        assert [(row["query_id"], row["doc_id"]) for row in missing.to_pylist()] == expected
        keep = artifact.anti_join(retry=retry)
        assert pa.concat_tables(keep(table.slice(i, 1)) for i in range(len(planned))) == missing
        assert artifact.statuses() == Counter(status for status, _ in done.values())
        streamed = [row for rows in artifact.rows() for row in rows.to_pylist()]
        assert sorted(row["number"] for row in streamed) == sorted(n for _, n in done.values())
        assert {
            (row["query_id"], row["doc_id"]): (row["status"], row["number"])
            for row in artifact.read().to_pylist()
        } == done
        assert artifact.history(columns=["number"])["number"].to_pylist() == list(range(number))


@given(texts=st.lists(st.lists(st.text(max_size=40), min_size=2, max_size=2), max_size=12))
def test_digests_differ_where_keys_do_and_do_not_know_of_their_table(texts):
    table = pa.table({"a": pa.array([a for a, _ in texts], pa.string()),
                      "b": pa.array([b for _, b in texts], pa.string())})  # fmt: skip
    found = digests(table, ("a", "b"))
    seen = list(zip(found.high.tolist(), found.low.tolist(), strict=True))
    assert len(set(seen)) == len({tuple(one) for one in texts})
    for row in range(len(texts)):
        alone = digests(table.slice(row, 1), ("a", "b"))
        assert (alone.high[0], alone.low[0]) == seen[row]


def test_digests_of_a_million_keys_differ_in_either_half():
    table = pa.table({"id": [f"q-{number:x}" for number in range(1_000_000)]})
    found = digests(table, ("id",))
    assert len(np.unique(found.high)) == len(np.unique(found.low)) == 1_000_000
    # Each of 64 lots gets its share: 15,625 ± 125 standard deviations of nothing.
    for half in (found.high, found.low):
        for bits in (half >> np.uint64(58), half & np.uint64(63)):
            assert np.abs(np.bincount(bits.astype(np.int64)) - 15_625).max() < 700


def test_two_keys_that_share_half_a_digest_are_told_apart():
    entries = np.zeros(4, ENTRY)
    entries["high"], entries["low"] = [1, 1, 1, 9], [2, 5, 7, 7]
    held = KeySet([entries[:2], entries[2:]])
    asked = Digests(np.array([1, 9, 1, 0, 1, 10], "<u8"), np.array([7, 7, 3, 2, 2, 7], "<u8"))
    assert held.holds(asked).tolist() == [True, True, False, False, True, False]


# ---- compaction --------------------------------------------------------------------------------


def committed(folder, parts=6):
    artifact = Artifact.declared(folder, "rewrites")
    for number in range(parts):
        statuses = {"q0": "error" if number < 2 else "ok", f"q{number + 1}": "ok"}
        artifact.commit(f"p{number}", rows(statuses, text=f"t{number}"))
    return artifact


def told(artifact):
    """Everything that a reader can ask."""
    return (
        artifact.read(),
        artifact.history(columns=["query_id", "rewritten_query", "status"]).to_pylist(),
        artifact.statuses(),
        artifact.missing(PLANNED, retry=["error"]),
        artifact.content(),
    )


class Stop:
    """Ends the process at one of its writes and deletions."""

    def __init__(self, patch, *, at):
        self._left = at
        for name in ("write", "delete"):
            patch.setattr(Place, name, self._counted(getattr(Place, name)))

    def _counted(self, act):
        def counted(place, *arguments):
            if not self._left:
                raise Killed
            self._left -= 1
            act(place, *arguments)

        return counted


class TestCompaction:
    def test_many_parts_become_few_and_nothing_else_shows(self, artifact):
        artifact = committed(artifact.uri)
        before, commits = told(artifact), artifact.commits()
        assert artifact.compact(beyond=6) == 0 and artifact.commits() == commits
        assert artifact.compact(beyond=5) == 5
        assert told(artifact) == before
        (merged,) = artifact.commits()
        assert merged.rows == 12 and merged.statuses == {"ok": 10, "error": 2}
        assert merged.committed_at_ns == commits[-1].committed_at_ns
        assert artifact.compact() == 0
        assert [len(list((artifact_path(artifact) / one).iterdir())) for one in
                ("data", "_commits")] == [1, 1]  # fmt: skip

    def test_what_killed_drivers_have_left_goes_and_what_may_yet_be_committed_stays(self, artifact):
        artifact.commit("p1", ok("q1"))
        folder = artifact_path(artifact)
        (folder / "data" / ".tmp-p2.parquet-1").write_bytes(b"half")
        (folder / "data" / "p2.parquet").write_bytes((folder / "data" / "p1.parquet").read_bytes())
        (folder / TODO / "shard").mkdir(parents=True)
        artifact.compact()
        assert {one.name for one in folder.rglob("*")} == {
            "data", "_commits", "p1.parquet", "p2.parquet", "p1.json"
        }  # fmt: skip

    def test_parts_have_a_size_and_later_ones_are_merged_in_turn(self, artifact, monkeypatch):
        artifact = committed(artifact.uri, parts=8)
        monkeypatch.setattr(artifacts_module, "_MERGED_ROWS", 6)
        assert artifact.compact() == 5
        assert [commit.rows for commit in artifact.commits()] == [6, 6, 4]
        artifact.commit("later", rows({"q0": "ok"}))
        before = told(artifact)
        assert artifact.compact() == 1
        assert [commit.rows for commit in artifact.commits()] == [6, 6, 5]
        assert told(artifact) == before
        monkeypatch.setattr(artifacts_module, "_MERGED_BYTES", 1)
        assert artifact.compact() == 0

    @pytest.mark.parametrize("again", [True, False])
    def test_killed_at_any_step_it_loses_nothing(self, tmp_path, again):
        step = 0
        while True:
            artifact = committed(tmp_path / str(step))
            before = told(artifact)
            with pytest.MonkeyPatch.context() as patch:
                Stop(patch, at=step)
                try:
                    artifact.compact()
                    break
                except Killed:
                    pass
            artifact = Artifact.declared(artifact.uri, "rewrites")
            assert told(artifact) == before, step
            artifact.commit("next", ok("new"))
            if again:
                artifact.compact()
                assert len(artifact.commits()) == 1
            assert set(artifact.read()["query_id"].to_pylist()) >= {"q0", "q6", "new"}
            step += 1
        assert step == 1 + 2 + 2 * 6

    def test_a_straggler_of_a_part_that_is_gone_stays_hidden(self, artifact):
        artifact = committed(artifact.uri)
        before = told(artifact)
        artifact.compact()
        artifact.commit("p3", rows({"q0": "ok", "q4": "ok"}, text="straggler"))
        (artifact_path(artifact) / "data" / "p3.parquet").unlink()
        assert told(artifact) == before
        artifact.compact()
        assert told(artifact) == before and len(artifact.commits()) == 1

    def test_a_reader_looks_again_where_parts_go_while_it_reads(self, artifact, monkeypatch):
        artifact = committed(artifact.uri)
        before, read = artifact.read(), Artifact._read_part
        other = Artifact.declared(artifact.uri, "rewrites")

        def late(self, commit, *arguments):
            if self is artifact and commit.part == "p2":
                other.compact()
            return read(self, commit, *arguments)

        monkeypatch.setattr(Artifact, "_read_part", late)
        assert artifact.read() == before

    def test_a_part_that_is_damaged_is_not_merged_into_a_sound_one(self, artifact):
        artifact = committed(artifact.uri)
        data = artifact_path(artifact) / "data"
        (data / "p3.parquet").write_bytes((data / "p4.parquet").read_bytes())
        with pytest.raises(StorageError, match="holds other rows"):
            artifact.compact()
        assert len(artifact.commits()) == 6

    def test_a_record_from_before_parts_could_be_merged(self, artifact):
        commit = artifact.commit("p1", ok("q1"))
        file = artifact_path(artifact) / "_commits" / "p1.json"
        record = json.loads(file.read_text())
        del record["replaces"]
        file.write_text(json.dumps(record))
        assert artifact.commits() == [commit]
