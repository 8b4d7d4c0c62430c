"""Backbone, pooling, tokenisation contract and encoding.

Importing this package does not load torch; `Embedder` does, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reasonembed.embedder.contract import (
    Attention,
    Pooling,
    TokenisationContract,
    resolve_contract,
)
from reasonembed.embedder.tokenisation import Role

if TYPE_CHECKING:
    from reasonembed.embedder.encode import Embedder

__all__ = ["Attention", "Embedder", "Pooling", "Role", "TokenisationContract", "resolve_contract"]


def __getattr__(name: str) -> Any:
    if name == "Embedder":
        from reasonembed.embedder.encode import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
