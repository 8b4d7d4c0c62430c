"""The agreement kit: how far two sets of labels agree, and what an annotator costs.

Teacher against student, annotator against gold, a model against itself: reads `judgments` (or two
columns of labels over the same pairs) and writes nothing. Grades are 1..5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reasonembed.schemas import ARTIFACTS

POSITIVE_MIN = 3
"""The lowest grade of a positive (arXiv:2510.08252)."""
_NUM_GRADES = 5


@dataclass(frozen=True)
class GradeCalibration:
    """What the other side says where one side says a grade.

    Attributes:
        grade: The predicted grade, 1..5.
        num_pairs: How often it was predicted.
        mean_reference: Mean of the reference's grades there; None where it was never predicted.
    """

    grade: int
    num_pairs: int
    mean_reference: float | None


@dataclass(frozen=True)
class LabelAgreement:
    """Agreement of predicted labels with reference labels over the same pairs.

    Attributes:
        num_pairs: Pairs that both label.
        num_unlabelled: Pairs that one of the two leaves without a label; they count nowhere else.
        exact: Share of equal labels.
        within_one: Share of labels that differ by 1 at most.
        binary: Share of pairs that both put on the same side of `POSITIVE_MIN`.
        binary_kappa: Cohen's kappa of that; None where chance alone gives full agreement (all
            labels of both on one side).
        weighted_kappa: Cohen's kappa over the five grades with quadratic weights; None where both
            give one and the same grade throughout.
        confusion: 5 × 5 counts, the reference's grade down, the predicted grade across.
        calibration: One entry for each grade.
    """

    num_pairs: int
    num_unlabelled: int
    exact: float
    within_one: float
    binary: float
    binary_kappa: float | None
    weighted_kappa: float | None
    confusion: tuple[tuple[int, ...], ...]
    calibration: tuple[GradeCalibration, ...]


def label_agreement(
    reference: Sequence[int | None], predicted: Sequence[int | None]
) -> LabelAgreement | None:
    """Compares two labels of each pair.

    Args:
        reference: 1..5 or None for each pair: gold, or the teacher.
        predicted: Of the same pairs in the same order: the annotator, or the student.

    Returns:
        None where no pair has both labels.

    Raises:
        ValueError: The two are not of one length, or a label is not a whole number from 1 to 5.
    """
    if len(reference) != len(predicted):
        raise ValueError(f"{len(reference)} reference labels, {len(predicted)} predicted ones")
    counts_GG = np.zeros((_NUM_GRADES, _NUM_GRADES), np.int64)
    for one, other in zip(reference, predicted, strict=True):
        if one is not None and other is not None:
            counts_GG[_place(one), _place(other)] += 1
    total = int(counts_GG.sum())
    if not total:
        return None
    gap_GG = np.abs(np.subtract.outer(np.arange(_NUM_GRADES), np.arange(_NUM_GRADES)))
    sides = [0, POSITIVE_MIN - 1]
    side_SS = np.add.reduceat(np.add.reduceat(counts_GG, sides, axis=0), sides, axis=1)
    return LabelAgreement(
        num_pairs=total,
        num_unlabelled=len(reference) - total,
        exact=float(np.trace(counts_GG)) / total,
        within_one=float(counts_GG[gap_GG <= 1].sum()) / total,
        binary=float(np.trace(side_SS)) / total,
        binary_kappa=_kappa(side_SS),
        weighted_kappa=_kappa(counts_GG),
        confusion=tuple(tuple(row) for row in counts_GG.tolist()),
        calibration=_calibration(counts_GG),
    )


def table_agreement(reference: pa.Table, predicted: pa.Table) -> LabelAgreement | None:
    """`label_agreement` of the `relevance_label` of two tables of judgments, joined by pair.

    A pair that only one of them holds counts as unlabelled, and so does one without a label.
    """
    key = list(ARTIFACTS["judgments"].key)
    both = reference.select([*key, "relevance_label"]).join(
        predicted.select([*key, "relevance_label"]),
        keys=key,
        join_type="full outer",
        right_suffix="_predicted",
    )
    columns = ("relevance_label", "relevance_label_predicted")
    one, other = (both.column(name).to_pylist() for name in columns)
    return label_agreement(one, other)


def _place(label: int) -> int:
    if label not in range(1, _NUM_GRADES + 1):
        raise ValueError(f"label {label!r} is no whole number from 1 to {_NUM_GRADES}")
    return int(label) - 1


def _kappa(counts_GG: NDArray[np.int64]) -> float | None:
    """Cohen's kappa with quadratic weights; of two classes, the plain one.

    1 - Σ w·observed / Σ w·expected, w = (i - j)², expected from the margins.
    """
    places = np.arange(len(counts_GG))
    weights_GG = np.subtract.outer(places, places) ** 2
    expected_GG = np.outer(counts_GG.sum(axis=1), counts_GG.sum(axis=0)) / counts_GG.sum()
    by_chance = float((weights_GG * expected_GG).sum())
    return 1 - float((weights_GG * counts_GG).sum()) / by_chance if by_chance else None


def _calibration(counts_GG: NDArray[np.int64]) -> tuple[GradeCalibration, ...]:
    grades_G = np.arange(1, _NUM_GRADES + 1)
    found = []
    for grade, column_G in zip(grades_G.tolist(), counts_GG.T, strict=True):
        num = int(column_G.sum())
        mean = float(grades_G @ column_G) / num if num else None
        found.append(GradeCalibration(grade, num, mean))
    return tuple(found)


@dataclass(frozen=True)
class Consistency:
    """How far repeated analyses of a pair agree with each other.

    Attributes:
        num_pairs: Pairs with two votes or more; no others count.
        exact: Mean over pairs of the share of two different votes that are equal.
        mean_spread: Mean over pairs of the highest vote minus the lowest.
    """

    num_pairs: int
    exact: float
    mean_spread: float


def consistency(judgments: pa.Table) -> Consistency | None:
    """Consistency of the `votes` of judgments; None where no pair has two."""
    several = [votes for votes in judgments.column("votes").to_pylist() if len(votes) > 1]
    if not several:
        return None
    exact = [_equal_share(votes) for votes in several]
    spread = [max(votes) - min(votes) for votes in several]
    return Consistency(len(several), fmean(exact), fmean(spread))


def _equal_share(votes: list[int]) -> float:
    equal = sum(count * (count - 1) for count in Counter(votes).values())
    return equal / (len(votes) * (len(votes) - 1))


@dataclass(frozen=True)
class PairCost:
    """Tokens for a thousand pairs; every question that was asked about them counts.

    Attributes:
        num_pairs: Judged pairs, failed ones included.
        read_per_1000: Tokens read.
        cached_per_1000: Of these, tokens whose work was found in the prefix cache.
        written_per_1000: Tokens written.
    """

    num_pairs: int
    read_per_1000: float
    cached_per_1000: float
    written_per_1000: float


def pair_cost(judgments: pa.Table) -> PairCost | None:
    """What judging cost; None without rows."""
    if not judgments.num_rows:
        return None
    names = ("prompt_tokens", "cached_tokens", "completion_tokens")
    read, cached, written = (1000 * _mean(judgments, name) for name in names)
    return PairCost(judgments.num_rows, read, cached, written)


@dataclass(frozen=True)
class CascadeReport:
    """What a cascade saved, and what it risked.

    Attributes:
        num_pairs: Judged pairs.
        quick_share: Share whose label is that of the first pass.
        full_share: Share that the first pass was unsure of.
        checked_share: Share that it was sure of and that was analysed all the same.
        tokens_read: In both passes.
        tokens_written: In both passes.
        read_saving: Share of tokens read that were saved, against analysing every pair without a
            first pass; negative where the cascade read more. None where no pair was analysed.
        written_saving: The same of tokens written.
        agreement: On checked pairs, the first pass's mean grade, rounded, against the analysis's
            label as reference; None where no pair was checked. From a `min_confidence` of 0.875 up
            the rounded mean is always the likeliest grade, which is the label of `quick` rows.
    """

    num_pairs: int
    quick_share: float
    full_share: float
    checked_share: float
    tokens_read: int
    tokens_written: int
    read_saving: float | None
    written_saving: float | None
    agreement: LabelAgreement | None


def cascade_report(judgments: pa.Table) -> CascadeReport | None:
    """Describes judgments that a cascade made.

    The cost without a cascade is an estimate. Unsure pairs cost what their analysis cost. Sure
    ones cost what the checked ones among them did, which were drawn by a hash; without checked
    pairs, what the unsure ones did. The first question, of which `quick` rows tell the price, is
    taken off.

    Returns:
        None where there are no rows, or none has been through a first pass.
    """
    if not judgments.num_rows or not judgments.column("quick_label").drop_null().length():
        return None
    by_route = {
        route: judgments.filter(pc.field("route") == route)
        for route in ("quick", "full", "checked")
    }
    quick, full, checked = (by_route[route].num_rows / judgments.num_rows for route in by_route)
    return CascadeReport(
        num_pairs=judgments.num_rows,
        quick_share=quick,
        full_share=full,
        checked_share=checked,
        tokens_read=_sum(judgments, "prompt_tokens"),
        tokens_written=_sum(judgments, "completion_tokens"),
        read_saving=_saving(by_route, "prompt_tokens"),
        written_saving=_saving(by_route, "completion_tokens"),
        agreement=_checked_agreement(by_route["checked"]),
    )


def _saving(by_route: dict[str, pa.Table], column: str) -> float | None:
    quick, full, checked = by_route["quick"], by_route["full"], by_route["checked"]
    like_sure = checked if checked.num_rows else full
    if not like_sure.num_rows:
        return None
    num_sure = quick.num_rows + checked.num_rows
    first = _mean(quick, column) if quick.num_rows else 0.0
    analysed = _sum(full, column) + num_sure * _mean(like_sure, column)
    without = analysed - (full.num_rows + num_sure) * first
    spent = sum(_sum(table, column) for table in by_route.values())
    return 1 - spent / without if without > 0 else None


def _checked_agreement(checked: pa.Table) -> LabelAgreement | None:
    means = checked.column("quick_label").to_pylist()
    quick = [math.floor(mean + 0.5) for mean in means]
    return label_agreement(checked.column("relevance_label").to_pylist(), quick)


def _sum(table: pa.Table, column: str) -> int:
    total: int | None = pc.sum(table.column(column)).as_py()
    return total or 0


def _mean(table: pa.Table, column: str) -> float:
    return _sum(table, column) / len(table)
