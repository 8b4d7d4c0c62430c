"""The pages under docs/ say what the code says: fields, columns, examples, links."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pytest
import yaml
from pydantic import BaseModel, Field

from docs.configuration_tables import (
    SECTIONS,
    default_of,
    kind_of,
    paths_of,
    rewritten,
)
from reasonembed import config
from reasonembed.schemas import ARTIFACTS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def text(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def tables(page):
    """(names in backticks of the heading, heading, rows of the tables below it)."""
    for part in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| `")]
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        rows = [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]
        yield re.findall(r"`([^`]+)`", heading), heading, rows


def headings():
    """The sections that docs/configuration.md has, by its headings over tables of fields."""
    for _, heading, rows in tables(text("configuration.md")):
        if any(len(row) == 4 for row in rows):
            yield from paths_of(heading)


def test_every_section_and_no_other_is_documented():
    assert sorted(headings()) == sorted(SECTIONS)


def test_tables_of_the_configuration_are_those_of_its_classes():
    page = text("configuration.md")
    assert rewritten(page) == page, "run python -m docs.configuration_tables"


class _Inner(BaseModel):
    size: Annotated[int, Field(gt=0)] = 1


class _Outer(BaseModel):
    name: str
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    small: float = 1e-6
    inner: _Inner = _Inner(size=2)
    many: tuple[_Inner, ...] = ()
    which: Literal["a", "b"] | int = "a"
    text: str = "{a}: b"


def test_types_ranges_and_defaults_as_tables_say_them():
    fields = _Outer.model_fields.values()
    assert [(kind_of(one.annotation, tuple(one.metadata)), default_of(one)) for one in fields] == [
        ("string", "required"),
        ("number ≥ 0, ≤ 1 or null", "`null`"),
        ("number", "`1.0e-06`"),
        ("section", "`{size: 2}`"),
        ("list of sections", "`[]`"),
        ("one of `a`, `b` or integer", "`a`"),
        ("string", '`"{a}: b"`'),
    ]


def yaml_blocks():
    return re.findall(r"```yaml\n(.*?)```", text("configuration.md"), re.DOTALL)


def merged(base, patch):
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return patch
    return base | {key: merged(base.get(key), value) for key, value in patch.items()}


def test_every_example_loads():
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text("utf-8"))
    assert len(yaml_blocks()) == 4
    for block in yaml_blocks():
        example = yaml.safe_load(block)
        whole = example if "run_dir" in example else merged(quickstart, example)
        config.parse(whole, where=block)


def test_overrides_shown_are_taken():
    shown = re.findall(r"--set (?:'([^']+)'|([^\s`'…]+))", text("configuration.md"))
    overrides = [quoted or plain for quoted, plain in shown]
    overrides = [one for one in overrides if not one.startswith("KEY")]
    assert len(overrides) == 7
    for one in overrides:
        config.load(ROOT / "configs" / "quickstart.yaml", overrides=[one])


def test_an_override_changes_the_place_that_it_names_and_no_alias_of_it():
    quickstart = ROOT / "configs" / "quickstart.yaml"
    changed = config.load(quickstart, overrides=["annotate.llm.model=other"])
    assert (changed.annotate.llm.model, changed.generate.llm.model) == (
        "other",
        "smollm2-135m-instruct",
    )
    assert changed.annotate.llm.max_model_len == changed.generate.llm.max_model_len


def test_every_column_of_every_artifact_and_no_other_is_documented():
    found = {}
    for names, _, rows in tables(text("artifacts.md")):
        for kind in set(names) & set(ARTIFACTS):
            columns = [row for row in rows if len(row) == 4]
            found.setdefault(kind, []).extend(
                (name.strip("`"), column_type, null) for name, column_type, null, _ in columns
            )
    for kind, artifact in ARTIFACTS.items():
        wanted = [
            (field.name, _type_name(field.type), "yes" if field.nullable else "")
            for field in artifact.schema
        ]
        assert sorted(found[kind]) == sorted(wanted), kind


def _type_name(kind):
    if pa.types.is_list(kind):
        return f"list of {_type_name(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else str(kind).replace("float", "float32")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
