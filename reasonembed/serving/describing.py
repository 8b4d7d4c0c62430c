"""How routes describe themselves in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi.openapi.models import Example

API_VERSION = "1.0.0"
"""Of the HTTP interface; a change that breaks clients raises the first number."""

Responses = dict[int | str, dict[str, Any]]


def examples(**named: tuple[str, Any]) -> dict[str, Example]:
    """Bodies to try, by name: a line of what each shows, and the body."""
    return {name: Example(summary=summary, value=value) for name, (summary, value) in named.items()}


def answers(example: Any, *, description: str = "The answer") -> Responses:
    """The successful answer, by example."""
    return {
        200: {"description": description, "content": {"application/json": {"example": example}}}
    }
