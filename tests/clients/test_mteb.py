"""Whole retrieval tasks of `mteb`, whose own OpenAI model asks the service."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import numpy as np
import openai
import pytest
import tiktoken
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations.openai_models import OpenAIModel
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

from tests.clients.expected import DOCUMENTS, PACKAGED, Computed
from tests.clients.process import Server, serving

pytestmark = pytest.mark.clients

SIBLING = Path(__file__).parents[3] / "shared" / "data"
SCIFACT = Path(os.environ.get("REASONEMBED_TEST_DATA", SIBLING)) / "scifact"
OFFLINE = {  # of the same weights in tests/systems/test_scifact.py, and as MTEB publishes them
    "ndcg_at_10": 0.64508,
    "map_at_10": 0.59593,
    "recall_at_100": 0.925,
    "precision_at_10": 0.08833,
}
FIVE_DECIMALS = 5e-6
SUBJECTS = ("leaf", "moss", "tax", "root", "bread", "moon", "leaf")
PLACES = ("in Norway", "on an island", "at school", "in old books", "for children", "in winter")
QUERIES = {
    "why do trees lose their leaves?": "leaf",
    "what keeps a hillside from sliding down?": "root",
    "who pays when a bridge is mended?": "tax",
    "where do the bubbles in a loaf come from?": "bread",
    "why is the beach wider at some hours?": "moon",
}


class Service(OpenAIModel):
    """`mteb`'s own, which knows no roles: it names the one of each side in the model's name."""

    def __init__(self, server: Server) -> None:
        client = openai.OpenAI(api_key=server.key, base_url=server.openai_url, timeout=600)
        create = functools.partial(client.embeddings.create, extra_body={"truncate": "end"})
        super().__init__(
            server.model,
            max_tokens=10**9,  # the service cuts, by the model's own tokens
            embed_dim=384,
            client=SimpleNamespace(embeddings=SimpleNamespace(create=create)),
        )
        self.mteb_model_meta = meta("service")
        self._name = server.model

    def encode(
        self, inputs: Any, *, prompt_type: PromptType | None = None, **options: Any
    ) -> np.ndarray:
        role = "query" if prompt_type == PromptType.query else "document"
        self.model_name = f"{self._name}:{role}"
        return super().encode(inputs, prompt_type=prompt_type, **options)


class Offline(AbsEncoder):
    """The embedder without a server, in `mteb`'s hands."""

    def __init__(self, compute: Callable[..., Computed]) -> None:
        self._compute = compute
        self.mteb_model_meta = meta("offline")

    def encode(
        self, inputs: Any, *, prompt_type: PromptType | None = None, **options: Any
    ) -> np.ndarray:
        role = "query" if prompt_type == PromptType.query else "document"
        return self._compute([one for batch in inputs for one in batch["text"]], role=role).vectors


def meta(name: str) -> ModelMeta:
    return ModelMeta.create_empty(overwrites={"name": f"tests/{name}", "revision": "1"})


@pytest.fixture(autouse=True)
def no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # mteb cuts by the words of OpenAI's models, which are fetched; bytes do where nothing is cut.
    ranks = {bytes([byte]): byte for byte in range(256)}
    of_bytes = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: of_bytes)
    yield


class Nature(AbsTaskRetrieval):
    """A small task; every document stands among others that say half of it."""

    metadata = TaskMetadata(
        name="Nature",
        dataset={"path": "tests/nature", "revision": "1"},
        description="Everyday questions.",
        type="Retrieval",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **_: Any) -> None:
        halves = {name: text[: len(text) // 2] for name, text in DOCUMENTS.items()}
        corpus = DOCUMENTS | {
            f"{name}-{number}": f"{halves[name]}, {place}, and {halves[other]}"
            for name, other in itertools.pairwise(SUBJECTS)
            for number, place in enumerate(PLACES)
        }
        queries = {f"q{number}": text for number, text in enumerate(QUERIES)}
        qrels = {
            query_id: {QUERIES[text]: 2} | {f"{QUERIES[text]}-{one}": 1 for one in range(3)}
            for query_id, text in queries.items()
        }
        put(self, corpus, queries, qrels)


class SciFact(mteb.get_task("SciFact").__class__):
    """`mteb`'s own, from files."""

    def load_data(self, **_: Any) -> None:
        lines = (SCIFACT / "corpus.jsonl").read_text().splitlines()
        corpus = {}
        for line in map(json.loads, lines):
            corpus[str(line["_id"])] = (line.get("title", ""), line["text"])
        topics = (SCIFACT / "topics.beir-v1.0.0-scifact.test.tsv").read_text().splitlines()
        queries = dict(line.split("\t", 1) for line in topics)
        qrels: dict[str, dict[str, int]] = {}
        for line in (SCIFACT / "qrels.beir-v1.0.0-scifact.test.txt").read_text().splitlines():
            query_id, _, doc_id, grade = line.split()
            qrels.setdefault(query_id, {})[doc_id] = int(grade)
        put(self, corpus, queries, qrels)


def put(
    task: AbsTaskRetrieval,
    corpus: dict[str, Any],
    queries: dict[str, str],
    qrels: dict[str, dict[str, int]],
) -> None:
    """Fills a task with what it would have fetched."""
    pairs = [(one if isinstance(one, tuple) else ("", one)) for one in corpus.values()]
    titles, texts = zip(*pairs, strict=True)
    task.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_dict({"id": [*corpus], "title": titles, "text": texts}),
                "queries": Dataset.from_dict({"id": [*queries], "text": [*queries.values()]}),
                "relevant_docs": qrels,
                "top_ranked": None,
            }
        }
    }
    task.data_loaded = True


def scores(model: AbsEncoder, task: AbsTaskRetrieval) -> dict[str, float]:
    """What `mteb` finds of a model on a task."""
    [result] = mteb.evaluate(model, task, cache=None, overwrite_strategy="always")
    [found] = result.scores["test"]
    return {name: value for name, value in found.items() if isinstance(value, float)}


def test_a_task_through_the_service_has_the_offline_figures(server, offline):
    found, expected = scores(Service(server), Nature()), scores(Offline(offline), Nature())
    assert len(found) > 100 and 0.2 < found["ndcg_at_10"] < 0.95
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(3_600)  # a million tokens
@pytest.mark.skipif(not SCIFACT.is_dir(), reason="REASONEMBED_TEST_DATA is not set")
def test_scifact_through_the_service_to_five_decimals(tmp_path):
    with serving({"model": PACKAGED}, tmp_path, model=PACKAGED) as running:
        found = scores(Service(running), SciFact())
    assert {name: found[name] for name in OFFLINE} == pytest.approx(OFFLINE, abs=FIVE_DECIMALS)
