from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reasonembed.embedder.contract import Pooling, load_tokenizer, resolve_contract
from reasonembed.embedder.tokenisation import ContractTokenizer, Role
from reasonembed.serving.preparation import ContractPreparer
from reasonembed.serving.protocol import EmbedItem, ItemError, Prepared
from tests.embedder.tiny import encoder_config, save_checkpoint, save_tokenizer

LIMIT = 48
DEFAULT = "Find keys."
TEMPLATES = {
    "plain": {},
    "framed": {
        "query_template": "Instruct: {instruction}\nQuery: {query} <end of query>",
        "document_template": "Passage: {document}",
    },
}
KINDS = [  # tokenizer that begins, that appends the end token by itself
    {},
    {"with_bos": True},
    {"appends": True},
    {"with_bos": True, "appends": True},
]
# Byte-level tokens of one emoji are several, and none of them alone is a character.
UNICODE = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("a set why 汉🤷🏽\u200d♀️é ")
    ),
    max_size=150,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """Preparers and the contract's own tokenizers, by kind of tokenizer and template."""
    found = {}
    for number, kind in enumerate(KINDS):
        place = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(place, **kind)
        for name, template in TEMPLATES.items():
            contract = resolve_contract(folder, encoder_config(folder, **template))
            preparer = ContractPreparer(
                load_tokenizer(place), contract, default_instruction=DEFAULT
            )
            rules = ContractTokenizer(load_tokenizer(place), contract)
            found[number, name] = SimpleNamespace(preparer=preparer, rules=rules, place=place)
    return found


@pytest.fixture
def simple(made):
    return made[0, "plain"]


def prepare(preparer, *items):
    return preparer.prepare(list(items))


def tokenised(rules, text, role="document", instruction=None):
    asked = (instruction if instruction is not None else DEFAULT) if role == "query" else ""
    [ids] = rules.tokenise([text], role=Role(role), instruction=asked)
    return ids


cases = st.sampled_from([(number, name) for number in range(len(KINDS)) for name in TEMPLATES])
roles = st.sampled_from(["query", "document"])


@given(text=UNICODE, case=cases, role=roles)
@example(text="q" * 200, case=(0, "plain"), role="document")
@settings(max_examples=150)
def test_end_is_the_contracts_own_cut(made, text, case, role):
    one = made[case]
    [outcome] = prepare(one.preparer, EmbedItem(text, role, truncate="end"))
    if not text:
        assert isinstance(outcome, ItemError)
        return
    assert outcome.ids == tokenised(one.rules, text, role)
    [refused] = prepare(one.preparer, EmbedItem(text, role))
    assert isinstance(refused, ItemError) == outcome.is_truncated
    if not outcome.is_truncated:
        assert refused == outcome


@given(text=UNICODE, case=cases, role=roles)
@example(text="q" * 200, case=(1, "framed"), role="query")
@example(text="🤷🏽\u200d♀️" * 60, case=(3, "framed"), role="query")
@settings(max_examples=150)
def test_start_keeps_an_end_of_the_text_within_the_limit(made, text, case, role):
    one = made[case]
    [outcome] = prepare(one.preparer, EmbedItem(text, role, truncate="start"))
    if not text:
        return
    assert isinstance(outcome, Prepared)
    assert len(outcome.ids) <= LIMIT
    [whole] = prepare(one.preparer, EmbedItem(text, role, truncate="end"))
    assert outcome.is_truncated == whole.is_truncated
    if not outcome.is_truncated:
        assert outcome == whole
        return
    # Exactly what some end of the text gives by itself: template whole, no half a character.
    ends = {tokenised(one.rules, text[start:], role) for start in range(1, len(text))}
    assert outcome.ids in ends
    # And not much less than what fits: at most a character's bytes, or a merge, is lost.
    assert len(outcome.ids) > LIMIT - 8


def test_the_limit_is_exact(simple):
    fits = "q" * (LIMIT - 1)  # a token each, and the end token
    fitting, over, end, start = prepare(
        simple.preparer,
        EmbedItem(fits),
        EmbedItem(fits + "q"),
        EmbedItem(fits + "z", truncate="end"),
        EmbedItem("z" + fits, truncate="start"),
    )
    assert fitting == Prepared(tokenised(simple.rules, fits))
    assert len(fitting.ids) == LIMIT
    assert over.is_callers_fault
    assert over.message.startswith(
        f"longer than the limit of {LIMIT} tokens for a document: it has {LIMIT + 1}, "
    )
    cut = Prepared(fitting.ids, is_truncated=True)
    assert (end, start) == (cut, cut)


def test_mixed_items_keep_their_order_and_their_instruction(simple):
    items = [
        EmbedItem("why", "query"),
        EmbedItem("a mapping"),
        EmbedItem("why", "query", "Find sets."),
        EmbedItem("q" * 99),
        EmbedItem("why", "query", ""),
        EmbedItem("a set"),
    ]
    outcomes = prepare(simple.preparer, *items)
    assert isinstance(outcomes[3], ItemError)
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, Prepared):
            expected = tokenised(simple.rules, item.content, item.role, item.instruction)
            assert outcome == Prepared(expected)


def test_token_ids_stand_for_their_text(made):
    for one in made.values():
        ids = tuple(load_tokenizer(one.place)("the order of keys")["input_ids"])
        [prepared] = prepare(one.preparer, EmbedItem(ids))
        assert prepared.ids == tokenised(one.rules, "the order of keys")


@pytest.mark.parametrize(
    ("item", "part"),
    [
        (EmbedItem(""), "no token besides special ones"),
        (EmbedItem((0, 1)), "no token besides special ones"),
        (EmbedItem((5, 400)), "token id 400 is outside 0..356"),
        (EmbedItem((-1,)), "check_embedding_ctx_length=False"),
        (EmbedItem("half \ud83e"), "surrogate"),
        (EmbedItem("a", "query", "\udfff"), "surrogate"),
        (EmbedItem("a", "document", "Find."), "documents take no instruction"),
        (EmbedItem("a", "query", "q" * 60, "end"), "leaves no room"),
        (EmbedItem("a", "query", "q" * 2_000_000, "start"), "768 characters"),
    ],
)
def test_what_cannot_be_prepared_is_refused_alone(simple, item, part):
    before, refused, after = prepare(simple.preparer, EmbedItem("a"), item, EmbedItem("a"))
    assert refused.is_callers_fault and part in refused.message
    assert before == after == Prepared(tokenised(simple.rules, "a"))


def test_a_text_that_the_tokenizer_makes_nothing_of_is_refused(folder, tmp_path):
    from tokenizers import normalizers

    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    contract = resolve_contract(folder, encoder_config(folder))
    preparer = ContractPreparer(tokenizer, contract, default_instruction=DEFAULT)
    blank, long, punctuation, late = prepare(
        preparer,
        EmbedItem(" \n"),
        EmbedItem(" " * 5_000),
        EmbedItem("?!"),
        EmbedItem(" " * 5_000 + "?"),
    )
    assert blank == long and isinstance(blank, ItemError)
    assert len(punctuation.ids) == 3 and len(late.ids) == 2


def test_only_templates_with_a_place_for_it_take_an_instruction(folder):
    contract = resolve_contract(folder, encoder_config(folder, query_template="{query}"))
    preparer = ContractPreparer(load_tokenizer(folder), contract, default_instruction="")
    with_one, without = prepare(
        preparer, EmbedItem("why", "query", "Find."), EmbedItem("why", "document")
    )
    assert with_one == without


def test_what_stays_out_of_the_mean_is_counted(folder):
    config = encoder_config(folder, document_template="d: {document}")
    contract = replace(resolve_contract(folder, config), pooling=Pooling.MEAN, pool_template=False)
    preparer = ContractPreparer(load_tokenizer(folder), contract, default_instruction=DEFAULT)
    rules = ContractTokenizer(load_tokenizer(folder), contract)
    query, own, document = prepare(
        preparer,
        EmbedItem("why", "query"),
        EmbedItem("why", "query", "Find a longer one."),
        EmbedItem("why", truncate="start"),
    )
    assert query.skip == rules.tokens_before_text(role=Role.QUERY, instruction=DEFAULT) > 5
    assert own.skip > query.skip
    assert document.skip == rules.tokens_before_text(role=Role.DOCUMENT) > 0


def test_tokens_and_what_they_stand_for(simple):
    ids = simple.preparer.tokenise("why does a dictionary")
    assert ids == load_tokenizer(simple.place)("why does a dictionary")["input_ids"]
    assert "".join(simple.preparer.detokenise(ids)) == "why does a dictionary"
    assert simple.preparer.tokenise("") == []
    with pytest.raises(ValueError, match=r"token id 400 is outside 0\.\.356"):
        simple.preparer.detokenise([1, 400])


@pytest.mark.parametrize("words", ["why does a set ", "q", "汉字", " "])
@pytest.mark.parametrize("truncate", ["none", "end", "start"])
def test_ten_megabytes_do_not_take_seconds(simple, words, truncate):
    text = words * (10_000_000 // len(words.encode()))
    started = time.process_time()
    [outcome] = prepare(simple.preparer, EmbedItem(text, truncate=truncate))
    # Seconds of cores, so that a busy machine changes little. Whole, these take 2.5 to 4.3.
    assert time.process_time() - started < 1.0
    if truncate == "none":
        assert f"more than {2 * LIMIT - 1}" in outcome.message
        return
    part = text[:5_000] if truncate == "end" else text[-5_000:]
    [expected] = prepare(simple.preparer, EmbedItem(part, truncate=truncate))
    assert outcome == expected
    assert LIMIT - 3 < len(outcome.ids) <= LIMIT  # a character here is up to three tokens


def test_a_long_text_of_few_tokens_is_not_taken_for_a_longer_one(folder):
    from tokenizers import normalizers

    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    contract = resolve_contract(folder, encoder_config(folder))
    preparer = ContractPreparer(tokenizer, contract, default_instruction=DEFAULT)
    text = "z" * 100_000 + "q" * 20 + "z" * 100_000
    for truncate in ("none", "end", "start"):
        [outcome] = prepare(preparer, EmbedItem(text, truncate=truncate))
        assert len(outcome.ids) == 21 and not outcome.is_truncated


def test_threads_do_not_disturb_one_another(simple):
    items = [
        EmbedItem(f"{number} why a set " * (1 + number % 7), role, truncate=truncate)
        for number in range(40)
        for role in ("query", "document")
        for truncate in ("none", "start", "end")
    ]
    expected = prepare(simple.preparer, *items)

    def some(first: int) -> bool:
        chosen = range(first, len(items), 8)
        found = [prepare(simple.preparer, items[place])[0] for place in chosen]
        return found == [expected[place] for place in chosen]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(some, range(8)))
    assert {type(one) for one in expected} == {Prepared, ItemError}


@pytest.mark.parametrize("kind", [(number, name) for number in range(4) for name in TEMPLATES])
def test_a_text_is_cut_to_its_first_tokens_where_the_caller_says(made, kind):
    one = made[kind]
    text = "why do dicts keep 汉 the order of keys? " * 3
    ids = one.preparer.tokenise(text)
    whole, cut = prepare(
        one.preparer,
        EmbedItem(text, truncate="end", max_tokens=len(ids)),
        EmbedItem(text, truncate="end", max_tokens=7),
    )
    [plain] = prepare(one.preparer, EmbedItem(text, truncate="end"))
    assert whole == plain
    end = one.preparer._backend.encode(text, add_special_tokens=False).offsets[6][1]
    assert cut == Prepared(tuple(tokenised(one.rules, text[:end])), cut.skip, is_truncated=True)


def test_only_the_beginning_of_a_long_text_is_looked_at_to_cut_it(simple):
    start = time.perf_counter()
    [cut] = prepare(simple.preparer, EmbedItem("a set " * 2_000_000, max_tokens=5))
    assert cut.is_truncated and len(cut.ids) <= 8
    assert time.perf_counter() - start < 1  # the whole takes several seconds


@pytest.mark.parametrize("role", ["query", "document"])
def test_an_instruction_of_megabytes_is_not_repeated_for_every_text(simple, role):
    """A megabyte of blanks is few tokens where a tokenizer merges them."""
    instruction = "x" + " " * 2_000_000
    items = [EmbedItem("a", role, instruction)] * 500
    started = time.process_time()
    outcomes = prepare(simple.preparer, *items)
    assert time.process_time() - started < 0.5  # a gigabyte would take a second to put together
    assert all(isinstance(one, ItemError) and one.is_callers_fault for one in outcomes)


def test_an_instruction_may_have_as_many_characters_as_a_text_is_looked_at(folder):
    from tokenizers import normalizers

    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    contract = resolve_contract(
        folder, encoder_config(folder, query_template="{instruction}{query}")
    )
    preparer = ContractPreparer(tokenizer, contract, default_instruction=DEFAULT)
    fits, over = prepare(
        preparer, EmbedItem("a", "query", "z" * LIMIT * 16), EmbedItem("a", "query", "z" * 769)
    )
    assert isinstance(fits, Prepared)
    assert "instruction of a query may have 768 characters" in over.message
