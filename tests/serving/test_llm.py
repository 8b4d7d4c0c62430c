from __future__ import annotations

import asyncio
import threading

import pytest

from reasonembed.config import AnnotateConfig, EngineRuntime, LLMConfig, RewriteConfig
from reasonembed.llm.protocol import Completion, failure, make_engine
from reasonembed.llm.scripted import FAIL_ERROR, FAIL_INVALID
from reasonembed.serving.llm import EngineGrading, EngineRewriting

LLM = LLMConfig(model="scripted", engine="scripted")
REWRITE = RewriteConfig(llm=LLM)


class Counted:
    """A scripted engine that notes what it is asked, and can be held or made to fail."""

    def __init__(self) -> None:
        self.engine = make_engine(LLM, EngineRuntime(), cache_dir=None)
        self.prompts: list[str] = []
        self.running = self.most = 0
        self.failure: Exception | None = None
        self.fails_rows = False
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def complete(self, requests) -> list[Completion]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.prompts += [one.prompt for one in requests]
        self.gate.wait(10)
        with self._lock:
            self.running -= 1
        if self.failure is not None:
            raise self.failure
        if self.fails_rows:
            return [failure("no luck") for _ in requests]
        return self.engine.complete(requests)

    def close(self) -> None:
        self.engine.close()


def run(call):
    return asyncio.run(call)


def test_a_rewrite_holds_the_query_and_the_reasoning():
    rewriting = EngineRewriting(REWRITE, Counted())
    [text] = run(rewriting.rewrite(["why do leaves fall"], task="biology"))
    assert text.startswith("why do leaves fall\n")
    assert len(text.split()) > 10


def test_one_query_that_the_llm_fails_on_is_none_and_no_other():
    rewriting = EngineRewriting(REWRITE, Counted())
    queries = ["good leaves", f"bad {FAIL_ERROR}", f"empty {FAIL_INVALID}", "other roots"]
    texts = run(rewriting.rewrite(queries, task="biology"))
    assert [one is None for one in texts] == [False, True, True, False]


def test_equal_queries_of_a_task_are_written_once():
    engine = Counted()
    rewriting = EngineRewriting(REWRITE, engine)

    async def scene():
        first = await rewriting.rewrite(["a leaf", "a root", "a leaf"], task="biology")
        assert len(engine.prompts) == 2
        again = await rewriting.rewrite(["a root", "a leaf"], task="biology")
        assert len(engine.prompts) == 2
        assert again == [first[1], first[0]]
        other = await rewriting.rewrite(["a leaf"], task="leetcode")
        assert len(engine.prompts) == 3
        assert other != [first[0]]

    run(scene())


@pytest.mark.parametrize("is_dead", [True, False])
def test_what_failed_is_asked_again_later(is_dead):
    engine = Counted()
    rewriting = EngineRewriting(REWRITE, engine)
    engine.failure = RuntimeError("the server is dead") if is_dead else None
    engine.fails_rows = not is_dead
    assert run(rewriting.rewrite(["a leaf"], task="biology")) == [None]
    engine.failure, engine.fails_rows = None, False
    assert run(rewriting.rewrite(["a leaf"], task="biology")) != [None]


def test_the_oldest_rewrites_are_forgotten(monkeypatch):
    monkeypatch.setattr("reasonembed.serving.llm._CACHED_REWRITES", 2)
    engine = Counted()
    rewriting = EngineRewriting(REWRITE, engine)
    for query in ("one leaf", "two leaf", "one leaf", "three leaf", "one leaf", "two leaf"):
        run(rewriting.rewrite([query], task="biology"))
    asked = [
        next(word for word in ("one", "two", "three") if f"{word} leaf" in one)
        for one in engine.prompts
    ]
    assert asked == ["one", "two", "three", "two"]


def test_an_unknown_task_is_taken_for_the_generic_one():
    engine = Counted()
    rewriting = EngineRewriting(REWRITE, engine)
    run(rewriting.rewrite(["a leaf"], task="of my own"))
    run(rewriting.rewrite(["a leaf"], task="generic"))
    assert len(engine.prompts) == 1


def test_the_engine_is_asked_so_often_at_once_and_no_oftener():
    engine = Counted()
    engine.gate.clear()
    rewriting = EngineRewriting(REWRITE, engine, concurrency=2)

    async def scene():
        calls = [
            asyncio.create_task(rewriting.rewrite([f"leaf {n}"], task="biology")) for n in range(5)
        ]
        while engine.running < 2:
            await asyncio.sleep(0.01)
        calls[4].cancel()
        await asyncio.sleep(0.05)
        engine.gate.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    texts = run(scene())
    assert engine.most == 2
    assert all(isinstance(one, list) and one[0] for one in texts[:4])
    assert isinstance(texts[4], asyncio.CancelledError)
    assert not any("leaf 4" in one for one in engine.prompts)  # it waited, and was never asked


@pytest.mark.parametrize("label_from", ["written", "expected"])
def test_grades_lie_between_one_and_five_and_follow_the_text_alone(label_from):
    config = AnnotateConfig(llm=LLM, label_from=label_from)
    documents = ["a leaf falls", "roots hold the soil", "moss has no roots", "a leaf falls"]

    async def scene(order):
        grading = EngineGrading(config, Counted())
        return await grading.grade("why", [documents[n] for n in order], task="biology")

    grades = run(scene([0, 1, 2, 3]))
    assert all(1 <= one <= 5 for one in grades)
    assert grades[0] == grades[3]
    assert run(scene([2, 1, 0])) == [grades[2], grades[1], grades[0]]
    assert any(one % 1 for one in grades) == (label_from == "expected")


def test_a_document_that_the_llm_fails_on_has_no_grade():
    grading = EngineGrading(AnnotateConfig(llm=LLM), Counted())
    grades = run(grading.grade("why", ["fine leaves", FAIL_ERROR], task="biology"))
    assert [one is None for one in grades] == [False, True]


def test_equal_documents_are_judged_once():
    engine = Counted()
    grading = EngineGrading(AnnotateConfig(llm=LLM), engine)
    run(grading.grade("why", ["fine leaves"] * 5, task="biology"))
    assert len(engine.prompts) == 1
    assert run(grading.grade("why", [], task="biology")) == []


def test_a_dead_engine_gives_no_grades():
    engine = Counted()
    engine.failure = RuntimeError("the server is dead")
    grading = EngineGrading(AnnotateConfig(llm=LLM), engine)
    assert run(grading.grade("why", ["a", "b"], task="biology")) == [None, None]


def test_equal_queries_at_once_share_one_call():
    engine = Counted()
    engine.gate.clear()
    rewriting = EngineRewriting(REWRITE, engine)

    async def scene():
        first = asyncio.create_task(rewriting.rewrite(["a leaf", "a root"], task="biology"))
        while not engine.running:
            await asyncio.sleep(0.01)
        others = [
            asyncio.create_task(rewriting.rewrite(["a leaf"], task="biology")) for _ in range(3)
        ]
        await asyncio.sleep(0.05)
        first.cancel()  # whoever began it; the others still wait for it
        others[0].cancel()
        await asyncio.sleep(0.05)
        engine.gate.set()
        gone = await asyncio.gather(first, others[0], return_exceptions=True)
        assert [type(one) for one in gone] == [asyncio.CancelledError] * 2
        return await asyncio.gather(*others[1:])

    one, other = run(scene())
    assert one == other and one[0].startswith("a leaf")
    assert len(engine.prompts) == 2
    assert not rewriting._running


def test_a_call_that_all_have_left_is_no_answer_to_who_comes_next():
    engine = Counted()
    engine.gate.clear()
    rewriting = EngineRewriting(REWRITE, engine, concurrency=1)

    async def scene():
        busy = asyncio.create_task(rewriting.rewrite(["a root"], task="biology"))
        left = asyncio.create_task(rewriting.rewrite(["a leaf"], task="biology"))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.sleep(0)
        again = asyncio.create_task(rewriting.rewrite(["a leaf"], task="biology"))
        await asyncio.sleep(0.05)
        engine.gate.set()
        await busy
        return await again

    assert run(scene())[0].startswith("a leaf")


def test_long_texts_are_not_kept():
    engine = Counted()
    rewriting = EngineRewriting(REWRITE, engine)
    long = "leaf " * 10_000
    for _ in range(2):
        [text] = run(rewriting.rewrite([long], task="biology"))
        assert text.startswith(long.strip()[:100])
    assert len(engine.prompts) == 2 and not rewriting._kept
    run(rewriting.rewrite(["short leaf"], task="biology"))
    assert all(len(key) <= 32 for key in rewriting._kept)
