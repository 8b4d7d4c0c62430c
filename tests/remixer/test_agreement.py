import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.remixer.agreement import (
    GradeCalibration,
    PairCost,
    cascade_report,
    consistency,
    label_agreement,
    pair_cost,
    table_agreement,
)
from reasonembed.schemas import JUDGMENTS, from_rows

# Ten pairs, worked by hand below.
TEACHER = [1, 1, 1, 2, 2, 3, 3, 4, 5, 5]
STUDENT = [1, 1, 2, 2, 3, 3, 1, 5, 5, 4]


def judgments(*rows):
    """Rows of judgments from what differs."""
    full = {
        "relevance_label": 3,
        "expected_label": None,
        "confidence": None,
        "analysis": None,
        "votes": [],
        "quick_label": None,
        "route": "full",
        "status": "ok",
        "detail": None,
        "finish_reason": "stop",
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "completion_tokens": 0,
        "tries": 1,
        "seed": 0,
        "model": "m",
    }
    made = [{"query_id": "q", "doc_id": f"d{i}"} | full | row for i, row in enumerate(rows)]
    return from_rows(made, JUDGMENTS, where="test")


def test_ten_pairs_worked_by_hand():
    found = label_agreement(TEACHER, STUDENT)
    # Equal: pairs 1, 2, 4, 6, 9. One apart: 3, 5, 8, 10. Two apart: 7.
    assert (found.num_pairs, found.num_unlabelled) == (10, 0)
    assert found.exact == pytest.approx(0.5)
    assert found.within_one == pytest.approx(0.9)
    # At 3: the teacher has 5 positives, the student 5; they differ on pairs 5 and 7.
    assert found.binary == pytest.approx(0.8)
    assert found.binary_kappa == pytest.approx((0.8 - 0.5) / (1 - 0.5))
    assert found.confusion == (
        (2, 1, 0, 0, 0),
        (0, 1, 1, 0, 0),
        (1, 0, 1, 0, 0),
        (0, 0, 0, 0, 1),
        (0, 0, 0, 1, 1),
    )
    # Σ w·observed = 4 × 1 + 1 × 4 = 8. By chance, Σ w·expected is the sum over all 100 pairs of a
    # teacher's and a student's label of (i - j)², over 10: the teacher's labels add up to 27 and
    # their squares to 95, the student's to 27 and 95, so (10·95 + 10·95 - 2·27·27) / 10 = 44.2.
    assert found.weighted_kappa == pytest.approx(1 - 8 / 44.2)
    assert found.calibration == (
        GradeCalibration(1, 3, pytest.approx(5 / 3)),  # 1, 1, 3
        GradeCalibration(2, 2, pytest.approx(1.5)),  # 1, 2
        GradeCalibration(3, 2, pytest.approx(2.5)),  # 2, 3
        GradeCalibration(4, 1, pytest.approx(5.0)),
        GradeCalibration(5, 2, pytest.approx(4.5)),  # 4, 5
    )


def test_a_grade_that_is_never_predicted_has_no_mean():
    found = label_agreement([1, 2], [2, 2])
    assert found.calibration[0] == GradeCalibration(1, 0, None)
    assert found.calibration[1] == GradeCalibration(2, 2, 1.5)


def test_chance_and_contradiction():
    assert label_agreement([1, 1, 5, 5], [1, 5, 1, 5]).weighted_kappa == pytest.approx(0)
    assert label_agreement([1, 1, 5, 5], [1, 5, 1, 5]).binary_kappa == pytest.approx(0)
    assert label_agreement([1, 5], [5, 1]).weighted_kappa == pytest.approx(-1)
    assert label_agreement([1, 3, 5], [1, 3, 5]).weighted_kappa == 1


def test_kappa_is_undefined_where_nothing_varies():
    same = label_agreement([4, 4], [4, 4])
    assert (same.exact, same.binary) == (1, 1)
    assert (same.weighted_kappa, same.binary_kappa) == (None, None)
    one_side = label_agreement([4, 5], [5, 3])
    assert one_side.binary_kappa is None
    assert one_side.weighted_kappa is not None


def test_pairs_without_a_label_are_counted_and_left_out():
    found = label_agreement([*TEACHER, None, 3, None], [*STUDENT, 3, None, None])
    assert dataclasses.replace(found, num_unlabelled=0) == label_agreement(TEACHER, STUDENT)
    assert found.num_unlabelled == 3
    assert label_agreement([None, 3], [3, None]) is None
    assert label_agreement([], []) is None


@pytest.mark.parametrize(
    ("reference", "predicted", "message"),
    [
        ([1, 2], [1], "2 reference labels, 1 predicted"),
        ([0], [1], "label 0 is no whole number from 1 to 5"),
        ([1], [6], "label 6"),
        ([1], [2.5], "label 2.5"),
    ],
)
def test_what_is_no_label_is_refused(reference, predicted, message):
    with pytest.raises(ValueError, match=message):
        label_agreement(reference, predicted)


labels = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=30)


def slow_kappa(one, other, weight):
    """Cohen's kappa from its definition, by pairs instead of counts."""
    observed = np.mean([weight(a, b) for a, b in zip(one, other, strict=True)])
    expected = np.mean([weight(a, b) for a, b in itertools.product(one, other)])
    return None if expected == 0 else 1 - observed / expected


@given(labels)
def test_against_a_slow_reference(drawn):
    one, other = zip(*drawn, strict=True)
    found = label_agreement(one, other)
    expected = slow_kappa(one, other, lambda a, b: (a - b) ** 2)
    assert found.weighted_kappa == (None if expected is None else pytest.approx(expected))
    expected = slow_kappa(one, other, lambda a, b: (a >= 3) != (b >= 3))
    assert found.binary_kappa == (None if expected is None else pytest.approx(expected))
    assert found.binary == pytest.approx(np.mean([(a >= 3) == (b >= 3) for a, b in drawn]))
    assert found.within_one == pytest.approx(np.mean([abs(a - b) <= 1 for a, b in drawn]))
    assert sum(map(sum, found.confusion)) == found.num_pairs == len(drawn)


@given(labels)
def test_against_scikit_learn(drawn):
    metrics = pytest.importorskip("sklearn.metrics")
    one, other = zip(*drawn, strict=True)
    found = label_agreement(one, other)
    if found.weighted_kappa is not None:
        assert found.weighted_kappa == pytest.approx(
            metrics.cohen_kappa_score(one, other, labels=[1, 2, 3, 4, 5], weights="quadratic")
        )
    assert found.confusion == tuple(
        map(tuple, metrics.confusion_matrix(one, other, labels=[1, 2, 3, 4, 5]).tolist())
    )


@given(labels)
def test_who_is_the_reference_matters_to_calibration_alone(drawn):
    one, other = zip(*drawn, strict=True)
    found, turned = label_agreement(one, other), label_agreement(other, one)
    assert turned.weighted_kappa == (
        None if found.weighted_kappa is None else pytest.approx(found.weighted_kappa)
    )
    assert (turned.exact, turned.within_one) == (found.exact, found.within_one)
    assert turned.confusion == tuple(zip(*found.confusion, strict=True))


def test_tables_are_compared_by_pair_whatever_their_order():
    teacher = judgments(*[{"relevance_label": label} for label in TEACHER])
    student = judgments(*[{"relevance_label": label} for label in STUDENT])
    expected = label_agreement(TEACHER, STUDENT)
    assert table_agreement(teacher, student.take(list(range(9, -1, -1)))) == expected
    found = table_agreement(teacher, student.slice(0, 9))
    assert (found.num_pairs, found.num_unlabelled) == (9, 1)


def test_consistency_worked_by_hand():
    table = judgments(
        {"votes": [3, 3, 3]},  # all three pairs equal, spread 0
        {"votes": [2, 3, 3, 5]},  # one of six pairs equal, spread 3
        {"votes": [1, 5]},  # none of one, spread 4
        {"votes": [4]},  # nothing to compare
        {"votes": []},
    )
    found = consistency(table)
    assert found.num_pairs == 3
    assert found.exact == pytest.approx((1 + 1 / 6 + 0) / 3)
    assert found.mean_spread == pytest.approx((0 + 3 + 4) / 3)
    assert consistency(table.slice(3)) is None


@given(st.lists(st.integers(1, 5), min_size=2, max_size=9))
def test_consistency_is_that_of_a_slow_count(votes):
    found = consistency(judgments({"votes": votes}))
    pairs = list(itertools.combinations(votes, 2))
    assert found.exact == pytest.approx(np.mean([a == b for a, b in pairs]))


def test_the_cost_of_a_thousand_pairs():
    table = judgments(
        {"prompt_tokens": 900, "cached_tokens": 600, "completion_tokens": 300},
        {"prompt_tokens": 1100, "cached_tokens": 200, "completion_tokens": 0, "status": "error"},
    )
    assert pair_cost(table) == PairCost(2, 1_000_000, 400_000, 150_000)
    assert pair_cost(table.slice(0, 0)) is None


def quick(label, *, tokens=(100, 1)):
    return {
        "route": "quick",
        "relevance_label": label,
        "quick_label": float(label),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
    }


def analysed(route, quick_label, label, *, tokens):
    return {
        "route": route,
        "relevance_label": label,
        "quick_label": quick_label,
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
    }


def test_a_cascade_worked_by_hand():
    table = judgments(
        *[quick(1)] * 6,
        analysed("checked", 1.1, 2, tokens=(200, 201)),
        analysed("checked", 4.6, 5, tokens=(200, 101)),
        analysed("full", 2.5, 4, tokens=(200, 301)),
        analysed("full", 3.4, None, tokens=(200, 301)),
    )
    found = cascade_report(table)
    assert found.num_pairs == 10
    assert (found.quick_share, found.full_share, found.checked_share) == (0.6, 0.2, 0.2)
    assert (found.tokens_read, found.tokens_written) == (6 * 100 + 4 * 200, 6 + 302 + 602)
    # Without a first pass: 10 analyses of 100 tokens read; the two unsure pairs wrote 300 each,
    # the eight sure ones 150 as the checked ones did.
    assert found.read_saving == pytest.approx(1 - 1400 / 1000)
    assert found.written_saving == pytest.approx(1 - 910 / (2 * 300 + 8 * 150))
    # Checked: 1.1 → 1 against 2, 4.6 → 5 against 5.
    assert found.agreement == label_agreement([2, 5], [1, 5])


def test_a_cascade_without_checked_pairs_takes_the_unsure_ones_for_an_estimate():
    table = judgments(*[quick(1)] * 3, analysed("full", 2.5, 4, tokens=(200, 301)))
    found = cascade_report(table)
    assert found.written_saving == pytest.approx(1 - 304 / (4 * 300))
    assert found.agreement is None


def test_a_cascade_that_analysed_nothing_cannot_tell_its_saving():
    found = cascade_report(judgments(quick(1), quick(5)))
    assert (found.quick_share, found.read_saving, found.written_saving) == (1, None, None)


def test_judgments_without_a_first_pass_are_no_cascade():
    assert cascade_report(judgments({}, {})) is None
    assert cascade_report(JUDGMENTS.empty_table()) is None
