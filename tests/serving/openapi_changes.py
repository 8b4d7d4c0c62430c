"""What a change of the OpenAPI document breaks for clients that were written for the older one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems")
_UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")
_Json = Mapping[str, Any]


def breaking(old: _Json, new: _Json) -> list[str]:
    """What breaks, a line each; nothing where the major version differs."""
    majors = {document["info"]["version"].split(".")[0] for document in (old, new)}
    return [] if len(majors) > 1 else list(_of_documents(old, new))


def _of_documents(old: _Json, new: _Json) -> Iterator[str]:
    for path, operations in old["paths"].items():
        for method, operation in operations.items():
            at = f"{method.upper()} {path}"
            found = new["paths"].get(path, {}).get(method)
            if found is None:
                yield f"{at}: removed"
            else:
                yield from _of_operations(_Pair(old, new), operation, found, at)


@dataclass(frozen=True)
class _Pair:
    """The older and the newer document, for their references."""

    old: _Json
    new: _Json


def _of_operations(both: _Pair, old: _Json, new: _Json, at: str) -> Iterator[str]:
    yield from _of_parameters(both, old, new, at)
    before, after = (_json_schema(one.get("requestBody", {})) for one in (old, new))
    if before is None and after is not None and new["requestBody"].get("required"):
        yield f"{at}: a body is needed"
    if before is not None:
        request = _Within(both.old, both.new, is_answer=False)
        yield from request.reasons(before, after or {"not": {}}, f"{at} body", frozenset())
    for status, answer in old["responses"].items():
        if status not in new["responses"]:
            yield f"{at}: status {status} removed"
            continue
        before = _json_schema(_resolved(answer, both.old))
        after = _json_schema(_resolved(new["responses"][status], both.new))
        if before is not None:
            response = _Within(both.new, both.old, is_answer=True)
            yield from response.reasons(after or {}, before, f"{at} {status}", frozenset())


def _of_parameters(both: _Pair, old: _Json, new: _Json, at: str) -> Iterator[str]:
    before = {(one["in"], one["name"]): one for one in old.get("parameters", ())}
    after = {(one["in"], one["name"]): one for one in new.get("parameters", ())}
    for key, parameter in before.items():
        where = f"{at} parameter {key[1]}"
        if key not in after:
            yield f"{where}: removed"
            continue
        request = _Within(both.old, both.new, is_answer=False)
        yield from request.reasons(parameter["schema"], after[key]["schema"], where, frozenset())
    for key, parameter in after.items():
        was_required = before.get(key, {}).get("required", False)
        if parameter.get("required") and not was_required:
            yield f"{at} parameter {key[1]}: now required"


@dataclass(frozen=True)
class _Within:
    """Whether all that one schema describes is described by another.

    Of requests, what the older one lets clients send must fit the newer one; of answers, what the
    newer one sends must fit the older one, and hold all that it named.
    """

    inner: _Json
    outer: _Json
    is_answer: bool

    def reasons(
        self, inner: _Json, outer: _Json, at: str, seen: frozenset[tuple[int, int]]
    ) -> Iterator[str]:
        """Why not, a line each."""
        choices = list(_variants(outer, self.outer))
        for one in _variants(inner, self.inner):
            tries = [list(self._of_variants(one, other, at, seen)) for other in choices]
            if all(tries):
                # The one that comes closest says what is wrong.
                yield from min(tries, key=len)

    def _of_variants(
        self, inner: _Json, outer: _Json, at: str, seen: frozenset[tuple[int, int]]
    ) -> Iterator[str]:
        pair = (id(inner), id(outer))
        if pair in seen:  # schemas may hold themselves
            return
        seen = seen | {pair}
        if "not" in outer:
            yield f"{at}: removed"
            return
        if outer.get("type", inner.get("type")) != inner.get("type"):
            yield f"{at}: {inner.get('type', 'anything')} is not {outer['type']}"
            yield f"{at}: another type altogether"  # further away than any other reason
            return
        yield from self._of_values(inner, outer, at)
        if "items" in inner or "items" in outer:
            yield from self.reasons(inner.get("items", {}), outer.get("items", {}), f"{at}[]", seen)
        yield from self._of_properties(inner, outer, at, seen)

    def _of_values(self, inner: _Json, outer: _Json, at: str) -> Iterator[str]:
        allowed = _values(outer)
        if allowed is not None:
            given = _values(inner)
            for value in [None] if given is None else given - allowed:
                yield f"{at}: {'any value' if given is None else value} is not one of {allowed}"
        for bound in (*_LOWER, *_UPPER):
            sign = 1 if bound in _LOWER else -1
            if bound in outer and (bound not in inner or sign * outer[bound] > sign * inner[bound]):
                yield f"{at}: {bound} {outer[bound]}, not {inner.get(bound)}"
        if "pattern" in outer and outer["pattern"] != inner.get("pattern"):
            yield f"{at}: pattern {outer['pattern']}"

    def _of_properties(
        self, inner: _Json, outer: _Json, at: str, seen: frozenset[tuple[int, int]]
    ) -> Iterator[str]:
        mine, theirs = inner.get("properties", {}), outer.get("properties", {})
        for name in set(outer.get("required", ())) - set(inner.get("required", ())):
            word = "may be missing" if self.is_answer else "now required"
            yield f"{at}.{name}: {word}"
        for name in theirs.keys() - mine.keys() if self.is_answer else mine.keys() - theirs.keys():
            yield f"{at}.{name}: removed"
        for name in mine.keys() & theirs.keys():
            yield from self.reasons(mine[name], theirs[name], f"{at}.{name}", seen)


def _variants(schema: _Json, document: _Json) -> Iterator[_Json]:
    found = _resolved(schema, document)
    choices = [*found.get("anyOf", ()), *found.get("oneOf", ())]
    if not choices:
        yield found
    for choice in choices:
        yield from _variants(choice, document)


def _values(schema: _Json) -> set[str] | None:
    if "const" in schema:
        return {repr(schema["const"])}
    return {repr(one) for one in schema["enum"]} if "enum" in schema else None


def _json_schema(content: _Json) -> _Json | None:
    schema: _Json | None = content.get("content", {}).get("application/json", {}).get("schema")
    return schema


def _resolved(schema: _Json, document: _Json) -> _Json:
    found: Any = schema
    while "$ref" in found:
        path, found = found["$ref"].removeprefix("#/").split("/"), document
        for part in path:
            found = found[part]
    return found  # type: ignore[no-any-return]
