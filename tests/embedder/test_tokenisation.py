import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.embedder import Role, resolve_contract
from reasonembed.embedder.contract import load_tokenizer
from reasonembed.embedder.tokenisation import ContractTokenizer, apply_template
from tests.embedder.tiny import WORDS, encoder_config, save_checkpoint


def make(folder, **changes):
    tokenizer = load_tokenizer(folder)
    contract = resolve_contract(folder, encoder_config(folder, **changes))
    return ContractTokenizer(tokenizer, contract), tokenizer


@given(query=st.text(), instruction=st.text())
def test_template_is_filled_whatever_braces_the_texts_hold(query, instruction):
    filled = apply_template("I: {instruction}\nQ: {query}", query=query, instruction=instruction)
    assert filled == f"I: {instruction}\nQ: {query}"


def test_slots_inside_the_texts_stay_as_they_are():
    filled = apply_template("{instruction}|{query}", query="{instruction}", instruction="{query}")
    assert filled == "{query}|{instruction}"


def test_queries_take_the_template_and_documents_stay_bare(checkpoint):
    ours, tokenizer = make(checkpoint)
    (query,) = ours.tokenise(["why {x}"], role=Role.QUERY, instruction="do {it}")
    (document,) = ours.tokenise(["why {x}"], role=Role.DOCUMENT)
    assert tokenizer.decode(query) == "Instruct: do {it}\nQuery: why {x}<|endoftext|>"
    assert tokenizer.decode(document) == "why {x}<|endoftext|>"
    with pytest.raises(ValueError, match="take no instruction"):
        ours.tokenise(["x"], role=Role.DOCUMENT, instruction="do")


@pytest.mark.parametrize("kind", ["plain", "with_bos", "appends"])
def test_the_end_token_stays_under_truncation_and_stands_once(tmp_path, kind):
    folder = save_checkpoint(tmp_path, with_bos=kind == "with_bos", appends=kind == "appends")
    ours, _ = make(folder, max_document_tokens=10)
    end = 1 if kind == "appends" else 0
    short, long, empty = ours.tokenise(["a", WORDS, ""], role=Role.DOCUMENT)
    assert len(long) == 10 and len(short) < 10
    for ids in (short, long, empty):
        assert ids[-1] == end and ids.count(end) == 1
    if kind == "with_bos":
        assert long[0] == short[0] == 2


def test_limits_are_those_of_the_role(checkpoint):
    ours, _ = make(checkpoint, max_query_tokens=12, max_document_tokens=20)
    assert len(ours.tokenise([WORDS], role=Role.QUERY)[0]) == 12
    assert len(ours.tokenise([WORDS], role=Role.DOCUMENT)[0]) == 20


def test_no_texts_give_no_ids(checkpoint):
    assert make(checkpoint)[0].tokenise([], role=Role.QUERY) == []
