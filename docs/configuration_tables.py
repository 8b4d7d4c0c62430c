"""Writes the tables of docs/configuration.md from the classes of reasonembed/config.py.

Names, order, types, ranges and defaults are the classes'. What a field means is written on the page
by hand; a field that is new there starts with the description that its class gives it. Run by
`python -m docs.configuration_tables`; a test holds the page to what it would write.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from reasonembed import config

PAGE = Path(__file__).parent / "configuration.md"
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_HEADING = re.compile(r"^#+ (.*)$")
_ROW = re.compile(r"(?<!\\)\|")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    above = path.partition(": ")[0]
    for name, field in model.model_fields.items():
        for inner, suffix in _nested(field.annotation):
            yield from _sections(inner, f"{above}.{name}{suffix}".lstrip("."))


def _nested(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """The configuration classes inside an annotation, and what each adds to the path."""
    if _is_section(annotation):
        kind = annotation.model_fields.get("kind")  # one of several classes
        return [(annotation, f": {{kind: {typing.get_args(kind.annotation)[0]}}}" if kind else "")]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return [(model, f".<name>{suffix}") for model, suffix in _nested(arguments[1])]
    if origin is tuple:
        return [(model, f"[]{suffix}") for model, suffix in _nested(arguments[0])]
    if origin is typing.Annotated:
        return _nested(arguments[0])
    return [found for argument in arguments for found in _nested(argument)]


SECTIONS: dict[str, type[BaseModel]] = dict(_sections(config.RunConfig)) | {
    "benchmark": config.BenchmarkConfig,
    "system": config.SystemConfig,
    "system.retrieve: {kind: hybrid}": config.HybridRetriever,
    "system.rerank": config.RerankConfig,
    "serve": config.ServeConfig,
    "serve.echo": config.EchoConfig,
    "index": config.IndexConfig,
}
"""Every section of a configuration, by its path."""


def own_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Its fields but for those of a class that is a section itself: they are described there."""
    above = {
        name for base in model.__bases__ if base in SECTIONS.values() for name in base.model_fields
    }
    return {name: field for name, field in model.model_fields.items() if name not in above}


def kind_of(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """A type as the tables say it, with its bounds and choices."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner, *found = arguments
        own = [m for one in found for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return kind_of(inner, (*own, *limits))
    if origin is typing.Literal:
        choices = ", ".join(f"`{choice}`" for choice in arguments)
        return choices if len(arguments) == 1 else f"one of {choices}"
    if origin in (types.UnionType, typing.Union):
        return _either(arguments, limits)
    if origin is tuple:
        many = "sections" if _is_section(arguments[0]) else kind_of(arguments[0])
        return f"list of {many.removeprefix('one of ')}"
    if origin is dict:
        return f"mapping of name to {kind_of(arguments[1])}"
    if _is_section(annotation):
        return "section"
    bounds = [
        f"{sign} {value:g}" if isinstance(value, float) else f"{sign} {value}"
        for limit in limits
        for key, sign in _BOUNDS.items()
        if (value := getattr(limit, key, None)) is not None
    ]
    return " ".join([_PLAIN[annotation], ", ".join(bounds)]).strip()


def _either(options: tuple[Any, ...], limits: tuple[Any, ...]) -> str:
    some = [kind_of(option, limits) for option in options if option is not type(None)]
    some = list(dict.fromkeys(some))  # sections of several kinds are one word
    words = " or ".join(filter(None, [", ".join(some[:-1]), some[-1]]))
    return words + (" or null" if type(None) in options else "")


def default_of(field: FieldInfo) -> str:
    """A default as YAML; of a section what it says otherwise than its class."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    may_be_null = type(None) in typing.get_args(field.annotation)
    if may_be_null and isinstance(value, BaseModel):
        value = value.model_dump()  # whole, for `{}` would look like nothing
    is_bare = isinstance(value, str) and _is_bare(value, r"[{}\[\]\n]|: ")
    return f"`{value if is_bare else _flow(value)}`"


def _is_bare(text: str, signs: str) -> bool:
    """Whether YAML takes it for the same string without quotation marks."""
    return bool(text) and not re.search(signs, text) and yaml.safe_load(text) == text


def _flow(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = {
            name: getattr(value, name)
            for name in type(value).model_fields
            if name in value.model_fields_set
        }
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return value if _is_bare(value, r"[{}\[\],:\n]") else json.dumps(value, ensure_ascii=False)
    # Not as JSON: to YAML 1e-06 is a word.
    return yaml.safe_dump(value).partition("\n")[0]


def paths_of(heading: str) -> list[str]:
    """The sections that the table below a heading describes."""
    if heading == "Top level":
        return [""]
    return [name for name in re.findall(r"`([^`]+)`", heading) if name in SECTIONS]


def rewritten(page: str) -> str:
    """The page with its tables as the classes have them."""
    lines: list[str] = []
    paths: list[str] = []
    rows: list[list[str]] = []
    for line in page.splitlines():
        if heading := _HEADING.match(line):
            paths = paths_of(heading[1])
        if paths and line.startswith("| `"):
            rows.append([cell.strip() for cell in _ROW.split(line)[1:-1]])
            continue
        if rows:
            lines += _table(paths, rows)
            rows = []
        lines.append(line)
    return "\n".join(lines + (_table(paths, rows) if rows else [])) + "\n"


def _table(paths: list[str], rows: list[list[str]]) -> list[str]:
    if len(rows[0]) != 4:
        return ["| " + " | ".join(row) + " |" for row in rows]  # says other things than fields
    said = {row[0].strip("`"): row[3] for row in rows}
    tables = [
        [
            f"| `{name}` | {kind_of(field.annotation, tuple(field.metadata))} "
            f"| {default_of(field)} | {said.get(name, field.description or '')} |"
            for name, field in own_fields(SECTIONS[path]).items()
        ]
        for path in paths
    ]
    for path, table in zip(paths, tables, strict=True):
        if table != tables[0]:
            raise ValueError(f"{path} and {paths[0]} share a heading and differ")
    # A bar inside a cell would end it; an empty cell is one blank.
    return [re.sub(r"\|  \|$", "| |", line) for line in tables[0]]


def main() -> None:
    """Writes the page anew."""
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
