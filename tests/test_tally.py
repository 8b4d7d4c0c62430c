from collections import Counter

import pyarrow as pa

from reasonembed.artifacts import Commit
from reasonembed.tally import Tally

ROWS = pa.table(
    {
        "query_id": ["a", "b", "c", "d"],
        "query": ["secret", None, None, None],
        "status": ["ok", "error", "truncated", "filtered"],
        "prompt_tokens": [100, 50, 7, 0],
        "cached_tokens": [60, 0, 0, 0],
        "completion_tokens": [20, 0, 512, 0],
    }
)


def test_rows_are_counted_by_status_and_tokens_by_kind():
    tally = Tally.of(ROWS)
    assert tally.statuses == {"ok": 1, "error": 1, "truncated": 1, "filtered": 1}
    assert tally.tokens == {"prompt": 157, "cached": 60, "completion": 532}
    assert tally.failed == {"error": 1, "truncated": 1}  # set aside by rule is no failure


def test_rows_without_a_status_are_ok():
    tally = Tally.of(pa.table({"id": ["a", "b"]}))
    assert tally.statuses == {"ok": 2} and tally.tokens == {} and tally.failed == {}
    assert Tally.of(pa.table({"id": pa.array([], pa.string())})).statuses == {}
    assert Tally.of(ROWS.slice(0, 0)).tokens == {"prompt": 0, "cached": 0, "completion": 0}


def test_it_travels_as_text_without_the_rows():
    text = Tally.of(ROWS).dumps()
    assert "secret" not in text and Tally.loads(text) == Tally.of(ROWS)


def test_tallies_add_up():
    total = Tally()
    for _ in range(3):
        total.add(Tally.loads(Tally.of(ROWS).dumps()))
    assert total.statuses["error"] == 3 and total.tokens["prompt"] == 3 * 157
    none = Tally(Counter(), Counter({"cached": 0}))
    none.add(Tally(Counter(), Counter({"cached": 0})))
    assert none.tokens == {"cached": 0} and list(none.tokens) == ["cached"]  # seen to be none


def test_a_part_that_was_committed_before_brings_rows_and_no_tokens():
    commit = Commit("p", 5, "digest", {"ok": 4, "error": 1}, 0)
    assert Tally.of_commit(commit) == Tally(Counter({"ok": 4, "error": 1}), Counter())
    assert Tally.of_commit(Commit("p", 5, "digest", {}, 0)).statuses == {"ok": 5}
