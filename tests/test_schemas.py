import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.errors import SchemaError
from reasonembed.schemas import (
    ARTIFACTS,
    SAMPLES,
    Status,
    conform,
    embeddings,
    from_rows,
    row_seed,
    stable_hash,
)

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("count", pa.int32(), nullable=False),
        pa.field("note", pa.string()),
    ]
)
ROW = {"id": "a", "count": 1, "note": None}


def table(**columns):
    return pa.table({"id": ["a"], "count": [1], "note": ["n"]} | columns)


def test_columns_are_put_in_order_and_cast():
    shuffled = pa.table({"note": ["n"], "count": pa.array([1], pa.int64()), "id": ["a"]})
    assert conform(shuffled, SCHEMA, where="t").schema == SCHEMA


def test_a_table_in_chunks_stays_whole():
    parts = pa.concat_tables([table(id=[name]) for name in "abc"])
    assert conform(parts, SCHEMA, where="t").column("id").to_pylist() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (lambda: table().drop_columns(["note", "id"]), r"missing columns \['id', 'note'\]"),
        (lambda: table(extra=[1]), r"unknown columns \['extra'\]"),
        (lambda: table().append_column("id", pa.array(["b"])), r"stand twice \['id'\]"),
        (lambda: table(id=pa.array([None], pa.string())), "'id' holds 1 null"),
        (lambda: table(count=[1.5]), "'count' does not fit int32: .*1.5"),
        (lambda: table(count=[2**40]), "'count' does not fit int32"),
        (lambda: table(count=["one"]), "'count' does not fit int32: .*one"),
        (lambda: table(note=[[1]]), "'note' does not fit string"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(columns, message):
    with pytest.raises(SchemaError, match=f"queries part 7: .*{message}"):
        conform(columns(), SCHEMA, where="queries part 7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "'id' holds 1 null"),
        ({"count": 1.5}, "'count' does not fit int32: 1.5 is no whole number"),
        ({"count": 1.0}, "1.0 is no whole number"),
        ({"count": "1"}, "'1' is no whole number"),
        ({"count": True}, "'count' does not fit int32"),
        ({"count": 2**31}, "'count' does not fit int32"),
        ({"count": 2**70}, "'count' does not fit int32"),
        ({"id": 3}, "'id' does not fit string"),
        ({"note": "half a character \ud83d"}, "'note' does not fit string"),
        ({"nott": "x"}, r"unknown columns \['nott'\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_column(change, message):
    with pytest.raises(SchemaError, match=f"t: .*{message}"):
        from_rows([ROW, ROW | change], SCHEMA, where="t")


def test_a_row_without_a_column_is_refused_even_where_null_is_allowed():
    with pytest.raises(SchemaError, match=r"missing columns \['note'\]"):
        from_rows([ROW, {"id": "b", "count": 2}], SCHEMA, where="t")


def test_no_rows_make_an_empty_table_of_the_schema():
    empty = from_rows([], SCHEMA, where="t")
    assert (empty.schema, empty.num_rows) == (SCHEMA, 0)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "id": st.text(),
                "count": st.integers(-(2**31), 2**31 - 1),
                "note": st.none() | st.text(),
            }
        )
    )
)
def test_rows_come_back_as_they_went_in(rows):
    made = from_rows(rows, SCHEMA, where="t")
    assert made.to_pylist() == rows
    assert conform(made, SCHEMA, where="t") == made


def test_nested_columns_hold_their_own_rules():
    document = {"doc_id": "d", "text": "x", "label": None, "text_hash": "h"}
    row = dict.fromkeys(SAMPLES.names, "text") | {"positives": [document], "negatives": []}
    assert from_rows([row], SAMPLES, where="t").to_pylist() == [row]
    row["positives"] = [document | {"text": None}]
    with pytest.raises(SchemaError, match="'positives' does not fit"):
        from_rows([row], SAMPLES, where="t")


@pytest.mark.parametrize(("dtype", "value"), [("float32", pa.float32()), ("float16", pa.float16())])
def test_embeddings_have_one_length(dtype, value):
    schema = embeddings(3, dtype=dtype)
    assert schema.field("vector").type == pa.list_(value, 3)
    if dtype == "float32":
        assert from_rows([{"id": "a", "vector": [1, 2, 3]}], schema, where="t").num_rows == 1
        with pytest.raises(SchemaError, match="'vector' does not fit"):
            from_rows([{"id": "a", "vector": [1, 2]}], schema, where="t")


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_every_artifact_has_a_key_that_is_never_null(kind):
    artifact = ARTIFACTS[kind]
    assert artifact.key
    for name in artifact.key:
        assert artifact.schema.field(name) == pa.field(name, pa.string(), nullable=False)


def test_every_llm_artifact_says_what_became_of_its_rows():
    for kind in ("queries", "judgments", "rewrites"):
        assert not ARTIFACTS[kind].schema.field("status").nullable
    assert [str(status) for status in Status] == ["ok", "truncated", "invalid", "error", "filtered"]


def test_hashes_and_seeds_are_the_same_on_every_machine():
    # Ids, seeds and fingerprints of every existing run hang on these values.
    assert stable_hash("a", 1) == "8181c16b4ad83cc1"
    assert stable_hash("a", 1, size=16) == "b4feb303ba68581ff5140f67114e15e6"
    assert row_seed(42, "q-1", "d") == 954827635


@given(st.integers(0, 2**63), st.text(), st.text())
def test_a_seed_is_a_31_bit_number_of_its_row(run_seed, one, two):
    assert 0 <= row_seed(run_seed, one) < 2**31
    assert row_seed(run_seed, one, two) == row_seed(run_seed, one, two)
    assert stable_hash(one, two) != stable_hash(one + two)
