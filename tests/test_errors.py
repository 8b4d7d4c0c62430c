"""What each kind of failure says, and its exit code."""

import pytest
import ray.exceptions as lost

from reasonembed.errors import (
    BudgetError,
    ClusterError,
    ConfigError,
    Interrupted,
    QualityError,
    StorageError,
    explain,
    is_expected,
)


def wrapped(inner):
    outer = RuntimeError("a worker failed")
    outer.__cause__ = inner
    return outer


def of_workers(*inner):
    error = RuntimeError("training failed")
    error.worker_failures = dict(enumerate(inner))
    return error


def task_error(cause):
    return lost.RayTaskError("map", "Traceback: …", cause)


OURS = [
    (ConfigError, 2),
    (ClusterError, 2),
    (QualityError, 3),
    (BudgetError, 4),
    (Interrupted, 75),
    (StorageError, 75),
]


@pytest.mark.parametrize(("kind", "code"), OURS)
def test_our_errors_have_their_codes_wherever_they_were_raised(kind, code):
    for error in (kind("why"), wrapped(kind("why")), of_workers(ValueError(), kind("why"))):
        assert explain(error) == ("why", code) and is_expected(error)
    assert explain(task_error(kind("why")).as_instanceof_cause())[1] == code


LOSSES = [
    lost.ActorDiedError(),
    lost.ActorUnavailableError("gone", None),
    lost.NodeDiedError("gone"),
    lost.ObjectLostError("ab", None, "put"),
    lost.OutOfMemoryError("killed by the memory monitor"),
    lost.WorkerCrashedError(),
    lost.LocalRayletDiedError(),
    lost.RpcError("unavailable"),
    lost.RaySystemError("Failed to connect to GCS within 60 seconds"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda error: type(error).__name__)
def test_what_the_cluster_lost_is_started_again(loss):
    for error in (loss, wrapped(loss), of_workers(ValueError("peer closed"), loss)):
        message, code = explain(error)
        assert code == 75 and type(loss).__name__ in message and "goes on" in message
        assert not is_expected(error)  # the traceback is shown all the same


def test_what_our_code_or_the_machine_did_is_a_failure():
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    init = lost.ActorDiedError(task_error(ValueError("no such model")))
    for error in (
        ValueError("x"),
        task_error(ValueError("x")),
        init,
        OutOfMemoryError("CUDA"),
        lost.RaySystemError("No module named 'x'"),
    ):
        assert explain(error)[1] == 1, error


def test_a_signal_that_arrives_in_foreign_code_is_still_one():
    wrapped_by_c = SystemError("returned a result with an exception set")
    wrapped_by_c.__cause__ = Interrupted("Ended by SIGTERM")
    assert explain(wrapped_by_c) == ("Ended by SIGTERM", 75)
