from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reasonembed.errors import EvaluationError
from reasonembed.evaluate_cli import app
from reasonembed.evaluation.leaderboard import (
    SHORT,
    benchmark_tasks,
    leaderboard_lines,
    published,
)
from reasonembed.evaluation.leaderboard import leaderboard as board_of
from reasonembed.evaluation.protocols import PROTOCOLS
from reasonembed.evaluation.results import result_dir, write_result
from reasonembed.systems.catalogue import system_names
from reasonembed.tasks import BRIGHT, R2MED
from tests.evaluation.results_of import DATA, result_of

# Whose printed average is not the mean of their printed values; the sources have them so.
KNOWN = {
    ("gte-Qwen2-7B-instruct", "bright"): 23.57,
    ("ReasonIR-8B", "bright+gpt4_reason"): 29.96,
    ("RaDeR-gte-Qwen2-7B", "r2med"): 35.22,
}


def whole_rows():
    tasks = benchmark_tasks()
    return [row for row in published() if len(row.values) == len(tasks[row.benchmark])]


def test_printed_averages_are_the_means_of_the_printed_values():
    differing = {}
    for row in whole_rows():
        if row.source.startswith("regressions"):
            continue  # no average was published
        unit = 0.01 if row.benchmark == "r2med" else 0.1
        mean = statistics.fmean(row.values.values())
        # A mean half way between two decimals may have been rounded to either.
        if abs(mean - row.average) > unit / 2 + 1e-9:
            differing[row.name, row.benchmark] = round(mean, 2)
            assert f"the mean of its values is {mean:.2f}" in row.uncertain
    assert differing == pytest.approx(KNOWN, abs=0.011)
    assert len(whole_rows()) >= 50


def test_rows_of_the_paper():
    rows = {(row.name, row.benchmark): row for row in published() if row.average}
    own = rows["ReasonEmbed-Qwen3-8B", "bright"]
    assert (own.average, own.values["biology"], own.values["theoremqa_theorems"]) == (
        38.1,
        55.5,
        47.2,
    )
    assert (own.protocol, own.date) == ("reasonembed", "2025-10-12")
    assert rows["ReasonEmbed-Qwen3-8B", "r2med"].average == 43.18
    assert rows["DIVER-Retriever-4B-1020", "bright"].average == 31.9
    assert rows["DIVER-Retriever-4B-1020", "bright"].values == {}
    assert rows["BM25, standard", "bright"].values["biology"] == 18.24
    assert rows["BM25, standard", "bright"].average == pytest.approx(13.69, abs=0.005)


def test_every_row_names_source_date_task_protocol_and_system():
    tasks = benchmark_tasks()
    assert tasks["bright"] == tasks["bright+gpt4_reason"] == BRIGHT
    assert tuple(f"r2med-{task}" for task in tasks["r2med"]) == R2MED
    assert {task for of in tasks.values() for task in of} <= SHORT.keys()
    for row in published():
        assert row.source and row.date.startswith("20") and row.uncertain
        assert row.protocol in {*PROTOCOLS, "unknown"}
        assert row.system is None or row.system in system_names(), row.system
        assert all(0 <= value <= 100 for value in row.values.values())


def ours(tasks, *, system="bm25", protocol="bright", value=0.2, seed=None):
    return [
        result_of([value], system=system, collection=f"bright/{task}", protocol=protocol, seed=seed)
        for task in tasks
    ]


def leaderboard(results, *, benchmark):
    found = [(Path(f"place-{number}", "result.json"), one) for number, one in enumerate(results)]
    return board_of(found, benchmark=benchmark)


def own_row(results, **options):
    (row,) = [row for row in leaderboard(results, benchmark="bright").rows if row.is_ours]
    return row


def test_incomplete_rows_have_no_mean():
    row = own_row(ours(BRIGHT[:7]))
    assert (row.average, len(row.values)) == (None, 7)
    by_task, average = row.difference()
    assert average is None
    assert by_task["biology"] == pytest.approx(20 - 18.24)
    assert own_row(ours(BRIGHT)).average == pytest.approx(20)
    text = "\n".join(leaderboard_lines(leaderboard(ours(BRIGHT[:7]), benchmark="bright")))
    assert "7 of 12" in text and "0 of 12" not in text.split("→ bm25")[1]


def test_a_row_is_compared_under_its_protocol_where_it_can():
    same = own_row(ours(BRIGHT, system="reasonembed-qwen3-4b", protocol="reasonembed"))
    assert (same.published.average, same.published.protocol) == (37.1, "reasonembed")
    other = own_row(ours(["pony"], system="reasonembed-qwen3-4b", protocol="bright"))
    assert other.published.values == {"pony": 12.16}
    board = leaderboard(ours(BRIGHT, protocol="mteb-v1.1"), benchmark="bright")
    assert any("of bright!" in line for line in leaderboard_lines(board))
    assert own_row(ours(["pony"], system="a-new-one")).published is None


def test_seeds_are_one_row():
    results = ours(BRIGHT, seed=1, value=0.2) + ours(BRIGHT, seed=2, value=0.4)
    row = own_row(results)
    assert row.name == "bm25 (2 seeds)"
    assert row.average == pytest.approx(30)


def test_a_copy_of_a_result_is_no_seed():
    twice = ours(BRIGHT, value=0.2) + ours(["pony"], value=0.4)
    places = f"place-{BRIGHT.index('pony')} and place-{len(BRIGHT)}"
    with pytest.raises(EvaluationError, match=f"two results on bright/pony .*, None: {places};"):
        own_row(twice)


def test_rows_whose_seeds_differ_from_task_to_task_have_no_mean():
    seeds = ours(BRIGHT, seed=1) + ours(["pony"], seed=2)
    with pytest.raises(
        EvaluationError, match=r"seeds \['1'\] on .* and \['1', '2'\] on bright/pony"
    ):
        own_row(seeds)


def test_figures_on_other_data_stand_in_no_common_table():
    other = result_of([0.2], system="dense", data=DATA | {"revision": "2024"})
    with pytest.raises(
        EvaluationError, match=r"revision is 'current' for bm25 and '2024' for dense"
    ):
        leaderboard([*ours(["pony"]), other], benchmark="bright")
    apart = result_of([0.2], protocol="run", data=DATA | {"corpus": "documents-2"})
    board = leaderboard([*ours(["pony"]), apart], benchmark="bright")
    assert [row.protocol for row in board.rows if row.is_ours] == ["bright", "run"]


def test_published_rows_come_by_average_and_ours_after_them():
    board = leaderboard(ours(["pony"]), benchmark="bright")
    averages = [row.average for row in board.rows if not row.is_ours]
    known = [one for one in averages if one is not None]
    assert known == sorted(known, reverse=True) and averages[: len(known)] == known
    assert board.rows[-1].is_ours and board.revisions == ("current",)


def test_a_benchmark_without_published_rows_is_ours_alone():
    results = [result_of([0.5], collection="python-stdlib", benchmark="python-stdlib")]
    board = leaderboard(results, benchmark="python-stdlib")
    assert (board.tasks, board.rows[0].average) == (("python-stdlib",), 50)
    with pytest.raises(EvaluationError, match="'bogus'; published are: bright, bright"):
        leaderboard(results, benchmark="bogus")
    with pytest.raises(EvaluationError, match=r"bm25 has no ndcg@10 on bright/pony"):
        leaderboard([result_of([0.5], metric="recall@1")], benchmark="bright")


def test_whole_pages_are_ranked_by_their_own_headline():
    long = {"benchmark": "bright-long", "collection": "bright-long/pony"}
    board = leaderboard([result_of([0.5], metric="recall@1", **long)], benchmark="bright-long")
    assert (board.metric, board.rows[0].values) == ("recall@1", {"pony": 50})
    assert leaderboard_lines(board)[0].startswith("bright-long: recall@1 × 100, 1 tasks")
    mixed = [result_of([0.5], metric=one, **long) for one in ("recall@1", "ndcg@10")]
    with pytest.raises(EvaluationError, match=r"several headlines: ndcg@10, recall@1"):
        leaderboard(mixed, benchmark="bright-long")


def invoke(*arguments):
    done = CliRunner().invoke(app, ["leaderboard", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_both(tmp_path):
    for one in ours(BRIGHT):
        folder = result_dir(
            tmp_path, protocol=one.protocol, collection=one.collection, system=one.system
        )
        write_result(one, folder)
    text = invoke(tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("→ bm25")]
    assert line.split()[2:5] == ["bright", "20.0", "20.0"]
    assert "minus published (BM25, standard)" in text
    assert "ReasonEmbed (arXiv:2510.08252), table 2 (2025-10-12)" in text
    row = json.loads(invoke(tmp_path, "--json"))["rows"][-1]
    assert row["difference"]["pony"] == pytest.approx(20 - 4.34)
    assert row["published"]["date"] == "2025-09"
    assert "43.2" in invoke("--benchmark", "r2med")
