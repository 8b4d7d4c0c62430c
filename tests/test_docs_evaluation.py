"""docs/evaluation.md says what the code says: names, fields, commands, examples."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from reasonembed.cli import app
from reasonembed.config import SystemConfig, validated
from reasonembed.evaluation.datasets import BENCHMARKS, PYTHON_STDLIB
from reasonembed.evaluation.metrics import CUTOFFS
from reasonembed.evaluation.protocols import PROTOCOLS
from reasonembed.evaluation.results import (
    FORMAT,
    RUN_PROTOCOL,
    Result,
    provenance,
    result_dir,
    write_result,
)
from reasonembed.report.benchmark import MAX_LISTS
from reasonembed.systems.catalogue import system_names
from tests.evaluation.results_of import result_of
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


def test_the_comparisons_shown_are_comparisons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bm25", "all-minilm-l6-v2-short"):
        folder = result_dir(
            Path("results"), protocol="bright", collection="python-stdlib", system=name
        )
        write_result(result_of([0.1, 0.2], system=name, **ON_STDLIB), folder)
    for seed, run in enumerate(("quickstart", "s1", "s2", "s3")):
        place = Path("runs", run)
        for name in ("bm25", "before", "after"):
            own = result_of(
                [0.1, 0.2],
                system=name,
                protocol=RUN_PROTOCOL,
                seed=seed if name == "after" else None,
                **ON_STDLIB,
            )
            write_result(own, place / "evaluate" / name)
        (place / "config.resolved.yaml").touch()
    block = section("Comparing systems").split("```")[1]
    lines = re.findall(r"^reasonembed (evaluate (?:compare|leaderboard) .*)$", block, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == 0, (line, done.exception)


ON_STDLIB = {"collection": "python-stdlib", "benchmark": "python-stdlib"}


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_and_option_shown_exists(line):
    command, words = get_command(app), line.replace("[", "").replace("]", "").split()
    while words and words[0] in getattr(command, "commands", ()):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
