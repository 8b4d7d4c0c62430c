import json
import statistics
from pathlib import Path

import pytest
import yaml

import reasonembed.embedder.vectors as vectors_module
from reasonembed.ablation import (
    AblationConfig,
    load_ablation,
    output_dir,
    plan_cells,
    run_ablation,
)
from reasonembed.config import changed, parse, validated
from reasonembed.errors import ConfigError, ReasonEmbedError
from reasonembed.run import Run
from reasonembed.schemas import SAMPLES, from_rows
from tests.report.small_run import Builder

PLANS = sorted((Path(__file__).parent.parent / "configs" / "ablation").glob("*.yaml"))
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
VARIANTS = [
    {"name": "base", "changes": {"train.intensity_start_step": 1000}},
    {"name": "weighted"},
    {"name": "same as weighted", "changes": {"train.intensity_cap": 5}},
    {"name": "untrained", "system": "before"},
    {"name": "control", "changes": {"assemble.positives_from": "source"}},
]


@pytest.fixture(autouse=True)
def fake_weights(monkeypatch):
    # Training embeds by the backbone alone; its identity is that of an encoder.
    monkeypatch.setattr(vectors_module, "resolve", lambda name, *, cache_dir=None: Path(name))
    monkeypatch.setattr(
        vectors_module, "weights_fingerprint", lambda path: f"weights of {path.name}"
    )


@pytest.fixture
def base(tmp_path):
    builder = Builder(tmp_path)
    builder.make("corpus", "plan", "generate", "mine", "annotate", "rewrite", "assemble")
    builder.run.artifact("samples").finish({})
    builder.run.save_config()
    return builder.run


def plan_of(base, variants=VARIANTS, *, seeds=(1, 2), **more):
    data = {"run": str(base.dir), "baseline": "base", "seeds": seeds, "variants": variants}
    return validated(AblationConfig, data | more, where="test")


def value(config, system, query):
    """What a made-up training would give: higher with weights, a little other with each seed."""
    if system == "before":
        return 0.1 if config["train"]["encoder"]["model"] == "backbone-model" else 0.7
    is_weighted = config["train"]["intensity_start_step"] < 1000
    return 0.3 + 0.2 * is_weighted + 0.01 * config["train"]["seed"] + 0.1 * query


class Performer:
    """Stands for `reasonembed run`; remembers what it was asked for."""

    def __init__(self, *, fails_at=None):
        self.asked, self._fails_at = [], fails_at

    def __call__(self, file, first):
        config = yaml.safe_load(file.read_text())
        self.asked.append((config, first))
        if len(self.asked) == self._fails_at:
            raise ReasonEmbedError("no memory")
        run = Run(parse(config, where=str(file)))
        assert (run.dir / "samples").exists() == (first == "train")
        per_query = {
            system: {f"q{query}": value(config, system, query) for query in range(3)}
            for system in ("before", "after")
        }
        systems = {
            name: {"ndcg@10": statistics.fmean(values.values()), "recall@100": 0.9}
            for name, values in per_query.items()
        }
        directory = run.directory("evaluate")
        directory.begin({})
        directory.finish({"per_query": per_query, "systems": systems})


def ablate(plan, performer):
    table = run_ablation(plan, perform=performer, say=lambda _: None)
    return table, json.loads(table.with_suffix(".json").read_text())["rows"]


def test_every_plan_that_ships_fits_the_quick_start():
    assert PLANS
    for path in PLANS:
        plan = load_ablation(path)
        quickstart = parse(yaml.safe_load(QUICKSTART.read_text()), where="quickstart")
        for variant in plan.variants:
            changed(quickstart, plan.common | variant.changes, where=variant.name)


def test_a_cell_for_each_variant_and_seed_but_equal_settings_are_computed_once(base):
    performer = Performer()
    _, rows = ablate(plan_of(base), performer)
    assert [row["variant"] for row in rows] == [one["name"] for one in VARIANTS]
    assert len(performer.asked) == 6  # base, weighted, control; 2 seeds each
    assert {config["train"]["seed"] for config, _ in performer.asked} == {1, 2}
    assert [first for _, first in performer.asked] == ["train"] * 4 + ["assemble"] * 2
    assert rows[1]["cells"] == rows[2]["cells"]


def test_a_finished_cell_is_not_computed_again(base):
    plan, broken = plan_of(base), Performer(fails_at=3)
    with pytest.raises(ReasonEmbedError, match="no memory"):
        ablate(plan, broken)
    assert (output_dir(plan) / f"{plan.name}.md").is_file()  # what is known so far
    again = Performer()
    ablate(plan, again)
    assert len(again.asked) == 4
    third = Performer()
    ablate(plan_of(base, seeds=(1, 2, 3)), third)
    assert {config["train"]["seed"] for config, _ in third.asked} == {3}


def test_other_samples_make_other_cells(base):
    before = {cell.config.run_dir for cell in plan_cells(plan_of(base))}
    row = base.artifact("samples").read().to_pylist()[0]
    more = from_rows([row | {"query_id": "q-new"}], SAMPLES, where="test")
    base.artifact("samples").commit("more", more)
    assert before.isdisjoint(cell.config.run_dir for cell in plan_cells(plan_of(base)))


def test_the_base_run_is_not_touched_and_lends_its_data(base):
    before = sorted(base.dir.rglob("*"))
    performer = Performer()
    ablate(plan_of(base), performer)
    assert sorted(base.dir.rglob("*")) == before
    cell = Run(parse(performer.asked[0][0], where="cell"))
    assert cell.artifact("samples").read().equals(base.artifact("samples").read())


def test_figures(base):
    table, rows = ablate(plan_of(base), Performer())
    by_name = {row["variant"]: row for row in rows}
    # 0.3 + 0.1 of the mean query + 0.015 of the mean seed
    assert by_name["base"]["mean"] == pytest.approx(0.415)
    assert by_name["base"]["spread"] == pytest.approx(statistics.stdev([0.01, 0.02]))
    assert by_name["base"]["against"] is None
    weighted = by_name["weighted"]["against"]
    assert weighted["over_queries"]["mean_difference"] == pytest.approx(0.2)
    assert weighted["low"] == pytest.approx(0.2) == weighted["high"]  # no seed differs
    assert by_name["untrained"]["by_seed"] == {"1": pytest.approx(0.1), "2": pytest.approx(0.1)}
    assert by_name["untrained"]["against"]["by_seed"] == pytest.approx([-0.31, -0.32])
    line = next(line for line in table.read_text().splitlines() if line.startswith("| weighted"))
    assert "| 0.6150 ± 0.0071 | +0.2000 | +0.2000 to +0.2000 |" in line


def test_an_untrained_baseline(base):
    plan = plan_of(base, VARIANTS[1:4], baseline="untrained")
    _, rows = ablate(plan, Performer())
    assert rows[0]["against"]["over_queries"]["mean_difference"] == pytest.approx(0.515)
    assert rows[2]["against"] is None


@pytest.mark.parametrize(
    ("variants", "more", "message"),
    [
        ([*VARIANTS, VARIANTS[0]], {}, "called 'base'"),
        (VARIANTS, {"baseline": "bas"}, "is no variant"),
        (VARIANTS, {"seeds": []}, "at least one"),
        (VARIANTS, {"seeds": [1, 1]}, "each once"),
        ([{"name": "base", "changes": {"mine.top_k": 3}}], {}, "mine.top_k"),
        ([{"name": "base", "changes": {"train.seed": 3}}], {}, "train.seed"),
        ([{"name": "base", "system": "before"}], {}, "no variant is trained"),
        (
            [VARIANTS[0], {"name": "x", "system": "before", "changes": {"train.epochs": 3}}],
            {},
            "not trained",
        ),
        *[
            (VARIANTS, {"common": {"train.epochs": 2, key: 3}}, f"common '{key}'")
            for key in ("mine.top_k", "generate.tries", "train.seed", "run_dir", "train")
        ],
    ],
)
def test_plans_that_are_refused(base, variants, more, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(base, variants, **more)


def test_a_key_that_does_not_exist_names_its_variant(base):
    plan = plan_of(base, [VARIANTS[0], {"name": "typo", "changes": {"train.intensity_cup": 3}}])
    with pytest.raises(ConfigError, match=r"variant 'typo'.*\n.*intensity_cup"):
        plan_cells(plan)


def test_a_run_without_samples_is_refused(tmp_path):
    builder = Builder(tmp_path)
    builder.make("corpus")
    builder.run.save_config()
    with pytest.raises(ConfigError, match="no finished samples"):
        plan_cells(plan_of(builder.run))


def test_what_all_variants_share_may_act_on_every_stage_of_a_cell(base):
    common = {
        "train.epochs": 2, "assemble.positives_from": "source", "export.golden_texts": 2,
        "evaluate.bm25": False, "runtime.train.num_workers": 2,
    }  # fmt: skip
    config = plan_cells(plan_of(base, common=common))[0].config
    assert (config.train.epochs, config.export.golden_texts) == (2, 2)
    assert config.runtime.train.num_workers == 2 and not config.evaluate.bm25


def test_plans_of_one_run_share_cells_and_have_a_table_each(base, tmp_path):
    tables = []
    for name, variants in (("first", VARIANTS[:2]), ("second", VARIANTS[:1])):
        data = {"run": str(base.dir), "baseline": "base", "seeds": [1], "variants": variants}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(data))
        performer = Performer()
        tables.append(ablate(load_ablation(file), performer))
    assert performer.asked == []  # the second's one cell is the first's
    assert [path.name for path, _ in tables] == ["first.md", "second.md"]
    assert [len(rows) for _, rows in tables] == [2, 1]
    assert json.loads(tables[0][0].with_suffix(".json").read_text())["rows"] == tables[0][1]


ELSEWHERE = {"name": "elsewhere", "changes": {"train.encoder.model": "other-model"}}


def test_an_untrained_row_is_of_the_run_s_own_backbone(base):
    _, rows = ablate(plan_of(base, [VARIANTS[0], VARIANTS[3], ELSEWHERE]), Performer())
    by_name = {row["variant"]: row for row in rows}
    assert by_name["untrained"]["by_seed"] == {"1": pytest.approx(0.1), "2": pytest.approx(0.1)}
    assert by_name["untrained"]["cells"] == by_name["base"]["cells"]
    common = {"train.encoder.model": "other-model"}
    _, rows = ablate(plan_of(base, [VARIANTS[0], VARIANTS[3]], common=common), Performer())
    assert rows[1]["mean"] == pytest.approx(0.7)  # what all variants begin with


@pytest.mark.parametrize(
    ("system", "variants", "common", "needs"),
    [
        ("before", [ELSEWHERE], {}, r"run's own train\.encoder"),
        ("bm25", [VARIANTS[0]], {"evaluate.bm25": False}, "evaluate.bm25: true"),
        ("miner", [VARIANTS[0]], {"assemble.sources": [{"path": "run"}]}, "not imported"),
    ],
)
def test_a_system_that_no_cell_would_measure_is_refused_before_training(
    base, system, variants, common, needs
):
    variants = [*variants, {"name": "row", "system": system}]
    plan = plan_of(base, variants, common=common, baseline="row")
    performer = Performer()
    with pytest.raises(ConfigError, match=f"'row': no cell measures {system}.*{needs}"):
        ablate(plan, performer)
    assert performer.asked == []


def test_what_is_evaluated_may_be_a_row(base):
    others = [{"name": system, "system": system} for system in ("bm25", "miner")]
    assert plan_cells(plan_of(base, [*VARIANTS, *others]))
