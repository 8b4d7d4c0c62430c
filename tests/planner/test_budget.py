"""Money: a stage that would pass the limit does not begin, one that reaches it ends."""

import math
from dataclasses import replace

import pyarrow as pa
import pytest

from reasonembed.errors import EXIT_BUDGET, BudgetError, ConfigError, explain
from reasonembed.planner.actual import FILE, compare, ensure_plan, read_plan
from reasonembed.planner.budget import Budget, budget_of
from reasonembed.planner.show import planned_and_actual
from reasonembed.run import Run
from reasonembed.schemas import CORPUS
from tests.planner.plans import changed

HOUR = 3600.0
TEXT = "A sentence about nothing in particular, said again and again. " * 12


class Clock:
    now = 1_000.0

    def __call__(self):
        return self.now


def budget(limit, *, timeline=(), planned=None, clock=None):
    notes = [
        {"stage": stage, "seconds": seconds, "outcome": outcome}
        for stage, seconds, outcome in timeline
    ]
    return Budget(
        limit=limit,
        currency="USD",
        price=lambda stage: 10.0,
        nodes=lambda stage: 2.0,
        planned=lambda stage: planned,
        total=lambda: 100.0,
        timeline=lambda: notes,
        clock=clock or Clock(),
    )


def test_failed_attempts_were_paid_for_too():
    spent = budget(1e9, timeline=[("a", HOUR, "failed"), ("a", HOUR / 2, "done")]).spent()
    assert spent == pytest.approx(30.0)


def test_a_stage_that_would_pass_the_limit_does_not_begin():
    with pytest.raises(
        BudgetError, match=r"train is planned to cost 50.00 USD more; 20.00 of.*60.00"
    ):
        budget(60.0, timeline=[("a", HOUR, "done")], planned=50.0).check("train")
    budget(71.0, timeline=[("a", HOUR, "done")], planned=50.0).check("train")


def test_what_a_stage_has_cost_before_is_part_of_its_plan():
    budget(60.0, timeline=[("train", HOUR, "failed")], planned=50.0).check("train")


def test_a_stage_that_was_done_is_passed_over_without_its_money():
    done = [("generate", HOUR, "done"), ("train", HOUR, "failed")]
    budget(60.0, timeline=done, planned=50.0).check("generate")  # 40 spent, nothing to do
    found = budget(60.0, timeline=[("annotate", HOUR, "done")], planned=50.0)
    found.timeline()[0]["shard"] = "1/2"  # the other half is still to be paid
    with pytest.raises(BudgetError, match=r"30\.00 USD more"):
        replace(found, limit=49.0).check("annotate")


def test_a_stage_whose_cost_nobody_knows_begins_while_there_is_money():
    budget(60.0, timeline=[("a", HOUR, "done")]).check("train")
    with pytest.raises(BudgetError):
        budget(20.0, timeline=[("a", HOUR, "done")]).check("train")


def test_a_stage_ends_when_the_money_does():
    clock = Clock()
    found = budget(20.0, clock=clock)
    with found.during("annotate"):
        clock.now += HOUR / 2
        found.guard()
        assert found.told() == {"spent": 10.0, "planned": 100.0}
        clock.now += HOUR / 2
        with pytest.raises(BudgetError, match="annotate ends here"):
            found.guard()
    assert found.spent() == 0.0  # its time is the timeline's affair now


def test_a_running_stage_knows_when_its_money_is_spent():
    clock = Clock()
    found = budget(100.0, timeline=[("a", HOUR, "failed")], clock=clock)
    with found.during("train"):
        end = found.lasts_until()
        clock.now += HOUR  # whenever it is asked
        assert found.lasts_until() == end == pytest.approx(1_000.0 + 4 * HOUR)
        clock.now = end
        with pytest.raises(BudgetError, match=r"100.00 USD are spent.*train ends here"):
            found.guard()
    with budget(math.inf).during("train"):
        assert budget(math.inf).lasts_until() == math.inf


def test_the_exit_code_is_the_budgets():
    assert explain(BudgetError("spent"))[1] == EXIT_BUDGET


def test_a_limit_where_nothing_costs_anything_is_refused(tmp_path):
    settings = changed("quickstart", runtime__cost__max_cost=5)
    with pytest.raises(ConfigError, match=r"runtime\.cost\.shape"):
        budget_of(Run(settings))


@pytest.fixture
def run(tmp_path):
    """A run whose corpus is committed, on shapes that cost money."""
    settings = changed(
        "quickstart", runtime__cost__shape="aws-l4", runtime__cost__max_cost=1_000
    ).model_copy(update={"run_dir": str(tmp_path / "run")})
    target = Run(settings)
    rows = [
        {
            "doc_id": f"d{i}", "text": f"{i} {TEXT}", "title": "", "task": "python-stdlib",
            "parent_id": None, "text_hash": f"h{i}", "group_id": f"g{i}",
        }
        for i in range(40)
    ]  # fmt: skip
    target.artifact("corpus").commit("p", pa.Table.from_pylist(rows, schema=CORPUS))
    return target


def test_a_plan_is_made_once_and_kept(run):
    found = ensure_plan(run)
    assert found is not None and read_plan(run) == found
    text = (run.place / FILE).read()
    assert ensure_plan(run) == found and (run.place / FILE).read() == text
    other = run.config.model_copy(
        update={"plan": run.config.plan.model_copy(update={"max_seeds_per_task": 3})}
    )
    assert ensure_plan(Run(other)) != found


def test_a_run_without_a_corpus_has_no_plan_yet(tmp_path):
    settings = changed("quickstart").model_copy(update={"run_dir": str(tmp_path)})
    assert ensure_plan(Run(settings)) is None
    assert planned_and_actual(Run(settings)) == []


def test_a_higher_limit_leaves_the_plan_as_it_was(run):
    found = ensure_plan(run)
    more = run.config.runtime.cost.model_copy(update={"max_cost": 2_000})
    runtime = run.config.runtime.model_copy(update={"cost": more})
    other = Run(run.config.model_copy(update={"runtime": runtime}))
    assert budget_of(other).planned("generate") > 0
    assert read_plan(run).settings == ensure_plan(other).settings == found.settings


def test_what_cannot_be_planned_is_said_once_a_stage(run, caplog):
    encoder = run.config.train.encoder.model_copy(update={"model": "nobody/knows"})
    train = run.config.train.model_copy(update={"encoder": encoder})
    found = budget_of(Run(run.config.model_copy(update={"train": train})))
    with found.during("generate"):
        for _ in range(3):
            found.guard()
    assert caplog.text.count("no plan of this run") == 1


def test_nothing_is_asked_of_the_store_where_there_is_no_limit():
    def timeline():
        raise AssertionError("read")

    replace(budget(float("inf")), timeline=timeline).guard()


def test_what_cannot_be_planned_is_said_and_stops_nothing(run, caplog):
    encoder = run.config.train.encoder.model_copy(update={"model": "nobody/knows"})
    train = run.config.train.model_copy(update={"encoder": encoder})
    assert ensure_plan(Run(run.config.model_copy(update={"train": train}))) is None
    assert "nobody/knows" in caplog.text


def test_a_plan_of_another_version_is_none(run):
    ensure_plan(run)
    (run.place / FILE).write(b'{"stages": [{"stage": "corpus", "unheard": 1}]}')
    assert read_plan(run) is None


def test_budget_of_a_run_knows_its_plan_and_price(run):
    found = budget_of(run)
    assert found.planned("generate") > 0
    assert found.told()["planned"] > 0
    run.place.local.joinpath("timeline.jsonl").write_text(
        '{"stage": "generate", "started": 0, "seconds": 3600, "outcome": "done"}\n'
    )
    assert found.spent() == pytest.approx(1.323)


def test_planned_and_actual(run):
    planned = ensure_plan(run)
    generate = planned.stage("generate")
    notes = [
        {"stage": "generate", "started": 0, "seconds": generate.seconds, "outcome": outcome}
        for outcome in ("failed", "done")
    ]
    (row,) = compare(run, planned, timeline=notes)
    assert row.ratio == pytest.approx(2.0)
    assert row.actual_cost == pytest.approx(2 * row.planned_cost)
    (run.place / "timeline.jsonl").append(notes[0])
    lines = planned_and_actual(run)
    assert any("generate" in line and "1.00" in line for line in lines)
    assert all(len(line) <= 110 for line in lines)
