from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.compare import holm
from reasonembed.evaluation.comparison_text import coarse_lines, comparison_lines
from reasonembed.evaluation.standings import System, compare_systems
from reasonembed.tasks import BRIGHT
from tests.evaluation.results_of import DATA, result_of, system_of

PONY, AOPS = "bright/pony", "bright/aops"


@pytest.fixture
def three():
    rng = np.random.default_rng(0)
    base = {PONY: rng.random(30), AOPS: rng.random(20)}
    better = {name: values + rng.normal(0.2, 0.1, len(values)) for name, values in base.items()}
    same = {name: values + rng.normal(0, 0.1, len(values)) for name, values in base.items()}
    return [system_of("base", base), system_of("better", better), system_of("same", same)]


def of(benchmark, system, collection):
    (row,) = [
        one for one in benchmark.differences if (one.system, one.collection) == (system, collection)
    ]
    return row


def test_the_overall_figure_is_the_mean_over_collections(three):
    found = compare_systems(three)
    assert [one.system for one in found.standings] == ["base", "better", "same"]
    assert (found.metric, found.protocol) == ("ndcg@10", "bright")
    assert found.num_queries == {AOPS: 20, PONY: 30}
    assert found.revisions == {AOPS: "current", PONY: "current"}
    standing = found.standings[1]
    assert standing.overall == pytest.approx(np.mean(list(standing.by_collection.values())))
    single = [of(found, "better", name).found for name in (PONY, AOPS)]
    overall = of(found, "better", None).found
    assert overall.mean_difference == pytest.approx(
        np.mean([one.mean_difference for one in single])
    )
    assert overall.mean_difference == pytest.approx(standing.overall - found.standings[0].overall)
    assert overall.wins == sum(one.wins for one in single)
    assert overall.p_value < 0.001 < 0.05 < of(found, "same", None).found.p_value


def test_p_is_corrected_in_two_families(three):
    found = compare_systems(three)
    assert found.families == (2, 4)
    overall = [row for row in found.differences if row.collection is None]
    single = [row for row in found.differences if row.collection is not None]
    for family in (overall, single):
        expected = holm([row.found.p_value for row in family])
        assert [row.p_corrected for row in family] == pytest.approx(expected)


def test_a_collection_s_figures_do_not_depend_on_the_others(three):
    both = compare_systems(three)
    alone = [
        System(one.name, [result for result in one.results if result.collection == PONY])
        for one in three
    ]
    found = compare_systems(alone)
    assert found.families == (0, 2)
    assert {row.collection for row in found.differences} == {PONY}
    assert of(found, "same", PONY).found == of(both, "same", PONY).found


def test_collections_of_one_size_are_drawn_apart():
    # Opposite differences in two collections cancel in every draw if the draws are the same ones.
    differences = np.random.default_rng(1).normal(0, 0.3, 40)
    base = system_of("base", {PONY: np.zeros(40), AOPS: np.zeros(40)})
    other = system_of("other", {PONY: differences, AOPS: -differences})
    overall = of(compare_systems([base, other]), "other", None).found
    assert overall.high - overall.low > 0.1


def seeds_of(name, runs):
    return System(
        name,
        [
            result_of(values, system=name, collection=collection, seed=seed)
            for seed, by_collection in runs.items()
            for collection, values in by_collection.items()
        ],
    )


def test_seeds_are_one_row_with_its_spread():
    base = system_of("base", {PONY: [0.2, 0.4], AOPS: [0.1, 0.3]})
    trained = seeds_of(
        "trained",
        {1: {PONY: [0.4, 0.6], AOPS: [0.2, 0.4]}, 2: {PONY: [0.6, 1.0], AOPS: [0.4, 0.4]}},
    )
    found = compare_systems([base, trained])
    own = found.standings[1]
    assert own.seeds == (1, 2)
    assert own.by_collection == pytest.approx({PONY: 0.65, AOPS: 0.35})
    assert own.overall == pytest.approx(0.5)
    assert own.spread == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert own.spread_by_collection == pytest.approx(
        {PONY: np.std([0.5, 0.8], ddof=1), AOPS: np.std([0.3, 0.4], ddof=1)}
    )
    assert found.values["trained"][PONY] == pytest.approx({"q0": 0.5, "q1": 0.8})
    assert of(found, "trained", PONY).found.mean_difference == pytest.approx(0.35)
    assert (found.standings[0].seeds, found.standings[0].spread) == ((None,), None)


def test_too_many_comparisons_for_so_few_swaps_are_said(three):
    found = compare_systems(three, num_samples=50)
    assert found.families == (2, 4) and min(row.p_corrected for row in found.differences) < 0.05
    (line,) = coarse_lines(found)
    assert line.startswith("50 swaps give no p below 0.02, and 4 times that passes 0.05")
    assert comparison_lines(found)[-1] == line
    assert coarse_lines(compare_systems(three)) == []


def test_another_metric_can_be_asked_for():
    systems = [
        system_of(name, {PONY: [0.1, 0.2]}, metric="recall@100") for name in ("base", "other")
    ]
    assert compare_systems(systems, metric="recall@100").metric == "recall@100"
    with pytest.raises(EvaluationError, match=r"base has no 'map@10' on bright/pony; it has rec"):
        compare_systems(systems, metric="map@10")


OTHER = {"benchmark": "r2med", "collection": "r2med/biology"}
BASE = system_of("base", {PONY: [0.1, 0.2]})


def changed(**fields):
    (result,) = system_of("other", {PONY: [0.1, 0.2]}).results
    return System("other", [dataclasses.replace(result, **fields)])


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ([BASE], "two systems or more, got 1"),
        ([BASE, BASE], "a name of its own, got base, base"),
        ([BASE, changed(protocol="reasonembed")], "base .* 'bright' and other under 'reasonembed'"),
        (
            [BASE, changed(provenance=DATA | {"revision": "2024"})],
            "bright/pony: revision is 'current' for base and '2024' for other",
        ),
        (
            [BASE, changed(provenance=DATA | {"collection": "queries-2"})],
            "judgments and exclusions is 'queries-1' for base and 'queries-2' for other",
        ),
        (
            [BASE, changed(provenance=DATA | {"corpus": "documents-2"})],
            "searched documents is 'documents-1' for base and 'documents-2' for other",
        ),
        (
            [BASE, system_of("other", {PONY: [0.1, 0.2, 0.3]})],
            r"base has 2 queries and other 3, 1 of them only one, such as \['q2'\]",
        ),
        (
            [BASE, system_of("other", {PONY: [0.1, 0.2], AOPS: [0.3]})],
            r"results on 1 collections and other on 2; .* only other has \['bright/aops'\]",
        ),
        ([BASE, System("other", [])], r"other on 0; only base has \['bright/pony'\]"),
        (
            [BASE, System("other", [*changed().results, *changed().results])],
            "two results on bright/pony with the same seed, None; leave one",
        ),
        (
            [
                system_of("base", {PONY: [0.1], AOPS: [0.1]}),
                System(
                    "other",
                    [
                        result_of([0.1], collection=PONY, seed=1),
                        result_of([0.1], collection=AOPS, seed=2),
                    ],
                ),
            ],
            r"other has seeds \['1'\] on bright/pony and \['2'\] on bright/aops",
        ),
        (
            [
                System(name, [*one.results, result_of([0.5], system=name, **OTHER)])
                for name, one in (("base", BASE), ("other", changed()))
            ],
            "of 2 benchmarks: bright, r2med; .*choose with --on",
        ),
        ([BASE, changed(headline="recall@1")], "several headlines: .*; choose one metric"),
    ],
)
def test_what_is_not_comparable_is_refused_with_both_values(systems, message):
    with pytest.raises(EvaluationError, match=message):
        compare_systems(systems)


def test_ten_systems_on_twelve_tasks_take_seconds():
    rng = np.random.default_rng(2)
    tasks = {f"bright/{name}": rng.random(120) for name in BRIGHT}
    systems = [
        system_of(f"s{number}", {name: values + 0.01 * number for name, values in tasks.items()})
        for number in range(10)
    ]
    started = time.process_time()
    found = compare_systems(systems)
    assert found.families == (9, 108)
    assert time.process_time() - started < 15  # about 1.5 s; machines differ
