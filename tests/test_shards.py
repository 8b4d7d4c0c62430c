import os
from contextlib import suppress

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.artifacts import locked, locked_part
from reasonembed.errors import ConfigError, StorageError
from reasonembed.lease import Claim
from reasonembed.shards import Shard, ShardRecords, of_shard, own_rows
from reasonembed.storage import Place


@given(st.lists(st.text(max_size=8), max_size=60), st.integers(1, 7))
def test_every_row_belongs_to_one_shard_whatever_else_there_is(keys, count):
    table = pa.table({"id": pa.array(keys, pa.string()), "row": range(len(keys))})
    parts = [of_shard(table, "id", Shard(index, count)) for index in range(1, count + 1)]
    rows = [row for part in parts for row in part.column("row").to_pylist()]
    assert sorted(rows) == list(range(len(keys)))
    owner = {key: n for n, part in enumerate(parts) for key in part.column("id").to_pylist()}
    alone = pa.table({"id": pa.array(keys[:1], pa.string()), "row": [0] * len(keys[:1])})
    for n, _ in enumerate(parts):
        expected = [key for key in keys[:1] if owner[key] == n]
        assert of_shard(alone, "id", Shard(n + 1, count)).column("id").to_pylist() == expected


def test_shards_are_of_similar_size_and_take_streams():
    table = pa.table({"id": [f"q-{n:06d}" for n in range(4_000)]})
    stream = (table.slice(start, 1_000) for start in range(0, 4_000, 1_000))
    rows = pa.concat_tables(own_rows(stream, "id", Shard(2, 4)))
    assert rows.equals(of_shard(table, "id", Shard(2, 4)))
    assert 850 < rows.num_rows < 1_150  # binomial: 5 standard deviations of 27
    assert own_rows(table, "id", None) is table


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/3", "1/3/4"])
def test_wrong_shards_are_refused(text):
    with pytest.raises(ConfigError, match="such as 2/4"):
        Shard.parse(text)


def test_records_know_what_is_missing(tmp_path):
    records = ShardRecords(Place(tmp_path / "queries"))
    assert records.missing() == [] and not records.exist()
    records.begin(Shard(1, 3))
    records.end(Shard(1, 3))
    records.begin(Shard(2, 3))
    assert records.missing() == [Shard(2, 3), Shard(3, 3)]
    for index in (2, 3):
        records.end(Shard(index, 3))
    assert records.missing() == [] and records.exist()
    records.begin(Shard(1, 2))  # cut anew: the old ones count no more
    assert records.missing() == [Shard(1, 2), Shard(2, 2)]
    records.forget()
    assert records.missing() == []


@pytest.mark.parametrize("was_ended", [True, False])
@pytest.mark.parametrize(("old", "new"), [(Shard(1, 3), Shard(1, 2)), (Shard(1, 2), Shard(1, 3))])
def test_killed_while_it_is_cut_anew_a_stage_does_not_pass_for_whole(
    tmp_path, monkeypatch, old, new, was_ended
):
    class Killed(BaseException):
        pass

    def killing(act, steps):
        def counted(place, *arguments):
            if next(steps, None) is None:
                raise Killed
            act(place, *arguments)

        return counted

    for left in range(5):
        records = ShardRecords(Place(tmp_path / str(left)))
        for index in range(1, old.of + 1):
            records.begin(Shard(index, old.of))
            if was_ended or index == 1:
                records.end(Shard(index, old.of))
        was_missing, steps = records.missing(), iter(range(left))
        with monkeypatch.context() as patch:
            for name in ("write", "delete"):
                patch.setattr(Place, name, killing(getattr(Place, name), steps))
            with suppress(Killed):
                records.begin(new)
        assert records.missing() or not was_missing, left


def test_shards_of_one_number_say_nothing_of_another(tmp_path):
    records = ShardRecords(Place(tmp_path / "queries"))
    for shard in (Shard(1, 2), Shard(2, 2), Shard(3, 3)):
        records.end(shard)
    assert records.missing() == [Shard(1, 3), Shard(2, 3)]


def test_shards_lock_out_the_whole_and_what_shares_rows(tmp_path):
    one = f"another driver .*process {os.getpid()}"

    def refused(holder, *, who):
        with pytest.raises(StorageError, match=f"in use by {who}"), holder:
            pass

    with locked_part(tmp_path, "generate 1/2"), locked_part(tmp_path, "generate 2/2"):
        refused(locked_part(tmp_path, "generate 1/2"), who=one)
        # Who of those that share it came last may have gone first.
        refused(locked_part(tmp_path, "generate 1/3"), who="another driver, for a shard;")
        refused(locked(tmp_path), who="another driver, for a shard;")
        with locked_part(tmp_path, "rewrite 1/3"):
            pass
    with locked(tmp_path):
        refused(locked_part(tmp_path, "generate 1/2"), who=one)
    with locked(tmp_path):
        pass


def test_claims_of_shards_exclude_what_shares_rows():
    def claim(part):
        return Claim(id=part, owner="", host="", machine="", pid=1, part=part)

    def exclude(one, other):
        assert claim(one).excludes(claim(other)) is claim(other).excludes(claim(one))
        return claim(one).excludes(claim(other))

    assert exclude("", "") and exclude("", "generate 1/2")
    assert exclude("generate 1/2", "generate 1/2") and exclude("generate 1/2", "generate 2/3")
    assert not exclude("generate 1/2", "generate 2/2")
    assert not exclude("generate 1/2", "rewrite 1/2")
    assert exclude("generate 1/2", "of another version")
