from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from reasonembed.serving.app import create_app
from reasonembed.tasks import TASKS
from tests.serving.api import assert_error
from tests.serving.shelf import DOCUMENTS, INSTRUCTION, QUERIES, shelf, shelf_service, vectors_of

ACCEPT = {"Accept": "application/json, text/event-stream"}


@contextlib.asynccontextmanager
async def served(*indexes, **fields) -> AsyncIterator[str]:
    """A real server on a free port; its address."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(shelf_service(*indexes, **fields)), log_level="error")
    )
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        assert not task.done(), "the server did not start"
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def connected(*indexes, mode="auto", **fields):
    """The SDK's client, and the address."""
    from mcp import Client

    async with served(*indexes, **fields) as url, Client(f"{url}/mcp", mode=mode) as client:
        yield client, url


async def results_of(client, **arguments):
    answer = await client.call_tool("search", arguments)
    assert not answer.is_error, answer.content
    assert json.loads(answer.content[0].text) == answer.structured_content
    return answer.structured_content["results"]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_client_searches_and_fetches(mode):
    async def scene():
        async with connected(shelf(), mode=mode) as (client, url):
            tools = {one.name: one for one in (await client.list_tools()).tools}
            assert set(tools) == {"search", "fetch"}
            assert "garden (7)" in tools["search"].description
            assert tools["search"].input_schema["required"] == ["query"]
            assert tools["search"].annotations.read_only_hint is True
            found = await results_of(client, query=QUERIES[0], top_k=3)
            assert len(found) == 3
            assert all(set(one) == {"id", "title", "url", "text"} for one in found)
            first = await client.call_tool("fetch", {"id": found[0]["id"]})
            document = next(one for one in DOCUMENTS if one.doc_id == found[0]["id"])
            assert first.structured_content == {
                "id": document.doc_id,
                "title": document.text,
                "text": document.text,
                "url": found[0]["url"],
                "metadata": {"index": "garden", "doc_id": document.doc_id},
            }
            async with httpx.AsyncClient() as http:
                for one in await results_of(client, query="moss water", top_k=7):
                    assert one["url"].startswith(f"{url}/v1/documents/garden/")
                    assert (await http.get(one["url"])).json()["id"] == one["id"]

    asyncio.run(scene())


def test_excluded_documents_and_tasks():
    index, vectors = shelf(), []
    dense = index.dense

    async def noted(queries_QD, **fields):
        vectors.append(queries_QD)
        return await dense(queries_QD, **fields)

    index.dense = noted

    async def scene():
        async with connected(index) as (client, _):
            found = await results_of(client, query=QUERIES[0], excluded_ids=["leaf-1", "nobody"])
            assert not {"leaf-1", "leaf-copy"} & {one["id"] for one in found}
            await results_of(client, query=QUERIES[2])
            await results_of(client, query=QUERIES[2], task="economics")
            for got, instruction in zip(
                vectors[1:], (INSTRUCTION, TASKS["economics"].instruction), strict=True
            ):
                np.testing.assert_array_equal(
                    got, vectors_of([QUERIES[2]], instruction=instruction)
                )
            long = await results_of(client, query="leaf " * 500, top_k=1)
            assert len(long) == 1

    asyncio.run(scene())


def test_several_collections_are_searched_in_turn():
    async def scene():
        attic = shelf("attic", documents=DOCUMENTS[:2])
        async with connected(shelf(), attic) as (client, _):
            found = await results_of(client, query=QUERIES[0], top_k=4)
            assert {one["id"].partition("/")[0] for one in found[:2]} == {"attic", "garden"}
            for one in found:
                read = await client.call_tool("fetch", {"id": one["id"]})
                assert read.structured_content["url"] == one["url"]
                index, _, doc_id = one["id"].partition("/")
                assert read.structured_content["metadata"] == {"index": index, "doc_id": doc_id}
            only = await results_of(client, query=QUERIES[0], index="attic")
            assert len(only) == 2
            excluded = await results_of(
                client, query=QUERIES[0], excluded_ids=["attic/leaf-1"], top_k=20
            )
            assert "attic/leaf-1" not in [one["id"] for one in excluded]
            assert "garden/leaf-1" in [one["id"] for one in excluded]
            slashed = await client.call_tool("fetch", {"id": "garden/moss/a b"})
            assert slashed.structured_content["metadata"]["doc_id"] == "moss/a b"
            bare = await client.call_tool("fetch", {"id": "root", "index": "garden"})
            assert bare.structured_content["metadata"]["index"] == "garden"

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("tool", "arguments", "text"),
    [
        ("search", {}, "query: Field required"),
        ("search", {"query": " "}, "query is empty"),
        ("search", {"query": "a", "top_k": 101}, "top_k: "),
        ("search", {"query": "a", "index": "x"}, "unknown index 'x'; there are: garden"),
        ("search", {"query": "a", "task": "x"}, "unknown task"),
        ("search", {"query": "a", "kind": "x"}, "kind: "),
        ("fetch", {"id": "nobody"}, "no document 'nobody'"),
        ("delete", {"id": "root"}, "no such tool"),
    ],
)
def test_errors_are_told_to_the_model(tool, arguments, text):
    async def scene():
        async with connected(shelf()) as (client, _):
            answer = await client.call_tool(tool, arguments)
            assert answer.is_error
            assert text in answer.content[0].text

    asyncio.run(scene())


def test_without_an_index_the_tools_say_so():
    async def scene():
        async with connected() as (client, _):
            answer = await client.call_tool("search", {"query": "a"})
            assert answer.is_error
            assert "no index" in answer.content[0].text

    asyncio.run(scene())


def call(client, *, headers=None, **params):
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    return client.post("/mcp", json=body, headers=ACCEPT | (headers or {}))


def test_any_host_name_will_do():
    with TestClient(create_app(shelf_service(shelf()))) as client:
        for host in ("search.example.org", "10.0.0.7:8000", "reasonembed"):
            answer = call(
                client, headers={"Host": host}, name="search", arguments={"query": "moss"}
            )
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "application/json"
            found = answer.json()["result"]["structuredContent"]["results"]
            assert found[0]["url"].startswith(f"http://{host}/v1/documents/")


def test_other_methods_and_an_app_that_has_not_begun():
    app = create_app(shelf_service(shelf()))
    idle = TestClient(app, raise_server_exceptions=False)
    assert_error(call(idle, name="search", arguments={}), 503, code="unavailable")
    with TestClient(app) as client:
        answer = client.get("/mcp", headers={"Accept": "text/event-stream"})
        assert_error(answer, 405)
        assert answer.headers["allow"] == "POST"
        assert_error(client.delete("/mcp"), 405)


def test_an_app_may_begin_again():
    app = create_app(shelf_service(shelf()))
    for _ in range(2):
        with TestClient(app) as client:
            answer = call(client, name="fetch", arguments={"id": "root"})
            assert answer.json()["result"]["structuredContent"]["id"] == "root"


def test_a_failure_is_logged_without_texts_and_told_without_reason(caplog):
    text = "my own query"

    async def broken(*_, **__):
        raise RuntimeError(text)

    index = shelf()
    index.dense = broken
    with TestClient(create_app(shelf_service(index))) as client:
        assert said(client, query="moss") == "the server failed; its log says why"
    assert "RuntimeError" in caplog.text and "broken" in caplog.text
    assert text not in caplog.text


def test_errors_have_the_services_shape():
    with TestClient(create_app(shelf_service(shelf()))) as client:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
        answer = client.post("/mcp", content=body, headers=ACCEPT | {"Content-Type": "text/plain"})
        assert_error(answer, 415, code="media_type")


def said(client, **arguments):
    answer = call(client, name="search", arguments=arguments).json()["result"]
    assert answer["isError"], answer
    return answer["content"][0]["text"]


def test_a_task_that_is_none_is_called_as_the_tool_calls_it():
    with TestClient(create_app(shelf_service(shelf()))) as client:
        message = said(client, query="a", task="cooking")
        assert message.startswith("task: unknown task") and "prompt_name" not in message


def test_the_tool_has_the_bounds_of_the_routes():
    limits = {"max_top_k": 8, "max_excluded_ids": 3, "max_queued_searches": 1}
    service = shelf_service(shelf(), limits=limits)
    with TestClient(create_app(service)) as client:
        assert "more than 8" in said(client, query="a", top_k=9)
        assert "limit of 3" in said(client, query="a", top_k=2, excluded_ids=["x"] * 4)
        with service.search.places.take(1):
            assert "send the request again later" in said(client, query="a", top_k=2)
        assert 'rejected_total{reason="overloaded"} 1.0' in client.get("/metrics").text
