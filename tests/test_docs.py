"""The pages under docs/ say what the code says: fields, columns, examples, links."""

import re
import typing
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from pydantic import BaseModel

from reasonembed import config
from reasonembed.schemas import ARTIFACTS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


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


def nested(annotation):
    """The configuration classes inside an annotation, and what each adds to the path."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")  # one of several classes
        return [(annotation, f": {{kind: {typing.get_args(kind.annotation)[0]}}}" if kind else "")]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return [(model, f".<name>{suffix}") for model, suffix in nested(arguments[1])]
    if origin is tuple:
        return [(model, f"[]{suffix}") for model, suffix in nested(arguments[0])]
    if origin is typing.Annotated:
        return nested(arguments[0])
    return [found for argument in arguments for found in nested(argument)]


def sections(model=config.RunConfig, path=""):
    """Every section of a configuration: its path and its class."""
    yield path, model
    above = path.partition(": ")[0]
    for name, field in model.model_fields.items():
        for inner, suffix in nested(field.annotation):
            yield from sections(inner, f"{above}.{name}{suffix}".lstrip("."))


SECTIONS = dict(sections()) | {
    "benchmark": config.BenchmarkConfig,
    "system": config.SystemConfig,
    "system.retrieve: {kind: hybrid}": config.HybridRetriever,
    "system.rerank": config.RerankConfig,
    "serve": config.ServeConfig,
    "serve.echo": config.EchoConfig,
    "index": config.IndexConfig,
}


def own_fields(model):
    """Its fields but for those of a class that is a section itself: they are described there."""
    above = {
        name for base in model.__bases__ if base in SECTIONS.values() for name in base.model_fields
    }
    return [name for name in model.model_fields if name not in above]


def documented():
    """Rows by path of section, as docs/configuration.md has them."""
    found = {}
    for names, heading, rows in tables(text("configuration.md")):
        # Tables of another width say other things than fields.
        fields = [row for row in rows if len(row) == 4]
        for path in [""] if heading == "Top level" else names if fields else []:
            assert path not in found, f"{path} is documented twice"
            found[path] = fields
    return found


def facts(schema):
    """What a field's type cell must say: its bounds and its choices."""
    for key, value in schema.items():
        if key in BOUNDS:
            yield f"{BOUNDS[key]} {value:g}"
        elif key == "enum":
            yield from (f"`{choice}`" for choice in value)
        elif key == "anyOf":
            for option in value:
                yield from facts(option)
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            yield from facts(value)
        elif (key, value) == ("type", "null"):
            yield "null"


def default_of(field):
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [
            item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value
        ]
    return value


def test_every_section_and_no_other_is_documented():
    assert set(documented()) == set(SECTIONS)


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path or "top level")
def test_every_field_of_a_section_and_no_other_is_documented(path):
    names = [row[0].strip("`") for row in documented()[path]]
    assert names == own_fields(SECTIONS[path])


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path or "top level")
def test_types_ranges_and_defaults_are_those_of_the_code(path):
    model = SECTIONS[path]
    schema = model.model_json_schema()["properties"]
    for name, kind, default, _ in documented()[path]:
        field = model.model_fields[name.strip("`")]
        for fact in facts(schema[name.strip("`")]):
            # "> 0" must not be found in "≥ 0", nor "1" in "10".
            assert re.search(rf"(?<!\S){re.escape(fact)}(?![\w.])", kind), (name, fact)
        if field.is_required():
            assert default == "required", name
            continue
        said = yaml.safe_load(default.strip("`"))
        wanted = default_of(field)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            # A section says where it differs from its type's own defaults.
            said = field.annotation(**said).model_dump(mode="json")
        assert said == wanted, name


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
