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
