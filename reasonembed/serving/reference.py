"""`/docs`: the OpenAPI document as one page without scripts, so that it needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { margin: 0 auto; max-width: 60rem; padding: 1rem }
code, pre { font: .875rem/1.4 ui-monospace, monospace }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8884; border-radius: .375rem }
table { border-collapse: collapse; width: 100% }
.wide { overflow-x: auto }
th, td { border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: left;
  vertical-align: top }
h2 { margin-top: 2.5rem } summary { cursor: pointer; padding: .375rem 0 }
.method { display: inline-block; min-width: 3.5rem; font-weight: 600 }
"""
_Schema = Mapping[str, Any]


def router(app: FastAPI) -> APIRouter:
    """`GET /docs` of an app."""
    routes = APIRouter()

    @routes.get("/docs", response_class=HTMLResponse)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render(app.openapi()), headers={"Content-Security-Policy": _POLICY})

    return routes


def render(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as HTML."""
    info, parts = document["info"], []
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for tag in document.get("tags", ()):
        chosen = [one for one in operations if tag["name"] in one[2].get("tags", ())]
        parts.append(f"<h2>{escape(tag['name'])}</h2>")
        parts += [_operation(path, method, one, document) for path, method, one in chosen]
    parts.append("<h2>Shapes</h2>")
    parts += [_shape(name, one) for name, one in document["components"]["schemas"].items()]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><main><h1>{title}</h1><p>{escape(info['description'])}</p>"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(parts)}</main></html>"
    )


def _operation(path: str, method: str, operation: _Schema, document: _Schema) -> str:
    parts = [f"<p>{escape(operation.get('description', ''))}</p>"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if operation.get("parameters"):
        parts.append(_table("Parameters", _parameters(operation["parameters"])))
    if body:
        parts.append(_table("Body", _fields(_resolved(body["schema"], document))))
        parts += [
            f"<p>{escape(one['summary'])}:</p><pre>{escape(_curl(path, one['value']))}</pre>"
            for one in body.get("examples", {}).values()
        ]
    parts.append(_table("Answers", _answers(operation["responses"], document)))
    return (
        f'<details id="{escape(operation["operationId"])}"><summary>'
        f'<span class="method">{method.upper()}</span> <code>{escape(path)}</code> '
        f"{escape(operation.get('summary', ''))}</summary>{''.join(parts)}</details>"
    )


def _shape(name: str, schema: _Schema) -> str:
    text = escape(schema.get("description", ""))
    return (
        f"<details><summary><code>{escape(name)}</code> {text}</summary>"
        f"{_table('Fields', _fields(schema))}</details>"
    )


def _table(title: str, rows: Iterator[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(text)}</td>"
        for name, kind, text in rows
    )
    return f'<h3>{title}</h3><div class="wide"><table>{cells}</table></div>'


def _parameters(parameters: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for one in parameters:
        yield one["name"], _kind(one["schema"]), one.get("description", "")


def _fields(schema: _Schema) -> Iterator[tuple[str, str, str]]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        text = field.get("description", "") + (" (required)" if name in required else "")
        yield name, _kind(field), text


def _answers(responses: _Schema, document: _Schema) -> Iterator[tuple[str, str, str]]:
    for status, response in responses.items():
        resolved = _resolved(response, document)
        content: _Schema = next(iter(resolved.get("content", {}).values()), {})
        example = content.get("example")
        shown = json.dumps(example, ensure_ascii=False) if example is not None else ""
        yield status, resolved["description"], shown or _kind(content.get("schema", {}))


def _resolved(schema: _Schema, document: _Schema) -> _Schema:
    found: Any = schema
    if "$ref" in schema:
        found = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
    return found  # type: ignore[no-any-return]


def _kind(schema: _Schema) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "enum" in schema or "const" in schema:
        return " | ".join(json.dumps(one) for one in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " | ".join(_kind(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def _curl(path: str, body: Any) -> str:
    quoted = json.dumps(body, ensure_ascii=False, indent=2).replace("'", "'\\''")
    return f"curl $URL{path} -H 'Content-Type: application/json' -d '{quoted}'"
