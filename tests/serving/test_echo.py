from __future__ import annotations

import time

import numpy as np
import pytest

from reasonembed.config import EchoConfig
from reasonembed.serving.echo import VOCABULARY_SIZE, EchoModel
from reasonembed.serving.protocol import EmbedItem, ItemError, Prepared

LIMIT = 10


def model(**changes) -> EchoModel:
    config = EchoConfig.model_validate({"dimension": 24, "max_tokens": LIMIT} | changes)
    return EchoModel(config, default_instruction="find it")


def embed(echo: EchoModel, *items: EmbedItem):
    prepared = echo.prepare(list(items))
    assert not any(isinstance(one, ItemError) for one in prepared)
    return echo.forward(prepared)


def test_vectors_depend_on_the_tokens_alone():
    items = [
        EmbedItem("a cat"),
        EmbedItem("a cat", "query"),
        EmbedItem("a cat", "query", "other"),
        EmbedItem("cat a"),
        EmbedItem("dogs bark"),
    ]
    vectors = embed(model(), *items)
    assert vectors.shape == (5, 24) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors, embed(model(), *items[::-1])[::-1])
    similar = vectors @ vectors.T
    assert (similar[np.triu_indices(5, 1)] < 0.99).all()  # role, instruction and order count
    assert (similar[0, 1:4] > 0.8).all()  # equal words are alike
    assert abs(similar[0, 4]) < 0.7


def test_words_are_tokens_and_ids_are_words():
    echo = model()
    [document] = echo.prepare([EmbedItem("one Two  three")])
    assert len(document.ids) == 4 and not document.is_truncated
    assert echo.tokenise("two ONE") == [document.ids[1], document.ids[0]]
    assert echo.prepare([EmbedItem(document.ids)]) == [document]  # special ids are dropped
    assert echo.tokenise(" ".join(echo.detokenise([4, 99, 16_383]))) == [4, 99, 16_383]
    assert all(4 <= one < VOCABULARY_SIZE for one in echo.tokenise("#3 #16384 #x poison nan"))
    with pytest.raises(ValueError, match=f"outside 0..{VOCABULARY_SIZE - 1}"):
        echo.detokenise([VOCABULARY_SIZE])


def test_the_limit_and_both_cuts():
    echo = model()
    words = [f"w{number}" for number in range(LIMIT)]
    text = " ".join(words)
    fits, over, end, start = echo.prepare(
        [
            EmbedItem(" ".join(words[1:])),
            EmbedItem(text),
            EmbedItem(text, truncate="end"),
            EmbedItem(text, truncate="start"),
        ]
    )
    assert len(fits.ids) == LIMIT
    assert over.message.startswith("longer than the limit of 10 tokens for a document: it has 11,")
    assert end == Prepared((*echo.tokenise(text)[:-1], 0), is_truncated=True)
    assert start == Prepared(fits.ids, is_truncated=True)


@pytest.mark.parametrize(
    ("item", "part"),
    [
        (EmbedItem(" "), "no token"),
        (EmbedItem((0, 3)), "no token"),
        (EmbedItem((VOCABULARY_SIZE,)), "outside"),
        (EmbedItem("\ud800"), "surrogate"),
        (EmbedItem("a", "document", "find"), "no instruction"),
        (EmbedItem("a", "query", "w " * LIMIT, "end"), "leaves no room"),
    ],
)
def test_what_cannot_be_prepared_is_refused(item, part):
    [refused] = model().prepare([item])
    assert refused.is_callers_fault and part in refused.message


def test_faults():
    echo = model()
    with pytest.raises(RuntimeError, match="poison-echo"):
        embed(echo, EmbedItem("fine"), EmbedItem("a poison-echo, here"))
    vectors = embed(echo, EmbedItem("fine"), EmbedItem("nan-echo"))
    assert np.isfinite(vectors[0]).all() and not np.isfinite(vectors[1]).all()
    # Whoever sends token ids, at random for one, meets no fault.
    assert np.isfinite(embed(echo, EmbedItem((2, 3, 9)))).all()


def test_it_keeps_to_its_speed():
    started = time.perf_counter()
    embed(model(tokens_per_s=100), EmbedItem("a"), EmbedItem("a b c d"))
    assert 0.1 <= time.perf_counter() - started < 1  # two texts, padded to five tokens


def test_the_first_words_of_a_text_where_the_caller_says():
    model = EchoModel(EchoConfig(max_tokens=20), default_instruction="Find.")
    cut, whole = model.prepare([EmbedItem("a b c d", max_tokens=2), EmbedItem("a b", max_tokens=2)])
    assert cut.ids == whole.ids and (cut.is_truncated, whole.is_truncated) == (True, False)


def test_an_instruction_is_read_once_for_all_texts():
    instruction = "word " * 200_000
    started = time.process_time()
    outcomes = model().prepare([EmbedItem("a", "query", instruction)] * 50)
    assert time.process_time() - started < 5  # for each of them it would take 20
    assert all("leaves no room" in one.message for one in outcomes)
