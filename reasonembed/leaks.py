"""Refuses what looks like a secret in places that are written down: configurations, job settings.

A configuration is saved beside every artifact, and a job's environment is shown by the dashboard to
whoever reaches it; keys come from the environment of the cluster's own machines instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from reasonembed.errors import ConfigError
from reasonembed.storage import KEY_IN_QUERY

_VALUES = re.compile(
    r"""
    \b(sk|rk)-[A-Za-z0-9_-]{20,}        # OpenAI, Anthropic and alike
    | \bhf_[A-Za-z0-9]{30,}             # Hugging Face
    | \b(AKIA|ASIA)[A-Z0-9]{16}\b       # AWS
    | \bAIza[A-Za-z0-9_-]{35}           # Google
    | \bgh[pousr]_[A-Za-z0-9]{36,}      # GitHub
    | \bxox[abprs]-[A-Za-z0-9-]{10,}    # Slack
    | -----BEGIN[ A-Z]*PRIVATE[ ]KEY-----
    | \bBearer\s+[A-Za-z0-9._~+/-]{20,}
    | \beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.
    | ://[^/\s:@]*:[^/\s@]+@            # a password in an address
    | """
    + KEY_IN_QUERY,
    re.VERBOSE,
)
_NAMES = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|SECRET|SECRET_KEY|PRIVATE_KEY|PASSWORD|PASSWD|TOKEN|CREDENTIALS?)$",
    re.IGNORECASE,
)
_CURE = (
    "; it would be saved with the run and shown by the dashboard. Set it in the environment of the "
    "cluster's machines (a Kubernetes Secret, an instance's role, head and worker start commands)"
)


def check_no_secrets(data: Any, *, where: str, by_name: bool = False) -> None:
    """Refuses a mapping that holds a secret.

    Args:
        data: A configuration, or a runtime environment; its strings are looked at, at any depth.
        where: What it is, for the message.
        by_name: Also refuses what is named as secrets are (`OPENAI_API_KEY`), whatever it holds.

    Raises:
        ConfigError: Something in it looks like a secret; the message names the place, never the
            value.
    """
    if found := sorted(set(_suspects(data, path="", by_name=by_name))):
        raise ConfigError(f"{where}: {', '.join(found)} looks like a secret{_CURE}")


def _suspects(data: Any, *, path: str, by_name: bool) -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            inner = f"{path}.{key}" if path else str(key)
            if by_name and isinstance(value, str) and value and _NAMES.search(str(key)):
                yield inner
            yield from _suspects(value, path=inner, by_name=by_name)
    elif isinstance(data, list | tuple):
        for number, value in enumerate(data):
            yield from _suspects(value, path=f"{path}.{number}", by_name=by_name)
    elif isinstance(data, str) and _VALUES.search(data):
        yield path
