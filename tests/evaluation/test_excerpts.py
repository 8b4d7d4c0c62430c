import gzip

import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.excerpts import (
    EXCERPTS_FILE,
    look_at,
    read_excerpts,
    write_excerpts,
)
from reasonembed.evaluation.metrics import evaluate_run

ODD = 'a/"b"\u2019ô'


def collection(**changed):
    given = {
        "name": "small",
        "queries": {"q1": "first " * 600, "q2": "second"},
        "qrels": {"q1": {ODD: 1, "lost": 2}, "q2": {"d1": 1}},
        "excluded": {"q1": frozenset(f"x{i}" for i in range(9))},
        "task": "generic",
        "instruction": "",
        "corpus_source": None,
    }
    return Collection(**(given | changed))


RUN = {"q1": {f"d{i}": float(i) for i in range(12)} | {ODD: 0.5}}
TEXTS = {f"d{i}": f"text {i} " * 100 for i in range(12)} | {ODD: "odd"}


def texts(ids):
    return {one: TEXTS[one] for one in ids if one in TEXTS}


def test_a_query_with_what_came_back_and_what_was_shut_out():
    one = look_at(["q1"], collection(), RUN, texts=texts)["q1"]
    assert one.found == [f"d{i}" for i in range(11, 1, -1)] and one.scores[0] == 11.0
    assert (one.num_found, one.num_excluded) == (13, 9)
    assert one.excluded == ["x0", "x1", "x2", "x3", "x4"]
    assert one.ranks == {ODD: 12} and one.gold == {ODD: 1, "lost": 2}
    assert one.texts[ODD] == "odd" and "lost" not in one.texts and "d0" not in one.texts
    assert len(one.query) == 2_000 and len(one.texts["d5"]) == 400


def test_ties_stand_as_they_are_measured():
    # Equal as float32, and by id from behind: what trec_eval counts is what a person sees.
    run = {"q2": {"d1": 1.0 + 1e-9, "d2": 1.0, "d0": 0.5}}
    given = collection(queries={"q2": "second"}, qrels={"q2": {"d1": 1}}, excluded={})
    one = look_at(["q2"], given, run, texts=texts)["q2"]
    assert one.found == ["d2", "d1", "d0"]
    measured = evaluate_run(run, given.qrels)
    assert measured.mean["recip_rank"] == 1 / one.ranks["d1"] == 0.5


def test_files_keep_every_query_and_are_equal_when_written_again(tmp_path):
    file = write_excerpts(tmp_path, collection(), RUN, texts=texts)
    written = file.read_bytes()
    found = read_excerpts(tmp_path)
    assert found == look_at(["q1", "q2"], collection(), RUN, texts=texts)
    assert found["q2"].found == [] and found["q2"].num_found == 0
    assert write_excerpts(tmp_path, collection(), RUN, texts=texts).read_bytes() == written
    assert [one.name for one in tmp_path.iterdir()] == [EXCERPTS_FILE]


def test_texts_are_asked_for_once_and_a_lone_surrogate_costs_nothing(tmp_path):
    asked = []

    def once(ids):
        asked.append(set(ids))
        return {one: "broken \ud800" for one in ids}

    write_excerpts(tmp_path, collection(), RUN, texts=once)
    assert len(asked) == 1 and "d0" not in asked[0] and {ODD, "lost", "d11"} <= asked[0]
    assert read_excerpts(tmp_path)["q1"].texts["d5"] == "broken ?"


@pytest.mark.parametrize(
    "content", [b"torn", gzip.compress(b'{"query_id": "q1"}'), b"\x1f\x8b\x08"]
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / EXCERPTS_FILE).write_bytes(content)
    with pytest.raises(EvaluationError, match=EXCERPTS_FILE.replace(".", r"\.")):
        read_excerpts(tmp_path)


def test_nothing_beside_a_result_is_no_error(tmp_path):
    assert read_excerpts(tmp_path) == {}
