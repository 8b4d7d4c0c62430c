"""The client of the Model Context Protocol's SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

from tests.clients.expected import DOCUMENTS
from tests.clients.process import Server

pytestmark = pytest.mark.clients


def within(server: Server, mode: str, ask: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    """Runs `ask` with a connected client that sends the key."""

    async def run() -> None:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with create_mcp_http_client(headers=headers) as http:
            transport = streamable_http_client(f"{server.url}/mcp", http_client=http)
            async with Client(transport, mode=mode) as client:
                await ask(client)

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_search_then_fetch(server, mode):
    async def ask(client: Client) -> None:
        tools = await client.list_tools()
        assert [tool.name for tool in tools.tools] == ["search", "fetch"]
        query = "why do trees lose their leaves?"
        found = await client.call_tool("search", {"query": query, "top_k": 2})
        results = found.structured_content["results"]
        assert len(results) == 2 and results[0]["text"] == DOCUMENTS["leaf"]
        read = await client.call_tool("fetch", {"id": results[0]["id"]})
        assert read.structured_content["text"] == DOCUMENTS["leaf"]

    within(server, mode, ask)


def test_mistakes_are_told_to_the_agent(server):
    async def ask(client: Client) -> None:
        found = await client.call_tool("fetch", {"id": "nowhere"})
        assert found.is_error and "nowhere" in found.content[0].text
        found = await client.call_tool("search", {"query": "a", "top_k": 0})
        assert found.is_error and "top_k" in found.content[0].text

    within(server, "auto", ask)
