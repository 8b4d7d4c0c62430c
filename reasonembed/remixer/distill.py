"""A small annotator taught by a large one: pairs, trajectories, and which of them are learnt.

Reads `candidates`, writes `trajectories`: several analyses a pair by the teacher, under the
annotation prompt. Those that hold a score and agree with the pair's majority are what the student
learns; the pairs of held-out queries measure it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.config import DistillConfig, LLMConfig
from reasonembed.corpus import CorpusStore
from reasonembed.errors import ConfigError
from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.remixer.agreement import consistency, label_agreement, pair_cost
from reasonembed.remixer.annotate import JudgedQuery, annotation_prompt, written_score
from reasonembed.remixer.answers import Answer, Verdict, ask, verdict
from reasonembed.schemas import TRAJECTORIES, Status, from_rows, row_seed, stable_hash
from reasonembed.tasks import Task

Pair = tuple[str, str]
PLANNED = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("sample", pa.string(), nullable=False),
    ]
)


# ---- what is asked ----------------------------------------------------------------------------


def plan_trajectories(candidates: pa.Table, *, max_pairs: int, samples: int, seed: int) -> pa.Table:
    """Rows of `PLANNED`: `samples` analyses of each chosen pair, those of a query side by side.

    Tasks and ranks are drawn from in turn (1, 2 to 3, 4 to 7, 8 to 15, ...), for most mined pairs
    are irrelevant and it is the first ranks that hold the labels above 2. Inside such a cell a hash
    decides, so that a larger corpus adds pairs and changes few.

    Args:
        candidates: Rows of `schemas.CANDIDATES`.
        max_pairs: Most pairs that are chosen.
        samples: Analyses a pair.
        seed: Of the hash.
    """
    cells: dict[tuple[str, int], list[Pair]] = defaultdict(list)
    for row in candidates.select(["query_id", "task", "doc_ids"]).to_pylist():
        for rank, doc_id in enumerate(row["doc_ids"], start=1):
            cells[row["task"], rank.bit_length()].append((row["query_id"], doc_id))
    chosen = _in_turn(
        [
            sorted(cell, key=lambda pair: stable_hash(seed, *pair))
            for _, cell in sorted(cells.items())
        ],
        limit=max_pairs,
    )
    rows: list[dict[str, object]] = [
        {"query_id": query_id, "doc_id": doc_id, "sample": str(number)}
        for query_id, doc_id in sorted(chosen)
        for number in range(samples)
    ]
    return from_rows(rows, PLANNED, where="planned trajectories")


def _in_turn(cells: list[list[Pair]], *, limit: int) -> list[Pair]:
    """The first of every cell, then the second of every cell, and so on."""
    numbered = [
        (depth, index, pair) for index, cell in enumerate(cells) for depth, pair in enumerate(cell)
    ]
    return [pair for _, _, pair in sorted(numbered)[:limit]]


def keep_planned(trajectories: pa.Table, planned: pa.Table) -> pa.Table:
    """Rows whose key is among `planned`; an earlier plan may have asked for more."""
    keys = set(zip(*planned.to_pydict().values(), strict=True))
    found = trajectories.select(PLANNED.names).to_pydict().values()
    return trajectories.filter(
        pa.array([key in keys for key in zip(*found, strict=True)], pa.bool_())
    )


def held_out_queries(sources: Mapping[str, str], *, share: float, seed: int) -> frozenset[str]:
    """Queries whose pairs measure the student; those of one source document stay together.

    Args:
        sources: Source document of each query.
        share: Of the source documents, about.
        seed: Of the hash that decides.

    Raises:
        ConfigError: Nothing is left to learn from, or nothing is held out although `share` is
            not 0.
    """
    found = frozenset(
        query_id
        for query_id, source in sources.items()
        if row_seed(seed, "held out", source) < share * 2**31
    )
    if len(found) == len(sources) or (share and not found):
        raise ConfigError(
            f"distill.held_out_share {share} holds out {len(found)} of {len(sources)} queries; "
            f"{'lower it' if found else 'raise it'}, or make more queries"
        )
    return found


class Analyst:
    """Writes analyses of pairs, the teacher's or the student's; one row in, one row out.

    Args:
        config: Sampling, tries, seed.
        llm: Who is asked.
        role: `teacher` or `student`; enters the seeds, so that two engines draw independently.
        engine: Of that model.
        corpus: The documents.
        queries: The queries.
        tasks: By name.
    """

    def __init__(
        self,
        config: DistillConfig,
        *,
        llm: LLMConfig,
        role: str,
        engine: Engine,
        corpus: CorpusStore,
        queries: Mapping[str, JudgedQuery],
        tasks: Mapping[str, Task],
    ) -> None:
        self._config, self._llm, self._role, self._engine = config, llm, role, engine
        self._corpus, self._queries, self._tasks = corpus, queries, tasks

    def __call__(self, planned: pa.Table) -> pa.Table:
        """Maps rows of `PLANNED` to rows of `schemas.TRAJECTORIES`."""
        keys = planned.to_pylist()
        requests = [self._request(key) for key in keys]
        answers = ask(self._engine, requests, _judged, tries=self._config.tries)
        rows = [
            self._row(key, request, answer)
            for key, request, answer in zip(keys, requests, answers, strict=True)
        ]
        return from_rows(rows, TRAJECTORIES, where="trajectories")

    def _request(self, key: dict[str, str]) -> Request:
        query = self._queries[key["query_id"]]
        prompt = annotation_prompt(
            query,
            self._corpus.text(key["doc_id"]),
            task=self._tasks[query.task],
            max_document_words=self._config.max_document_words,
        )
        seed = row_seed(self._config.seed, self._role, *key.values())
        return Request("|".join(key.values()), prompt, self._config.sampling, seed)

    def _row(self, key: dict[str, str], request: Request, answer: Answer) -> dict[str, Any]:
        return {
            **key,
            "task": self._queries[key["query_id"]].task,
            "prompt": request.prompt,
            "answer": answer.completion.text or None,
            "relevance_label": None if answer.text is None else written_score(answer.text),
            **answer.fields(model=self._llm.model),
        }


def _judged(_: int, completion: Completion) -> tuple[str, Verdict]:
    outcome = verdict(completion)
    if outcome.status == Status.OK and written_score(completion.text) is None:
        outcome = Verdict(Status.INVALID, "no whole number from 1 to 5 inside score tags")
    return completion.text, outcome


# ---- what is learnt ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What became of the teacher's trajectories.

    Attributes:
        rows: Those that the student learns, rows of `schemas.TRAJECTORIES`.
        funnel: How many were asked for, how many are left out by reason, how many are kept; the
            reasons and the kept ones add up to those asked for.
        labels: Kept trajectories by task and label.
    """

    rows: pa.Table
    funnel: dict[str, int]
    labels: dict[str, dict[int, int]]


def select_trajectories(
    trajectories: pa.Table, *, held_out: Collection[str], config: DistillConfig
) -> Selection:
    """Keeps distinct trajectories that agree with their pair's majority, balanced by label.

    With `max_per_label`, the first trajectory of every pair goes before the second of any, so that
    the limit keeps as many pairs as it can; a hash decides among equals.

    Args:
        trajectories: Of all planned pairs, failed rows included.
        held_out: Queries that are not learnt from.
        config: Agreement, limit, seed.
    """
    reasons: list[str] = []
    kept: list[dict[str, Any]] = []
    for rows in pairs_of(trajectories).values():
        outcomes = _judge_pair(rows, held_out=held_out, min_agreement=config.min_agreement)
        reasons += [reason for _, reason in outcomes if reason]
        agreeing = [row for row, reason in outcomes if not reason]
        kept += [row | {"depth": depth} for depth, row in enumerate(agreeing)]
    kept, over = _balanced(kept, limit=config.max_per_label, seed=config.seed)
    funnel = {"asked": trajectories.num_rows, **Counter(reasons)}
    if over:
        funnel["over max_per_label"] = over
    table = from_rows(kept, TRAJECTORIES, where="training trajectories")
    return Selection(table, funnel | {"kept": len(kept)}, _label_table(kept))


def pairs_of(trajectories: pa.Table) -> dict[Pair, list[dict[str, Any]]]:
    """Trajectories by pair, in order of the sample's number."""
    pairs: dict[Pair, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(trajectories.to_pylist(), key=lambda row: int(row["sample"])):
        pairs[row["query_id"], row["doc_id"]].append(row)
    return dict(sorted(pairs.items()))


def majority(labels: Sequence[int], *, min_agreement: float) -> int | None:
    """The label that most of them are, with at least that share; None on a tie."""
    votes = Counter(labels).most_common(2)
    if not votes or (len(votes) == 2 and votes[0][1] == votes[1][1]):
        return None
    label, count = votes[0]
    return label if count / len(labels) >= min_agreement else None


def _judge_pair(
    rows: list[dict[str, Any]], *, held_out: Collection[str], min_agreement: float
) -> list[tuple[dict[str, Any], str | None]]:
    """Each trajectory of a pair with the reason why it is left out, if it is."""
    agreed = majority(_votes(rows), min_agreement=min_agreement)
    seen: set[str] = set()
    outcomes: list[tuple[dict[str, Any], str | None]] = []
    for row in rows:
        reason = None
        if row["query_id"] in held_out:
            reason = "held out"
        elif row["status"] != Status.OK:
            reason = row["status"]
        elif agreed is None:
            reason = "pair without majority"
        elif row["relevance_label"] != agreed:
            reason = "against the majority"
        elif row["answer"] in seen:
            reason = "said twice"
        else:
            seen.add(row["answer"])
        outcomes.append((row, reason))
    return outcomes


def _balanced(
    kept: list[dict[str, Any]], *, limit: int | None, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """At most `limit` rows of a task and label, in order of key, and how many that leaves out."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in kept:
        cells[row["task"], row["relevance_label"]].append(row)
    chosen = [
        row
        for cell in cells.values()
        for row in sorted(cell, key=lambda row: (row["depth"], stable_hash(seed, *_key(row))))[
            :limit
        ]
    ]
    rows = [{name: row[name] for name in TRAJECTORIES.names} for row in sorted(chosen, key=_key)]
    return rows, len(kept) - len(rows)


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["query_id"], row["doc_id"], int(row["sample"])


def _label_table(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, int]]:
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for row in rows:
        counts[row["task"]][row["relevance_label"]] += 1
    return {task: dict(sorted(found.items())) for task, found in sorted(counts.items())}


def _votes(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    return [row["relevance_label"] for row in rows if row["status"] == Status.OK]


# ---- how good the student is ------------------------------------------------------------------


def compare(teacher: pa.Table, student: pa.Table, *, min_agreement: float) -> dict[str, Any]:
    """Teacher and student on the same pairs, as a mapping of JSON values.

    The reference is the teacher's majority, where there is one; the student is taken at its first
    analysis, for one a pair is what it will be asked for. `teacher.consistency.exact` says how
    often two analyses of the teacher agree: a student can hardly do better.

    Args:
        teacher: Rows of `schemas.TRAJECTORIES`.
        student: The same pairs and samples.
        min_agreement: That makes a majority.

    Raises:
        ValueError: The two are not about the same pairs.
    """
    one, other = pairs_of(teacher), pairs_of(student)
    if one.keys() != other.keys():
        raise ValueError(f"teacher and student judge {len(one)} and {len(other)} other pairs")
    reference = [majority(_votes(rows), min_agreement=min_agreement) for rows in one.values()]
    predicted = [rows[0]["relevance_label"] for rows in other.values()]
    found = label_agreement(reference, predicted)
    return {
        "pairs": len(one),
        "pairs without majority": reference.count(None),
        "student": _annotator(student),
        "teacher": _annotator(teacher),
        "agreement": None if found is None else asdict(found),
    }


def _annotator(trajectories: pa.Table) -> dict[str, Any]:
    """What one annotator is like by itself; the cost is that of one analysis a pair."""
    votes = [_votes(rows) for rows in pairs_of(trajectories).values()]
    repeats = consistency(pa.table({"votes": pa.array(votes, pa.list_(pa.int8()))}))
    cost = pair_cost(trajectories.filter(pc.field("sample") == "0"))
    return {
        "models": pc.unique(trajectories.column("model")).to_pylist(),
        "answers": dict(Counter(trajectories.column("status").to_pylist())),
        "consistency": None if repeats is None else asdict(repeats),
        "cost": None if cost is None else asdict(cost),
    }
