"""Which side of the retrieval a request's inputs stand on, by whatever field it says so.

The protocols that clients speak have different words for it: Cohere's and Voyage's `input_type`,
Jina's `task`, TEI's `prompt_name`, a free `instruction`, and, for clients that cannot send fields
of ours, a suffix of the model's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from reasonembed.serving.errors import ApiError
from reasonembed.serving.protocol import InputType, ServedModel
from reasonembed.tasks import TASKS

AnyInputType = Literal["query", "document", "search_query", "search_document"]
AnyTask = Literal["retrieval.query", "retrieval.passage"]

_ROLES: dict[str, InputType] = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "document": "document",
    "search_document": "document",
    "retrieval.passage": "document",
}
SUFFIXES: tuple[str, ...] = ("query", "document", *TASKS)
"""What a model's name may end with after a colon."""


@dataclass(frozen=True)
class Role:
    """What every input of a request is, and what its queries ask for; None: the default."""

    role: InputType
    instruction: str | None = None


@dataclass(frozen=True)
class Said:
    """The fields of a request that say a role; `suffix` stands in its model's name."""

    suffix: str | None = None
    input_type: str | None = None
    task: str | None = None
    prompt_name: str | None = None
    instruction: str | None = None


@dataclass(frozen=True)
class _Claim:
    field: str
    role: InputType
    instruction: str | None = None


def resolve(said: Said, *, model: ServedModel, default: InputType) -> Role:
    """The role that a request's fields agree on.

    An instruction alone makes queries of the inputs: documents have none.

    Args:
        said: What the request says.
        model: Decides whether there are instructions at all.
        default: Where nothing is said.

    Raises:
        ApiError: 400: two fields contradict each other (both are named), a prompt or suffix is
            unknown, or an instruction is given to a model that takes none.
    """
    claims = list(_claims(said))
    _check_agreement(claims)
    told = [claim for claim in claims if claim.instruction is not None]
    if told and not model.takes_instruction:
        raise ApiError(
            400,
            f"{told[0].field}: {model.name} takes no instruction; leave it out",
            param=told[0].field,
        )
    role = claims[0].role if claims else default
    return Role(role, told[0].instruction if told else None)


def split_name(name: str, model: ServedModel, *, param: str = "model") -> str | None:
    """The suffix of a model's name as a request gives it, if it has one.

    Raises:
        ApiError: 404: it is not this model's.
    """
    for known in (model.name, *model.aliases):
        if name == known:
            return None
        suffix = name.removeprefix(f"{known}:")
        if suffix != name and suffix in SUFFIXES:
            return suffix
    raise ApiError(
        404,
        f"no model of that name is served here; there is {model.name!r}, also with a role after a "
        f"colon: {', '.join(f':{suffix}' for suffix in SUFFIXES[:3])}, …",
        param=param,
        code="model_not_found",
    )


def _claims(said: Said) -> Iterable[_Claim]:
    if said.suffix is not None:
        yield _named("model", said.suffix)
    if said.input_type is not None:
        yield _Claim("input_type", _ROLES[said.input_type])
    if said.task is not None:
        yield _Claim("task", _ROLES[said.task])
    if said.prompt_name is not None:
        yield _named("prompt_name", said.prompt_name)
    if said.instruction is not None:
        if not said.instruction.strip():
            raise ApiError(
                400, "instruction is empty; leave it out for the default", param="instruction"
            )
        yield _Claim("instruction", "query", said.instruction)


def _named(field: str, name: str) -> _Claim:
    if name in ("query", "document"):
        return _Claim(field, _ROLES[name])
    if name not in TASKS:
        raise ApiError(400, f"{field}: unknown name; there are: {', '.join(SUFFIXES)}", param=field)
    return _Claim(field, "query", TASKS[name].instruction)


def _check_agreement(claims: list[_Claim]) -> None:
    for claim in claims[1:]:
        if claim.role != claims[0].role:
            raise ApiError(
                400,
                f"{claims[0].field} says {claims[0].role} and {claim.field} says {claim.role}; "
                "documents are embedded without instruction, queries with one: send one of the two",
                param=claim.field,
            )
    told = [claim for claim in claims if claim.instruction is not None]
    for claim in told[1:]:
        if claim.instruction != told[0].instruction:
            raise ApiError(
                400,
                f"{told[0].field} and {claim.field} give different instructions; send one of them",
                param=claim.field,
            )
