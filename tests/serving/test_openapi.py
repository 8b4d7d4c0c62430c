from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from reasonembed.serving import openapi
from tests.serving.api import hash_client
from tests.serving.openapi_changes import breaking

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
BASELINE = Path(__file__).with_name("openapi_baseline.json")
OPEN = {"/livez", "/readyz", "/health"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(json.dumps(hash_client().get("/openapi.json").json()))


def operations(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", path, operation


def test_the_committed_file_is_the_generated_one():
    """Renew it: `python -m reasonembed.serving.openapi docs/openapi.json`."""
    assert COMMITTED.read_text(encoding="utf-8") == openapi.text()


def test_the_document_does_not_depend_on_the_service(document):
    other = hash_client(aliases=["x"], dimensions=[4]).get("/openapi.json").json()
    assert other == document
    assert json.loads(openapi.text()) == document


def test_the_document_is_valid(document):
    OpenAPIV31SpecValidator(document).validate()


def test_every_operation_is_described(document):
    seen = set()
    for name, path, operation in operations(document):
        assert operation["operationId"] not in seen, name
        seen.add(operation["operationId"])
        assert operation["summary"] and operation["description"], name
        assert operation["tags"], name
        assert operation["security"] == ([] if path in OPEN else [{"bearer": []}, {}]), name
        responses = operation["responses"]
        assert "200" in responses and "422" not in responses, name
        assert responses["500"] == {"$ref": "#/components/responses/Error500"}, name
        if "requestBody" in operation:
            assert {"400", "401", "413", "415", "429", "503"} <= set(responses), name
            content = operation["requestBody"]["content"]["application/json"]
            assert content["examples"] or content["example"], name


def test_every_field_of_a_body_is_described(document):
    for name, _, operation in operations(document):
        if "requestBody" not in operation:
            continue
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rsplit("/", 1)[-1]]
        assert schema["additionalProperties"] is False, name
        for field, described in schema["properties"].items():
            is_described_there = "$ref" in str(described)
            assert described.get("description") or is_described_there, f"{name} {field}"


def test_examples_fit_their_schemas(document):
    def check(schema, value, where):
        whole = {**schema, "components": document["components"]}
        errors = [error.message for error in Draft202012Validator(whole).iter_errors(value)]
        assert not errors, where

    num_checked = 0
    for name, _, operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in body.get("examples", {}).values():
            check(body["schema"], example["value"], name)
            num_checked += 1
        answer = operation["responses"]["200"].get("content", {}).get("application/json", {})
        if "example" in answer:
            check(answer["schema"], answer["example"], name)
            num_checked += 1
    assert num_checked >= 8


def test_nothing_that_was_released_is_broken(document):
    """A deliberate break raises the first number of `describing.API_VERSION`."""
    assert breaking(json.loads(BASELINE.read_text(encoding="utf-8")), document) == []


def small() -> dict[str, Any]:
    """A document with one of everything."""
    return {
        "info": {"version": "1.2.0"},
        "paths": {
            "/things/{id}": {
                "post": {
                    "parameters": [
                        {
                            "in": "path",
                            "name": "id",
                            "required": True,
                            "schema": {"type": "string"},
                        },
                        {"in": "query", "name": "n", "schema": {"type": "integer", "maximum": 9}},
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {"schema": {"$ref": "#/components/schemas/Body"}}
                        },
                    },
                    "responses": {
                        "200": {
                            "content": {
                                "application/json": {
                                    "schema": {"$ref": "#/components/schemas/Answer"}
                                }
                            }
                        },
                        "404": {"description": "missing"},
                    },
                }
            }
        },
        "components": {
            "schemas": {
                "Body": {
                    "type": "object",
                    "required": ["text"],
                    "properties": {
                        "text": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                        "kind": {"type": "string", "enum": ["a", "b"]},
                        "inner": {
                            "anyOf": [{"$ref": "#/components/schemas/Body"}, {"type": "null"}]
                        },
                    },
                },
                "Answer": {
                    "type": "object",
                    "required": ["id"],
                    "properties": {
                        "id": {"type": "string"},
                        "note": {"type": "string"},
                        "items": {"type": "array", "items": {"type": "number"}},
                    },
                },
            }
        },
    }


def _operation(document):
    return document["paths"]["/things/{id}"]["post"]


def _schema(document, name):
    return document["components"]["schemas"][name]


BREAKING = {
    "path": lambda one: one["paths"].clear(),
    "method": lambda one: one["paths"]["/things/{id}"].pop("post"),
    "status": lambda one: _operation(one)["responses"].pop("404"),
    "answer": lambda one: _operation(one)["responses"]["200"].pop("content"),
    "parameter": lambda one: _operation(one)["parameters"].pop(),
    "needed parameter": lambda one: _operation(one)["parameters"][1].update(required=True),
    "new needed parameter": lambda one: _operation(one)["parameters"].append(
        {"in": "query", "name": "m", "required": True, "schema": {"type": "string"}}
    ),
    "parameter's bound": lambda one: _operation(one)["parameters"][1]["schema"].update(maximum=8),
    "body": lambda one: _operation(one).pop("requestBody"),
    "body's field": lambda one: _schema(one, "Body")["properties"].pop("kind"),
    "needed field": lambda one: _schema(one, "Body")["required"].append("kind"),
    "new needed field": lambda one: _schema(one, "Body").update(
        required=["text", "new"],
        properties={**_schema(one, "Body")["properties"], "new": {"type": "string"}},
    ),
    "narrowed enum": lambda one: _schema(one, "Body")["properties"]["kind"]["enum"].pop(),
    "new enum": lambda one: _schema(one, "Body")["properties"].update(
        text={"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "integer"}]}
    ),
    "narrowed type": lambda one: _schema(one, "Body")["properties"]["text"]["anyOf"].pop(),
    "new pattern": lambda one: _schema(one, "Body")["properties"]["kind"].update(pattern="a"),
    "new bound": lambda one: _schema(one, "Body")["properties"]["kind"].update(maxLength=3),
    "answer's field": lambda one: _schema(one, "Answer")["properties"].pop("note"),
    "answer's field may be missing": lambda one: _schema(one, "Answer")["required"].clear(),
    "answer's type": lambda one: _schema(one, "Answer")["properties"]["id"].update(type="integer"),
    "answer may be null": lambda one: _schema(one, "Answer")["properties"].update(
        note={"anyOf": [{"type": "string"}, {"type": "null"}]}
    ),
    "answer's items": lambda one: _schema(one, "Answer")["properties"]["items"].update(
        items={"type": "string"}
    ),
}
FINE = {
    "nothing": lambda one: None,
    "a new path": lambda one: one["paths"].update({"/more": {}}),
    "a new status": lambda one: _operation(one)["responses"].update({"429": {}}),
    "a new field that may be left out": lambda one: _schema(one, "Body")["properties"].update(
        new={"type": "string"}
    ),
    "a field that need no longer be sent": lambda one: _schema(one, "Body")["required"].clear(),
    "one more of an enum": lambda one: _schema(one, "Body")["properties"]["kind"]["enum"].append(
        "c"
    ),
    "one more type": lambda one: _schema(one, "Body")["properties"]["text"]["anyOf"].append(
        {"type": "null"}
    ),
    "a wider bound": lambda one: _operation(one)["parameters"][1]["schema"].update(maximum=10),
    "a new field of the answer": lambda one: _schema(one, "Answer")["properties"].update(
        more={"type": "string"}
    ),
    "a field that is always sent": lambda one: _schema(one, "Answer")["required"].append("note"),
    "fewer values in the answer": lambda one: _schema(one, "Answer")["properties"]["note"].update(
        enum=["x"]
    ),
}


@pytest.mark.parametrize("change", BREAKING)
def test_a_breaking_change_is_found_unless_the_major_version_says_so(change):
    old, new = small(), copy.deepcopy(small())
    BREAKING[change](new)
    assert breaking(old, new)
    new["info"]["version"] = "2.0.0"
    assert breaking(old, new) == []


@pytest.mark.parametrize("change", FINE)
def test_what_breaks_nobody_passes(change):
    new = copy.deepcopy(small())
    FINE[change](new)
    assert breaking(small(), new) == []
