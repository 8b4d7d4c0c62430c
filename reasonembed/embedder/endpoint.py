"""Vectors from an OpenAI-compatible embedding endpoint (`/v1/embeddings`)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reasonembed.config import EndpointRetriever
from reasonembed.errors import ModelError

_MAX_RETRIES = 5  # with the client's own growing pauses, on 408, 409, 429, 5xx and lost connections
_BATCH_TEXTS = 64


class EndpointEmbedder:
    """Embeds texts by asking a server; the same two calls as `Embedder`.

    Args:
        config: Model name, query template, dimension.
        base_url: Of the server, up to `/v1`.
        api_key: Sent as bearer token.
        timeout_s: Of one request.
        max_retries: Of one request, before the stage fails.
    """

    def __init__(
        self,
        config: EndpointRetriever,
        *,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        max_retries: int = _MAX_RETRIES,
    ) -> None:
        import openai

        self._config, self._base_url = config, base_url
        self._client = openai.OpenAI(
            api_key=api_key or "none",
            base_url=base_url,
            timeout=timeout_s,
            max_retries=max_retries,
        )
        self._errors: tuple[type[Exception], ...] = (openai.APIError, json.JSONDecodeError)

    def encode_queries(self, texts: Sequence[str], *, instruction: str = "") -> NDArray[np.float32]:
        """Vectors of queries, float32 [N, D]; the template is applied here.

        Raises:
            ModelError: The server cannot be reached, refuses, or answers something else.
        """
        # Not `str.format`, which would read braces in a query.
        before, _, after = self._config.query_template.partition("{query}")
        before, after = (one.replace("{instruction}", instruction) for one in (before, after))
        asked = [f"{before}{text}{after}" for text in texts]
        return self.encode_documents(asked)

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of documents, float32 [N, D].

        Raises:
            ModelError: The server cannot be reached, refuses, or answers something else.
        """
        vectors_ND = np.empty((len(texts), self._config.dimension), dtype=np.float32)
        for start in range(0, len(texts), _BATCH_TEXTS):
            part = slice(start, start + _BATCH_TEXTS)
            vectors_ND[part] = self._ask(texts[part])
        return vectors_ND

    def _ask(self, texts: Sequence[str]) -> NDArray[np.float32]:
        try:
            answer = self._client.embeddings.create(
                model=self._config.model, input=list(texts), encoding_format="float"
            )
            rows = {item.index: item.embedding for item in answer.data}
            vectors_ND = np.array([rows[i] for i in range(len(texts))], dtype=np.float32)
        except self._errors as error:
            raise self._failed(f"{type(error).__name__}: {error}") from error
        except (TypeError, AttributeError, KeyError, ValueError) as error:  # 200, and nonsense
            raise self._failed(
                f"the answer is no list of {len(texts)} vectors: {error!r}"
            ) from error
        if vectors_ND.shape[1:] != (self._config.dimension,):
            raise self._failed(
                f"its vectors have shape {vectors_ND.shape[1:]}, mine.also says dimension "
                f"{self._config.dimension}"
            )
        return vectors_ND

    def _failed(self, reason: str) -> ModelError:
        return ModelError(f"embedding endpoint {self._base_url} ({self._config.model}): {reason}")
