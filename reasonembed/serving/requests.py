"""Bodies of the requests for vectors, in each protocol, and what every input must be.

Unknown fields are refused: a misspelt one would otherwise change vectors in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from reasonembed.config import ServeConfig
from reasonembed.serving.errors import ApiError
from reasonembed.serving.protocol import EmbedItem, ServedModel, TokenIds, Truncate
from reasonembed.serving.roles import AnyInputType, AnyTask, Role, Said, resolve, split_name

Inputs = str | list[str] | list[int] | list[list[int]]
_INPUTS = "a text, a list of texts, the token ids of a text, or a list of those of several"

_MAX_FIELDS = 100  # of a body; none has nearly as many
_RETRIEVAL_ONLY = ("classification", "clustering")


def _stop_at_first(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = schema.values()
    elif not isinstance(schema, list | tuple):
        return
    for part in schema:
        _stop_at_first(part)


def _only_retrieval(value: Any) -> Any:
    if value in _RETRIEVAL_ONLY:
        raise PydanticCustomError(
            "input_type",
            "this model embeds for retrieval alone and has no form for classification or "
            "clustering; use query or document (search_query, search_document)",
        )
    return value


class Body(BaseModel):
    """What all bodies have in common: no unknown fields, no conversion of types.

    Mistakes are not collected: one is answered, and a body may hold millions of them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", "has fields that are not known")
        return value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The fields' own, with lists that stop at their first mistake."""
        schema = handler(source)
        _stop_at_first(schema)
        return schema


class Roles(Body):
    """Fields that say which side of the retrieval the inputs stand on, all extensions."""

    input_type: Annotated[AnyInputType | None, BeforeValidator(_only_retrieval)] = Field(
        None,
        description="extension: what the inputs are; a query is embedded with its instruction",
        examples=["query"],
    )
    task: AnyTask | None = Field(
        None, description="extension: the same as input_type, in Jina's words"
    )
    prompt_name: str | None = Field(
        None,
        description="extension: `query`, `document`, or the name of a retrieval task, whose "
        "instruction the queries get",
        examples=["biology"],
    )
    instruction: str | None = Field(
        None,
        description="extension: what the queries ask for, in place of the model's default",
        examples=["Given a bug report, retrieve the passages that explain its cause."],
    )

    def role(self, settings: ServeConfig, model: ServedModel, suffix: str | None) -> Role:
        """What the fields agree on; see `roles.resolve`."""
        said = Said(
            suffix=suffix,
            input_type=self.input_type,
            task=self.task,
            prompt_name=self.prompt_name,
            instruction=self.instruction,
        )
        return resolve(said, model=model, default=settings.default_input_type)


class EmbeddingsBody(Roles):
    """Body of `POST /v1/embeddings`: OpenAI's, and extensions."""

    input: Inputs = Field(description=_INPUTS)
    model: str = Field(
        description="the model's name; it may end with a role for clients that cannot send the "
        "extensions: `:query`, `:document`, or `:` and the name of a retrieval task"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64 holds little-endian float32; both give the same bits"
    )
    dimensions: int | None = Field(
        None, ge=1, description="a shorter length that the model was trained for; norm 1 again"
    )
    user: str | None = Field(None, description="taken and not used")
    truncate: Truncate | None = Field(
        None,
        description="extension: `none` (default) refuses inputs over the model's limit, `start` "
        "and `end` cut them there; the answer names those that were cut",
    )

    def items(self, settings: ServeConfig, model: ServedModel) -> list[EmbedItem]:
        """The inputs, checked against the model.

        Raises:
            ApiError: 404 for another model; 400 for what the model cannot embed.
        """
        role = self.role(settings, model, split_name(self.model, model))
        contents = as_contents(self.input, settings, param="input")
        check_contents(contents, settings, model, param="input")
        return made_items(contents, role, self.truncate or "none")


class CohereText(Body):
    """A part of an input."""

    type: Literal["text"] = Field(description="images are not embedded here")
    text: str


class CohereInput(Body):
    """An input in parts."""

    content: list[CohereText] = Field(description="one text", min_length=1, max_length=1)


EmbeddingType = Literal["float", "base64", "binary", "ubinary"]
_UNCALIBRATED = ("int8", "uint8")


def _known_types(value: Any) -> Any:
    if isinstance(value, list) and any(one in _UNCALIBRATED for one in value):
        raise PydanticCustomError(
            "embedding_types",
            "int8 and uint8 need ranges that were measured on a corpus, and this model has none; "
            "there are: float, base64, binary, ubinary",
        )
    return value


class CohereBody(Body):
    """Body of `POST /v2/embed`, in Cohere's form."""

    model: str = Field(description="the model's name")
    input_type: Annotated[AnyInputType, BeforeValidator(_only_retrieval)] = Field(
        description="what the texts are; a query is embedded with the model's instruction",
        examples=["search_document"],
    )
    texts: list[str] | None = Field(None, description="either texts or inputs")
    inputs: list[CohereInput] | None = Field(None, description="either texts or inputs")
    embedding_types: Annotated[list[EmbeddingType] | None, BeforeValidator(_known_types)] = Field(
        None,
        min_length=1,
        description="default float; binary and ubinary hold the signs of eight numbers a byte",
    )
    output_dimension: int | None = Field(
        None, ge=1, description="a shorter length that the model was trained for; norm 1 again"
    )
    truncate: Literal["NONE", "START", "END"] | None = Field(
        None, description="what happens to texts over the limit; default END, as Cohere's"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="taken where it is no smaller than the model's own limit, and refused else",
    )
    priority: int | None = Field(None, description="taken and not used")

    def items(self, settings: ServeConfig, model: ServedModel) -> list[EmbedItem]:
        """The texts, checked against the model.

        Raises:
            ApiError: 404 for another model; 400 for what the model cannot embed.
        """
        suffix = split_name(self.model, model)
        said = Said(suffix=suffix, input_type=self.input_type)
        role = resolve(said, model=model, default=settings.default_input_type)
        self._check_max_tokens(role, model)
        param, texts = self._texts()
        check_contents(texts, settings, model, param=param)
        cuts: dict[str, Truncate] = {"NONE": "none", "START": "start", "END": "end"}
        return made_items(texts, role, cuts[self.truncate or "END"])

    def field(self) -> str:
        """The one that holds the texts."""
        return "texts" if self.inputs is None else "inputs"

    def _texts(self) -> tuple[str, list[str]]:
        if self.texts is not None and self.inputs is not None:
            raise ApiError(400, "texts and inputs are both given; send one of them", param="inputs")
        if self.inputs is not None:
            return "inputs", [one.content[0].text for one in self.inputs]
        if self.texts is None:
            raise ApiError(400, "texts is missing", param="texts")
        return "texts", self.texts

    def _check_max_tokens(self, role: Role, model: ServedModel) -> None:
        limit = limit_of(role, model)
        if self.max_tokens is not None and self.max_tokens < limit:
            raise ApiError(
                400,
                f"max_tokens: this model cuts a {role.role} at {limit} tokens and nowhere else; "
                "leave it out",
                param="max_tokens",
            )


class TeiBody(Body):
    """Body of `POST /embed`, in the form of Text Embeddings Inference."""

    inputs: Inputs = Field(description=_INPUTS)
    normalize: bool | None = Field(
        None, description="vectors have norm 1, as the model was trained; false is refused"
    )
    truncate: bool | None = Field(
        None, description="whether inputs over the limit are cut; default false"
    )
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = Field(
        None, description="where they are cut; default right"
    )
    prompt_name: str | None = Field(
        None,
        description="`query`, `document`, or the name of a retrieval task",
        examples=["query"],
    )
    dimensions: int | None = Field(
        None, ge=1, description="a shorter length that the model was trained for; norm 1 again"
    )

    def items(self, settings: ServeConfig, model: ServedModel) -> list[EmbedItem]:
        """The inputs, checked against the model.

        Raises:
            ApiError: 400 for what the model cannot embed.
        """
        if self.normalize is False:
            raise ApiError(
                400,
                "normalize: vectors have norm 1, as the model was trained; leave it out",
                param="normalize",
            )
        said = Said(prompt_name=self.prompt_name)
        role = resolve(said, model=model, default=settings.default_input_type)
        contents = as_contents(self.inputs, settings, param="inputs")
        check_contents(contents, settings, model, param="inputs")
        return made_items(contents, role, self._cut())

    def _cut(self) -> Truncate:
        if not self.truncate:
            return "none"
        return "start" if (self.truncation_direction or "right").lower() == "left" else "end"


class TokenizeBody(Roles):
    """Body of `POST /tokenize`; one of `input`, `inputs` (as TEI), `text` (as Cohere)."""

    input: str | list[str] | None = Field(None, description="a text, or a list of texts")
    inputs: str | list[str] | None = Field(None, description="the same, in TEI's words")
    text: str | list[str] | None = Field(None, description="the same, in Cohere's words")
    model: str | None = Field(None, description="the model's name, if given")

    def named_texts(self) -> tuple[str, list[str]]:
        """The field that holds the texts, and the texts.

        Raises:
            ApiError: 400: there is none, or more than one.
        """
        given = [(name, getattr(self, name)) for name in ("input", "inputs", "text")]
        given = [(name, value) for name, value in given if value is not None]
        if len(given) != 1:
            raise ApiError(400, "send one of input, inputs, text", param="input")
        [(name, value)] = given
        return name, [value] if isinstance(value, str) else value


def limit_of(role: Role, model: ServedModel) -> int:
    """Tokens that an input of that role may hold."""
    return model.max_query_tokens if role.role == "query" else model.max_document_tokens


def made_items(
    contents: Sequence[str | TokenIds], role: Role, truncate: Truncate
) -> list[EmbedItem]:
    """Inputs of one role."""
    return [EmbedItem(content, role.role, role.instruction, truncate) for content in contents]


def as_contents(given: Inputs, settings: ServeConfig, *, param: str) -> list[str | TokenIds]:
    """One text or one list of token ids an input.

    Raises:
        ApiError: 413: more token ids than a request may hold; each is looked at, so that millions
            would hold the others up.
    """
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        given = [given]
    number = sum(len(one) for one in given if isinstance(one, list))
    check_numbers(number, settings.limits.max_request_tokens, what=f"{param} holds")
    return [one if isinstance(one, str) else tuple(one) for one in given]  # type: ignore[arg-type]


def check_numbers(number: int, limit: int, *, what: str) -> None:
    """Refuses more token ids than a request may hold.

    Raises:
        ApiError: 413.
    """
    if number > limit:
        raise ApiError(
            413,
            f"{what} {number} token ids, over the limit of {limit} tokens a request "
            "(max_request_tokens); send them in parts",
            code="request_too_large",
        )


def check_contents(
    contents: Sequence[str | TokenIds], settings: ServeConfig, model: ServedModel, *, param: str
) -> None:
    """Refuses what no model could embed.

    Args:
        contents: Texts or token ids.
        settings: Says how many there may be.
        model: Says which token ids there are.
        param: The request's field that holds them.

    Raises:
        ApiError: 400: too many or none, an empty one, a token id that the model does not have.
    """
    limit = settings.limits.max_inputs
    if not 1 <= len(contents) <= limit:
        raise ApiError(400, f"{param} holds {len(contents)} items; send 1 to {limit}", param=param)
    for index, content in enumerate(contents):
        if not content:
            raise ApiError(400, f"{param}[{index}] is empty", param=param)
        if isinstance(content, tuple) and not (
            min(content) >= 0 and max(content) < model.vocabulary_size
        ):
            raise ApiError(
                400,
                f"{param}[{index}] holds a token id outside 0..{model.vocabulary_size - 1}; were "
                f"the ids made by another tokenizer than that of {model.name}? Send text (in "
                "LangChain: check_embedding_ctx_length=False)",
                param=param,
            )
