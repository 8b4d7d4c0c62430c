"""What `reasonembed plan` does, but for starting Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from reasonembed.config import RunConfig
from reasonembed.errors import StorageError
from reasonembed.planner.calibration import (
    Calibration,
    calibration_file,
    device_name,
    measure_machine,
    read_calibration,
    write_calibration,
)
from reasonembed.planner.estimate import Plan, make_plan
from reasonembed.planner.formulae import Device
from reasonembed.planner.inputs import read_inputs
from reasonembed.planner.observe import observed
from reasonembed.planner.prices import chosen_shape, read_prices
from reasonembed.planner.show import plan_view
from reasonembed.run import Run


def plan(config: RunConfig, *, shape: str | None = None, documents: int | None = None) -> Plan:
    """The plan of a configuration by everything that is known.

    Args:
        config: Of the run.
        shape: See `make_plan`.
        documents: How many there are, where the corpus is elsewhere.

    Raises:
        ConfigError: Something is not known; the message says what.
    """
    prices = read_prices(config.runtime.cost.prices)
    name = shape or chosen_shape(config)
    known = calibration(config, prices.device(name))
    inputs = read_inputs(config, documents=documents)
    return make_plan(config, inputs, prices=prices, calibration=known, shape=shape)


def calibration(config: RunConfig, device: Device) -> Calibration:
    """What is known of a kind of device; of this machine its speed, which is measured now."""
    name = device_name(device)
    file = calibration_file(name, cache_dir=config.runtime.cache_dir)
    found = read_calibration(file, device=name)
    if found.measured is None and not device.is_gpu:
        found = replace(found, measured=measure_machine())
    return found


def learn(run: Run, config: RunConfig, *, shape: str | None = None) -> Calibration:
    """Adds what a run shows to what is known of its devices, and keeps it.

    Args:
        run: Finished, or as far as it came.
        config: Of the run that is planned; decides the kind of device.
        shape: See `make_plan`.

    Raises:
        StorageError: The cache cannot be written.
    """
    prices = read_prices(config.runtime.cost.prices)
    device = prices.device(shape or chosen_shape(config))
    found = observed(run, calibration(config, device), device, read_inputs(run.config))
    file = calibration_file(found.device, cache_dir=config.runtime.cache_dir)
    try:
        write_calibration(found, file)
    except OSError as error:
        raise StorageError(f"cannot keep what was measured in {file}: {error}") from error
    return found


def show(found: Plan, *, console: Console, say: Callable[[str], None], as_json: bool) -> None:
    """Prints a plan."""
    if as_json:
        say(json.dumps(found.to_json(), indent=1))
    else:
        console.print(plan_view(found))
