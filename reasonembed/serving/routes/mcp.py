"""`/mcp`: the searches as tools of the Model Context Protocol, over streamable HTTP.

Stateless, with answers in JSON: any ingress serves any call. Keys and host names are checked
before a request comes here, as for every other route.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from reasonembed.index.fusion import rrf
from reasonembed.serving.concurrency import together
from reasonembed.serving.errors import ApiError, unavailable
from reasonembed.serving.exchange import exchange_of, note_refusal, note_timings
from reasonembed.serving.jsonroute import check_content_type
from reasonembed.serving.middleware import without_texts
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import StoredDocument
from reasonembed.serving.requests import Body
from reasonembed.serving.routes.search import searches_of
from reasonembed.serving.search_forms import check_instruction, check_queries
from reasonembed.serving.searches import Asked, Searched, Wanted

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from mcp.types import CallToolResult, Tool

log = logging.getLogger(__name__)

PATH = "/mcp"
_SNIPPET = 1_000  # characters of a document in a list of results
_TITLE = 100
_SEARCH = (
    "Searches a collection of documents by meaning, also where the answer takes reasoning: ask in "
    "plain words, with all you know. Gives ids, titles and beginnings of the best documents."
)
_FETCH = "Gives the whole text of a document that a search found, by its id."


class SearchArguments(Body):
    """What the tool `search` takes."""

    query: str = Field(description="what is looked for, in plain words")
    index: str | None = Field(
        None, description="the collection to search; left out, all of them are searched"
    )
    top_k: int = Field(10, ge=1, le=100, description="documents that come back at most")
    excluded_ids: list[str] = Field(
        default_factory=list, description="ids of documents that must not come back"
    )
    task: str | None = Field(
        None, description="what kind of search it is, such as `biology`; default the collection's"
    )


class FetchArguments(Body):
    """What the tool `fetch` takes."""

    id: str = Field(description="of a document, as `search` gives it")
    index: str | None = Field(None, description="the collection, if the id does not say it")


class FoundDocument(BaseModel):
    """A result of the tool `search`."""

    id: str
    title: str
    url: str
    text: str = Field(description="its beginning")


class SearchOutput(BaseModel):
    """What the tool `search` gives."""

    results: list[FoundDocument]


class FetchOutput(BaseModel):
    """What the tool `fetch` gives."""

    id: str
    title: str
    text: str
    url: str
    metadata: dict[str, str]


def mount(app: FastAPI, service: Service) -> None:
    """Adds `/mcp` to an app and to its lifespan.

    Args:
        app: Whose lifespan has not begun. What is added here begins anew with every lifespan; a
            service that is assembled with an `on_end` has but one.
        service: What the tools search.
    """
    endpoint = _Endpoint(service)
    app.router.routes.append(Route(PATH, endpoint, include_in_schema=False))
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(over: FastAPI) -> AsyncIterator[Any]:
        async with inner(over) as state, endpoint.running():
            yield state

    app.router.lifespan_context = lifespan


class _Endpoint:
    """The ASGI app at the path; the SDK's session manager can be run but once, so each has one."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._manager: StreamableHTTPSessionManager | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While requests can be answered."""
        manager = _session_manager(self._service)
        async with manager.run():
            self._manager = manager
            try:
                yield
            finally:
                self._manager = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request as ASGI has it."""
        if self._manager is None:
            await _refused(unavailable("the service is starting"))(scope, receive, send)
        elif scope["method"] != "POST":
            # There are no sessions to end, and nothing that the server would say by itself.
            error = ApiError(405, "this route takes POST", headers={"Allow": "POST"})
            await _refused(error)(scope, receive, send)
        else:
            try:
                check_content_type(Headers(scope=scope))
            except ApiError as error:
                await _refused(error)(scope, receive, send)
            else:
                await self._manager.handle_request(scope, receive, send)


def _refused(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _session_manager(service: Service) -> StreamableHTTPSessionManager:
    # Here because it takes half a second, and an app can be made without its lifespan.
    from mcp.server.lowlevel import Server
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from mcp.types import CallToolRequestParams, ListToolsResult

    tools = _Tools(service)

    async def list_tools(_: Any, __: Any) -> ListToolsResult:
        return ListToolsResult(tools=tools.listed())

    async def call_tool(context: Any, params: CallToolRequestParams) -> CallToolResult:
        return await tools.call(params.name, params.arguments or {}, context.request)

    server: Server[Any] = Server(
        "reasonembed",
        version=service.version,
        instructions="Search for documents with `search`, then read them with `fetch`.",
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    # Without the SDK's own list of host names: the service's middleware guards every route.
    return StreamableHTTPSessionManager(
        app=server,
        json_response=True,
        stateless=True,
        max_request_body_size=service.settings.limits.max_body_bytes,
    )


class _Tools:
    """The tools over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def listed(self) -> list[Tool]:
        """Their descriptions; that of `search` names the collections."""
        from mcp.types import Tool, ToolAnnotations

        served = self._service.search.indexes.values() if self._service.search else ()
        names = ", ".join(f"{one.info.name} ({one.info.num_documents})" for one in served)
        about = f" Collections and their sizes: {names}." if names else ""
        hints = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
        return [
            Tool(
                name=name,
                description=description,
                input_schema=arguments.model_json_schema(),
                output_schema=output.model_json_schema(),
                annotations=hints,
            )
            for name, description, arguments, output in (
                ("search", _SEARCH + about, SearchArguments, SearchOutput),
                ("fetch", _FETCH, FetchArguments, FetchOutput),
            )
        ]

    async def call(self, name: str, arguments: dict[str, Any], request: Request) -> CallToolResult:
        """Result of a call; whatever the caller can mend is told as a tool's error."""
        from mcp.types import CallToolResult, TextContent

        def result(text: str, **fields: Any) -> CallToolResult:
            return CallToolResult(content=[TextContent(type="text", text=text)], **fields)

        try:
            if name == "search":
                output = await self._search(SearchArguments(**arguments), request)
            elif name == "fetch":
                output = await self._fetch(FetchArguments(**arguments), request)
            else:
                return result("there is no such tool; there are: search, fetch", is_error=True)
        except ValidationError as error:
            return result(_invalid(error), is_error=True)
        except ApiError as error:
            note_refusal(request, error)
            return result(error.message, is_error=True)
        except Exception as error:  # the SDK would tell the caller its message, and log it
            exchange = exchange_of(request)
            request_id = exchange.request_id if exchange else "a request"
            log.error("%s: the tool %s failed: %s", request_id, name, without_texts(error))
            log.debug("%s", request_id, exc_info=error)
            return result("the server failed; its log says why", is_error=True)
        content = output.model_dump(mode="json")
        text = json.dumps(content, ensure_ascii=False)
        return result(text, structured_content=content)

    async def _search(self, given: SearchArguments, request: Request) -> BaseModel:
        search = searches_of(self._service)
        check_queries([given.query], self._service.settings, param="query")
        check_instruction(None, given.task, task_param="task")
        asked = Asked(given.query, task=given.task, excluded_ids=tuple(given.excluded_ids))
        wanted = Wanted(top_k=given.top_k, with_documents=True, truncate="end")
        if not search.indexes or given.index is not None:
            names = [search.index(given.index).info.name]
        else:
            names = list(search.indexes)
        every = await together(
            *(search.search(name, [self._own(asked, name)], wanted=wanted) for name in names)
        )
        for one in every:
            note_timings(request, one.timings, tokens=one.num_tokens)
        return SearchOutput(results=self._merged(every, given.top_k, request))

    def _merged(self, every: list[Searched], k: int, request: Request) -> list[FoundDocument]:
        """Results of several collections in turn: scores of different ones do not compare."""
        documents: dict[str, tuple[str, StoredDocument]] = {}
        for one in every:
            for hit in one.found[0].hits:
                assert hit.document is not None
                shown = self._shown_id(one.info.name, hit.doc_id)
                documents[shown] = (one.info.name, hit.document)
        ranked = {
            one.info.name: [self._shown_id(one.info.name, hit.doc_id) for hit in one.found[0].hits]
            for one in every
        }
        return [
            FoundDocument(
                id=fused.doc_id,
                title=_title(documents[fused.doc_id][1]),
                url=_url(request, *documents[fused.doc_id]),
                text=documents[fused.doc_id][1].text[:_SNIPPET],
            )
            for fused in rrf(ranked, k=k)
        ]

    async def _fetch(self, given: FetchArguments, request: Request) -> BaseModel:
        said, doc_id = self._named(given.id)
        if given.index not in (None, said):
            said, doc_id = given.index, given.id
        index = searches_of(self._service).index(said).info.name
        document = await searches_of(self._service).document(index, doc_id)
        return FetchOutput(
            id=given.id,
            title=_title(document),
            text=document.text,
            url=_url(request, index, document),
            metadata={"index": index, "doc_id": doc_id},
        )

    def _shown_id(self, index: str, doc_id: str) -> str:
        """Where there are several collections, an id says which one it is of."""
        return doc_id if len(searches_of(self._service).indexes) == 1 else f"{index}/{doc_id}"

    def _named(self, shown: str) -> tuple[str | None, str]:
        """Collection and id, the other way round; no collection where none is said."""
        names = searches_of(self._service).indexes
        name, _, doc_id = shown.partition("/")
        return (name, doc_id) if len(names) > 1 and name in names else (None, shown)

    def _own(self, asked: Asked, index: str) -> Asked:
        """The search of one collection: excluded ids of others have no meaning in it."""
        named = map(self._named, asked.excluded_ids)
        excluded = tuple(doc_id for name, doc_id in named if name in (None, index))
        return replace(asked, excluded_ids=excluded)


def _title(document: StoredDocument) -> str:
    """Its title, or its first line."""
    lines = document.text.strip().splitlines()
    return (document.title or (lines[0] if lines else "") or document.doc_id)[:_TITLE]


def _url(request: Request, index: str, document: StoredDocument) -> str:
    """Where a program may read it."""
    from urllib.parse import quote

    path = f"v1/documents/{quote(index, safe='')}/{quote(document.doc_id)}"
    return f"{request.base_url}{path}"


def _invalid(error: ValidationError) -> str:
    """What does not fit, without the values."""
    return "; ".join(
        f"{'.'.join(str(part) for part in one['loc'])[:64]}: {one['msg']}" for one in error.errors()
    )
