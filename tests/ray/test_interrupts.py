"""A signal ends a driver in time, with its last words, whatever it waits for."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ray_jobs.interrupts import interruptible
from reasonembed.errors import ClusterError, Interrupted, ReasonEmbedError
from tests.ray.processes import ROOT

_DRIVER = """
import os, sys, time
from pathlib import Path
from ray_jobs.interrupts import interruptible
from reasonembed.errors import Interrupted, explain
noted = Path(sys.argv[1])
try:
    with interruptible(lambda message: noted.write_text(message), stderr=2) as interrupts:
        try:
            print("ready", flush=True)
            while True:
                time.sleep(0.05)
        finally:
            time.sleep(float(sys.argv[2]))
except Interrupted as error:
    message, code = explain(error)
    sys.stderr.write(message)
    sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("unwinding_s", [0, 60])
def test_a_driver_ends_in_time(tmp_path, number, unwinding_s):
    noted = tmp_path / "noted"
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(noted), str(unwinding_s)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert driver.stdout.readline() == "ready\n"
    began = time.monotonic()
    driver.send_signal(number)
    _, said = driver.communicate(timeout=30)
    assert driver.returncode == 75
    assert f"Ended by {number.name}" in said and "Traceback" not in said
    assert noted.exists() is (unwinding_s > 0)
    assert time.monotonic() - began < 10  # two seconds, on a machine that does nothing else


def test_a_signal_is_the_cause_of_what_is_made_of_it():
    with (
        pytest.raises(Interrupted, match="Ended by SIGTERM"),
        interruptible(lambda message: None, stderr=2),
    ):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except ReasonEmbedError as error:
            raise ClusterError(f"run_dir: {error}") from None
    with (
        pytest.raises(ClusterError, match="by itself"),
        interruptible(lambda message: None, stderr=2),
    ):
        raise ClusterError("by itself")
