import contextlib
import json
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import reasonembed.embedder.vectors as vectors_module
import reasonembed.run as run_module
from reasonembed.artifacts import StageDirectory
from reasonembed.config import (
    LengthBucket,
    RunConfig,
    RuntimeConfig,
    SampleSource,
    flatten,
    load,
    parse,
)
from reasonembed.errors import ConfigError, DriftError, Interrupted
from reasonembed.remixer.answers import prompt_template
from reasonembed.run import STAGES, Run

SCRIPTED = {"model": "scripted", "engine": "scripted"}
IDENTIFIED = [stage for stage in STAGES if stage != "embed"]  # its identity is its encoder's


def config(run_dir="runs/test", *, engine="scripted", models="models"):
    llm = {"model": f"{models}/llm", "engine": engine}
    return parse(
        {
            "run_dir": str(run_dir),
            "corpus": {"source": "python-stdlib", "task": "python-stdlib"},
            "filter": {"llm": llm},
            "generate": {"llm": llm},
            "mine": {"encoder": {"model": f"{models}/miner"}},
            "annotate": {"llm": llm, "audit_queries": 3},
            "rewrite": {"llm": llm},
            "train": {"encoder": {"model": f"{models}/backbone"}},
        },
        where="test",
    )


def set_weights(monkeypatch, **functions):
    """Wherever they are looked up: of LLMs by a run, of encoders by their vectors."""
    for name, function in functions.items():
        for module in (run_module, vectors_module):
            monkeypatch.setattr(module, name, function)


@pytest.fixture(autouse=True)
def fake_weights(monkeypatch):
    """Weights are wherever the cache is, and are told apart by name, as content would."""

    def resolve(name, *, cache_dir=None):
        return Path(cache_dir or "/default") / Path(name).name

    set_weights(
        monkeypatch,
        resolve=resolve,
        weights_fingerprint=lambda path: f"weights of {path.name}",
    )


def identities(configuration):
    run = Run(configuration)
    return {stage: run.identity(stage) for stage in IDENTIFIED}


def leaves(model, path=()):
    """Path, type and value of every setting below a configuration."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), field.annotation, value


def replace_leaf(model, path, value):
    name, *rest = path
    if rest:
        value = replace_leaf(getattr(model, name), rest, value)
    return model.model_copy(update={name: value})


def another(annotation, value):
    """Another value for a setting."""
    choices = [choice for choice in typing.get_args(annotation) if choice is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        return (*value, LengthBucket(min_words=1, max_words=2))
    if isinstance(value, dict):
        return value | {"another": 1}
    assert value is None, (annotation, value)
    return "x" if str in choices else 7


CONFIG = config()
RUNTIME = [path for path, _, _ in leaves(RuntimeConfig())]
RESULT = {
    path: another(annotation, value)
    for path, annotation, value in leaves(CONFIG)
    if path[0] not in ("runtime", "run_dir", "tasks", "report", "distill")
} | {("corpus", "task"): "biology"}
del RESULT[("evaluate", "collection")]  # needs a folder, and has its own test
del RESULT[("assemble", "sources")]  # likewise
GATES = {path: value for path, value in RESULT.items() if path[-1] == "max_failed_share"}


def test_the_settings_are_found():
    assert ("engine", "max_num_seqs") in RUNTIME
    assert RESULT[("train", "lora", "rank")] == 33
    assert len(GATES) == 4


@pytest.mark.parametrize("engine", ["scripted", "vllm"])
def test_no_setting_under_runtime_changes_any_identity(engine):
    base = config(engine=engine)
    before = identities(base)
    for path, annotation, value in leaves(base.runtime, ("runtime",)):
        changed = replace_leaf(base, path, another(annotation, value))
        assert changed != base, path
        assert identities(changed) == before, path


@settings(max_examples=20)
@given(st.sets(st.sampled_from(RUNTIME)))
def test_nor_do_several_at_once(paths):
    changed = CONFIG
    for path, annotation, value in leaves(CONFIG.runtime, ("runtime",)):
        if path[1:] in paths:
            changed = replace_leaf(changed, path, another(annotation, value))
    assert identities(changed) == identities(CONFIG)


def test_the_place_of_a_run_and_of_weights_changes_no_identity(tmp_path):
    here = config(tmp_path / "here", engine="vllm", models="a/place")
    there = config(tmp_path / "there", engine="vllm", models="another/place")
    llm_paths = {f"{stage}.llm.model" for stage in ("filter", "generate", "annotate", "rewrite")}
    for stage in IDENTIFIED:
        one, two = Run(here).identity(stage), Run(there).identity(stage)
        assert {key for key in one if one[key] != two[key]} <= llm_paths


OWN_STAGE = {"annotate": {"annotate", "audit"}, "evaluate": {"evaluate"}}


@pytest.mark.parametrize("path", sorted(set(RESULT) - set(GATES)), ids=".".join)
def test_every_setting_that_decides_a_result_changes_its_identity(path):
    changed = replace_leaf(CONFIG, path, RESULT[path])
    before, after = identities(CONFIG), identities(changed)
    differ = {stage for stage in IDENTIFIED if before[stage] != after[stage]}
    stage = path[0]
    if path == ("annotate", "audit_queries"):
        assert differ == set()  # a longer audit adds rows, it changes none
    elif path == ("filter", "min_probability"):
        assert differ == {"plan"}  # the probabilities stay
    elif path == ("mine", "max_source_rank"):
        assert differ == {"assemble"}  # so do the ranks
    elif path[:2] == ("evaluate", "instruction"):
        assert {"export", "audit"} <= differ  # it travels with the model and chooses pairs
    else:
        assert OWN_STAGE.get(stage, {stage}) <= differ


def test_another_collection_changes_what_hangs_on_it(tmp_path):
    def folder(name, *, gold="d1", text="why"):
        place = tmp_path / name
        (place / "qrels").mkdir(parents=True)
        (place / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": text}))
        (place / "qrels" / "test.tsv").write_text(f"q\t{gold}\t1\n")
        return identities(replace_leaf(CONFIG, ("evaluate", "collection"), str(place)))

    def changed(other):
        return {stage for stage in IDENTIFIED if other[stage] != base[stage]}

    base = folder("base")
    # Gold documents are held out of the seeds; other words of a query concern who answers it only.
    assert changed(folder("gold", gold="d2")) == {"plan", "audit", "evaluate"}
    assert changed(folder("text", text="how")) == {"audit", "evaluate"}


@pytest.mark.parametrize("path", sorted(GATES), ids=".".join)
def test_a_gate_changes_no_identity(path):
    assert identities(replace_leaf(CONFIG, path, GATES[path])) == identities(CONFIG)


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ("llm", {"filter", "generate", "annotate", "audit", "rewrite"}),
        ("miner", {"mine", "audit"}),
        ("backbone", {"train"}),
    ],
)
def test_other_weights_under_the_same_name_are_another_identity(monkeypatch, changed, stages):
    base = config(engine="vllm")
    before = identities(base)
    set_weights(
        monkeypatch,
        weights_fingerprint=lambda path: (
            f"weights of {path.name}" + ("!" if path.name == changed else "")
        ),
    )
    after = identities(base)
    assert {stage for stage in IDENTIFIED if before[stage] != after[stage]} == stages


def test_another_prompt_is_another_identity(monkeypatch):
    before = identities(CONFIG)
    names = ("filter", "generate", "annotate", "rewrite")
    texts = {name: prompt_template(name).template for name in names}
    texts["annotate"] += " "
    monkeypatch.setattr(run_module, "prompt_fingerprint", lambda name: texts[name])
    after = identities(CONFIG)
    assert before["annotate"]["prompt"] != after["annotate"]["prompt"]
    chosen = replace_leaf(CONFIG, ("generate", "prompt"), "generate-short")
    monkeypatch.undo()
    set_weights(monkeypatch, resolve=lambda name, cache_dir: Path(name), weights_fingerprint=str)
    assert Run(chosen).identity("generate")["prompt"] != before["generate"]["prompt"]


def test_the_words_of_the_task_are_part_of_what_is_asked():
    other = replace_leaf(CONFIG, ("corpus", "task"), "biology")
    for stage in ("filter", "generate", "annotate", "rewrite"):
        assert Run(other).identity(stage)["task"] != Run(CONFIG).identity(stage)["task"]


def test_identities_are_flat_and_survive_json():
    for identity in identities(CONFIG).values():
        assert json.loads(json.dumps(identity)) == identity
        assert not any(isinstance(value, dict) for value in identity.values())


class TestInputs:
    def test_another_input_is_another_identity(self, tmp_path):
        run = Run(config(tmp_path))
        before = run.identity("plan")
        assert before["input.corpus"] == "(not made yet)"
        run.begin("corpus", run.artifact("corpus"))
        after = run.identity("plan")
        assert after["input.corpus"] == run.artifact("corpus").stage().fingerprint
        assert run.identity("plan") == after

    def test_a_stage_begins_once_for_a_configuration(self, tmp_path):
        run = Run(config(tmp_path))
        corpus = run.artifact("corpus")
        run.begin("corpus", corpus)
        corpus.finish({})
        changed = Run(replace_leaf(run.config, ("corpus", "limit"), 10))
        with pytest.raises(DriftError, match=r"corpus\.limit: made with None, now 10"):
            changed.begin("corpus", changed.artifact("corpus"))

    def test_stale_says_what_would_not_be_made_the_same_way(self, tmp_path):
        run = Run(config(tmp_path))
        assert run.stale() == {}
        run.begin("corpus", run.artifact("corpus"))
        run.begin("plan", run.artifact("seeds"))
        assert run.stale() == {}
        changed = Run(replace_leaf(run.config, ("plan", "variants"), 2))
        assert changed.stale() == {"plan": ["plan.variants: made with 1, now 2"]}

    def test_a_corpus_file_is_known_by_its_content(self, tmp_path):
        file = tmp_path / "corpus.jsonl"
        file.write_text('{"id": "a", "text": "x"}\n')
        run = Run(replace_leaf(CONFIG, ("corpus", "source"), str(file)))
        before = run.identity("corpus")["source.content"]
        by_folder = Run(replace_leaf(CONFIG, ("corpus", "source"), str(tmp_path)))
        assert by_folder.identity("corpus")["source.content"] == before
        file.write_text('{"id": "a", "text": "y"}\n')
        assert run.identity("corpus")["source.content"] != before


class TestDirectory:
    def test_a_run_is_found_again_with_its_configuration(self, tmp_path):
        run = Run(config(tmp_path))
        run.save_config()
        assert Run.existing(tmp_path).config == run.config

    def test_a_run_that_was_moved_lives_where_it_is_now(self, tmp_path):
        old, new = tmp_path / "old", tmp_path / "new"
        old.mkdir()
        Run(config(old)).save_config()
        old.rename(new)
        assert Run.existing(new).dir == new

    def test_a_folder_without_a_run_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=f"{tmp_path} holds no run"):
            Run.existing(tmp_path)

    def test_a_saved_configuration_with_an_unknown_key_is_refused(self, tmp_path):
        (tmp_path / "config.resolved.yaml").write_text("nonsense: 1\n")
        with pytest.raises(ConfigError, match="nonsense: unknown key"):
            Run.existing(tmp_path)

    def test_discard_takes_a_stage_and_all_after_it(self, tmp_path):
        run = Run(config(tmp_path))
        for kind, stage in (("corpus", "corpus"), ("seeds", "plan"), ("queries", "generate")):
            run.begin(stage, run.artifact(kind))
        vectors = run.vectors(run.config.mine.encoder, dimension=2)
        vectors.begin({})
        directory = run.directory("train")
        directory.begin({})
        run.discard_from("plan")
        assert run.artifact("corpus").stage() is not None
        for output in (run.artifact("seeds"), run.artifact("queries"), directory):
            assert output.stage() is None
        assert vectors.stage() is not None, "vectors are never stale"

    def test_a_discard_that_is_killed_leaves_nothing_made_from_what_is_gone(
        self, tmp_path, monkeypatch
    ):
        kinds = ("seeds", "queries", "candidates", "judgments", "rewrites", "samples")
        for survivors in range(len(kinds)):
            run = Run(config(tmp_path / str(survivors)))
            for kind in kinds:
                run.artifact(kind).begin({"kind": kind})
            left = [len(kinds) - survivors]

            def discard(self, left=left, real=StageDirectory.discard):
                if self.stage() is not None:
                    if left[0] == 0:
                        raise KeyboardInterrupt
                    left[0] -= 1
                real(self)

            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(StageDirectory, "discard", discard)
                run.discard_from("plan")
            alive = [run.artifact(kind).stage() is not None for kind in kinds]
            assert alive == sorted(alive, reverse=True), "a later stage outlived an earlier one"

    def test_every_stage_has_an_output(self, tmp_path):
        run = Run(config(tmp_path))
        places = [output.uri for stage in STAGES for output in run.outputs(stage)]
        assert all(run.outputs(stage) for stage in IDENTIFIED)
        assert len(places) == len(set(places)) == len(STAGES)  # embed has none, mine has two

    def test_vectors_lie_where_what_decides_them_says(self, tmp_path, monkeypatch):
        run = Run(config(tmp_path))
        miner = run.config.mine.encoder
        place = run.vectors(miner, dimension=2).uri
        assert place.startswith(str(tmp_path))
        assert (
            run.vectors(miner.model_copy(update={"max_query_tokens": 7}), dimension=2).uri != place
        )
        set_weights(monkeypatch, weights_fingerprint=lambda path: "others")
        assert run.vectors(miner, dimension=2).uri != place
        shared = Run(replace_leaf(run.config, ("runtime", "vectors_dir"), str(tmp_path / "all")))
        assert shared.vectors(miner, dimension=2).uri.startswith(str(tmp_path / "all"))


class TestStages:
    def test_a_configuration_leaves_out_what_it_does_not_ask_for(self):
        assert Run(CONFIG).stages == STAGES
        without = replace_leaf(CONFIG, ("filter",), None)
        assert Run(without).stages == tuple(stage for stage in STAGES if stage != "filter")

    def test_samples_from_elsewhere_need_no_stage_that_makes_them(self, tmp_path):
        file = tmp_path / "biology-formatted.jsonl"
        file.write_text("{}\n")
        sources = (SampleSource(path=str(file), form="reasonembed"),)
        run = Run(replace_leaf(CONFIG, ("assemble", "sources"), sources))
        assert run.stages == ("corpus", "assemble", "train", "export", "evaluate")
        before = run.identity("assemble")
        file.write_text("{ }\n")
        assert run.identity("assemble") != before


class TestGrowth:
    def begun(self, run):
        for kind, stage in (("corpus", "corpus"), ("seeds", "plan"), ("samples", "assemble")):
            run.begin(stage, run.artifact(kind))
            run.artifact(kind).finish({})

    def test_rows_stay_and_what_is_one_result_is_made_anew(self, tmp_path):
        source = tmp_path / "corpus.jsonl"
        source.write_text("1")
        configuration = replace_leaf(config(tmp_path / "run"), ("corpus", "source"), str(source))
        self.begun(Run(configuration))
        source.write_text("12")
        with pytest.raises(DriftError, match=r"source\.content"):
            self.begun(Run(configuration))
        growing = Run(configuration, is_growing=True)
        self.begun(growing)
        assert growing.stale() == {}
        assert growing.artifact("seeds").finished() == {}

    def test_another_setting_is_still_refused(self, tmp_path):
        run = Run(config(tmp_path))
        self.begun(run)
        changed = Run(replace_leaf(run.config, ("plan", "variants"), 2), is_growing=True)
        with pytest.raises(DriftError, match=r"plan\.variants: made with 1, now 2"):
            self.begun(changed)

    def test_a_second_round_mines_with_the_trained_model(self, tmp_path):
        first = Run(config(tmp_path / "1"))
        with pytest.raises(ConfigError, match="has no exported model"):
            first.next_round(config(tmp_path / "2"))
        first.directory("export").begin({})
        first.directory("export").finish({})
        second = first.next_round(config(tmp_path / "2"))
        assert second.mine.encoder.model == str(first.model_dir)
        assert second.mine.encoder.query_template == first.config.train.encoder.query_template
        with pytest.raises(ConfigError, match="is the first round's own"):
            first.next_round(first.config)

    def test_rows_of_another_run_are_taken_over_and_checked(self, tmp_path):
        first, second = Run(config(tmp_path / "1")), Run(config(tmp_path / "2"))
        first.begin("corpus", first.artifact("corpus"))
        first.begin("plan", first.artifact("seeds"))
        first.artifact("seeds").finish({})
        second.dir.mkdir()
        first.begin("mine", first.artifact("candidates"))
        second.adopt(first)
        second.adopt(first)
        assert second.artifact("candidates").stage() is None
        assert (second.dir / "candidates-before" / "_stage.json").is_file()
        assert second.artifact("seeds").stage() == first.artifact("seeds").stage()
        second.begin("plan", second.artifact("seeds"))
        changed = Run(replace_leaf(second.config, ("plan", "variants"), 2))
        with pytest.raises(DriftError):
            changed.begin("plan", changed.artifact("seeds"))


class TestTimeline:
    def test_each_attempt_is_noted_with_what_it_gave(self, tmp_path):
        run = Run(config(tmp_path))
        assert run.timeline() == []
        with run.timed("plan") as note:
            note["result"] = {"seeds": 3}
        with pytest.raises(RuntimeError), run.timed("generate"):
            raise RuntimeError
        first, second = run.timeline()
        assert (first["stage"], first["outcome"], first["result"]) == ("plan", "done", {"seeds": 3})
        assert (second["stage"], second["outcome"]) == ("generate", "failed")
        assert first["seconds"] >= 0
        assert second["started"] >= first["started"]

    def test_a_signal_is_noted_as_one_also_where_it_arrives_in_foreign_code(self, tmp_path):
        run = Run(config(tmp_path))
        for error in (Interrupted("SIGTERM"), SystemError("with an exception set")):
            with pytest.raises(type(error)), run.timed("train"):
                raise error from Interrupted("SIGTERM")
        assert [(one["outcome"], one["detail"]) for one in run.timeline()] == [
            ("interrupted", "SIGTERM")
        ] * 2


def test_flatten_covers_every_setting():
    empty = {"tasks"}  # a mapping without entries has no leaf
    assert {key.split(".")[0] for key in flatten(CONFIG)} == set(RunConfig.model_fields) - empty


def test_models_that_lie_in_a_folder_are_named_from_the_root(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    base = Path(__file__).parents[1] / "configs/quickstart.yaml"
    models = ["train.encoder.model=own", "mine.encoder.model=some/hub-id"]
    config = Run(load(base, overrides=[*models, "run_dir=runs/x"])).config
    assert config.train.encoder.model == str(tmp_path / "own")
    assert config.mine.encoder.model == "some/hub-id"
