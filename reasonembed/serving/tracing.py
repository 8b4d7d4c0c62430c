"""W3C trace context: which trace a request belongs to (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_STATE = re.compile(r"[\x20-\x7e]{1,512}", re.ASCII)  # 512 characters must be passed on, §3.3.1.5
_ZEROS_TRACE, _ZEROS_SPAN = "0" * 32, "0" * 16


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where a request stands in a trace.

    Attributes:
        trace_id: 32 hex digits; the caller's, or a new one.
        span_id: 16 hex digits, always new: this service's part.
        parent_id: The caller's span; None where it sent none.
        is_sampled: Whether the caller keeps the trace.
        state: `tracestate` as it came; empty where there is none.
    """

    trace_id: str
    span_id: str
    parent_id: str | None = None
    is_sampled: bool = False
    state: str = ""

    @property
    def parent(self) -> str:
        """`traceparent` of what this request calls, and of its answer."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def trace_of(parents: Sequence[str], states: Sequence[str]) -> TraceContext:
    """The context of a request.

    A `traceparent` that is missing, not valid or there twice starts a new trace, and then
    `tracestate` does not count either (§3.2.1, §3.3.1).

    Args:
        parents: Values of the headers `traceparent`.
        states: Values of the headers `tracestate`, in order.
    """
    span_id = _random_id(8)
    found = _parse(parents[0]) if len(parents) == 1 else None
    if found is None:
        return TraceContext(trace_id=_random_id(16), span_id=span_id)
    trace_id, parent_id, is_sampled = found
    state = ",".join(part for part in states if part)
    if not _STATE.fullmatch(state):
        state = ""
    return TraceContext(trace_id, span_id, parent_id, is_sampled, state)


def _parse(header: str) -> tuple[str, str, bool] | None:
    """Trace, span and the flag `sampled`; None where the header is not valid."""
    match = _PARENT.fullmatch(header)
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    # Later versions may append fields; of them the known ones are read (§4.3).
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if trace_id == _ZEROS_TRACE or parent_id == _ZEROS_SPAN:
        return None
    return trace_id, parent_id, bool(int(flags, 16) & 1)


def _random_id(num_bytes: int) -> str:
    """Hex digits, not all zero."""
    while True:
        drawn = secrets.token_hex(num_bytes)
        if int(drawn, 16):
            return drawn
