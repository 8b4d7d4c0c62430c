"""Searches in this service's own form, in Search-R1's and in OpenAI's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi import Body as JsonBody
from fastapi.responses import JSONResponse

from reasonembed.serving import writing
from reasonembed.serving.describing import answers
from reasonembed.serving.errors import ApiError
from reasonembed.serving.exchange import note_timings
from reasonembed.serving.jsonroute import JsonRoute
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import IndexInfo, StoredDocument
from reasonembed.serving.reranking import reranker
from reasonembed.serving.search import NO_INDEX, SearchService
from reasonembed.serving.search_forms import (
    BATCHES,
    PAGE_EXAMPLE,
    RERANK_DEPTH,
    RETRIEVALS,
    RETRIEVE_EXAMPLE,
    RETRIEVED,
    SEARCH_EXAMPLE,
    SEARCHES,
    STORE_SEARCHES,
    BatchBody,
    DocumentAnswer,
    IndexesAnswer,
    QueriesAnswer,
    RankingOptions,
    RetrieveAnswer,
    RetrieveBody,
    SearchAnswer,
    SearchBody,
    SharedBody,
    VectorStoreAnswer,
    VectorStoreBody,
    check_queries,
)
from reasonembed.serving.searches import Asked, Found, Hit, Kind, Rerank, Searched, Wanted


def router(service: Service) -> APIRouter:
    """Routes over the service's indexes; without an index, each says that there is none."""
    routes = APIRouter(route_class=JsonRoute, tags=["search"])
    _add_searches(routes, service)
    _add_aliases(routes, service)
    _add_reading(routes, service)
    return routes


def _add_searches(routes: APIRouter, service: Service) -> None:
    async def answer(request: Request, body: SearchBody | BatchBody) -> Response:
        param, asked = body.asked(service.settings)
        wanted = _wanted(body, service, param)
        found = await _found(request, service, body.index, asked, wanted)
        name = service.embeddings.model.name
        return await _written(
            request, lambda: _results(found, wanted, name), found, wanted, service
        )

    @routes.post(
        "/v1/search",
        operation_id="search",
        summary="Search an index",
        response_model=SearchAnswer,
        responses=answers(SEARCH_EXAMPLE, description="Hits of each query, best first"),
    )
    async def search(
        request: Request, body: Annotated[SearchBody, JsonBody(openapi_examples=SEARCHES)]
    ) -> Response:
        """Dense, BM25 or hybrid; with excluded ids, q′, and a reranker."""
        return await answer(request, body)

    @routes.post(
        "/v1/search/batch",
        operation_id="searchBatch",
        summary="Searches of an index that differ in more than their text",
        response_model=SearchAnswer,
        responses=answers(SEARCH_EXAMPLE, description="Hits of each search, best first"),
    )
    async def batch(
        request: Request, body: Annotated[BatchBody, JsonBody(openapi_examples=BATCHES)]
    ) -> Response:
        """Searches that each have their own instruction and excluded ids; one pass of the model."""
        return await answer(request, body)


def _add_aliases(routes: APIRouter, service: Service) -> None:
    settings = service.settings

    @routes.post(
        "/retrieve",
        operation_id="retrieve",
        summary="Search in Search-R1's form",
        response_model=RetrieveAnswer,
        responses=answers(RETRIEVE_EXAMPLE, description="Documents of each query, best first"),
    )
    async def retrieve(
        request: Request,
        body: Annotated[RetrieveBody, JsonBody(openapi_examples=RETRIEVALS)],
        index: Annotated[str | None, Query(description="needed if there are several")] = None,
        kind: Annotated[Kind | None, Query(description="default dense")] = None,
    ) -> Response:
        """Documents are `{id, contents}`; where they have a title, `contents` begins with it.

        As in Search-R1's retriever a list of queries may be empty. A blank query, which models in
        training do write, finds nothing and does not fail the others; long ones lose their end.
        """
        wanted = Wanted(
            kind=kind,
            top_k=body.topk or RETRIEVED,
            with_documents=True,
            truncate="end",
            param="queries",
            top_k_param="topk",
        )
        check_queries(body.queries, settings, param="queries", may_be_blank=True)
        asked = [Asked(query) for query in body.queries if query.strip()]
        found = await _found(request, service, index, asked, wanted)
        each = iter(found.found)
        rows = [next(each).hits if query.strip() else () for query in body.queries]
        return await _written(
            request,
            lambda: writing.with_list(
                {}, "result", (_retrieved(row, with_scores=body.return_scores) for row in rows)
            ),
            found,
            wanted,
            service,
        )

    @routes.post(
        "/v1/vector_stores/{index}/search",
        operation_id="searchVectorStore",
        summary="Search in the form of OpenAI's vector stores",
        response_model=VectorStoreAnswer,
        responses=answers(PAGE_EXAMPLE, description="The one page of results"),
    )
    async def vector_store(
        request: Request,
        index: Annotated[str, Path(description="name of an index", examples=["biology"])],
        body: Annotated[VectorStoreBody, JsonBody(openapi_examples=STORE_SEARCHES)],
    ) -> Response:
        """The dense search of an index, or its first kind."""
        if body.filters is not None:
            raise ApiError(400, "filters are not supported; leave them out", param="filters")
        texts, ranking = body.texts(), body.ranking_options or RankingOptions()
        check_queries(texts, settings, param="query")
        wanted = Wanted(
            top_k=body.max_num_results,
            min_score=ranking.score_threshold,
            with_documents=True,
            rewrite=body.rewrite_query,
            top_k_param="max_num_results",
        )
        found = await _found(request, service, index, [Asked(text) for text in texts], wanted)
        return await _written(
            request,
            lambda: writing.plain(_page(found, texts, body.max_num_results)),
            found,
            wanted,
            service,
        )


def _add_reading(routes: APIRouter, service: Service) -> None:
    @routes.get(
        "/v1/indexes",
        operation_id="listIndexes",
        summary="The indexes",
        response_model=IndexesAnswer,
    )
    async def indexes() -> JSONResponse:
        """What can be searched, and how."""
        served = service.search.indexes.values() if service.search else ()
        data = [_index(one.info, len(one.queries)) for one in served]
        return JSONResponse({"object": "list", "data": data})

    @routes.get(
        "/v1/indexes/{index}/queries",
        operation_id="listQueries",
        summary="Benchmark queries of an index",
        response_model=QueriesAnswer,
    )
    async def queries(
        index: Annotated[str, Path(description="name of an index", examples=["biology"])],
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> JSONResponse:
        """With gold documents and excluded ids; empty unless the index was made of a benchmark."""
        every = searches_of(service).index(index).queries
        page = every[offset : offset + limit]
        data = [
            {
                "id": one.query_id,
                "query": one.text,
                "gold": dict(one.qrels),
                "excluded_ids": list(one.excluded_ids),
            }
            for one in page
        ]
        more = offset + len(page) < len(every)
        return JSONResponse({"object": "list", "data": data, "total": len(every), "has_more": more})

    @routes.get(
        "/v1/documents/{index}/{doc_id:path}",
        operation_id="retrieveDocument",
        summary="A document of an index",
        response_model=DocumentAnswer,
    )
    async def document(
        index: Annotated[str, Path(description="name of an index", examples=["biology"])],
        doc_id: Annotated[str, Path(description="as hits have it", examples=["a"])],
    ) -> JSONResponse:
        """Its text, whose first line is its title where it has one."""
        return JSONResponse(_document(await searches_of(service).document(index, doc_id)))


async def _found(
    request: Request,
    service: Service,
    index: str | None,
    asked: Sequence[Asked],
    wanted: Wanted,
) -> Searched:
    """What is found; headers and log tell of it."""
    found = await searches_of(service).search(index, asked, wanted=wanted)
    note_timings(request, found.timings, tokens=found.num_tokens)
    return found


async def _written(
    request: Request,
    answer: Callable[[], bytes],
    found: Searched,
    wanted: Wanted,
    service: Service,
) -> Response:
    """An answer as JSON; a large one is written beside other requests.

    Raises:
        ApiError: 429 others' answers leave no room for it.
    """
    service.outgoing.hold(request, found.num_bytes)
    each = writing.TEXT_VALUES if wanted.with_documents else 1
    return await writing.respond(
        answer,
        num_values=each * sum(len(one.hits) for one in found.found),
        metrics=service.metrics,
    )


def searches_of(service: Service) -> SearchService:
    """The service's searches.

    Raises:
        ApiError: 404 it has no index.
    """
    if service.search is None:
        raise ApiError(404, NO_INDEX, param="index", code="index_not_found")
    return service.search


def _wanted(body: SharedBody, service: Service, param: str) -> Wanted:
    """What a body's searches have in common.

    Raises:
        ApiError: 404 there is no such reranker.
    """
    rerank = None
    if body.rerank is not None:
        judged = service.settings.rerank
        by = reranker(
            body.rerank.model,
            model=service.embeddings.model,
            annotator=judged.llm.model if judged and service.grading else None,
            default="annotator" if service.grading else "cosine",
            param="rerank.model",
        )
        rerank = Rerank(by, body.rerank.depth or max(RERANK_DEPTH, body.top_k))
    return Wanted(
        kind=body.kind,
        top_k=body.top_k,
        min_score=body.min_score,
        with_documents=body.return_documents,
        rewrite=body.rewrite,
        rerank=rerank,
        truncate=body.truncate,
        param=param,
    )


def _results(searched: Searched, wanted: Wanted, model: str) -> bytes:
    usage = {
        "prompt_tokens": searched.num_tokens,
        "total_tokens": searched.num_tokens,
        "truncated_inputs": list(searched.truncated),
    }
    fields = {
        "object": "search.results",
        "index": searched.info.name,
        "kind": searched.kind,
        "model": model,
        "usage": usage,
        "timings_ms": {name: round(ms, 3) for name, ms in searched.timings_ms.items()},
    }
    results = (_result(number, one, wanted) for number, one in enumerate(searched.found))
    return writing.with_list(fields, "data", results)


def _result(number: int, found: Found, wanted: Wanted) -> dict[str, Any]:
    result: dict[str, Any] = {
        "query_index": number,
        "hits": [_hit(one, is_graded=wanted.is_graded) for one in found.hits],
        "unknown_excluded_ids": found.unknown_excluded_ids,
    }
    if wanted.rewrite:
        result["rewritten_query"] = found.rewritten_query
    return result


def _hit(hit: Hit, *, is_graded: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": hit.doc_id, "score": hit.score, "rank": hit.rank}
    if is_graded:
        answer["grade"] = hit.grade
    if hit.document is not None:
        answer["document"] = _document(hit.document)
    return answer


def _document(document: StoredDocument) -> dict[str, Any]:
    return {"id": document.doc_id, "text": document.text, "title": document.title}


def _index(info: IndexInfo, num_queries: int) -> dict[str, Any]:
    shown = asdict(info) | {"kinds": list(info.kinds), "num_queries": num_queries}
    del shown["digest"]  # between the service's own parts
    return shown


def _retrieved(hits: Sequence[Hit], *, with_scores: bool) -> list[dict[str, Any]]:
    """As Search-R1's client reads it: `contents` holds title and text."""
    documents = [
        ({"id": hit.doc_id, "contents": hit.document.text}, hit.score)
        for hit in hits
        if hit.document is not None
    ]
    if with_scores:
        return [{"document": one, "score": score} for one, score in documents]
    return [one for one, _ in documents]


def _page(searched: Searched, texts: Sequence[str], k: int) -> dict[str, Any]:
    """OpenAI's page: each document once, with the best of its scores."""
    best: dict[str, Hit] = {}
    for hit in (hit for one in searched.found for hit in one.hits):
        if hit.doc_id not in best or hit.score > best[hit.doc_id].score:
            best[hit.doc_id] = hit
    ordered = sorted(best.values(), key=lambda hit: (-hit.score, hit.rank))[:k]
    return {
        "object": "vector_store.search_results.page",
        "search_query": [
            one.rewritten_query or text for one, text in zip(searched.found, texts, strict=True)
        ],
        "data": [_file(hit) for hit in ordered],
        "has_more": False,
        "next_page": None,
    }


def _file(hit: Hit) -> dict[str, Any]:
    document = hit.document or StoredDocument(hit.doc_id, "")
    return {
        "file_id": hit.doc_id,
        "filename": document.title or hit.doc_id,
        "score": hit.score,
        "attributes": {},
        "content": [{"type": "text", "text": document.text}],
    }
