"""The embeddings request of the OpenAI protocol, our extensions, and its one error shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from reasonembed.serving.protocol import EmbedItem, InputType, ServedModel, Truncate

_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_INPUTS = 2_048  # as OpenAI's own service


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: For the caller.
        param: The field of the request that it is about.
        code: Stable name for programs, where the protocol has one.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The protocol's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class EmbeddingRequest(BaseModel):
    """Body of `POST /v1/embeddings`; the last three fields are extensions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, texts, the token ids of a text, or those of several"
    )
    model: str
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64 holds little-endian float32; both give the same bits"
    )
    dimensions: int | None = Field(None, description="must be the model's own, if given")
    user: str | None = None
    input_type: InputType = Field(
        "document", description="extension; a query is embedded with its instruction"
    )
    instruction: str | None = Field(
        None, description="extension; what the queries ask for, in place of the model's default"
    )
    truncate: Truncate = Field(
        "none", description="extension; `end` cuts inputs over the limit, `none` refuses them"
    )

    def items(self, model: ServedModel) -> list[EmbedItem]:
        """The inputs, checked against the model.

        Raises:
            ApiError: 404 for another model; 400 for values that the model cannot serve.
        """
        self._check_options(model)
        contents = _contents(self.input)
        if not 1 <= len(contents) <= MAX_INPUTS:
            raise ApiError(
                400, f"input holds {len(contents)} items; send 1 to {MAX_INPUTS}", param="input"
            )
        for index, content in enumerate(contents):
            _check_content(content, index, model)
        return [
            EmbedItem(content, self.input_type, self.instruction, self.truncate)
            for content in contents
        ]

    def _check_options(self, model: ServedModel) -> None:
        if self.model != model.name:
            raise ApiError(
                404,
                f"this server has no model of that name; it serves {model.name!r}",
                param="model",
                code="model_not_found",
            )
        if self.dimensions not in (None, model.dimension):
            raise ApiError(
                400,
                f"{model.name} has vectors of {model.dimension} dimensions and no others; "
                f"leave dimensions out, got {self.dimensions}",
                param="dimensions",
            )
        if not _is_unicode(self.instruction or ""):
            raise ApiError(400, "instruction holds half of a surrogate pair", param="instruction")
        if self.instruction is not None and self.input_type == "document":
            raise ApiError(
                400,
                "documents are embedded without instruction; set input_type to 'query' or leave "
                "instruction out",
                param="instruction",
            )


def _contents(given: Any) -> list[str | tuple[int, ...]]:
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [tuple(given)]
    return [one if isinstance(one, str) else tuple(one) for one in given]


def _check_content(content: str | tuple[int, ...], index: int, model: ServedModel) -> None:
    if not content:
        raise ApiError(400, f"input[{index}] is empty", param="input")
    if isinstance(content, tuple):
        if not all(0 <= token < model.vocabulary_size for token in content):
            raise ApiError(
                400,
                f"input[{index}] holds a token id outside 0..{model.vocabulary_size - 1}; were the "
                f"ids made by another tokenizer than that of {model.name}? Send text (in "
                "LangChain: check_embedding_ctx_length=False)",
                param="input",
            )
    elif not _is_unicode(content):
        raise ApiError(400, f"input[{index}] holds half of a surrogate pair", param="input")


def _is_unicode(text: str) -> bool:
    """Whether the text can leave Python: JSON can spell half a surrogate pair, UTF-8 cannot."""
    return _SURROGATE.search(text) is None


def invalid_body(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What to answer to a body that is not JSON or does not validate.

    No value of the request is repeated: it may be long, or hold what JSON cannot carry back.

    Args:
        errors: As pydantic lists them; locations start with "body".
    """
    first = errors[0]
    location = [str(part) for part in first["loc"][1:]]
    param = location[0] if location else None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    if param is None:
        return ApiError(400, "the body must be a JSON object; send Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        known = ", ".join(EmbeddingRequest.model_fields)
        shown = param if len(param) < 100 and _is_unicode(param) else None
        return ApiError(400, f"unknown parameter; there are: {known}", param=shown)
    if param == "input" and first["type"] != "missing":
        message = (
            "input must be a string, a list of strings, a list of token ids, or a list of lists of "
            "token ids, all of one kind"
        )
        return ApiError(400, message, param=param)
    return ApiError(400, f"{param}: {first['msg']}", param=param)
