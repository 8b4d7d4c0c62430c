"""docs/serving.md says what the code says: commands, routes, bodies, metrics, codes, numbers."""

import ast
import json
import re
from pathlib import Path

import jsonschema
import pytest
from typer.main import get_command

from reasonembed.cli import app
from reasonembed.config import LimitsConfig
from reasonembed.serving.admission import _FULL_TOKENS, MIN_TEXT_TOKENS
from reasonembed.serving.backend import _CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.queueing import _MAX_RATIO
from reasonembed.serving.routes.mcp import PATH
from reasonembed.serving.service import _CALL_INPUTS, _CALL_TOKENS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
API = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
ROUTES = {f"{method.upper()} {path}" for path, of in API["paths"].items() for method in of}


def section(title):
    return re.split(r"\n##+ ", TEXT.split(f" {title}\n")[1])[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands():
    for block in blocks(TEXT, ""):
        yield from re.findall(r"^reasonembed (.*?)(?:\s{2,}#.*)?$", block, re.MULTILINE)
    yield from re.findall(r"`reasonembed ((?:serve|index|keys) [^`|]*)`", TEXT)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_and_option_shown_exists(line):
    command, words = get_command(app), line.split()
    while words and words[0] in getattr(command, "commands", ()):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_route_stands_in_the_table_and_no_other():
    table = TEXT.split("| route | form |\n")[1].split("\n\n")[0]
    shown = set(re.findall(r"`((?:GET|POST) [^`]+)`", table))
    pages = {"GET /", "GET /docs", "GET /openapi.json"}
    assert shown == ROUTES | pages
    assert f"`{PATH}`" in table


@pytest.mark.parametrize("text", [TEXT, README], ids=["serving.md", "README.md"])
def test_bodies_shown_are_taken(text):
    curls = re.findall(r"curl localhost:8000(\S+) .*? -d '(\{.*?\})'", text, re.DOTALL)
    assert curls
    for path, body in curls:
        content = API["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = {**content["schema"], "components": API["components"]}
        jsonschema.Draft202012Validator(schema).validate(json.loads(body))


@pytest.mark.parametrize("block", blocks(TEXT, "python") + blocks(README, "python"))
def test_programs_shown_are_python(block):
    ast.parse(block)


def test_every_metric_stands_there_and_no_other():
    made = {family.name for family in Metrics().registry.collect()}
    shown = re.findall(r"`(reasonembed_[a-z_]+)`", section("Log and metrics"))
    assert {re.sub("_(total|info)$", "", name) for name in shown} == made


def test_every_code_of_an_error_stands_there_and_no_other():
    sources = [path.read_text("utf-8") for path in (ROOT / "reasonembed/serving").rglob("*.py")]
    raised = {code for text in sources for code in re.findall(r'\bcode="([a-z_]+)"', text)}
    rows = [line for line in section("Errors").splitlines() if re.match(r"\| \d", line)]
    assert {
        code for row in rows for code in re.findall(r"`([a-z_]+)`", row.split("|")[3])
    } == raised


def test_every_file_of_the_service_and_setting_named_is_there():
    for path in re.findall(r"`((?:configs|cluster|docs)/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path
    for name in set(LimitsConfig.model_fields) & set(re.findall(r"`([a-z_]+)`", TEXT)):
        assert f"| `{name}` |" in CONFIGURATION


def test_numbers_are_those_of_the_code():
    assert f"at most {_CALL_TOKENS:,} tokens and {_CALL_INPUTS} texts" in TEXT
    assert f"at least {MIN_TEXT_TOKENS};" in TEXT
    assert f"at least {_FULL_TOKENS:,} tokens" in TEXT
    assert f"at most {_MAX_RATIO} times the shortest" in TEXT
    assert f"{_CPU_BATCH_TOKENS:,} on CPUs, {_GPU_BATCH_TOKENS:,} on GPUs" in CONFIGURATION
