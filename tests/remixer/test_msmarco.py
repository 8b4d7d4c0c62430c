import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed import tasks
from reasonembed.config import SampleSource
from reasonembed.corpus import text_hash
from reasonembed.errors import ConfigError, SchemaError
from reasonembed.remixer.formats import read_source
from reasonembed.remixer.lines import Tally
from reasonembed.remixer.msmarco import _Drawn, _ScratchTexts
from reasonembed.schemas import SAMPLES, from_rows
from tests.remixer.test_formats import assemble_stage, run_of, write_lines

NUM_PASSAGES = 40


def passage(number):
    return f"passage {number} says é{number}"


def write(file, text):
    """A file, gzipped where its name says so."""
    content = text.encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def folder(path, *, gz="", queries=3):
    """Collection and queries; every query has positive `10 q` and all others as negatives."""
    path.mkdir(exist_ok=True)
    collection = [f"{i}\t{passage(i)}\n" for i in range(NUM_PASSAGES)]
    write(path / f"collection.tsv{gz}", "".join(collection))
    write(path / f"queries.train.tsv{gz}", "".join(f"{q}\tquery {q}\r\n" for q in range(queries)))
    return path


def triples(path, lines, *, gz="", name="qidpidtriples.train.full.2.tsv"):
    return write(path / f"{name}{gz}", "".join("\t".join(map(str, one)) + "\n" for one in lines))


ALL = [(q, 10 * q, n) for q in range(3) for n in range(NUM_PASSAGES) if n != 10 * q]


def hard_negatives(path, lines, *, gz=""):
    content = "".join(json.dumps(line) + "\n" for line in lines)
    return write(path / f"msmarco-hard-negatives.jsonl{gz}", content)


def read(path, form, *, share=0.0, tally=None, **settings):
    source = SampleSource(path=str(path), form=form, **settings)
    tally = tally or Tally(source.max_bad_share)
    placed = read_source(source, tasks=tasks.TASKS, held_out_share=share, tally=tally)
    return from_rows([one.row for one in placed], SAMPLES, where="test").to_pylist()


def ids(row, side):
    return [one["doc_id"] for one in row[side]]


def texts(row, side):
    return [one["text"] for one in row[side]]


# ---- the three forms ------------------------------------------------------------------------


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_triples_of_ids_become_a_sample_a_query_with_the_texts_of_the_collection(tmp_path, gz):
    triples(folder(tmp_path, gz=gz), ALL, gz=gz)
    rows = read(tmp_path, "msmarco-triples", max_negatives=15)
    assert [row["query_id"] for row in rows] == [f"msmarco-{q}" for q in range(3)]
    for q, row in enumerate(rows):
        assert row["query"] == row["rewritten_query"] == f"query {q}"
        assert row["instruction"] == tasks.get("msmarco").instruction
        assert (ids(row, "positives"), texts(row, "positives")) == (
            [f"{10 * q}"],
            [passage(10 * q)],
        )
        assert len(set(ids(row, "negatives"))) == 15
        assert texts(row, "negatives") == [passage(one) for one in ids(row, "negatives")]
        assert row["negatives"][0]["text_hash"] == text_hash(row["negatives"][0]["text"])
    assert len({tuple(ids(row, "negatives")) for row in rows}) == 3  # each query draws its own


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_hard_negatives_are_drawn_from_all_systems_and_never_a_positive(tmp_path, gz):
    line = {"qid": 1, "pos": [10, 11], "neg": {"bm25": [1, 2, 10, 3], "dense": [3, "4", 11]}}
    empty = {"qid": 0, "pos": [], "neg": {"bm25": [1]}}
    only_positives = {"qid": 2, "pos": [5], "neg": {"bm25": [5]}}
    hard_negatives(folder(tmp_path, gz=gz), [line, empty, only_positives], gz=gz)
    tally = Tally()
    (row,) = read(tmp_path, "msmarco-hard-negatives", tally=tally)
    assert ids(row, "positives") == ["10", "11"]
    assert sorted(ids(row, "negatives")) == ["1", "2", "3", "4"]
    assert tally.remarks() == ["1 queries without a positive", "1 queries without negatives"]


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_triples_of_texts_need_no_collection(tmp_path, gz):
    lines = [("why é", "good", f"bad {i}") for i in range(9)] + [("how", "fine", "poor")]
    lines += [("why é", "better", "bad 3"), ("why é", "good", "better")]
    random.Random(0).shuffle(lines)
    triples(tmp_path, lines, gz=gz, name="triples.train.small.tsv")
    how, why = read(tmp_path, "msmarco-text-triples")
    assert (how["query"], texts(how, "negatives")) == ("how", ["poor"])
    assert sorted(texts(why, "positives")) == ["better", "good"]
    assert sorted(texts(why, "negatives")) == sorted(f"bad {i}" for i in range(9))
    assert ids(why, "negatives") == [text_hash(text) for text in texts(why, "negatives")]


def test_the_triplets_of_embedding_training_data_are_lines_as_any(tmp_path):
    line = {"query": "q", "pos": ["a"], "neg": ["b", "c"]}
    write(tmp_path / "msmarco-triplets.jsonl.gz", json.dumps(line) + "\n")
    (row,) = read(tmp_path / "msmarco-triplets.jsonl.gz", "flagembedding", task="msmarco")
    assert (row["task"], texts(row, "negatives")) == ("msmarco", ["b", "c"])


# ---- which negatives ------------------------------------------------------------------------


def test_the_order_of_the_file_and_repeats_decide_nothing_the_seed_does(tmp_path):
    triples(folder(tmp_path), ALL)
    rows = read(tmp_path, "msmarco-triples", max_negatives=4)
    shuffled = random.Random(1).sample(ALL * 2, 2 * len(ALL))
    triples(tmp_path, shuffled)
    assert read(tmp_path, "msmarco-triples", max_negatives=4) == rows
    other = read(tmp_path, "msmarco-triples", max_negatives=4, seed=43)
    assert [ids(row, "negatives") for row in other] != [ids(row, "negatives") for row in rows]


@given(
    offered=st.lists(st.integers(0, 2**32 - 1), max_size=60),
    most=st.integers(1, 10),
    order=st.randoms(use_true_random=False),
)
def test_a_draw_holds_so_many_distinct_ones_whatever_their_order(offered, most, order):
    drawn = []
    for _ in range(2):
        one = _Drawn(7, most)
        for number in offered:
            one.offer(number, number)
        drawn.append(one.numbers(but=()))
        order.shuffle(offered)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == len(drawn[0]) == min(most, len(set(offered)))
    assert set(drawn[0]) <= set(offered)


def test_a_draw_is_even():
    counts = dict.fromkeys(range(50), 0)
    for salt in range(2_000):
        one = _Drawn(salt * 2**31, 5)
        for number in counts:
            one.offer(number, number)
        for number in one.numbers(but=()):
            counts[number] += 1
    # Each is drawn in a tenth of 2,000 draws; five standard deviations (13.4) either way.
    assert all(200 - 67 < count < 200 + 67 for count in counts.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["msmarco-triples", "msmarco-text-triples"])
def test_positives_take_no_place_among_the_negatives_whatever_comes_first(tmp_path, form, seed):
    # Query 1 has positives 0 to 4, each also offered as a negative, and 20 true negatives.
    lines = [(1, p, n) for p in range(5) for n in range(25) if p != n]
    random.Random(seed).shuffle(lines)
    if form == "msmarco-triples":
        triples(folder(tmp_path), lines)
    else:
        named = [(f"query {q}", passage(p), passage(n)) for q, p, n in lines]
        triples(tmp_path, named, name="triples.train.small.tsv")
    (row,) = read(tmp_path, form, max_negatives=19)
    assert len(row["positives"]) == 5
    assert len(set(texts(row, "negatives")) - {passage(p) for p in range(5)}) == 19


def test_held_out_queries_go_by_their_text(tmp_path):
    triples(folder(tmp_path, queries=30), [(q, q % 9, 10 + q % 9) for q in range(30)])
    splits = [row["split"] for row in read(tmp_path, "msmarco-triples", share=0.4)]
    assert 4 < splits.count("held_out") < 22


# ---- what cannot be used --------------------------------------------------------------------

BAD = {
    "msmarco-triples": ["1\t2", "1\t2\tx", "1\t2\t-3", "1\t2\t99999999999"],
    "msmarco-text-triples": ["one\ttwo", "one\ttwo\t ", "a\tb\tc\td"],
    "msmarco-hard-negatives": [
        "{oops",
        '{"qid": 1, "pos": [1]}',
        '{"qid": 1, "pos": [true], "neg": {}}',
        '{"qid": 1, "pos": [1], "neg": [2]}',
        '{"qid": 1, "pos": 1, "neg": {}}',
        "[1]",
    ],
}
NAMES = {
    "msmarco-triples": "qidpidtriples.train.full.2.tsv",
    "msmarco-text-triples": "triples.train.small.tsv",
    "msmarco-hard-negatives": "msmarco-hard-negatives.jsonl",
}
GOOD = {
    "msmarco-triples": "1\t2\t3",
    "msmarco-text-triples": "one\ttwo\tthree",
    "msmarco-hard-negatives": '{"qid": 1, "pos": [2], "neg": {"bm25": [3]}}',
}


@pytest.mark.parametrize(("form", "bad"), [(form, one) for form in BAD for one in BAD[form]])
def test_a_bad_line_is_an_error_with_its_place_or_is_counted(tmp_path, form, bad):
    lines = [GOOD[form]] * 99
    write(folder(tmp_path) / NAMES[form], "\n".join([lines[0], bad, *lines]))
    with pytest.raises(SchemaError, match=f"{NAMES[form]} line 2: "):
        read(tmp_path, form)
    tally = Tally(0.1)
    (row,) = read(tmp_path, form, max_bad_share=0.1, tally=tally)
    assert len(row["negatives"]) == 1
    (remark,) = tally.remarks()
    assert remark.startswith(f"1 of {tally.seen} lines unusable, the first: {tmp_path}")
    assert f"{NAMES[form]} line 2: " in remark


def test_more_bad_lines_than_allowed_are_an_error_at_the_end(tmp_path):
    lines = ["no triple"] * 2 + [GOOD["msmarco-triples"]] * 8
    write(folder(tmp_path) / NAMES["msmarco-triples"], "\n".join(lines))
    with pytest.raises(SchemaError, match=r"2 of \d+ lines cannot be used, more than"):
        read(tmp_path, "msmarco-triples", max_bad_share=0.01)


def test_a_file_of_another_form_is_noticed_soon(tmp_path):
    (tmp_path / "x.jsonl").write_text("[]\n" * 3_000)
    tally = Tally(0.1)
    with pytest.raises(SchemaError, match=r"x\.jsonl line 1: a JSON object"):
        read(tmp_path / "x.jsonl", "flagembedding", task="pony", max_bad_share=0.1, tally=tally)
    assert tally.seen == 1_001  # of 10,000, where shares begin to mean something, a tenth and one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((7, 1, 2), "query 7: its text is not among the queries"),
        ((1, 77, 2), "query 1: passage 77 is not in the collection"),
        ((1, 3, 77), "query 1: passage 77 is not in the collection"),
    ],
)
def test_ids_without_a_text_are_errors_or_counted(tmp_path, line, message):
    triples(folder(tmp_path), [(0, 1, 2), line])
    with pytest.raises(SchemaError, match=message):
        read(tmp_path, "msmarco-triples")
    tally = Tally(0.5)
    (row,) = read(tmp_path, "msmarco-triples", max_bad_share=0.5, tally=tally)
    assert row["query_id"] == "msmarco-0"
    assert message in tally.first
    # One of two queries is too much, however long the files are.
    with pytest.raises(SchemaError, match=rf"1 of 2 lines cannot be used.*{message}"):
        read(tmp_path, "msmarco-triples", max_bad_share=0.4)


@pytest.mark.parametrize("bad", [b"3\n", b"3\t\xff\n", b"x\ttext\n"])
def test_a_bad_line_of_the_collection_counts_if_it_is_needed_or_has_no_id(tmp_path, bad):
    triples(folder(tmp_path), [(1, 2, 4)])
    file = tmp_path / "collection.tsv"
    file.write_bytes(bad + file.read_bytes())
    if bad.startswith(b"x"):
        with pytest.raises(SchemaError, match=r"collection\.tsv line 1: an id, a tab and a text"):
            read(tmp_path, "msmarco-triples")
    else:
        assert len(read(tmp_path, "msmarco-triples")) == 1  # passage 3 is nobody's
        triples(tmp_path, [(1, 2, 3)])
        with pytest.raises(SchemaError, match=r"collection\.tsv line 1: an id, a tab and a text"):
            read(tmp_path, "msmarco-triples")


def test_a_missing_file_or_two_of_a_kind_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"exactly one file qidpidtriples\.train.*there is none"):
        read(tmp_path, "msmarco-triples")
    triples(folder(tmp_path), ALL)
    write(tmp_path / "collection.tsv.gz", "")
    with pytest.raises(ConfigError, match=r"there is collection\.tsv, collection\.tsv\.gz"):
        read(tmp_path, "msmarco-triples")


@pytest.mark.parametrize(
    "settings",
    [{"form": "parquet", "max_negatives": 3}, {"form": "run", "max_bad_share": 0.1}],
)
def test_settings_of_another_form_are_refused(settings):
    with pytest.raises(ValueError, match=r"max_(negatives|bad_share) is for"):
        SampleSource(path="x", **settings)


def test_only_what_is_wanted_is_kept_and_once(tmp_path):
    with (tmp_path / "scratch").open("wb+") as file:
        kept = _ScratchTexts([5, 3, 5], file)
        for number, text in [(3, "drei é"), (4, "vier"), (5, "fünf"), (3, "again")]:
            if kept.wants(number):
                kept.put(number, text)
        kept.flush()
        assert [kept.get(number) for number in (3, 4, 5)] == ["drei é", None, "fünf"]
    assert (tmp_path / "scratch").read_bytes() == "drei éfünf".encode()


# ---- the stage ------------------------------------------------------------------------------


def test_the_stage_says_what_it_has_passed_over(tmp_path):
    data = folder(tmp_path / "data")
    triples(data, [*ALL, ("x", 1, 2)])
    line = {"query": "x", "pos": ["a"], "neg": ["c"]}
    bare = write_lines(tmp_path / "bare.jsonl", line)
    run = run_of(
        tmp_path / "run",
        {"path": str(data), "form": "msmarco-triples", "max_bad_share": 0.1, "max_negatives": 5},
        {"path": str(bare), "form": "flagembedding", "task": "biology"},
    )
    counts, said = assemble_stage(run)
    assert {"sample": 4, "unusable lines": 1, "train": 4}.items() <= counts.items()
    assert "3 samples from" in said and "line 118: three ids are needed" in said
    assert assemble_stage(run) == (counts, "")


def test_the_stage_is_known_by_the_files_that_it_reads(tmp_path):
    data = folder(tmp_path / "data")
    run = run_of(tmp_path / "run", {"path": str(data), "form": "msmarco-triples"})
    key = "source.0.content"
    assert run.identity("assemble")[key] == "(missing)"  # why-stale must not fail
    triples(data, ALL)
    known = run.identity("assemble")
    (data / "readme.txt").write_text("beside them")
    assert run.identity("assemble") == known
    triples(data, ALL[1:])
    assert run.identity("assemble")[key] not in (known[key], "(missing)")
