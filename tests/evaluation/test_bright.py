from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from reasonembed import tasks
from reasonembed.corpus import read_corpus
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.datasets import load_collection, load_collections
from tests.evaluation.bright_files import (
    BIOLOGY,
    BIOLOGY_IDS,
    LEETCODE,
    ODD,
    write_bright,
    write_documents,
    write_table,
)
from tests.evaluation.real_data import DATA, needs_data

BOTH = "bright:biology,leetcode"
MTEB = "c26703e6600d97c579ee2985f16cf307db13ed85"


class Hub:
    """Stands in for the hub: answers with a folder, and keeps what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None, list[str]]] = []

    def __call__(
        self, repo: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]
    ) -> str:
        assert repo_type == "dataset"
        self.asked.append((repo, revision, allow_patterns))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "cache" / ("ab" * 20))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repo: str, **options: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.mark.parametrize("form", ["parquet", "shards", "jsonl", "jsonl.gz", "topics"])
def test_every_form_gives_the_same_collections(tmp_path: Path, form: str):
    write_bright(tmp_path, form=form)
    biology, leetcode = load_collections(BOTH, data_dir=tmp_path)
    assert (biology.name, biology.benchmark, biology.task) == (
        "bright/biology",
        "bright",
        "biology",
    )
    assert biology.queries == {"0": "Why?\n\nReally why?", "1": "How?"}
    assert biology.qrels == {"0": {"a/page_1.txt": 1, "a/page_2.txt": 1}, "1": {ODD: 1}}
    assert not any(biology.excluded.values())
    assert not biology.is_long
    assert biology.instruction == tasks.get("biology").instruction
    # The id is that of another query, of another task.
    assert leetcode.queries == {"0": "Trap rain."}
    assert leetcode.excluded == {"0": frozenset({"leetcode/42.txt", "in_no_corpus.txt"})}


def test_long_documents(tmp_path: Path):
    write_bright(tmp_path)
    long = load_collection("bright-long:biology", data_dir=tmp_path)
    assert (long.name, long.benchmark) == ("bright-long/biology", "bright-long")
    assert long.qrels == {"0": {"a/page.txt": 1}, "1": {"a/page.txt": 1, "b.txt": 1}}
    assert long.is_long
    assert long.corpus_source == "hf://datasets/xlangai/BRIGHT/long_documents/biology*.parquet"
    with pytest.raises(EvaluationError, match="bright-long has no task 'leetcode'"):
        load_collections("bright-long:leetcode", data_dir=tmp_path)


def test_queries_of_a_reasoning_variant(tmp_path: Path):
    folder = write_bright(tmp_path)
    rows = [row | {"query": f"thoughts about {row['id']}"} for row in BIOLOGY]
    write_table(folder / "gpt4_reason", "biology", rows, form="shards")
    reasoned = load_collection("bright+gpt4_reason:biology", data_dir=tmp_path)
    assert reasoned.queries == {"0": "thoughts about 0", "1": "thoughts about 1"}
    assert reasoned.name == "bright+gpt4_reason/biology"
    assert reasoned.benchmark == "bright+gpt4_reason"
    original = load_collection("bright:biology", data_dir=tmp_path)
    assert original.qrels == reasoned.qrels
    assert original.fingerprint() != reasoned.fingerprint()


def test_judgments_that_count_copies(tmp_path: Path):
    folder = write_bright(tmp_path)
    with pytest.raises(EvaluationError, match=r"qrels.bright-biology.fixed.txt is in no folder"):
        load_collections("bright+adjusted:biology", data_dir=tmp_path)
    file = folder / "qrels.bright-biology.fixed.txt"
    official = f"0\t0\ta/page_1.txt\t1\n0\t0\ta/page_2.txt\t1\n1\t0\t{ODD}\t1\n"
    file.write_text(official + "1\t0\ttwin.txt\t1\n", encoding="utf-8")
    adjusted = load_collection("bright+adjusted:biology", data_dir=tmp_path)
    assert adjusted.qrels["1"] == {ODD: 1, "twin.txt": 1}
    assert adjusted.benchmark == "bright+adjusted"
    credited = load_collection("bright:biology", data_dir=tmp_path).credit_duplicates(
        lambda doc_id: [doc_id, "twin.txt"] if doc_id == ODD else [doc_id]
    )
    assert credited.qrels == adjusted.qrels
    file.write_text("0 0 a/page_1.txt 1\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"'0' lacks official gold, such as 'a/page_2.txt'"):
        load_collections("bright+adjusted:biology", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold_ids": ["N/A"]}, "'0' needs gold documents"),
        ({"gold_ids": "a"}, r"line 1: 'gold_ids' must be a list of ids"),
        ({"excluded_ids": ["a/page_1.txt", "z"]}, r"gold and excluded: \['a/page_1.txt'\]"),
        ({"query": " "}, "line 1: 'query' must be a string that is not blank"),
        ({"id": "1"}, "line 2: '1' stands there twice"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: dict, message: str):
    write_bright(tmp_path, form="jsonl", biology=[BIOLOGY[0] | changes, BIOLOGY[1]])
    with pytest.raises(EvaluationError, match=message):
        load_collections("bright:biology", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bright:botany", "bright has no task 'botany'; there are: biology, earth_science"),
        ("bright:pony,Pony", "'pony' stands twice"),
        ("bright+gpt5_reason", r"no option \+gpt5_reason; there are: \+gpt4_reason"),
        ("bright+gpt4_reason+grit_reason", r"take \+gpt4_reason or the other"),
        ("bright-long+adjusted", r"bright-long has no option \+adjusted"),
        ("bright-pro+grit_reason", r"bright-pro has no option \+grit_reason; there are: none"),
        ("bright:", "'bright:' is no name of collections"),
    ],
)
def test_names_that_mean_nothing(tmp_path: Path, spec: str, message: str):
    write_bright(tmp_path)
    with pytest.raises(EvaluationError, match=message):
        load_collections(spec, data_dir=tmp_path)


def test_dashes_and_case_of_tasks_do_not_matter(tmp_path: Path):
    write_bright(tmp_path, earth_science=BIOLOGY)
    assert load_collection("bright:Earth-Science", data_dir=tmp_path).task == "earth_science"


@pytest.mark.parametrize("form", ["parquet", "shards", "jsonl.gz"])
def test_documents_beside_the_queries(tmp_path: Path, form: str):
    folder = write_bright(tmp_path)
    write_documents(folder, "biology", BIOLOGY_IDS, form=form)
    collection = load_collection("bright:biology", data_dir=tmp_path)
    corpus = read_corpus(str(collection.corpus_source), task=collection.task)
    assert corpus["doc_id"].to_pylist() == BIOLOGY_IDS
    collection.check_against(BIOLOGY_IDS)
    with pytest.raises(EvaluationError, match="1 gold documents are not in the corpus"):
        collection.check_against(BIOLOGY_IDS[1:])


def test_excluded_documents_may_be_in_no_corpus(tmp_path: Path):
    write_bright(tmp_path)
    load_collection("bright:leetcode", data_dir=tmp_path).check_against(["leetcode/11.txt"])


class TestHub:
    def test_only_what_is_missing_is_fetched(self, tmp_path: Path, hub: Hub):
        write_bright(tmp_path / "data", biology=BIOLOGY)
        write_table(hub.folder / "examples", "leetcode", LEETCODE, form="shards")
        biology, leetcode = load_collections(BOTH, data_dir=tmp_path / "data")
        assert hub.asked == [("xlangai/BRIGHT", None, ["examples/leetcode*.parquet"])]
        # The documents are those of the commit that the queries are of.
        commit = hub.folder.name
        documents = f"hf://datasets/xlangai/BRIGHT@{commit}/documents/leetcode*.parquet"
        assert leetcode.corpus_source == documents
        assert biology.corpus_source == "hf://datasets/xlangai/BRIGHT/documents/biology*.parquet"

    def test_another_revision_never_comes_from_an_unnamed_folder(self, tmp_path: Path, hub: Hub):
        write_bright(tmp_path / "data")
        write_table(hub.folder / "examples", "biology", BIOLOGY[:1], form="parquet")
        mteb = load_collection("bright@mteb:biology", data_dir=tmp_path / "data")
        assert hub.asked == [("mteb/BRIGHT", MTEB, ["examples/biology*.parquet"])]
        assert (mteb.name, list(mteb.queries)) == ("bright@mteb/biology", ["0"])
        load_collection("bright@v2:biology")
        assert hub.asked[-1][:2] == ("xlangai/BRIGHT", "v2")

    def test_offline_with_another_part_in_the_cache(self, hub: Hub):
        write_table(hub.folder / "examples", "pony", BIOLOGY, form="parquet")
        with pytest.raises(EvaluationError, match="on this machine lacks examples/biology; or"):
            load_collections("bright:biology")

    def test_neither_at_hand_nor_on_the_hub(self, tmp_path: Path):
        write_bright(tmp_path, biology=BIOLOGY)
        message = (
            r"queries of aops, pony are not in .*bright, and .*no route.* with a network: hf "
            r"download xlangai/BRIGHT .*--include 'examples/pony\*.parquet'; or put .* as data_dir"
        )
        with pytest.raises(EvaluationError, match=message):
            load_collections("bright:aops,pony,biology", data_dir=tmp_path)
        with pytest.raises(EvaluationError, match="is no folder; leave it out to use the hub"):
            load_collections("bright", data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("parquet", "examples/biology.parquet", "cannot be read as Parquet"),
        ("jsonl.gz", "examples/biology.jsonl.gz", r"cannot be read \(Compressed file ended"),
        ("topics", "topics.bright-biology-original.jsonl.gz", r"cannot be read \(Compressed file"),
        ("jsonl", "examples/biology.jsonl", "line 2: not valid JSON"),
    ],
)
def test_downloads_that_end_early(tmp_path: Path, form: str, name: str, message: str):
    file = write_bright(tmp_path, form=form) / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(EvaluationError, match=message):
        load_collections("bright:biology", data_dir=tmp_path)


def test_a_missing_shard_and_an_empty_table(tmp_path: Path):
    folder = write_bright(tmp_path, form="shards")
    (folder / "examples" / "biology-00001-of-00002.parquet").unlink()
    with pytest.raises(EvaluationError, match="'biology' has 2 files, of which 1 are missing"):
        load_collections("bright:biology", data_dir=tmp_path)
    (folder / "examples" / "pony.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="there are no queries; is the file whole"):
        load_collections("bright:pony", data_dir=tmp_path)


def test_bright_pro_has_no_exclusions(tmp_path: Path):
    rows = [{key: row[key] for key in ("id", "query", "gold_ids")} for row in BIOLOGY]
    write_table(tmp_path / "bright-pro" / "examples", "biology", rows, form="parquet")
    pro = load_collection("bright-pro:biology", data_dir=tmp_path)
    assert (pro.name, pro.task, pro.revision) == ("bright-pro/biology", "biology", "")
    assert pro.excluded == {}
    assert pro.corpus_source == "hf://datasets/yale-nlp/Bright-Pro/documents/biology*.parquet"


def numbered(queries: int, gold: int, *, excluded: int = 0) -> list[dict]:
    """Rows with so many queries and pairs of gold."""
    counts = [gold // queries + (number < gold % queries) for number in range(queries)]
    return [
        {
            "id": str(number),
            "query": f"query {number}",
            "excluded_ids": [f"x{number}_{e}" for e in range(excluded)] or ["N/A"],
            "gold_ids_long": ["N/A"],
            "gold_ids": [f"g{number}_{g}" for g in range(count)],
        }
        for number, count in enumerate(counts)
    ]


def loaded(tmp_path: Path, spec: str, **tables: list[dict]) -> list[Collection]:
    write_bright(tmp_path, form="jsonl", **tables)
    return load_collections(spec, data_dir=tmp_path)


class TestRevisions:
    def test_counts_name_the_revision(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        pony, aops = loaded(
            tmp_path, "bright:pony,aops", pony=numbered(112, 2219), aops=numbered(111, 524)
        )
        assert pony.revision == "current (since autumn 2024)"
        # Two revisions are the same in this task.
        assert aops.revision == "current (since autumn 2024) = mteb/BRIGHT c26703e"
        assert not caplog.records

    def test_another_count_is_said_with_both(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        (pony,) = loaded(tmp_path, "bright:pony", pony=numbered(112, 2220))
        assert pony.revision == "unknown"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        for part in ("bright/pony: 112 queries and 2220", "112 queries and 2219", "and 2519"):
            assert part in record.getMessage()

    def test_tasks_of_two_revisions(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        loaded(
            tmp_path,
            "bright:pony,theoremqa_theorems",
            pony=numbered(112, 2519),
            theoremqa_theorems=numbered(76, 151),
        )
        (record,) = caplog.records
        assert "different revisions" in record.getMessage()
        assert "bright/pony: mteb/BRIGHT c26703e; " in record.getMessage()

    def test_the_number_of_documents(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        (pony,) = loaded(tmp_path, "bright:pony", pony=numbered(112, 2219))
        gold = {doc_id for judged in pony.qrels.values() for doc_id in judged}
        fillers = [f"filler {number}" for number in range(7894 - len(gold))]
        pony.check_against([*gold, *fillers])
        assert not caplog.records
        pony.check_against([*gold, *fillers[1:]])
        assert "the corpus has 7893 documents, that of the revision" in caplog.text


REAL = {
    "biology": (103, 372, 393),
    "earth_science": (116, 585, 589),
    "economics": (103, 800, 800),
    "psychology": (101, 692, 692),
    "robotics": (101, 520, 521),
    "stackoverflow": (117, 478, 580),
    "sustainable_living": (108, 576, 1073),
    "leetcode": (142, 262, 262),
    "pony": (112, 2219, 2219),
    "aops": (111, 524, 524),
    "theoremqa_questions": (194, 439, 439),
    "theoremqa_theorems": (76, 151, 151),
}
CURRENT = "current (since autumn 2024)"


def pairs(collection: Collection) -> int:
    return sum(map(len, collection.qrels.values()))


@needs_data
class TestRealData:
    def test_twelve_tasks_of_the_current_revision(self, caplog: pytest.LogCaptureFixture):
        found = load_collections("bright", data_dir=DATA)
        assert {c.task: (len(c.queries), pairs(c)) for c in found} == {
            task: counts[:2] for task, counts in REAL.items()
        }
        assert [c.task for c in found] == list(tasks.BRIGHT)
        assert all(c.revision.split(" = ")[0] == CURRENT for c in found)
        assert sum(len(c.queries) for c in found) == 1384
        assert sum(map(pairs, found)) == 7618
        assert not caplog.records
        excluded = {c.task: [len(ids) for ids in c.excluded.values()] for c in found}
        assert {task for task, sizes in excluded.items() if any(sizes)} == {
            "leetcode",
            "aops",
            "theoremqa_questions",
        }
        assert (min(excluded["leetcode"]), max(excluded["leetcode"])) == (9, 1119)

    def test_eight_long_tasks(self, caplog: pytest.LogCaptureFixture):
        found = load_collections("bright-long", data_dir=DATA)
        gold = {c.task: pairs(c) for c in found}
        assert len(gold) == 8
        assert (gold["biology"], gold["pony"], gold["stackoverflow"]) == (134, 769, 129)
        assert all(c.revision == CURRENT and c.is_long for c in found)
        assert not caplog.records

    def test_judgments_that_count_copies(self):
        official = load_collections("bright", data_dir=DATA)
        adjusted = load_collections("bright+adjusted", data_dir=DATA)
        assert {c.task: pairs(c) for c in adjusted} == {t: counts[2] for t, counts in REAL.items()}
        for one, other in zip(official, adjusted, strict=True):
            assert (one.queries, one.excluded) == (other.queries, other.excluded)
            # The revision is that of the official judgments.
            assert one.revision == other.revision

    def test_the_excluded_pairs_of_another_file(self):
        leetcode = load_collection("bright:leetcode", data_dir=DATA)
        lines = (DATA / "bright" / "exclude.bright-leetcode.txt").read_text().splitlines()
        theirs = {tuple(line.split()) for line in lines}
        assert theirs == {(q, doc) for q, ids in leetcode.excluded.items() for doc in ids}

    def test_questions_repeat_gold_that_counts_once(self):
        import gzip

        file = DATA / "bright" / "topics.bright-theoremqa-questions-original.jsonl.gz"
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            written = sum(len(json.loads(line)["gold_ids"]) for line in lines)
        assert (written, REAL["theoremqa_questions"][1]) == (617, 439)
