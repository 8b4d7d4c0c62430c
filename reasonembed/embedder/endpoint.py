"""Vectors from an OpenAI-compatible embedding endpoint (`/v1/embeddings`)."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonembed.config import EndpointRetriever
from reasonembed.errors import ModelError
from reasonembed.storage import Place

# With the client's own growing pauses or those that `Retry-After` asks for, on 408, 409, 429, 5xx
# and lost connections.
_MAX_RETRIES = 5
_BATCH_TEXTS = 64
_TRIES = 2  # of a request whose answer cannot be used, before its texts are sent in two halves
_REFUSED = (400, 413, 422)  # what servers say of too many or too long texts, and of others
_TOO_LARGE = 413
# "Too long", or both what is counted and its limit: "invalid tokens" and a filter's limit are none.
_TOO_LONG = re.compile(r"\btoo (long|large|many tokens)\b", re.IGNORECASE)
_COUNTED = re.compile(r"\b(tokens|characters|length|context (size|window))\b", re.IGNORECASE)
_LIMIT = re.compile(r"exceed|maximum|less than|fewer than|at most|longer than", re.IGNORECASE)
_MIN_CHARS = 256  # a text that is refused at this length is refused for something else
_SHOWN = 3  # texts named in a warning
PROBE_FILE = "_endpoint.json"
_PROBE = "The moon raises the tides, and the sun does so too, at less than half the height."
_SAME_MODEL = 0.99  # precision and batches of a server move a cosine by thousandths at most

log = logging.getLogger(__name__)

_Vectors = NDArray[np.float32]


class _Unusable(Exception):
    """A request brought nothing that can be trusted; with fewer texts it may."""


class _TooLong(_Unusable):
    """A request was refused for its length."""


@dataclass(frozen=True)
class _Call:
    """What is put around every text of a call, and what had to be cut of which.

    Attributes:
        before: Of the template.
        after: Of the template.
        cut: Beginning and both lengths in characters, of each text that the server found too long.
    """

    before: str = ""
    after: str = ""
    cut: list[tuple[str, int, int]] = field(default_factory=list)


class EndpointEmbedder:
    """Embeds texts by asking a server; the same two calls as `Embedder`.

    An answer is used whole or not at all: one vector for every text, each at a place of its own,
    finite and not zero. Any other is asked for again, then by halves, down to the one text that
    the server cannot embed, which is an error. Servers count tokens, which nobody can here: a text
    that is refused alone because of its length loses its second half until the server takes it,
    a warning says how many did, and `cut` holds those of the last call.

    Args:
        config: Model name, query template, dimension, limit of a text.
        base_url: Of the server, up to `/v1`.
        api_key: Sent as bearer token.
        timeout_s: Of one request.
        max_retries: Of a request that failed on its way, before the stage fails.
        pause_s: Before a request with an unusable answer is sent again.
    """

    def __init__(
        self,
        config: EndpointRetriever,
        *,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        max_retries: int = _MAX_RETRIES,
        pause_s: float = 1.0,
    ) -> None:
        import openai

        self._config, self._base_url, self._pause_s = config, base_url, pause_s
        self.cut: frozenset[str] = frozenset()
        self._client = openai.OpenAI(
            api_key=api_key or "none",
            base_url=base_url,
            timeout=timeout_s,
            max_retries=max_retries,
        )
        self._failures: tuple[type[openai.APIError], ...] = (openai.APIError,)

    def encode_queries(self, texts: Sequence[str], *, instruction: str = "") -> _Vectors:
        """Vectors of queries, float32 [N, D]; the template is applied here.

        Raises:
            ModelError: The server cannot be reached, refuses, or answers something else.
        """
        # Not `str.format`, which would read braces in a query.
        before, _, after = self._config.query_template.partition("{query}")
        before, after = (one.replace("{instruction}", instruction) for one in (before, after))
        return self._encode(texts, _Call(before, after))

    def encode_documents(self, texts: Sequence[str]) -> _Vectors:
        """Vectors of documents, float32 [N, D].

        Raises:
            ModelError: The server cannot be reached, refuses, or answers something else.
        """
        return self._encode(texts, _Call())

    def _encode(self, given: Sequence[str], call: _Call) -> _Vectors:
        # Servers refuse an empty text, and corpora hold some.
        texts = [text[: self._config.max_chars] or " " for text in given]
        vectors_ND = np.empty((len(texts), self._config.dimension), dtype=np.float32)
        for start in range(0, len(texts), _BATCH_TEXTS):
            part = slice(start, start + _BATCH_TEXTS)
            vectors_ND[part] = self._by_halves(texts[part], call)
        shortened = {text for text, _, _ in call.cut}
        self.cut = frozenset(
            own for own, text in zip(given, texts, strict=True) if text in shortened
        )
        if call.cut:
            shown = "; ".join(
                f"{text[:60]!r} from {whole} to {kept} characters"
                for text, whole, kept in call.cut[:_SHOWN]
            )
            log.warning(
                "%s: %d of %d texts were too long for the server and were cut: %s",
                *(self._config.model, len(call.cut), len(texts), shown),
            )
        return vectors_ND

    def _by_halves(self, texts: list[str], call: _Call) -> _Vectors:
        try:
            return self._ask(texts, call)
        except _Unusable as error:
            if len(texts) == 1:
                return self._shorter(texts[0], call, error)
        half = len(texts) // 2
        return np.concatenate(
            [self._by_halves(part, call) for part in (texts[:half], texts[half:])]
        )

    def _shorter(self, text: str, call: _Call, error: _Unusable) -> _Vectors:
        """The vector of the beginning of a text that was refused alone because of its length."""
        part = text
        while isinstance(error, _TooLong) and len(part) // 2 >= _MIN_CHARS:
            part = part[: len(part) // 2]
            try:
                vector_1D = self._ask([part], call)
            except _Unusable as again:
                error = again
            else:
                call.cut.append((text, len(text), len(part)))
                return vector_1D
        start = f"{text[:60]!r}{' …' if len(text) > 60 else ''}"
        lengths = f"{len(text)} characters" + (f", nor for its first {len(part)}" * (part != text))
        raise self._failed(f"no vector for a text of {lengths}, {start}: {error}") from error

    def _ask(self, texts: list[str], call: _Call) -> _Vectors:
        whole = [f"{call.before}{text}{call.after}" for text in texts]
        for is_last in [False] * (_TRIES - 1) + [True]:
            try:
                return self._read(self._request(whole), count=len(whole))
            except _Unusable as error:
                if is_last or isinstance(error.__cause__, self._failures):
                    raise  # what was refused once will be again
            time.sleep(self._pause_s)
        raise AssertionError("the last try returns or raises")

    def _request(self, texts: list[str]) -> Any:
        try:
            return self._client.embeddings.create(
                model=self._config.model, input=texts, encoding_format="float"
            )
        except json.JSONDecodeError as error:
            raise _Unusable(f"the answer is not JSON: {error}") from error
        except self._failures as error:
            reason, status = f"{type(error).__name__}: {error}", getattr(error, "status_code", None)
            if status not in _REFUSED:
                raise self._failed(reason) from error
            raise (_TooLong if _is_length(status, reason) else _Unusable)(reason) from error

    def _read(self, answer: Any, *, count: int) -> _Vectors:
        try:
            rows = {item.index: item.embedding for item in answer.data}
            given = len(answer.data)
            vectors_ND = np.array([rows[i] for i in range(count)])
        except (TypeError, AttributeError, KeyError, ValueError) as error:  # 200, and nonsense
            raise _Unusable(f"the answer is no list of {count} vectors: {error!r}") from error
        if given != count or vectors_ND.ndim != 2 or vectors_ND.dtype.kind not in "fi":
            raise _Unusable(f"the answer is no list of {count} vectors")
        if vectors_ND.shape[1] != self._config.dimension:
            raise self._failed(
                f"its vectors have {vectors_ND.shape[1]} dimensions, the configuration says "
                f"{self._config.dimension}"
            )
        with np.errstate(over="ignore"):  # becomes infinite, which is refused here
            vectors_ND = vectors_ND.astype(np.float32)
        if not (np.isfinite(vectors_ND).all(axis=1) & vectors_ND.any(axis=1)).all():
            raise _Unusable("a vector is zero or not finite")
        return vectors_ND

    def _failed(self, reason: str) -> ModelError:
        return ModelError(f"embedding endpoint {self._base_url} ({self._config.model}): {reason}")


def check_same_model(embedder: EndpointEmbedder, folder: Place, *, address: str) -> None:
    """Makes sure that a server gives the vectors that lie in a folder, as one text tells.

    Nobody sees the weights behind an address, so the first server's vector of a fixed text is kept
    beside the vectors, with the addresses that gave it.

    Args:
        embedder: Asks the server.
        folder: Of vectors under the same model name.
        address: Of the server.

    Raises:
        ModelError: The server cannot be asked, or gives clearly another vector.
        StorageError: The folder cannot be read or written.
    """
    file, own_D = folder / PROBE_FILE, embedder.encode_documents([_PROBE])[0]
    kept = {"text": _PROBE, "vector": own_D.tolist(), "addresses": []}
    if raw := file.read():
        kept = json.loads(raw)
    kept_D = np.array(kept["vector"], np.float32)
    cosine = float(own_D @ kept_D / np.linalg.norm(own_D) / np.linalg.norm(kept_D))
    if cosine < _SAME_MODEL:
        raise ModelError(
            f"{address} is not the model whose vectors lie in {folder}, made by "
            f"{', '.join(kept['addresses'])}: of one text the vectors have a cosine of "
            f"{cosine:.4f}, below {_SAME_MODEL}. Ask the same model, or delete that folder"
        )
    if address not in kept["addresses"]:
        kept["addresses"].append(address)
        file.write(json.dumps(kept).encode())


def addresses_of(folder: Place) -> list[str]:
    """The servers that gave the vectors in a folder; see `check_same_model`."""
    raw = (folder / PROBE_FILE).read()
    return list(json.loads(raw)["addresses"]) if raw else []


def _is_length(status: int | None, said: str) -> bool:
    """Whether a server refused a request because it is too long."""
    has_limit = bool(_COUNTED.search(said) and _LIMIT.search(said))
    return status == _TOO_LARGE or bool(_TOO_LONG.search(said)) or has_limit
