from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from reasonembed.errors import EvaluationError
from reasonembed.evaluate_cli import app
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.comparison_text import comparison_lines, metric_name, moved_lines
from reasonembed.evaluation.excerpts import write_excerpts
from reasonembed.evaluation.results import result_dir, write_result
from reasonembed.evaluation.standings import compare_systems
from tests.evaluation.results_of import result_of, system_of

PONY, AOPS = "bright/pony", "bright/aops"
LOW = {PONY: [0.1, 0.2, 0.5, 0.5, 0.1, 0.2, 0.3, 0.1], AOPS: [0.1, 0.1, 0.3]}
HIGH = {PONY: [0.9, 0.6, 0.4, 0.5, 0.6, 0.7, 0.8, 0.62], AOPS: [0.1, 0.2, 0.2]}


@pytest.fixture
def systems():
    return [system_of("bm25", LOW), system_of("dense", HIGH)]


def test_the_table_says_what_was_measured_and_what_it_means(systems):
    text = "\n".join(comparison_lines(compare_systems(systems)))
    assert "nDCG@10 × 100 under protocol bright, 11 queries: bright/aops (current)" in text
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line) for line in text.splitlines()}
    assert rows["dense"] == ["dense", "40.3"]
    pony = rows[PONY]
    assert pony[1:4] == ["8", "25.0", "64.0"]
    # Of two comparisons, this is one that looks good by chance too easily.
    assert pony[4] == "+39.0" and pony[-1] == "6/1/1"
    assert float(pony[-3]) < 0.05 < float(pony[-2].split()[0])
    assert pony[-2].endswith(" of 2")
    assert rows["all, equally weighted"][1:5] == ["11", "20.8", "40.3", "+19.5*"]
    assert rows["all, equally weighted"][-2].endswith(" of 1")
    assert rows[AOPS][4] == "+0.0"
    assert "95 % interval: if other queries" in text and "p: how often swapping" in text


def test_seeds_are_shown_with_their_spread(systems):
    trained = [
        *system_of("trained", LOW, seed=1).results,
        *system_of("trained", HIGH, seed=2).results,
    ]
    systems[1] = type(systems[1])("trained", trained)
    lines = comparison_lines(compare_systems(systems))
    assert any(re.fullmatch(r"trained +30\.6 +± 13\.8 \(2 seeds\)", line) for line in lines)


def test_queries_that_moved_most_are_shown(systems):
    lines = moved_lines(compare_systems(systems), systems, show=2)
    won = lines[lines.index("Queries that dense won most against bm25:") + 1 :]
    assert won[0].split() == ["10.0", "to", "90.0", PONY, "q0"]
    lost = lines[lines.index("Queries that dense lost most against bm25:") + 1 :]
    assert [line.split()[-1] for line in lost] == ["q2", "q2"]
    same = [system_of("bm25", LOW), system_of("copy", LOW)]
    assert moved_lines(compare_systems(same), same, show=3).count("  none") == 2
    assert moved_lines(compare_systems(same), same, show=0) == []


def test_metrics_have_the_names_that_people_know():
    assert [metric_name(one) for one in ("ndcg@10", "map@5", "recip_rank", "recall@1")] == [
        "nDCG@10",
        "MAP@5",
        "MRR",
        "recall@1",
    ]


def write(root, system, by_collection, *, protocol="bright", texts=False):
    for name, values in by_collection.items():
        folder = result_dir(root, protocol=protocol, collection=name, system=system)
        write_result(result_of(values, system=system, collection=name, protocol=protocol), folder)
        if texts:
            queries = {f"q{n}": f"{name}: how\nis query {n}?" for n in range(len(values))}
            given = Collection(
                name=name,
                queries=queries,
                qrels={query_id: {"d": 1} for query_id in queries},
                excluded={},
                task="generic",
                instruction="",
                corpus_source=None,
            )
            write_excerpts(folder, given, {}, texts=lambda ids: dict.fromkeys(ids, "text"))


@pytest.fixture
def results(tmp_path):
    write(tmp_path / "results", "bm25", LOW)
    write(tmp_path / "results", "dense", HIGH, texts=True)
    return tmp_path / "results"


def invoke(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_prints_the_table_and_the_texts(results):
    done = invoke("bm25", "dense", "--results", results, "--show", 1)
    assert done.exit_code == 0, done.output
    assert "dense against bm25:" in done.output
    assert "10.0 to 90.0  bright/pony q0  bright/pony: how is query 0?" in done.output


def test_the_command_prints_json_unrounded(results):
    done = invoke("bm25", "dense", "--results", results, "--json", "--on", AOPS)
    found = json.loads(done.stdout)
    assert found["format"] == "reasonembed-comparison/1"
    assert found["families"] == {"overall": 0, "by_collection": 1}
    assert found["values"]["dense"][AOPS] == {"q0": 0.1, "q1": 0.2, "q2": 0.2}
    assert found["differences"][0]["found"]["losses"] == 1


def test_the_command_refuses_what_is_not_comparable(results):
    write(results, "other", HIGH, protocol="reasonembed")
    done = invoke("bm25", "other", "--results", results)
    assert isinstance(done.exception, EvaluationError)
    assert "'bright' and other under 'reasonembed'" in str(done.exception)
