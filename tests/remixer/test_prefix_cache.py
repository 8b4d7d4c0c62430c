"""How much of the annotator's prompts a prefix cache finds, by a simulation of vLLM's."""

import random
import re
from collections import OrderedDict
from dataclasses import replace

from reasonembed.config import AnnotateConfig, CascadeConfig
from reasonembed.llm.protocol import Completion
from reasonembed.remixer.annotate import (
    GRADES,
    Annotator,
    JudgedQuery,
    annotation_prompt,
    plan_pairs,
    query_blocks,
)
from reasonembed.schemas import CANDIDATES, from_rows
from reasonembed.tasks import TASKS
from tests.remixer.fakes import LLM, FakeEngine, corpus_store

BLOCK_TOKENS = 16  # vLLM's default on GPUs; a prefix is found in whole blocks
QUERIES, DOCUMENTS = 12, 20
# Of a prompt with a full definition of relevance and an example or two, BRIGHT's queries, passages.
TEMPLATE_TOKENS, QUERY_TOKENS, DOCUMENT_TOKENS = 400, 240, 315
BATCH_ROWS = 32
CACHED_PROMPTS = 5  # a GPU holds hundreds, and then there are thousands of queries


def tokens(text):
    """Words and marks: one token each, which is near what tokenizers make of English."""
    return re.findall(r"\w+|[^\w\s]", text)


class PrefixCache:
    """Blocks of tokens by the hash of all that stands up to their end, the least recent ones out.

    As in vLLM, the last token of a prompt is always computed, and the blocks of a request are found
    by those that follow it, in the same batch too.
    """

    def __init__(self, *, capacity_tokens):
        self._blocks = OrderedDict()
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self.read = self.found = 0

    def ask(self, prompt):
        ids = tokens(prompt)
        hashes, before = [], 0
        for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            before = hash((before, tuple(ids[start : start + BLOCK_TOKENS])))
            hashes.append(before)
        usable = (len(ids) - 1) // BLOCK_TOKENS
        hits = next((i for i, key in enumerate(hashes) if key not in self._blocks), len(hashes))
        self.read, self.found = self.read + len(ids), self.found + min(hits, usable) * BLOCK_TOKENS
        for key in reversed(hashes):  # the end of a prompt goes before its beginning
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    @property
    def rate(self):
        return self.found / self.read


def words(name, count):
    rng = random.Random(name)
    return " ".join(f"w{rng.randrange(10_000)}" for _ in range(count))


def template_tokens(task):
    query = JudgedQuery("", task.name)
    return len(tokens(annotation_prompt(query, "", task=task, max_document_words=1)))


BUILT_IN = TASKS["biology"]
_LONGER = words("definition", TEMPLATE_TOKENS - template_tokens(BUILT_IN))
DEFINED = replace(BUILT_IN, relevance=f"{BUILT_IN.relevance} {_LONGER}")


def around(mean, i, count):
    """The i-th of `count` lengths that are spread evenly over half to one and a half of `mean`."""
    return round(mean * (0.5 + (i + 0.5) / count))


TEXTS = {
    f"d{i}": words(f"document {i}", around(DOCUMENT_TOKENS, i % DOCUMENTS, DOCUMENTS))
    for i in range(QUERIES * DOCUMENTS)
}
ASKED = {
    f"q{i}": JudgedQuery(words(f"query {i}", around(QUERY_TOKENS, i, QUERIES)), "biology")
    for i in range(QUERIES)
}
CANDIDATE_TABLE = from_rows(
    [
        {
            "query_id": query_id,
            "source_doc_id": "s",
            "task": "biology",
            "doc_ids": [f"d{i * DOCUMENTS + k}" for k in range(DOCUMENTS)],
            "scores": [0.0] * DOCUMENTS,
            "origins": [[{"retriever": "miner", "rank": k + 1}] for k in range(DOCUMENTS)],
            "num_excluded": 0,
            "source_rank": 1,
        }
        for i, query_id in enumerate(ASKED)
    ],
    CANDIDATES,
    where="test",
)


def asked_prompts(*, task=DEFINED, **changes):
    """Prompts in the order in which the annotation job asks them."""
    unsure = dict.fromkeys(GRADES, 0.2)
    engine = FakeEngine(
        lambda request: (
            Completion("", "length", 1, 1, unsure)
            if request.choices
            else Completion("Because.", "stop")
        )
    )
    annotator = Annotator(
        AnnotateConfig(llm=LLM, tries=1, **changes),
        engine=engine,
        corpus=corpus_store(TEXTS),
        queries=ASKED,
        tasks={"biology": task},
    )
    for block in query_blocks(plan_pairs(CANDIDATE_TABLE, limit=DOCUMENTS), BATCH_ROWS):
        annotator(block)
    return [request.prompt + request.prefill for request in engine.requests]


def mean_tokens(prompts):
    return sum(len(tokens(prompt)) for prompt in prompts) / len(prompts)


def rate(prompts, *, cached_prompts=CACHED_PROMPTS):
    cache = PrefixCache(capacity_tokens=cached_prompts * round(mean_tokens(prompts)))
    for prompt in prompts:
        cache.ask(prompt)
    return cache.rate


def query_last(prompt):
    """The same prompt with query and document in the other order."""
    parts = re.fullmatch(
        r"(.*)(\[Query begins\].*\[Query ends\])\s*(\[Document begins\].*)", prompt, re.DOTALL
    )
    head, query, document = parts.groups()
    return f"{head}{document}\n\n{query}"


def test_hit_rate_at_twenty_documents_a_query():
    prompts = asked_prompts()
    expected = TEMPLATE_TOKENS + QUERY_TOKENS + DOCUMENT_TOKENS
    assert abs(mean_tokens(prompts) - expected) < 1  # lengths are whole
    assert rate(prompts) >= 0.64


def test_hit_rate_is_what_the_lengths_allow():
    for task in (BUILT_IN, DEFINED):
        prompts, template = asked_prompts(task=task), template_tokens(task)
        whole = mean_tokens(prompts)
        # All pairs but the very first find the template, all but a query's first the query too.
        shared = template * (DOCUMENTS - 1 / QUERIES) + QUERY_TOKENS * (DOCUMENTS - 1)
        best = shared / (DOCUMENTS * whole)
        # Less than a block is lost, and a few tokens of the template follow the document.
        assert best - BLOCK_TOKENS / whole <= rate(prompts) <= best


def test_other_orders_find_the_template_alone():
    prompts = asked_prompts()
    assert rate([query_last(prompt) for prompt in prompts]) < rate(prompts) - 0.2
    scattered = [prompts[q * DOCUMENTS + k] for k in range(DOCUMENTS) for q in range(QUERIES)]
    assert rate(scattered) < rate(prompts) - 0.2


def test_further_questions_about_a_pair_find_nearly_all_of_it():
    once = rate(asked_prompts())
    for changes in ({"label_from": "expected"}, {"cascade": CascadeConfig()}, {"samples": 2}):
        # The cache holds a block of pairs; half of the prompts are found but for their last tokens.
        found = rate(asked_prompts(**changes), cached_prompts=2 * BATCH_ROWS)
        assert found >= (once + 0.95) / 2
