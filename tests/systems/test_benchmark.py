"""Several systems on several collections, and what is printed of them."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from reasonembed.cli import app
from reasonembed.config import BenchmarkConfig, SystemConfig, load_benchmark
from reasonembed.errors import ConfigError, EvaluationError, ModelError, StorageError
from reasonembed.evaluation.metrics import Metrics
from reasonembed.evaluation.results import Result
from reasonembed.evaluation.standings import System, compare_systems
from reasonembed.progress import Reporter
from reasonembed.systems.benchmark import measure_here, placed
from reasonembed.systems.catalogue import load_system
from reasonembed.systems.table import table_lines
from tests.embedder.test_endpoint import embeddings
from tests.llm.chat_server import serving
from tests.ray.tiny_run import write_corpus

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "benchmark").glob("*.yaml"))


@pytest.fixture
def data(tmp_path):
    return write_corpus(tmp_path / "data")


def benchmark(tmp_path, data, **more):
    fields = {
        "systems": ["bm25", "bm25-query-side"],
        "collections": [str(data)],
        "results_dir": str(tmp_path / "results"),
    }
    return BenchmarkConfig.model_validate(fields | more)


def lines_of(config):
    return measure_here(config, Reporter(Console(file=StringIO())))


def test_two_systems_on_one_collection(tmp_path, data):
    lines = lines_of(benchmark(tmp_path, data))
    assert lines[0] == "data: 8 queries; figures × 100"
    assert lines[1].startswith("Protocol bright: ")
    table = lines[3:6]
    assert table[0].split()[:3] == ["system", "nDCG@10", "recall@10"]
    assert [row.split()[0] for row in table[1:]] == ["bm25", "bm25-query-side"]
    text = "\n".join(lines)
    assert "nDCG@10: how far" in text and "95 % interval" in text
    assert str(tmp_path / "results" / "bright") in lines[-1]


def test_a_mistake_shows_before_anything_is_made(tmp_path, data):
    for wrong, message in (
        ({"systems": ["bm25", "bm26"]}, "unknown system 'bm26'"),
        ({"systems": ["bm25", "bm25"]}, "'bm25' stands 2 times"),
        ({"collections": [str(data), str(data)]}, "collection 'data' stands 2 times"),
        ({"collections": ["nowhere"]}, "no collection 'nowhere'"),
        ({"systems": ["text-embedding-3-large"]}, "runtime.endpoints"),
    ):
        with pytest.raises((ConfigError, EvaluationError), match=message):
            lines_of(benchmark(tmp_path, data, **wrong))
    assert not (tmp_path / "results").exists()


def test_a_missing_run_file_shows_before_anything_is_made(tmp_path, data):
    file = tmp_path / "file.yaml"
    path = str(tmp_path / "{task}.trec")
    file.write_text(yaml.safe_dump({"name": "file", "retrieve": {"kind": "run", "path": path}}))
    with pytest.raises(EvaluationError, match=r"file: there is no run file .*data\.trec"):
        lines_of(benchmark(tmp_path, data, systems=["bm25", str(file)]))
    assert not (tmp_path / "results").exists()


def test_an_address_is_asked_for_where_something_is_to_be_embedded(tmp_path, data):
    file = tmp_path / "far.yaml"
    far = {"kind": "endpoint", "model": "m", "dimension": 3, "query_template": "{query}"}
    file.write_text(yaml.safe_dump({"name": "far", "retrieve": far}))

    def vectors(body):
        return embeddings(*([len(text), 1, 2] for text in body["input"]))

    config = benchmark(tmp_path, data, systems=[str(file)])
    with pytest.raises(ConfigError, match=r"runtime\.endpoints\.far"):
        lines_of(config)
    with serving(vectors) as server:
        runtime = {"endpoints": {"far": server.url}}
        first = lines_of(benchmark(tmp_path, data, systems=[str(file)], runtime=runtime))
    assert lines_of(config) == first


def test_a_missing_model_shows_before_anything_is_made(tmp_path, data):
    (tmp_path / "gone").mkdir()
    encoder = {"model": str(tmp_path / "gone"), "query_template": "{query}"}
    parts = {"words": {"kind": "bm25"}, "dense": {"kind": "dense", "encoder": encoder}}
    llm = {"model": str(tmp_path / "gone")}
    for number, fields in enumerate(
        (
            {"retrieve": {"kind": "hybrid", "parts": parts}},
            {"retrieve": {"kind": "bm25"}, "rewrite": {"llm": llm}},
            {"retrieve": {"kind": "bm25"}, "rerank": {"annotate": {"llm": llm}}},
        )
    ):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump({"name": f"s{number}"} | fields))
        with pytest.raises(ModelError, match="gone' is no checkpoint"):
            lines_of(benchmark(tmp_path, data, systems=["bm25", str(file)]))
    assert not (tmp_path / "results").exists()


def test_folders_of_models_are_absolute_where_actors_look_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    encoder = {"model": "mine", "query_template": "{query}"}
    far = {"kind": "endpoint", "model": "mine", "dimension": 3}
    dense = {"kind": "dense", "encoder": encoder}
    fields = {
        "name": "s",
        "retrieve": {"kind": "hybrid", "parts": {"here": dense, "far": far}},
        "rewrite": {"llm": {"model": "mine"}},
        "rerank": {"annotate": {"llm": {"model": "mine", "engine": "openai"}}},
    }
    found = placed(SystemConfig.model_validate(fields))
    parts = found.retrieve.parts
    assert parts["here"].encoder.model == found.rewrite.llm.model == str(tmp_path / "mine")
    assert parts["far"].model == found.rerank.annotate.llm.model == "mine"
    elsewhere = load_system("bge-large-en-v1.5")
    assert placed(elsewhere) == elsewhere


def test_two_processes_do_not_share_a_folder(tmp_path, data):
    from reasonembed.artifacts import locked

    with (
        locked(tmp_path / "results"),
        pytest.raises(StorageError, match="in use by another"),
    ):
        lines_of(benchmark(tmp_path, data))


def result(system, collection, values, **more):
    per_query = {
        f"q{i}": {"ndcg@10": value, "recall@10": value, "recall@100": 1.0, "recip_rank": value}
        for i, value in enumerate(values)
    }
    mean = {
        name: sum(of[name] for of in per_query.values()) / len(per_query)
        for name in per_query["q0"]
    }
    made = {"revision": "2024-11", "collection": collection, "corpus": "c"}
    return Result(
        system=system,
        seed=None,
        collection=f"bright/{collection}",
        benchmark="bright",
        protocol="bright",
        headline="ndcg@10",
        metrics=Metrics(mean, per_query, more.pop("missing", 0), more.pop("ties", 0)),
        credited=None,
        provenance=made | more,
    )


def test_tasks_stand_in_columns_and_their_plain_mean_first():
    results = [
        result("a", "biology", [0.2, 0.4], ties=3),
        result("a", "pony", [0.5]),
        result("b", "biology", [0.4, 0.4], missing=1, rewrites_failed=2),
        replace(result("b", "pony", [0.5]), credited=result("b", "pony", [0.8]).metrics),
    ]
    lines = table_lines(results, place=Path("results"))
    assert lines[0] == "bright: 3 queries, 2 tasks, revision 2024-11; figures × 100"
    assert [line.split() for line in lines[3:6]] == [
        ["nDCG@10", "of", "mean", "biology", "pony", "mean,", "copies", "credited"],
        ["a", "40.0", "30.0", "50.0", "40.0"],
        ["b", "45.0", "40.0", "50.0", "60.0"],
    ]
    text = "\n".join(lines)
    assert "a: 3 documents tie" in text
    assert "b: 1 queries have no answer and count 0; 2 queries could not be rewritten" in text
    assert "b is 5.0 nDCG@10 above a" in text


def test_the_p_of_the_best_of_several_is_corrected_for_all():
    rng = np.random.default_rng(3)
    base = 0.5 + rng.normal(0, 0.1, 40)
    by_system = {"base": base} | {
        f"s{number}": base + rng.normal(0.02, 0.1, 40) for number in range(8)
    }
    results = [result(name, "pony", values.tolist()) for name, values in by_system.items()]
    systems = [System(one.system, [one]) for one in results]
    found = compare_systems(systems)
    best = max(found.standings[1:], key=lambda one: one.overall).system
    (row,) = [one for one in found.differences if one.system == best]
    text = "\n".join(table_lines(results, place=Path("results")))
    assert row.p_corrected > 2 * row.found.p_value
    assert f"p = {row.p_corrected:.4f}, corrected for 8 comparisons)" in text


def test_one_system_is_compared_with_none():
    lines = table_lines([result("a", "biology", [0.2, 0.4])], place=Path("results"))
    assert not any("interval" in line for line in lines)


def test_the_command(tmp_path, data, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", "--system", "bm25", "--on", str(data)])
    assert done.exit_code == 0, done.output
    assert "[1/1] bm25 on data" in done.output and "nDCG@10" in done.output
    assert (tmp_path / "results" / "bright" / "data" / "bm25" / "result.json").is_file()
    other = ["evaluate", "--system", "bm25", "--on", str(data), "--protocol", "mteb-v1.1"]
    assert CliRunner().invoke(app, other).exit_code == 0
    assert (tmp_path / "results" / "mteb-v1.1").is_dir()
    helped = CliRunner().invoke(app, ["evaluate", "--help"])
    assert "score" in helped.output and "--system" in helped.output


def test_a_damaged_result_does_not_hide_the_table(tmp_path, data, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "results" / "bright" / "old" / "bm25" / "result.json"
    old.parent.mkdir(parents=True)
    old.write_text("{")
    done = CliRunner().invoke(app, ["evaluate", "--system", "bm25", "--on", str(data)])
    assert "nDCG@10" in done.output
    assert isinstance(done.exception, EvaluationError)
    assert str(old.relative_to(tmp_path)) in str(done.exception)


def test_an_option_before_a_subcommand_is_refused():
    for option, value in (("--results", "out"), ("--on", "bright"), ("--protocol", "bright")):
        done = CliRunner().invoke(app, ["evaluate", option, value, "compare", "a", "b"])
        assert isinstance(done.exception, ConfigError)
        assert f"{option} stands before compare; put it after compare" in str(done.exception)


@pytest.mark.parametrize("empty", ["systems", "collections"])
def test_nothing_to_measure_is_refused(empty):
    with pytest.raises(ConfigError, match=f"{empty}: .*at least 1 item"):
        load_benchmark(None, overrides=[f"{empty}=[]"])


def test_a_file_and_what_is_given_beside_it(tmp_path):
    file = tmp_path / "b.yaml"
    file.write_text(yaml.safe_dump({"systems": ["bm25"], "protocol": "reasonembed"}))
    config = load_benchmark(
        file, given={"collections": ["limit-small"]}, overrides=["runtime.batch_tokens=512"]
    )
    assert (config.systems, config.collections) == (("bm25",), ("limit-small",))
    assert config.protocol == "reasonembed" and config.runtime.batch_tokens == 512
    assert load_benchmark(None) == BenchmarkConfig()
    with pytest.raises(ConfigError, match="protocol"):
        load_benchmark(file, given={"protocol": "brite"})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_benchmark_that_ships_can_be_read(file):
    config = load_benchmark(file)
    for name in config.systems:
        load_system(name)


def test_benchmarks_ship():
    assert CONFIGS
