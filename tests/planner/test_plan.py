import datetime
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from reasonembed.config import load
from reasonembed.errors import ConfigError
from reasonembed.planner.answers import Answers, ends_for
from reasonembed.planner.estimate import plan_from
from reasonembed.planner.inputs import read_inputs
from reasonembed.planner.prices import read_prices, uses_gpus
from reasonembed.planner.shapes import KNOWN, shape_from, shape_of
from reasonembed.planner.show import as_text, plan_view
from tests.planner.plans import INPUTS, changed, config, plan

SMOL = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152,
    "tie_word_embeddings": True,
}  # fmt: skip


SHIPPED = sorted(file.stem for file in Path("configs").glob("*.yaml"))


def test_a_config_json_gives_the_shape_that_is_known_by_name():
    known = KNOWN["smollm2-135m-instruct"]
    assert shape_from(SMOL, name=known.name) == known
    assert known.weights == pytest.approx(134.5e6, rel=0.001)


def test_an_encoder_is_not_causal_and_its_feed_forward_has_two_matrices():
    bert = {
        "model_type": "bert", "hidden_size": 384, "intermediate_size": 1536,
        "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30_522,
    }  # fmt: skip
    assert shape_from(bert, name="all-minilm-l6-v2") == replace(
        KNOWN["all-minilm-l6-v2"], is_tied=True
    )


def test_a_model_nobody_knows_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"config\.json.*Qwen3-8B"):
        shape_of("someone/unheard-of")


def test_a_model_that_another_run_will_train_has_the_shape_of_its_start():
    assert shape_of("runs/msmarco-qwen3-8b/export/model").weights == KNOWN["Qwen3-8B"].weights


def test_every_shipped_configuration_can_be_planned():
    for name in SHIPPED:
        found = plan(config(name))
        assert found.seconds > 0 and all(one.rows >= 0 for one in found.stages), name


@pytest.mark.parametrize("name", [name for name in SHIPPED if uses_gpus(config(name))])
def test_every_shipped_configuration_for_gpus_fits_eight_h100(name):
    settings = config(name)
    found = plan(settings, inputs=read_inputs(settings))
    said = as_text(plan_view(found))
    assert not found.left_out and "may not fit" not in said, said


def test_72b_on_four_l4_does_not_fit_and_the_plan_says_what_would():
    found = plan(shape="aws-l4x8")
    generate = found.stage("generate")
    assert "145 GB" in generate.problem and "4 x L4 have 86 GB" in generate.problem
    assert "It needs 7: set runtime.engine.tensor_parallel_size 8" in generate.problem
    assert generate.seconds == 0 == generate.on_demand
    assert "cannot run" in as_text(plan_view(found))


def test_fp8_on_one_kind_of_gpu_changes_that_kind_alone():
    few = {"runtime__engine__by_accelerator": "{L4: {quantization: fp8, kv_cache_dtype: fp8}}"}
    before, after = plan(shape="aws-l4x8"), plan(changed(**few), shape="aws-l4x8")
    weights = [one.stage("annotate").memory["weights"] for one in (before, after)]
    assert weights[1] == weights[0] / 2
    h100 = plan(changed(**few)).stage("annotate").memory["weights"]
    assert h100 == weights[0]


def test_more_rows_cost_more_and_more_workers_take_less_time():
    small, large = (plan(changed(plan__max_seeds_per_task=n)) for n in (100, 10_000))
    assert large.stage("annotate").flops == pytest.approx(100 * small.stage("annotate").flops)
    one, two = (plan(changed(runtime__annotate__max_actors=n)) for n in (1, 2))
    assert two.stage("annotate").seconds < 0.6 * one.stage("annotate").seconds
    assert two.stage("annotate").device_hours == pytest.approx(
        one.stage("annotate").device_hours, rel=0.02
    )


def test_whole_nodes_are_paid_for():
    found = plan(changed(runtime__annotate__max_actors=3))  # 12 GPUs on nodes of 8
    annotate = found.stage("annotate")
    assert (annotate.devices, annotate.nodes) == (12, 2)
    assert annotate.on_demand == pytest.approx(annotate.seconds / 3600 * 2 * 55.04)
    assert annotate.spot < annotate.on_demand


def test_a_small_batch_is_pointed_out():
    notes = plan(changed(runtime__engine__max_num_seqs=64)).stage("annotate").notes
    assert "64 texts at once" in notes[0] and "max_num_seqs" in notes[0]


def test_no_figure_is_cut_off_in_eighty_columns():
    many = replace(INPUTS, documents=5_000_000, distinct=5_000_000)
    found = plan(changed(plan__max_seeds_per_task=400_000), inputs=many)
    most = found.stage("annotate").on_demand
    said = as_text(plan_view(found), width=80)
    assert most > 10_000 and f" {most:,.0f} " in said and f" {found.cost('spot'):,.0f} " in said
    assert "…" not in said


def test_what_cannot_run_is_said_and_not_in_the_sum():
    sizes = {"runtime__engine__tensor_parallel_size": 3, "train__batch_queries": 10**8}
    found = plan(changed(**sizes))
    assert found.left_out == ("generate", "annotate", "rewrite", "train")
    assert "64 heads" in found.stage("generate").problem
    assert "fill no batch of train.batch_queries 100,000,000" in found.stage("train").problem
    assert "all without generate, annotate, rewrite, train" in as_text(plan_view(found))
    here = plan(shape="this-machine").stage("generate").problem
    assert "this machine has" in here and "tensor_parallel_size" not in here


def test_a_kind_of_gpu_that_the_shape_has_not_is_pointed_out():
    notes = {"runtime__annotate__accelerators": "[B200]", "runtime__train__accelerators": "[H100]"}
    found = plan(changed(**notes))
    said = [one.stage for one in found.stages if any("[B200]" in note for note in one.notes)]
    assert said == ["annotate"]


def test_what_is_set_already_is_no_advice():
    small = {"runtime__train__chunk_tokens": 65_536}
    assert "train.lora" not in plan(changed(**small)).stage("train").notes[0]
    full = plan(changed(train__lora="null", runtime__train__sharding="fsdp", **small))
    said = full.stage("train").notes[0]
    assert "train.lora" in said and "sharding" not in said


def test_a_plan_goes_through_json():
    found = plan()
    assert plan_from(json.loads(json.dumps(found.to_json()))) == found


def test_no_probe_no_corpus_the_published_statistics_are_used_and_said():
    inputs = read_inputs(config())
    assert (inputs.documents, inputs.distinct) == (57_359, 49_434)
    assert "published statistics" in inputs.origin
    assert inputs.document_tokens("Qwen/Qwen3-8B").mean() == pytest.approx(329 / 3.5, rel=0.05)


def test_nothing_known_of_a_corpus_is_an_error_that_names_the_cure(tmp_path):
    unknown = changed("quickstart", corpus__source=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="--documents"):
        read_inputs(unknown)
    assert read_inputs(unknown, documents=1_000).documents == 1_000


def test_a_corpus_that_is_there_is_counted(tmp_path):
    file = tmp_path / "corpus.jsonl"
    texts = ["word " * 100, "word " * 100, "short", "other " * 80]
    rows = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = read_inputs(changed("quickstart", corpus__source=str(file)))
    assert (found.documents, found.distinct) == (4, 3)
    assert found.eligible == 0.75


# ---- answers --------------------------------------------------------------------------------


def test_lengths_of_answers_that_end_by_chance():
    found = Answers(limit=64, ends=ends_for(30, limit=64))
    assert found.tokens_a_try == pytest.approx(30, rel=0.001)
    assert found.tokens_a_try < found.longest(8) < found.longest(60) <= 64
    assert Answers(limit=64, ends=0.0).tokens_a_try == 64


def test_a_limit_below_what_a_model_would_write_is_nearly_reached():
    assert Answers(64, ends_for(800, limit=64)).tokens_a_try == pytest.approx(0.9 * 64, rel=0.001)


def test_an_open_engine_is_always_full_and_a_closed_one_waits_for_the_longest():
    answers = Answers(limit=400, ends=0.01)
    closed = answers.steps(600, batch=60, at_once=60, is_open=False)
    opened = answers.steps(600, batch=60, at_once=60, is_open=True)
    assert opened == pytest.approx(600 * answers.tokens / 60)
    assert closed > 1.5 * opened
    assert closed == pytest.approx(10 * answers.longest(60))


def test_second_tries_take_steps_and_tokens():
    once, twice = Answers(64, 0.0), Answers(64, 0.0, again=0.5, tries=2)
    assert twice.tokens == 1.5 * once.tokens
    steps = [one.steps(60, batch=60, at_once=60, is_open=False) for one in (once, twice)]
    assert steps == [64, 128]


# ---- prices ---------------------------------------------------------------------------------


def test_old_prices_are_pointed_out():
    prices = read_prices()
    young = prices.date + datetime.timedelta(days=90)
    assert prices.warning(today=young) is None
    said = prices.warning(today=young + datetime.timedelta(days=1))
    assert "91 days ago" in said and "runtime.cost.prices" in said


def test_own_prices(tmp_path):
    file = tmp_path / "prices.yaml"
    mine = {"node": "mine", "accelerator": "L4", "gpus": 4, "cpus": 32, "on_demand": 2, "spot": 1}
    data = {
        "date": "2099-01-01",
        "currency": "EUR",
        "accelerators": {"L4": {"tflops": 121, "bandwidth_tb": 0.3, "memory_gb": 24}},
        "shapes": {"ours": mine},
    }
    file.write_text(yaml.safe_dump(data))
    prices = read_prices(str(file))
    assert prices.shape("ours").on_demand == 2 and prices.device("ours").name == "L4"
    with pytest.raises(ConfigError, match=r"no cluster shape 'aws-l4'.*ours"):
        prices.shape("aws-l4")
    data["shapes"]["ours"]["accelerator"] = "B200"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="B200"):
        read_prices(str(file))
    with pytest.raises(ConfigError, match="no file"):
        read_prices(str(tmp_path / "other.yaml"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        read_prices(str(file))


def test_every_packaged_shape_has_both_prices_and_says_where_they_are_from():
    for name, shape in read_prices().shapes.items():
        assert 0 < shape.spot < shape.on_demand, name
        assert set(shape.source) == {"on_demand", "spot"}, name


# ---- the command ------------------------------------------------------------------------------


def test_the_planner_loads_neither_deep_learning_nor_ray():
    code = (
        "import sys\nimport reasonembed.planner.command, reasonembed.planner.budget\n"
        "import reasonembed.planner.probe\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_prints_tables_or_json(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from reasonembed.cli import app

    monkeypatch.setenv("REASONEMBED_PLANNER", str(tmp_path))
    sets = ["--set", f"run_dir={tmp_path / 'run'}"]
    asked = ["plan", "configs/bright-qwen3-8b.yaml", *sets]
    table = CliRunner().invoke(app, asked)
    assert table.exit_code == 0, table.output
    for word in ("annotate", "GPU h", "published statistics"):
        assert word in table.output, word
    assert "cannot run" not in table.output
    assert "cluster aws-h100x8, for runtime.cost.shape is not set" in table.output
    assert max(map(len, table.output.splitlines())) > 80  # no terminal
    said = CliRunner().invoke(app, [*asked, "--json", "--shape", "aws-l4x8"])
    data = json.loads(said.stdout)
    assert data["shape"] == "aws-l4x8" and data["total"]["spot"] > 0
    assert data["total"]["without"] == ["generate", "rewrite"]
    assert not any("cluster" in one for one in data["assumptions"])
    assert not (tmp_path / "run").exists()


def test_a_plan_is_quick():
    settings = load("configs/bright-qwen3-8b.yaml")
    plan(settings)
    started = time.perf_counter()
    plan(settings)
    assert time.perf_counter() - started < 1
    assert math.isfinite(INPUTS.query_chars)
