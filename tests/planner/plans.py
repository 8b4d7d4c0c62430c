"""What the tests of the planner share: configurations, inputs, an empty calibration."""

from reasonembed.config import load, parse
from reasonembed.planner.calibration import Calibration
from reasonembed.planner.estimate import make_plan
from reasonembed.planner.inputs import Inputs
from reasonembed.planner.prices import read_prices

INPUTS = Inputs(
    documents=57_359,
    distinct=49_434,
    chars=(700,) * 20,
    eligible=0.5,
    queries=103,
    origin="a test",
)


def config(name="bright-qwen3-8b", **changes):
    """A packaged configuration with dotted changes."""
    sets = [f"{key}={value}" for key, value in changes.items()]
    return load(f"configs/{name}.yaml", overrides=[*sets, "run_dir=/tmp/no-such-run"])


def changed(name="bright-qwen3-8b", **sections):
    """The same with `runtime__cost__shape=...` for keys."""
    return config(name, **{key.replace("__", "."): value for key, value in sections.items()})


def plan(settings=None, *, shape="aws-h100x8", inputs=INPUTS, known=None):
    """A plan that rests on nothing measured."""
    return make_plan(
        settings or config(),
        inputs,
        prices=read_prices(),
        calibration=known or Calibration("H100"),
        shape=shape,
    )


__all__ = ["INPUTS", "changed", "config", "parse", "plan"]
