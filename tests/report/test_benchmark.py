import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files

import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.leaderboard import published
from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.evaluation.results import Result, provenance, write_result
from reasonembed.report import benchmark
from reasonembed.report.benchmark import write_benchmark_report
from reasonembed.report.blame import blame
from tests.report.parsed_page import checked
from tests.report.small_results import collection, ranked, write
from tests.report.test_page import HOSTILE

BIOLOGY, ROBOTICS = collection(), collection("bright/robotics")


@pytest.fixture
def results(tmp_path):
    for given in (BIOLOGY, ROBOTICS):
        write(tmp_path, "bm25", ranked([1, 2, 3, 4]), given)
        write(tmp_path, "dense", ranked([1, 1, None, 3]), given)
    return tmp_path


def page_of(results):
    return checked(write_benchmark_report(results).read_text(encoding="utf-8"))


def looks_of(results):
    """Id of each query on the page, in its order."""
    markup = write_benchmark_report(results).read_text(encoding="utf-8")
    return re.findall(r'<details class="look"[^>]*><summary><code>(.*?)</code>', markup)


def test_the_head_says_under_which_rules_and_on_what(results):
    text = page_of(results).text
    head = text.split("Figures")[0]
    assert "Protocol bright: " in head and "Systems bm25, dense" in head
    assert "bright/biology, bright/robotics" in head
    assert "revision current" in head and "packages numpy 2" in head
    assert "weights" not in head and "weights w-dense" in text.split("How it was made")[2]


def test_figures_are_those_of_the_results(results):
    text = page_of(results).text
    mean = (1 + 1 + 0 + 0.5) / 4
    assert f"bright/biology bright dense {mean:.4f} 0.5000 0.7500 0.7500" in text


def test_ours_stand_beside_published_rows(results):
    text = page_of(results).text.split("Leaderboard")[2].split("Differences")[0]
    mean = 100 * (1 + 1 + 0 + 0.5) / 4
    assert f"dense (ours) bright – {mean:.1f}" in text  # of two tasks of twelve there is no mean
    rows = [row for row in published() if row.benchmark == "bright"]
    assert all(row.name in text and row.source in text and row.date in text for row in rows)
    assert text.index("(ours)") < text.index(rows[0].name)
    # BM25's own row stands as published; the difference to it stands under ours alone.
    assert text.count("minus ") == 1 and "minus BM25, standard as published" in text


def test_collections_that_nobody_published_about_have_no_board(tmp_path):
    write(tmp_path, "dense", ranked([1, 1, 1, 1]), collection("own"))
    assert "no figures were published" in page_of(tmp_path).text


def test_each_system_is_compared_with_bm25(results):
    text = page_of(results).text.split("Differences")[2]
    assert (
        "dense mean over collections 0.6250 − 0.6404 −0.0154" in text
    )  # (1 + .631 + .5 + .431) / 4
    assert "dense bright/robotics" in text and "2 / 1 / 1" in text


def test_what_cannot_be_compared_costs_the_page_nothing(results):
    write(results, "half", ranked([1, 1, 1, 1]), BIOLOGY)
    assert "Without all 2 collections: half." in page_of(results).text
    write(results, "dense", ranked([1, 1, None, 3]), ROBOTICS, corpus="changed")
    text = page_of(results).text
    assert "They cannot be compared: bright/robotics" in text and "asked q2" in text


def test_a_copy_of_a_result_makes_no_row(results, tmp_path):
    shutil.copytree(results / "bright", results / "backup" / "bright")
    text = page_of(results).text.split("Leaderboard")[2].split("Differences")[0]
    assert "They make no table: bm25 has two results on bright/biology" in text
    assert "backup/bright" in text and "(ours)" not in text


def test_a_query_shows_systems_side_by_side(results):
    text = page_of(results).text.split("Queries", 3)[-1]
    q1 = text.split("q1 bright/biology (bright)")[1].split("bright/robotics (bright)")[0]
    assert "asked q1 plain" in q1 and "ndcg@10: bm25 0.631, dense 1.000" in q1
    assert "d0 document d0 plain 2 1" in q1
    assert "1 d1 12.0000 document d1 plain d0 12.0000 gold document d0 plain" in q1
    assert "can return it: x1, x2." in q1
    assert "d1 document d1 plain" in q1.split("How the documents begin that came back")[1]


def test_the_queries_that_tell_systems_apart_come_first_and_the_others_are_left_out(
    results, monkeypatch
):
    every = looks_of(results)
    assert every == ["q2", "q1", "q3", "q0"] * 2  # 0.5, 0.37, 0.07 and 0 apart
    monkeypatch.setattr(benchmark, "MAX_LISTS", 9)
    assert looks_of(results) == ["q2", "q1"] * 2
    assert "at most 2 queries" in page_of(results).text


def test_of_one_system_the_worst_queries_come_first(tmp_path):
    write(tmp_path, "dense", ranked([1, 3, None, 2]), BIOLOGY)
    assert looks_of(tmp_path) == ["q2", "q1", "q3", "q0"]


def test_of_several_seeds_the_first_is_shown(results):
    write(results, "bm25", ranked([4, 4, 4, 4]), BIOLOGY, seed=1)
    text = page_of(results).text
    assert "bm25 (seed 1)" in text and "ndcg@10: bm25 0.631, dense 1.000" in text


def test_protocols_stand_apart(results):
    write(results, "dense", ranked([1, 1, 1, 1]), BIOLOGY, protocol="reasonembed")
    text = page_of(results).text
    assert "bright under bright" in text and "bright under reasonembed" in text
    assert "no two systems to compare" in text
    assert "bright/biology (reasonembed)" in text


@pytest.fixture
def exported(whole, tmp_path):
    """Results of a system that is the export of a run, on the collection of its evaluation."""
    given, folder = whole.run.collection, tmp_path / "results"
    measured = evaluate_run({id_: {} for id_ in given.queries}, given.qrels)
    own = Result(
        system="after",
        seed=None,
        collection=given.name,
        benchmark=given.name,
        protocol="run",
        headline="ndcg@10",
        metrics=measured,
        credited=None,
        provenance=provenance(given, corpus="c0"),
    )
    write_result(own, whole.run.dir / "evaluate" / "after")
    whole.run.save_config()

    def make(given, weights="w-trained"):
        encoder = {"model": str(whole.run.dir / "export" / "model")}
        system = {"retrieve": {"kind": "dense", "encoder": encoder}}
        run = {id_: {"d0": 2.0, "d5": 1.0} for id_ in given.queries}
        identity = {"retrieve.mine.weights": weights}
        write(folder, "mine", run, given, system=system, identity=identity)
        write(folder, "bm25", run | {"e0": {}}, given)
        return page_of(folder).text

    yield make
    (whole.run.dir / "evaluate" / "after" / "result.json").unlink()


def test_of_a_runs_export_the_closest_training_samples_stand_beside_its_queries(whole, exported):
    text = exported(whole.run.collection).split("Queries", 3)[-1]
    nearest = blame(whole.run, "e0")[0]
    e0 = text.split("e0 data")[1].split("e1 data")[0]
    assert "Closest training samples of mine" in e0
    assert f"0.9000 {nearest.query_id} {nearest.query}" in e0
    assert "d0, which came back as number 1, was its positive" in e0  # from mine, not from bm25
    assert "samples of bm25" not in text


def test_on_another_collection_they_are_not_shown(whole, exported):
    queries = dict(whole.run.collection.queries) | {"e0": "another question"}
    text = exported(replace(whole.run.collection, queries=queries))
    assert "another question" in text and "Closest training samples" not in text


def test_of_a_run_that_was_trained_again_since_they_are_not_shown(whole, exported):
    text = exported(whole.run.collection, weights="w-trained-before")
    assert "asked 0" in text and "Closest training samples" not in text


def test_samples_that_cannot_be_read_are_said_to_be(whole, exported, tmp_path):
    file = whole.run.dir / "evaluate" / "closest.parquet"
    file.rename(tmp_path / "away")
    try:
        text = exported(whole.run.collection)
    finally:
        (tmp_path / "away").rename(file)
    assert "The closest training samples of mine cannot be shown" in text
    assert "--from evaluate --fresh" in text


def test_without_texts_figures_remain(tmp_path):
    write(tmp_path, "dense", ranked([1, 1, 1, 1]), BIOLOGY, excerpts=False)
    text = page_of(tmp_path).text
    assert "no query can be shown" in text and "1.0000" in text


def test_hostile_texts_and_names_stay_texts(tmp_path):
    given = collection(HOSTILE.replace("\x00", ""), text=HOSTILE, gold="d'\"<0>/ô")
    for system in ("<b>a", "b&b"):
        run = ranked([1, 2, 3, None], gold="d'\"<0>/ô")
        write(tmp_path, system, run, given, text=HOSTILE, instruction=HOSTILE)
    markup = write_benchmark_report(tmp_path).read_text(encoding="utf-8")
    page = checked(markup)
    assert page.tags.count("script") == 1 and markup.count("<script") == 1
    assert HOSTILE.replace("\x00", "\ufffd") in page.text
    assert "d'\"<0>/ô" in page.text and "<b>a" in page.text


def test_twelve_tasks_of_five_systems_stay_below_ten_megabytes(tmp_path):
    long = "Wörter — and <formulas> & more " * 80
    for task in range(12):
        given = collection(f"bright/task{task}", queries=25, text=long)
        for system in range(5):
            run = ranked([1 + system] * 25, prefix=f"a rather long folder/document {system} ")
            write(tmp_path, f"system{system}", run, given, text=long)
    size = write_benchmark_report(tmp_path).stat().st_size
    assert 2_000_000 < size < 10_000_000


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="holds no result"):
        write_benchmark_report(tmp_path)
    with pytest.raises(EvaluationError, match="no folder"):
        write_benchmark_report(tmp_path / "gone")


DRIVER = """
const made = JSON.parse(process.argv[2]);
const select = (value) => ({ value });
const selects = [select(""), select("0"), select("1"), select("written")];
const words = { value: "" }, output = {}, listeners = {};
const list = {
  children: made.map((one) => ({ dataset: one, textContent: one.text })),
  replaceChildren: (...shown) => { list.shown = shown.map((one) => one.dataset.text); },
};
const controls = {
  hidden: true,
  querySelectorAll: () => selects,
  querySelector: (name) => (name === "input" ? words : output),
  addEventListener: (name, act) => { listeners[name] = act; },
};
global.document = { getElementById: (id) => ({ looks: list, controls }[id]) };
require(process.argv[1]);
const found = [[controls.hidden, ...list.shown]];
for (const [group, first, second, order, asked] of JSON.parse(process.argv[3])) {
  [group, first, second, order].forEach((value, place) => { selects[place].value = value; });
  words.value = asked;
  listeners.input();
  found.push([output.textContent, ...list.shown]);
}
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script runs in a browser")
def test_the_script_sorts_and_filters(tmp_path):
    script = files("reasonembed.report") / "assets" / "queries.js"
    made = [
        {"group": "0", "values": "0.5 0.9", "text": "Alpha lost"},
        {"group": "0", "values": "0.8 0.1", "text": "beta gained"},
        {"group": "1", "values": "0.1 0.9", "text": "gamma lost much"},
        {"group": "1", "values": "- 0.2", "text": "delta lacks"},
    ]
    asked = [
        ["", "0", "1", "loss", ""],
        ["", "0", "1", "gain", ""],
        ["", "1", "0", "gain", ""],
        ["", "0", "1", "lowest", ""],
        ["1", "0", "1", "written", ""],
        ["", "0", "1", "written", "LOST  alpha"],
    ]
    done = subprocess.run(
        ["node", "-e", DRIVER, str(script), json.dumps(made), json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
    )
    a, b, c, d = (one["text"] for one in made)
    assert json.loads(done.stdout) == [
        [False, a, b, c, d],
        ["2 of 4 queries", c, a],
        ["1 of 4 queries", b],
        ["2 of 4 queries", c, a],
        ["3 of 4 queries", c, a, b],
        ["2 of 4 queries", c, d],
        ["1 of 4 queries", a],
    ]
