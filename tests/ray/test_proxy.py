"""What a proxy of Serve says of its own; no cluster is started."""

import asyncio

import httpx
import pytest

from ray.serve._private.http_util import RequestIdMiddleware, validate_http_proxy_callback_return
from ray_jobs.proxy import Answering, middlewares


def get(proxy, **headers):
    """The answer of a proxy, put together as Serve does it."""

    async def ask():
        transport = httpx.ASGITransport(app=Answering(RequestIdMiddleware(proxy)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/models", headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize("headers", [{}, {"x-request-id": "mine"}])
def test_a_request_that_its_ingress_left_behind_may_be_sent_again(headers):
    async def dies(scope, receive, send):
        await receive()

    answer = get(dies, **headers)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "unavailable"
    [request_id] = answer.headers.get_list("x-request-id")
    assert request_id == headers.get("x-request-id", request_id) != ""


def test_what_is_answered_is_left_as_it_is():
    async def answers(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"as it was"})

    answer = get(answers)
    assert (answer.status_code, answer.text) == (500, "as it was")
    assert answer.headers.get_list("x-request-id") != []


def test_serve_takes_it():
    assert [one.cls for one in validate_http_proxy_callback_return(middlewares())] == [Answering]
