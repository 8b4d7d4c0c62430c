from __future__ import annotations

import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation import sources
from reasonembed.evaluation.results import result_dir, write_result
from reasonembed.evaluation.sources import load_systems
from tests.evaluation.results_of import result_of


def write(root, system, *, collection="bright/pony", protocol="bright", seed=None):
    result = result_of(
        [0.1, 0.2], system=system, collection=collection, protocol=protocol, seed=seed
    )
    folder = result_dir(root, protocol=protocol, collection=collection, system=system)
    folder = folder if seed is None else folder / f"seed-{seed}"
    write_result(result, folder)
    return folder


@pytest.fixture
def results(tmp_path):
    for collection in ("bright/aops", "bright/pony"):
        for system in ("bm25", "minilm"):
            write(tmp_path / "results", system, collection=collection)
    return tmp_path / "results"


def load(*sources, results, **options):
    return load_systems(sources, results=results, **options)


def test_a_name_is_looked_up_among_the_results(results):
    bm25, minilm = load("bm25", "minilm", results=results)
    assert (bm25.name, minilm.name) == ("bm25", "minilm")
    assert [one.collection for one in bm25.results] == ["bright/aops", "bright/pony"]
    assert all((folder / "result.json").is_file() for folder in minilm.folders)


def test_a_file_and_a_folder_and_a_system_in_a_folder(results, tmp_path):
    folder = write(tmp_path / "elsewhere", "dense")
    sources = str(folder / "result.json"), str(folder), str(tmp_path / "elsewhere")
    for source in sources:
        (system,) = load(source, results=results)
        assert (system.name, len(system.results)) == ("dense", 1)
    (system,) = load(f"{results}:bm25", results=tmp_path)
    assert (system.name, len(system.results)) == ("bm25", 2)


def test_a_run_directory_is_its_evaluation(results, tmp_path):
    run = tmp_path / "run"
    for system in ("before", "after"):
        write_result(result_of([0.1], system=system), run / "evaluate" / system)
    (run / "config.resolved.yaml").write_text("")
    write_result(result_of([0.1], system="other"), run / "elsewhere")
    before, after = load(f"{run}:before", f"{run}:after", results=results)
    assert (before.name, after.name) == ("before", "after")
    with pytest.raises(EvaluationError, match=f"name one: {run}:after or {run}:before"):
        load(str(run), results=results)


def test_systems_of_one_name_are_called_by_their_source(results, tmp_path):
    other = write(tmp_path / "other", "bm25")
    first, second, third = load("bm25", str(other), "minilm", results=results)
    assert [first.name, second.name, third.name] == ["bm25", str(other), "minilm"]


def test_commas_make_seeds_of_one_system(results, tmp_path):
    ones = [str(write(tmp_path / f"r{seed}", "after", seed=seed)) for seed in (7, 3)]
    (system,) = load(",".join(ones), results=results)
    assert system.name == "after"
    assert [one.seed for one in system.results] == [7, 3]
    (named,) = load("bm25,minilm", results=results)  # two trainings under two names
    assert named.name == "bm25,minilm"
    assert [one.seed for one in named.results] == [1, 1, 2, 2]


def test_of_runs_the_seeds_are_of_one_system(results, tmp_path):
    for number in (1, 2):
        for system in ("before", "after"):
            folder = tmp_path / f"s{number}" / "evaluate" / system
            write_result(result_of([0.1], system=system, protocol="run", seed=number), folder)
        (tmp_path / f"s{number}" / "config.resolved.yaml").write_text("")
    one, two = tmp_path / "s1", tmp_path / "s2"
    (after,) = load(f"{one}:after,{two}:after", results=results)
    assert [result.seed for result in after.results] == [1, 2]
    with pytest.raises(EvaluationError, match="seeds of one system, and these are 2: after, befo"):
        load(f"{one}:after,{two}:before", results=results)


def test_a_folder_is_read_once_for_all_sources(results, monkeypatch):
    read, real = [], sources.find_result_files
    monkeypatch.setattr(sources, "find_result_files", lambda path: read.append(path) or real(path))
    load("bm25", "minilm", f"{results}:bm25", results=results)
    assert read == [results]


def test_a_folder_may_hold_seeds(tmp_path):
    for seed in (1, 2):
        write(tmp_path, "trained", seed=seed)
    (system,) = load("trained", results=tmp_path)
    assert [one.seed for one in system.results] == [1, 2]


def test_protocols_and_collections_choose(results):
    write(results, "bm25", protocol="reasonembed")
    with pytest.raises(EvaluationError, match=r"several protocols: bright, reas.*--protocol"):
        load("bm25", results=results)
    (system,) = load("bm25", results=results, protocol="reasonembed")
    assert [one.protocol for one in system.results] == ["reasonembed"]
    (pony,) = load("bm25", results=results, protocol="bright", collections=["bright/pony"])
    assert [one.collection for one in pony.results] == ["bright/pony"]
    (bright,) = load("bm25", results=results, protocol="bright", collections=["bright"])
    assert len(bright.results) == 2
    with pytest.raises(EvaluationError, match=r"minilm has no result .* bright/pony under bright"):
        load("minilm", results=results, protocol="reasonembed")


def test_what_is_not_there_is_said(results, tmp_path):
    with pytest.raises(EvaluationError, match=r"no system 'bm52'; its systems: bm25, minilm"):
        load("bm52", results=results)
    with pytest.raises(EvaluationError, match="and no folder nowhere"):
        load("nowhere:bm25", results=results)
    with pytest.raises(EvaluationError, match=r"no folder .*none with results"):
        load("bm25", results=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"holds no result\.json"):
        load(str(tmp_path / "empty"), results=results)
