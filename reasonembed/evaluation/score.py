"""Any run file against any judgments: `reasonembed evaluate score`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.metrics import METRICS, cutoffs_of, evaluate_run
from reasonembed.evaluation.qrels import gold_of, read_excluded, read_qrels
from reasonembed.evaluation.runs import read_run, without_excluded

_SHOWN = 5  # ids named in a line


@dataclass(frozen=True)
class Score:
    """Figures of a run file.

    Attributes:
        mean: Mean over all judged queries by metric, unrounded.
        per_query: The same by query id.
        missing: Judged queries that the run lacks; they count 0.
        without_gold: Judged queries without a relevant document; they count 0, whatever is found.
        documents: In the run, over all queries, after the removal of excluded ones.
        ties: Of these, documents whose score, as float32, another one of the query had already.
        removed: Excluded documents that were in the run; None where no exclusions were given.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]
    missing: tuple[str, ...]
    without_gold: tuple[str, ...]
    documents: int
    ties: int
    removed: int | None

    def to_json(self) -> dict[str, Any]:
        """All but the figures of each query, as JSON values."""
        return {
            "metrics": self.mean,
            "queries": len(self.per_query),
            "missing": list(self.missing),
            "without_gold": list(self.without_gold),
            "documents": self.documents,
            "ties": self.ties,
            "removed": self.removed,
        }


def score_files(
    run: Path, qrels: Path, *, metrics: Sequence[str] = METRICS, excluded: Path | None = None
) -> Score:
    """Measures a run file; see `runs.read_run`, `qrels.read_qrels` and `qrels.read_excluded`.

    Args:
        run: File of scores.
        qrels: File of judgments.
        metrics: Names, as `metrics.parse_metrics` gives them.
        excluded: File of documents that queries must not get back.

    Raises:
        EvaluationError: A file is malformed, run, qrels and exclusions do not belong together, or
            a document is gold and excluded.
    """
    ranked, judged, removed = read_run(run), read_qrels(qrels), None
    if excluded is not None:
        out = read_excluded(excluded)
        if strange := sorted(out.keys() - judged.keys() - ranked.keys()):
            raise EvaluationError(
                f"{excluded}: {len(strange)} of its {len(out)} query ids are neither in {qrels} "
                f"nor in {run}, such as {strange[:_SHOWN]}; are these the files of one collection?"
            )
        ranked, removed = without_excluded(ranked, judged, out)
    found = evaluate_run(ranked, judged, ks=cutoffs_of(metrics))
    return Score(
        mean={name: found.mean[name] for name in metrics},
        per_query={
            query_id: {name: figures[name] for name in metrics}
            for query_id, figures in found.per_query.items()
        },
        missing=tuple(query_id for query_id in judged if query_id not in ranked),
        without_gold=tuple(query_id for query_id, gold in gold_of(judged).items() if not gold),
        documents=sum(map(len, ranked.values())),
        ties=found.num_ties,
        removed=removed,
    )


def write_per_query(per_query: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Writes the figures of each query, unrounded: JSON if the name ends so, else between tabs.

    Raises:
        EvaluationError: A query id holds a tab or line break and the form is not JSON, or the file
            cannot be written.
    """
    if file.suffix == ".json":
        text = json.dumps(per_query, indent=1, ensure_ascii=False) + "\n"
    else:
        names = list(next(iter(per_query.values())))
        rows = [["query_id", *names]]
        for query_id, figures in per_query.items():
            if set(query_id) & set("\t\n\r"):
                raise EvaluationError(
                    f"query id {query_id!r} cannot stand between tabs; name the file .json"
                )
            rows.append([query_id, *(repr(figures[name]) for name in names)])
        text = "".join("\t".join(row) + "\n" for row in rows)
    try:
        file.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise EvaluationError(f"{file} cannot be written: {error}") from error


def table_of(mean: Mapping[str, float]) -> list[str]:
    """Lines for people: a measure a row, a cutoff a column, five decimals."""
    cutoffs = sorted({int(name.split("@")[1]) for name in mean if "@" in name})
    rows = [["", *(f"@{k}" for k in cutoffs)]] if cutoffs else []
    for measure in dict.fromkeys(name.split("@")[0] for name in mean if "@" in name):
        values = [mean.get(f"{measure}@{k}") for k in cutoffs]
        rows.append([measure, *("" if one is None else f"{one:.5f}" for one in values)])
    if "recip_rank" in mean:
        rows.append(["recip_rank", f"{mean['recip_rank']:.5f}"])
    return ["".join([f"{row[0]:<10}", *(f"{one:>9}" for one in row[1:])]) for row in rows]


def notes_of(score: Score) -> list[str]:
    """What a reader of the figures must know beside them, a line each."""
    lines = [f"queries: {len(score.per_query):,}, every mean is over all of them"]
    if score.missing:
        lines.append(f"missing: {_some(score.missing)} not in the run, counted 0")
    else:
        lines.append("missing: none")
    if score.without_gold:
        lines.append(f"without a relevant document: {_some(score.without_gold)}, counted 0")
    if score.removed is not None:
        lines.append(f"excluded: {score.removed:,} documents removed from the run")
    lines.append(
        f"ties: {score.ties:,} of {score.documents:,} documents (equal as float32; ordered by "
        "document id, descending, as trec_eval does)"
    )
    return lines


def _some(ids: Sequence[str]) -> str:
    """How many, and the first few of them."""
    more = ", …" if len(ids) > _SHOWN else ""
    return f"{len(ids):,} ({', '.join(ids[:_SHOWN])}{more})"
