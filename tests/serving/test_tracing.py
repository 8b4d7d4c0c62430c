import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.serving.tracing import trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"
VALID = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[01]")
HEX = st.text("0123456789abcdef")


def test_a_valid_parent_is_continued():
    context = trace_of([GOOD], ["rojo=1,congo=2"])
    assert context.trace_id == TRACE and context.parent_id == SPAN
    assert context.span_id != SPAN and context.is_sampled
    assert context.parent == f"00-{TRACE}-{context.span_id}-01"
    assert context.state == "rojo=1,congo=2"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        GOOD.upper(),
        f" {GOOD}",
        f"{GOOD} ",
        f"{GOOD}-",
        f"{GOOD}-more",
        f"{GOOD}\n",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0g",
        f"cc-{TRACE}-{SPAN}-01.later",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
    ],
)
def test_what_is_not_valid_starts_a_new_trace(header):
    context = trace_of([header], ["rojo=1"])
    assert context.trace_id not in (TRACE, TRACE.lower()) and context.parent_id is None
    assert context.state == "" and not context.is_sampled
    assert VALID.fullmatch(context.parent)


@pytest.mark.parametrize("header", [f"cc-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-what-later"])
def test_later_versions_are_read_as_far_as_they_are_known(header):
    context = trace_of([header], [])
    assert context.trace_id == TRACE and context.parent.startswith("00-") and context.is_sampled


def test_unknown_flags_are_not_passed_on():
    assert trace_of([f"00-{TRACE}-{SPAN}-fe"], []).parent.endswith("-00")
    assert trace_of([f"00-{TRACE}-{SPAN}-ff"], []).parent.endswith("-01")


def test_two_parents_are_none():
    assert trace_of([GOOD, GOOD], []).parent_id is None


def test_states_are_joined_in_order_and_bounded():
    assert trace_of([GOOD], ["a=1", "", "b=2"]).state == "a=1,b=2"
    assert trace_of([GOOD], ["a=" + "x" * 510]).state == "a=" + "x" * 510
    assert trace_of([GOOD], ["a=" + "x" * 511]).state == ""
    assert trace_of([GOOD], ["a=\x7f"]).state == ""


@given(st.lists(st.text() | st.just(GOOD), max_size=3), st.lists(st.text(), max_size=3))
def test_whatever_comes_the_context_is_valid(parents, states):
    context = trace_of(parents, states)
    assert VALID.fullmatch(context.parent)
    assert len(context.state) <= 512 and context.state.isprintable()


@given(HEX, st.integers(0, 254), st.integers(0, 255))
def test_valid_ids_survive(digits, version, flags):
    trace, span = (digits + TRACE)[:32], (digits + SPAN)[:16]
    context = trace_of([f"{version:02x}-{trace}-{span}-{flags:02x}"], [])
    is_valid = int(trace, 16) and int(span, 16)
    assert (context.trace_id == trace) == bool(is_valid)
    assert context.is_sampled == bool(is_valid and flags & 1)
