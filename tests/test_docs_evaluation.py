"""docs/evaluation.md says what the code says: names, fields, commands, examples."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from reasonembed.cli import app
from reasonembed.config import SystemConfig, validated
from reasonembed.evaluation.datasets import BENCHMARKS, PYTHON_STDLIB
from reasonembed.evaluation.metrics import CUTOFFS
from reasonembed.evaluation.protocols import PROTOCOLS
from reasonembed.evaluation.results import FORMAT, Result, provenance
from reasonembed.report.benchmark import MAX_LISTS
from reasonembed.systems.catalogue import system_names
from tests.report.small_results import collection

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text):
    """Names in backticks in the first column of a section's tables."""
    rows = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return [name for cell in rows for name in re.findall(r"`([^`]+)`", cell)]


def test_every_protocol_stands_there_with_its_rules():
    rows = {
        line.split("|")[1].strip(" `"): line
        for line in section("Protocols").splitlines()
        if line.startswith("| `")
    }
    assert set(rows) == set(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        assert ("masked before" in rows[name]) == (protocol.exclusion == "before")
        assert f"{protocol.depth:,}" in rows[name]
        assert all(f"{tokens:,}" in rows[name] for tokens in protocol.max_tokens.values())


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
def test_no_place_waits_for_its_output(page):
    assert "<!-- output -->" not in page.read_text(encoding="utf-8")


def test_every_benchmark_can_be_found():
    named = {name.split(":")[0] for name in first_cells(section("Collections"))}
    assert named == {*BENCHMARKS, PYTHON_STDLIB, "trec"}


def test_every_system_of_the_catalogue_stands_there_once():
    named = first_cells(section("Systems").split("\n### ")[0])
    assert sorted(named) == system_names()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_every_system_shown_is_one(block):
    validated(SystemConfig, yaml.safe_load(block), where=block)


def test_every_field_of_a_result_is_explained():
    named = first_cells(section("The result file"))
    fields = {field.name for field in dataclasses.fields(Result)}
    made = provenance(collection(), corpus="")
    assert {"format", *fields} <= set(named)
    assert {f"provenance.{name}" for name in made} <= set(named)
    assert FORMAT in TEXT


def test_numbers_are_those_of_the_code():
    assert f"at most {MAX_LISTS:,} lists" in TEXT
    *first, last = CUTOFFS
    assert f"at {', '.join(map(str, first))} and {last}" in TEXT


def commands():
    for page in (TEXT, README):
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
            if language:
                continue
            yield from re.findall(r"^reasonembed (.*?)(?:\s{2,}.*|\s+#.*)?$", block, re.MULTILINE)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_and_option_shown_exists(line):
    command, words = get_command(app), line.replace("[", "").replace("]", "").split()
    while words and words[0] in getattr(command, "commands", ()):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
