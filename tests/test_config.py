from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.config import (
    AnnotateConfig,
    SamplingConfig,
    fingerprint,
    flatten,
    load,
    parse,
)
from reasonembed.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SCRIPTED = {"model": "scripted", "engine": "scripted"}


def minimal():
    return {
        "run_dir": "runs/test",
        "corpus": {"source": "python-stdlib", "task": "python-stdlib"},
        "generate": {"llm": dict(SCRIPTED)},
        "mine": {"encoder": {"model": "miner"}},
        "annotate": {"llm": dict(SCRIPTED)},
        "rewrite": {"llm": dict(SCRIPTED)},
        "train": {"encoder": {"model": "backbone"}},
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal()), encoding="utf-8")
    return path


def test_configurations_ship():
    assert CONFIGS, "configs/ holds no *.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_that_ships_loads(path):
    config = load(path)
    # Written beside the artifacts and read again, it is still the same.
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse(again, where="again") == config


def test_imported_samples_need_no_section_that_makes_samples():
    data = {name: minimal()[name] for name in ("run_dir", "corpus", "train")}
    with pytest.raises(ConfigError, match="generate: Field required"):
        parse(data, where="test")
    config = parse(data | {"assemble": {"sources": [{"path": "other"}]}}, where="test")
    assert config.mine.encoder == config.train.encoder
    own = {"mine": {"encoder": {"model": "miner"}}, "assemble": {"sources": [{"path": "other"}]}}
    assert parse(data | own, where="test").mine.encoder.model == "miner"


def test_defaults_fill_in(file):
    config = load(file)
    assert config.train.temperature == 0.02
    assert config.annotate.sampling == AnnotateConfig.model_fields["sampling"].default


@pytest.mark.parametrize(
    ("override", "lines"),
    [
        ("trian.epochs=2", ["trian: unknown key; see docs/configuration.md"]),
        ("train.lora.rnak=2", ["train.lora.rnak: unknown key"]),
        ("train.epochs=0", ["train.epochs: Input should be greater than 0 (given: 0)"]),
        ("generate.sampling.top_p=1.5", ["generate.sampling.top_p: ", "(given: 1.5)"]),
        ("generate.sampling.top_k=-2", ["generate.sampling.top_k: ", "(given: -2)"]),
        (
            "annotate.label_from=guess",
            ["annotate.label_from: ", "'written' or 'expected'", "'guess'"],
        ),
        ("train.learning_rate=.inf", ["train.learning_rate: ", "finite number"]),
        ("train.learning_rate=.nan", ["train.learning_rate: "]),
        ("plan.education_levels={phd: 0}", ["plan.education_levels.phd: ", "(given: 0)"]),
        ("plan.lengths=[{min_words: 1, max_words: 0}]", ["plan.lengths.0.max_words: "]),
        ("corpus.task=biologie", ["corpus.task 'biologie' is unknown", "biology, "]),
        ("corpus.source=", ["corpus.source: Input should be a valid string"]),
        ("runtime.serve.port=70000", ["runtime.serve.port: ", "(given: 70000)"]),
        # Rules across fields name both values.
        (
            "annotate={llm: {model: m}, samples: 3, sampling: {temperature: 0}}",
            ["annotate: ", "samples 3 at temperature 0"],
        ),
        ("train.task_batches={x: {batch_queries: 8, group_size: 2}}", ["'x' is no task"]),
        ("plan.min_chars=6000", ["plan: ", "min_chars 6000 > max_chars 5000"]),
        ("plan.lengths=[{min_words: 9, max_words: 3}]", ["plan: ", "length bucket 9..3 is empty"]),
        ("plan.lengths=[]", ["plan: ", "at least one"]),
        ("assemble.negative_max=3", ["assemble: ", "negative_max 3", "positive_min 3"]),
        ("assemble.rule=rank", ["rule 'rank'", "label_from is 'written'", "'expected'"]),
        ("runtime.train.max_failures=-2", ["runtime.train.max_failures: ", "(given: -2)"]),
        ("runtime.train.num_workers=65", ["batch_queries 64", "num_workers 65"]),
        ("mine.max_source_rank=101", ["mine: ", "max_source_rank 101", "top_k 100"]),
        ("runtime.annotate.min_actors=4", ["runtime.annotate: ", "min_actors 4 > max_actors 1"]),
    ],
)
def test_a_mistake_is_named_with_its_path_and_value(file, override, lines):
    with pytest.raises(ConfigError) as caught:
        load(file, overrides=[override])
    message = str(caught.value)
    assert message.startswith(f"{file}:\n")
    for line in lines:
        assert line in message


def test_the_paper_s_scale_needs_a_fixed_number_of_workers(file):
    both = ["train.gradient_scale=paper", "runtime.train={num_workers: 4, min_workers: 2}"]
    assert load(file, overrides=both[:1]).train.gradient_scale == "paper"
    with pytest.raises(ConfigError, match=r"gradient_scale 'paper'.*runtime\.train\.min_workers"):
        load(file, overrides=both)


def test_training_in_float16_is_refused_but_mining_is_not(file):
    assert load(file, overrides=["mine.encoder.dtype=float16"]).mine.encoder.dtype == "float16"
    for dtype in ("bfloat16", "float32"):
        assert load(file, overrides=[f"train.encoder.dtype={dtype}"]).train.encoder.dtype == dtype
    with pytest.raises(ConfigError, match=r"train: .*'float16'.*use 'bfloat16' or 'float32'"):
        load(file, overrides=["train.encoder.dtype=float16"])


def test_all_mistakes_are_named_at_once(file):
    with pytest.raises(ConfigError) as caught:
        load(file, overrides=["train.epochs=0", "mine.top_k=0", "nonsense=1"])
    for path in ("train.epochs", "mine.top_k", "nonsense"):
        assert f"  {path}: " in str(caught.value)


def test_a_missing_section_is_named(tmp_path):
    data = minimal()
    del data["train"]["encoder"]["model"], data["corpus"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)corpus: Field required.*train\.encoder\.model: Fi"):
        load(path)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("run_dir=/elsewhere", ("run_dir",), "/elsewhere"),
        ("train.learning_rate=3.0e-4", ("train", "learning_rate"), 3e-4),
        ("train.masks=[known_positives]", ("train", "masks"), ("known_positives",)),
        ("train.intensity_cap=.inf", ("train", "intensity_cap"), float("inf")),
        ("train.max_steps=null", ("train", "max_steps"), None),
        ("train.lora={rank: 8, alpha: 16}", ("train", "lora", "rank"), 8),
        ("plan.education_levels={phd: 1}", ("plan", "education_levels"), {"phd": 1.0}),
        ("runtime.train.num_workers=2", ("runtime", "train", "num_workers"), 2),
        (
            "mine.encoder.query_template=a={query}",
            ("mine", "encoder", "query_template"),
            "a={query}",
        ),
    ],
)
def test_overrides_are_yaml_at_any_depth(file, override, path, value):
    found = load(file, overrides=[override])
    for name in path:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_counts_and_the_file_stays(file):
    before = file.read_text()
    config = load(file, overrides=["train.epochs=3", "train.epochs=4", "train.group_size=8"])
    assert (config.train.epochs, config.train.group_size) == (4, 8)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "expected KEY.KEY=VALUE"),
        ("=3", "expected KEY.KEY=VALUE"),
        ("", "expected KEY.KEY=VALUE"),
        ("run_dir.deep=1", "'run_dir' is a value, not a section"),
        ("train.epochs=[1", "the value is not YAML"),
    ],
)
def test_malformed_overrides_are_refused(file, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(file, overrides=[override])
    assert repr(override) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not YAML"),
        (b"\xff\xfe", "is not YAML"),
        (b"- a\n- b", "must hold a mapping, it holds list"),
        (b"", "must hold a mapping, it holds NoneType"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file at .*gone\.yaml"):
        load(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("generate.sampling.max_tokens=9", ("generate", "sampling")),
        ("annotate.sampling.max_tokens=9", ("annotate", "sampling")),
        ("rewrite.sampling.max_tokens=9", ("rewrite", "sampling")),
        ("runtime.embed.max_actors=9", ("runtime", "embed")),
        ("runtime.annotate.max_actors=9", ("runtime", "annotate")),
    ],
)
def test_a_section_given_in_part_keeps_its_own_other_defaults(file, override, section):
    untouched, changed = load(file), load(file, overrides=[override])
    for name in section:
        untouched, changed = getattr(untouched, name), getattr(changed, name)
    key = override.partition("=")[0].rpartition(".")[2]
    assert changed == untouched.model_copy(update={key: 9})


def test_a_configuration_cannot_be_changed_in_place():
    config = parse(minimal(), where="test")
    with pytest.raises(ValueError, match="frozen"):
        config.run_dir = "elsewhere"


def test_flatten_joins_keys_and_keeps_lists_whole():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [{"f": 1}]}) == {
        "a.b": 1,
        "a.c.d": None,
        "e": [{"f": 1}],
    }
    assert flatten(SamplingConfig(top_k=3), prefix="s")["s.top_k"] == 3


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.text(), values, max_size=5), st.randoms(use_true_random=False))
def test_a_fingerprint_does_not_depend_on_order(identity, rng):
    items = list(identity.items())
    rng.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(identity)


def test_fingerprints_tell_values_apart_and_stay_what_they_are():
    assert fingerprint({"a": 1}) == "d0b970de6740691aa906909481c490c8"
    assert len({fingerprint({"a": value}) for value in (1, 1.5, "1", True, None, [1])}) == 6
