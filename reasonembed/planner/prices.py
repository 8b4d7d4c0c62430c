"""What nodes are and cost, from a dated file: the packaged one or the user's own."""

from __future__ import annotations

import datetime
import os
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, model_validator

from reasonembed.config import RunConfig, Strict, validated
from reasonembed.errors import ConfigError
from reasonembed.planner.formulae import Device

THIS_MACHINE = "this-machine"
OLD_DAYS = 90
_CPU_FLOPS, _CPU_BANDWIDTH = 64e9, 8e9  # a core, fp32; a machine; a probe measures better
Price = Annotated[float, Field(ge=0)]
Size = Annotated[float, Field(gt=0)]


class Accelerator(Strict):
    """A kind of GPU, by its data sheet."""

    tflops: Size
    bandwidth_tb: Size
    memory_gb: Size
    interconnect_gb: Size = 12.0


class Shape(Strict):
    """A kind of node."""

    node: str
    accelerator: str | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    cpus: Annotated[int, Field(gt=0)]
    memory_gb: Size = 16.0
    disk_gb: Size = 100.0
    on_demand: Price
    spot: Price
    source: dict[str, str] = Field(default_factory=dict)


class Prices(Strict):
    """A file of prices: when it was written, what there is, and what it costs an hour."""

    date: datetime.date
    currency: str = "USD"
    accelerators: dict[str, Accelerator] = Field(default_factory=dict)
    shapes: dict[str, Shape]

    @model_validator(mode="after")
    def _kinds(self) -> Prices:
        for name, shape in self.shapes.items():
            if shape.gpus and shape.accelerator not in self.accelerators:
                raise ValueError(
                    f"shapes.{name}: accelerator {shape.accelerator!r} is not among accelerators: "
                    f"{', '.join(self.accelerators)}"
                )
        return self

    @cached_property
    def all_shapes(self) -> dict[str, Shape]:
        """With this machine, which costs nothing unless the file says so."""
        cores = os.cpu_count() or 1
        here = Shape(node="this machine", cpus=cores, memory_gb=_memory_gb(), on_demand=0, spot=0)
        return {THIS_MACHINE: here} | self.shapes

    def shape(self, name: str) -> Shape:
        """A kind of node by its name.

        Raises:
            ConfigError: There is none of that name.
        """
        if name not in self.all_shapes:
            raise ConfigError(
                f"no cluster shape {name!r} in the prices of {self.date}; there are: "
                f"{', '.join(self.all_shapes)}; or give a file by runtime.cost.prices"
            )
        return self.all_shapes[name]

    def device(self, name: str) -> Device:
        """One accelerator of a shape, or all cores of one without."""
        shape = self.shape(name)
        if not shape.gpus or shape.accelerator is None:
            memory = shape.memory_gb * 1e9
            return Device("cpu", shape.cpus * _CPU_FLOPS, _CPU_BANDWIDTH, memory, is_gpu=False)
        kind = self.accelerators[shape.accelerator]
        return Device(
            shape.accelerator,
            kind.tflops * 1e12,
            kind.bandwidth_tb * 1e12,
            kind.memory_gb * 1e9,
            kind.interconnect_gb * 1e9,
        )

    def warning(self, *, today: datetime.date | None = None) -> str | None:
        """What to say of the file's age; None while it is young."""
        days = ((today or datetime.datetime.now(datetime.UTC).date()) - self.date).days
        if days <= OLD_DAYS:
            return None
        return f"prices are of {self.date}, {days} days ago; give newer ones by runtime.cost.prices"


def read_prices(path: str | None = None) -> Prices:
    """The packaged prices, or those of a file.

    Raises:
        ConfigError: There is no such file, or it is not of this form.
    """
    if path is None:
        text = files("reasonembed.planner").joinpath("data/prices.yaml").read_text("utf-8")
        where = "the packaged prices"
    else:
        if not Path(path).is_file():
            raise ConfigError(f"runtime.cost.prices: no file {path}")
        text, where = _text_of(Path(path)), path
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must hold a mapping, it holds {type(data).__name__}")
    return validated(Prices, data, where=where)


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"runtime.cost.prices: {file} is not UTF-8 ({error}); save it as UTF-8"
        ) from error


def chosen_shape(config: RunConfig) -> str:
    """The shape that is planned for: the configuration's, or one that has what it asks for."""
    if config.runtime.cost.shape:
        return config.runtime.cost.shape
    return "aws-h100x8" if uses_gpus(config) else THIS_MACHINE


def uses_gpus(config: RunConfig) -> bool:
    """Whether any stage of a configuration asks for a GPU."""
    runtime = config.runtime
    pools = (runtime.generate, runtime.embed, runtime.annotate, runtime.rewrite, runtime.filter)
    return runtime.train.use_gpu or any(pool.num_gpus for pool in pools)


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
