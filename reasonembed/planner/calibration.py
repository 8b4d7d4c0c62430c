"""Rates: seconds of start-up, an operation, a byte, a row; assumed at first, then as measured.

A load takes start + flops·a + written·b + traffic·c + rows·d seconds of its workers. What is
assumed of these rates comes from the device's data sheet and a usual share of it; measurements move
them, all together where they say little and one by one where they can tell them apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from reasonembed.planner.answers import AnswerStatistics, Seen, Yields
from reasonembed.planner.formulae import Device
from reasonembed.planner.loads import Load

UTILISATION = 0.4  # of operations, dense bfloat16 data sheet; well-tuned stacks reach 0.35 to 0.45
CPU_UTILISATION = 0.8  # of what matrices of a thousand rows reach
BANDWIDTH_SHARE = 0.6  # of the data sheet's bytes a second while decoding
_PRIOR = 0.05  # weight of what is assumed of a rate against one measurement
_SLOW_WRITING = 5.0  # on CPUs: matrices of a few rows, and a token is drawn from the vocabulary
_KEEP = 60  # measurements of a key that are kept, the newest

_START = {"llm": (25.0, 120.0), "embed": (8.0, 40.0), "train": (20.0, 90.0)}  # CPU, GPU
_ROW = {"llm": 2e-3, "embed": 2e-4, "train": 5e-2}
_CPU_STAGES = {  # start, and seconds a row; of `export` a megabyte of weights
    "corpus": (0.5, 1e-4),
    "filter": (0.5, 1e-4),
    "plan": (0.3, 5e-5),
    "generate": (0.5, 1e-4),
    "embed": (0.5, 5e-5),
    "mine": (2.0, 5e-4),
    "annotate": (0.5, 1e-4),
    "audit": (1.0, 1e-3),
    "rewrite": (0.3, 1e-4),
    "assemble": (0.3, 1e-3),
    "export": (5.0, 2e-3),
    "evaluate": (3.0, 1e-3),
    "openai": (1.0, 1.0),
    "scripted": (3.0, 1e-3),
}


@dataclass(frozen=True)
class Rates:
    """Seconds of a start and of a unit of work.

    Attributes:
        start_s: Until the first row is worked on, and after the last.
        per_flop: Of an operation.
        per_written: Of an operation on tokens that are written.
        per_byte: Of a byte moved while decoding.
        per_row: Of a row, or a step of training.
        measurements: That they rest on; 0 where they are assumed.
    """

    start_s: float
    per_flop: float
    per_written: float
    per_byte: float
    per_row: float
    measurements: int = 0

    def work_s(self, load: Load) -> float:
        """Seconds of one worker that does it all, without its start."""
        return (
            load.flops * self.per_flop
            + load.written * self.per_written
            + load.traffic * self.per_byte
            + load.rows * self.per_row
        )

    def seconds(self, load: Load) -> float:
        """Seconds until it is done, by as many workers as it has."""
        if not load.rows:
            return 0.0
        return self.start_s + self.work_s(load) / load.used_workers


@dataclass(frozen=True)
class Measurement:
    """So much work took so long.

    Attributes:
        key: Of the load.
        kind: Of the load.
        seconds: Of one worker.
        flops: As in `Load`.
        written: As in `Load`.
        traffic: As in `Load`.
        rows: As in `Load`.
        start_s: Given alone, when only the start was measured.
        stage: Of a start: the first engine of a run starts more slowly than those after it.
    """

    key: str
    kind: str
    seconds: float = 0.0
    flops: float = 0.0
    written: float = 0.0
    traffic: float = 0.0
    rows: float = 0.0
    start_s: float | None = None
    stage: str = ""


@dataclass(frozen=True)
class Calibration:
    """Everything that was measured on one kind of device.

    Attributes:
        device: Its name; see `device_name`.
        measured: The machine's own speed where it is no GPU: operations and bytes a second.
        measurements: Oldest first.
        seen: Answers by stage and model.
        yields: Shares that go on.
        made: When it was last added to, seconds since 1970.
    """

    device: str
    measured: tuple[float, float] | None = None
    measurements: tuple[Measurement, ...] = ()
    seen: dict[str, Seen] = field(default_factory=dict)
    yields: Yields | None = None
    made: float = 0.0

    @property
    def statistics(self) -> AnswerStatistics:
        """For `loads`."""
        return AnswerStatistics(dict(self.seen), self.yields or Yields())

    def on(self, device: Device) -> Device:
        """The device at its own speed, where that was measured."""
        if device.is_gpu or self.measured is None:
            return device
        # A busy machine measures too little: what any such machine can is the least.
        return replace(
            device,
            flops=max(device.flops, self.measured[0]),
            bandwidth=max(device.bandwidth, self.measured[1]),
        )

    def rates(self, load: Load, device: Device, *, stage: str = "") -> Rates:
        """Of a load: measured where its key was, else assumed.

        Args:
            load: What is to be done.
            device: Where.
            stage: Whose starts count, if any were measured.
        """
        assumed = assumed_rates(load.key, load.kind, device)
        own = [one for one in self.measurements if one.key == load.key]
        if not own:
            return _as_others(assumed, load, self.measurements, device)
        if load.kind == "cpu":
            return _scaled(assumed, own)
        work = [one for one in own if one.start_s is None and one.seconds > 0]
        fitted = fit(assumed, work)
        began = [one for one in own if one.start_s is not None]
        began = [one for one in began if one.stage == stage] or began
        starts = [one.start_s for one in began if one.start_s is not None]
        start = median(starts) if starts else assumed.start_s
        return replace(fitted, start_s=start, measurements=len(own))

    def with_measurements(
        self,
        found: Iterable[Measurement],
        *,
        seen: Mapping[str, Seen] | None = None,
        yields: Yields | None = None,
    ) -> Calibration:
        """With more; the newest of each key are kept."""
        by_key: dict[str, list[Measurement]] = defaultdict(list)
        for one in (*self.measurements, *found):
            by_key[one.key].append(one)
        kept = tuple(one for many in by_key.values() for one in many[-_KEEP:])
        return replace(
            self,
            measurements=kept,
            seen={**self.seen, **(seen or {})},
            yields=yields or self.yields,
            made=time.time(),
        )


def assumed_rates(key: str, kind: str, device: Device) -> Rates:
    """What is assumed before anything was measured."""
    if kind == "cpu":
        start, row = _CPU_STAGES[key.partition("|")[2]]
        return Rates(start, 0.0, 0.0, 0.0, row)
    speed = device.flops * (UTILISATION if device.is_gpu else CPU_UTILISATION)
    return Rates(
        _START[kind][device.is_gpu],
        1 / speed,
        (1 if device.is_gpu else _SLOW_WRITING) / speed,
        1 / (device.bandwidth * BANDWIDTH_SHARE),
        _ROW[kind],
    )


def _scaled(assumed: Rates, measured: Sequence[Measurement]) -> Rates:
    """Of work without a model: start and rows alike, by the median ratio."""
    ratios = [one.seconds / (assumed.start_s + one.rows * assumed.per_row) for one in measured]
    scale = median(ratios)
    return replace(
        assumed,
        start_s=assumed.start_s * scale,
        per_row=assumed.per_row * scale,
        measurements=len(measured),
    )


def _as_others(
    assumed: Rates, load: Load, measurements: Sequence[Measurement], device: Device
) -> Rates:
    """Of a model that was not measured: the share of the device that others of its kind reach."""
    if load.kind == "cpu":
        return assumed
    work = [m for m in measurements if m.kind == load.kind and m.start_s is None and m.seconds > 0]
    starts = [m.start_s for m in measurements if m.kind == load.kind and m.start_s is not None]
    found = fit(assumed, work) if work else assumed
    return replace(found, start_s=median(starts) if starts else assumed.start_s, measurements=0)


def fit(assumed: Rates, measured: Sequence[Measurement]) -> Rates:
    """Rates that explain measurements and otherwise keep the proportions of what was assumed.

    Least squares of relative errors over rates that are not negative. First all are scaled alike,
    by the median ratio; then each is drawn towards its scaled value with the weight of `_PRIOR`.
    """
    if not measured:
        return assumed
    prior = np.array([assumed.per_flop, assumed.per_written, assumed.per_byte, assumed.per_row])
    work = np.array([[one.flops, one.written, one.traffic, one.rows] for one in measured])
    seconds = np.array([one.seconds for one in measured])
    scale = median((seconds / (work @ prior)).tolist())
    unit = work * prior * scale / seconds[:, None]  # each row sums to about one
    # |unit @ x - 1|² + prior |x - 1|² over x >= 0, x being a rate by its scaled assumption
    normal = unit.T @ unit + _PRIOR * np.eye(len(prior))
    wanted = unit.sum(axis=0) + _PRIOR
    found = np.ones(len(prior))
    for _ in range(300):  # coordinate descent: the problem is convex and has four unknowns
        for i in range(len(prior)):
            rest = wanted[i] - normal[i] @ found + normal[i, i] * found[i]
            found[i] = max(0.0, rest / normal[i, i])
    rates = found * prior * scale
    return replace(
        assumed,
        per_flop=float(rates[0]),
        per_written=float(rates[1]),
        per_byte=float(rates[2]),
        per_row=float(rates[3]),
        measurements=len(measured),
    )


# ---- where it is kept ---------------------------------------------------------------------------


def device_name(device: Device) -> str:
    """What a calibration is kept under: the GPU's kind, or this machine's processor."""
    if device.is_gpu:
        return device.name
    return f"{_processor()} x {os.cpu_count() or 1}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_machine() -> tuple[float, float]:
    """Operations and bytes a second of this machine's processor, in a third of a second."""
    size = 768
    left = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    right, big = left.copy(), np.ones(2**24, np.float32)
    left @ right
    flops = max(2 * size**3 / _timed(lambda: left @ right) for _ in range(8))
    return flops, max(2 * big.nbytes / _timed(big.copy) for _ in range(4))


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def calibration_file(device: str, *, cache_dir: str | None = None) -> Path:
    """Where a device's calibration is kept: in the user's cache, or where an environment says."""
    name = "".join(c if c.isalnum() else "-" for c in device).strip("-").lower()
    if own := os.environ.get("REASONEMBED_PLANNER"):
        return Path(own).expanduser() / f"{name}.json"
    chosen = cache_dir or os.environ.get("REASONEMBED_CACHE") or "~/.cache/reasonembed"
    return Path(chosen).expanduser() / "planner" / f"{name}.json"


def read_calibration(file: Path, *, device: str) -> Calibration:
    """What is kept there; an empty one where nothing or nothing readable is."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return Calibration(
            device=device,
            measured=tuple(data["measured"]) if data.get("measured") else None,
            measurements=tuple(Measurement(**one) for one in data["measurements"]),
            seen={name: Seen(**one) for name, one in data["seen"].items()},
            yields=Yields(**data["yields"]) if data.get("yields") else None,
            made=data["made"],
        )
    except (OSError, ValueError, TypeError, KeyError):
        return Calibration(device)


def write_calibration(calibration: Calibration, file: Path) -> None:
    """Writes it, whole or not at all.

    Raises:
        OSError: The cache cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
        json.dump(asdict(calibration), scratch, indent=1)
    Path(scratch.name).replace(file)
