"""One exception tree for what a user can put right.

Programming errors stay `assert` or built-in exceptions; everything below is shown on the command
line as one message without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator


class ReasonEmbedError(Exception):
    """Base of every error whose message tells a user what to change."""


class ConfigError(ReasonEmbedError):
    """A configuration file or override is wrong; the message holds the path of the key."""


class SchemaError(ReasonEmbedError):
    """A table does not have the declared columns or types of its artifact."""


class CorpusError(ReasonEmbedError):
    """A corpus cannot be read as given; the message names file and line or row."""


class ModelError(ReasonEmbedError):
    """Weights cannot be found, verified or loaded."""


class DriftError(ReasonEmbedError):
    """An artifact was made with another configuration; the message names the fields."""


class StorageError(ReasonEmbedError):
    """A run directory cannot be written: full, read-only, missing or locked."""


class AccessError(StorageError):
    """The storage refuses, or is not there; to start again helps only when that is put right."""


class QualityError(ReasonEmbedError):
    """A stage's share of failed rows passed its limit."""


class EvaluationError(ReasonEmbedError):
    """A run, qrels or collection is inconsistent."""


class ClusterError(ReasonEmbedError):
    """The cluster cannot run what is asked; the message says what is missing, by resource."""


class BudgetError(ReasonEmbedError):
    """The run has cost, or will cost, more than it may; what is committed stays."""


class Interrupted(ReasonEmbedError):
    """Somebody, or a machine that leaves, ended the run; started again, it goes on."""


EXIT_FAILED, EXIT_CONFIG, EXIT_QUALITY, EXIT_BUDGET, EXIT_RESUME = 1, 2, 3, 4, 75
"""Exit codes: look what failed; change configuration or cluster; too many rows failed; the money is
spent; start again, it goes on."""


def explain(error: BaseException) -> tuple[str, int]:
    """The message for a person, and the exit code."""
    known = cause_of(error)
    if known is not None:
        code = next((code for kind, code in _CODES if isinstance(known, kind)), EXIT_FAILED)
        return str(known), code
    lost = next(filter(_is_loss, _chain(error)), None)
    if lost is None:
        return f"{type(error).__name__}: {error}", EXIT_FAILED
    return (
        f"The cluster lost a process or a machine: {type(lost).__name__}: {lost}\n"
        "What is committed stays; start again, it goes on.",
        EXIT_RESUME,
    )


_CODES = (
    ((ConfigError, DriftError, ClusterError, AccessError), EXIT_CONFIG),
    (QualityError, EXIT_QUALITY),
    (BudgetError, EXIT_BUDGET),
    ((Interrupted, StorageError), EXIT_RESUME),
)

# By name, because nothing here may import Ray. Its errors for what our own code does (a task or a
# constructor that raises, a full object store) are not among them.
_LOSSES = frozenset(
    {
        "ActorDiedError",
        "ActorPlacementGroupRemoved",
        "ActorUnavailableError",
        "LocalRayletDiedError",
        "NodeDiedError",
        "ObjectLostError",
        "OutOfDiskError",
        "OutOfMemoryError",
        "RpcError",
        "TaskPlacementGroupRemoved",
        "WorkerCrashedError",
    }
)
_LOST_CONNECTION = ("GCS", "Broken pipe", "UNAVAILABLE", "Connection refused")


def _is_loss(error: BaseException) -> bool:
    """Whether the cluster failed and not what ran on it; torch has an OutOfMemoryError, too."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("ray.")}
    if names & _LOSSES:
        return not getattr(error, "actor_init_failed", False)
    return "RaySystemError" in names and any(sign in str(error) for sign in _LOST_CONNECTION)


def is_expected(error: BaseException) -> bool:
    """Whether the message alone is enough, without a traceback."""
    return cause_of(error) is not None


def cause_of(error: BaseException) -> ReasonEmbedError | None:
    """The first error of ours in a chain of causes; None where there is none.

    A cluster wraps what its workers raise, and C++ code in which a signal arrives what that raises.
    """
    return next((one for one in _chain(error) if isinstance(one, ReasonEmbedError)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it wraps, each once, the outer ones first."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += _inner(one)


def _inner(error: BaseException) -> list[BaseException]:
    """What an error wraps: Ray Train keeps its workers' errors in a mapping, Ray one in `cause`."""
    failures = getattr(error, "worker_failures", None) or {}
    named = ("cause", "controller_failure", "__cause__", "__context__")
    inner = [*failures.values(), *(getattr(error, name, None) for name in named)]
    return [one for one in inner if isinstance(one, BaseException)]
