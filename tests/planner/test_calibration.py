import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.planner.answers import AnswerStatistics, Seen, Yields, seen_ends
from reasonembed.planner.calibration import (
    Calibration,
    Measurement,
    Rates,
    assumed_rates,
    device_name,
    fit,
    measure_machine,
    read_calibration,
    write_calibration,
)
from reasonembed.planner.formulae import Device
from reasonembed.planner.loads import Load
from tests.planner.plans import config

CPU = Device("cpu", 1e11, 1e10, 1e10, is_gpu=False)
TRUE = Rates(20.0, 8e-12, 3e-11, 4e-11, 1e-3)


def block(rng, rates=TRUE, key="llm|m"):
    load = Load(
        "llm",
        key,
        rows=int(rng.integers(8, 64)),
        flops=rng.uniform(0.5, 4) * 1e12,
        written=rng.uniform(0.1, 2) * 1e12,
        traffic=rng.uniform(2, 12) * 1e10,
    )
    seconds = rates.work_s(load) * rng.uniform(0.95, 1.05)
    return load, Measurement(
        key, "llm", seconds, load.flops, load.written, load.traffic, float(load.rows)
    )


def test_rates_that_made_the_measurements_are_found_for_other_work():
    rng = np.random.default_rng(0)
    found = fit(assumed_rates("llm|m", "llm", CPU), [block(rng)[1] for _ in range(8)])
    for _ in range(20):
        load, _ = block(rng)
        assert found.work_s(load) == pytest.approx(TRUE.work_s(load), rel=0.15)


def test_one_measurement_scales_everything_that_is_assumed():
    assumed = assumed_rates("llm|m", "llm", CPU)
    load, one = block(np.random.default_rng(1))
    found = fit(assumed, [one])
    assert found.work_s(load) == pytest.approx(one.seconds, rel=0.001)
    doubled = replace(load, rows=2 * load.rows, flops=2 * load.flops, written=2 * load.written,
                      traffic=2 * load.traffic)  # fmt: skip
    assert found.work_s(doubled) == pytest.approx(2 * one.seconds, rel=0.001)


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=6))
def test_rates_are_never_negative(seconds):
    rng = np.random.default_rng(2)
    measured = [replace(block(rng)[1], seconds=one) for one in seconds]
    found = fit(assumed_rates("llm|m", "llm", CPU), measured)
    assert min(found.per_flop, found.per_written, found.per_byte, found.per_row) >= 0


def test_starts_are_those_of_the_stage_where_it_was_seen():
    load = Load("llm", "llm|m", rows=10, flops=1e12)
    starts = [("generate", 40.0), ("annotate", 12.0), ("rewrite", 10.0)]
    known = Calibration("cpu").with_measurements(
        Measurement("llm|m", "llm", start_s=seconds, stage=stage) for stage, seconds in starts
    )
    assert known.rates(load, CPU, stage="generate").start_s == 40
    assert known.rates(load, CPU, stage="filter").start_s == 12


def test_a_model_that_was_not_measured_takes_the_share_that_others_of_its_kind_reach():
    rng = np.random.default_rng(3)
    known = Calibration("cpu").with_measurements(block(rng)[1] for _ in range(8))
    load, _ = block(rng)
    other = known.rates(replace(load, key="llm|another"), CPU)
    assert other.measurements == 0
    assert other.work_s(load) == pytest.approx(TRUE.work_s(load), rel=0.15)


def test_work_without_a_model_is_scaled_whole():
    known = Calibration("cpu").with_measurements(
        [Measurement("cpu|mine", "cpu", seconds=9.0, rows=2_000)]
    )
    load = Load("cpu", "cpu|mine", rows=2_000)
    assert known.rates(load, CPU).seconds(load) == pytest.approx(9.0)
    half = replace(load, rows=1_000)
    assert 4.5 < known.rates(half, CPU).seconds(half) < 9.0


def test_workers_share_the_work_but_not_the_start():
    load = Load("llm", "llm|m", rows=100, flops=1e13, workers=4, blocks=10)
    alone = replace(load, workers=1)
    assert TRUE.seconds(load) - TRUE.start_s == pytest.approx(
        (TRUE.seconds(alone) - TRUE.start_s) / 4
    )
    assert replace(load, blocks=2).used_workers == 2


def test_it_is_kept_and_a_damaged_file_is_none(tmp_path):
    known = Calibration(
        "cpu", (1e11, 1e10), seen={"generate|m": Seen(0.01)}, yields=Yields(queries=0.9)
    ).with_measurements([Measurement("llm|m", "llm", 1.0, 2.0, 3.0, 4.0, 5.0)])
    file = tmp_path / "a" / "cpu.json"
    write_calibration(known, file)
    assert read_calibration(file, device="cpu") == known
    file.write_text(json.dumps(asdict(known))[:50])
    assert read_calibration(file, device="cpu") == Calibration("cpu")
    assert read_calibration(tmp_path / "none.json", device="cpu") == Calibration("cpu")


def test_only_the_newest_measurements_of_a_key_are_kept():
    many = (Measurement("k", "embed", float(i + 1)) for i in range(200))
    kept = Calibration("cpu").with_measurements(many).measurements
    assert len(kept) == 60 and kept[-1].seconds == 200


def test_answers_are_planned_as_they_were_seen():
    settings = config("quickstart")
    model = settings.generate.llm.model
    ends = seen_ends([64] * 8 + [10, 20], [False] * 8 + [True] * 2)
    assert ends == pytest.approx(2 / (8 * 64 + 30))
    known = AnswerStatistics({f"generate|{model}": Seen(ends, again=0.25)})
    answers = known.answers("generate", settings)
    assert answers.tokens_a_try == pytest.approx(57, abs=1)
    longer = config("quickstart", **{"generate.sampling.max_tokens": 128})
    assert known.answers("generate", longer).tokens_a_try == pytest.approx(101, abs=2)


def test_this_machine_is_measured_in_a_moment():
    flops, bandwidth = measure_machine()
    assert flops > 1e9 and bandwidth > 1e8
    assert " x " in device_name(CPU)
    assert device_name(replace(CPU, name="H100", is_gpu=True)) == "H100"
