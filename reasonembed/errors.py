"""One exception tree for what a user can put right.

Programming errors stay `assert` or built-in exceptions; everything below is shown on the command
line as one message without a traceback.
"""


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


class QualityError(ReasonEmbedError):
    """A stage's share of failed rows passed its limit."""


class EvaluationError(ReasonEmbedError):
    """A run, qrels or collection is inconsistent."""


EXIT_FAILED, EXIT_CONFIG, EXIT_QUALITY = 1, 2, 3
"""Exit codes: run again, it goes on; change the configuration; too many rows failed."""


def explain(error: BaseException) -> tuple[str, int]:
    """The message for a person, and the exit code."""
    known = _known(error)
    if known is None:
        return f"{type(error).__name__}: {error}", EXIT_FAILED
    if isinstance(known, (ConfigError, DriftError)):
        return str(known), EXIT_CONFIG
    return str(known), EXIT_QUALITY if isinstance(known, QualityError) else EXIT_FAILED


def is_expected(error: BaseException) -> bool:
    """Whether the message alone is enough, without a traceback."""
    return _known(error) is not None


def _known(error: BaseException | None) -> ReasonEmbedError | None:
    """The first error of ours in a chain of causes; a cluster wraps what its workers raise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ReasonEmbedError):
            return error
        error = _inner(error)
    return None


def _inner(error: BaseException) -> BaseException | None:
    """What an error wraps: Ray Train keeps its workers' errors in a mapping, Ray one in `cause`."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return next(iter(failures.values()), None)
    for name in ("cause", "controller_failure", "__cause__", "__context__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return inner
    return None
