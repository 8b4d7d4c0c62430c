import asyncio
import base64
import gzip
import json
import logging
import re
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonembed.config import ServeConfig
from reasonembed.serving import middleware
from reasonembed.serving.errors import ApiError
from reasonembed.serving.exchange import ACCESS, Exchange, note_timings, start_access_log
from reasonembed.serving.keys import KeyFile, add_key, remove_key
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.middleware import SECURITY_HEADERS, install
from reasonembed.serving.outgoing import Outgoing
from reasonembed.serving.service import Timings
from tests.serving.browser import listening

LIMIT, BIG, ROOM = 1_000, 1_000_000, 4_000_000
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
SECRET = "why does my neighbour's dog bark at night"


class Site:
    """A small app behind the middleware, and what happened in it."""

    def __init__(self, keys=None, timeout_s=5.0, sends_request_id=True, **config):
        limits = {"max_body_bytes": LIMIT, "timeout_s": timeout_s}
        self.metrics, self.keys = Metrics(), keys
        self.settings = ServeConfig(model="echo", limits=limits, **config)
        self.began, self.cancelled, self.finished = (asyncio.Event() for _ in range(3))
        self.outgoing = Outgoing(ROOM)
        self.app = FastAPI()
        self._add_plain()
        self._add_failing()
        self._add_waiting()
        self._add_streams()
        self._add_big()
        install(self.app, self, sends_request_id=sends_request_id)

    def _add_plain(self):
        app = self.app

        @app.get("/livez")
        @app.get("/readyz")
        @app.get("/health")
        @app.get("/items/{item_id}")
        async def answer(item_id: str = ""):
            return {"status": "ok"}

        @app.post("/echo")
        async def echo(request: Request):
            note_timings(request, Timings(0.25, 0.5, 0.125), tokens=7)
            return {"size": len(await request.body())}

        @app.get("/page")
        async def page():
            return HTMLResponse("<p>", headers={"Content-Security-Policy": "default-src 'none'"})

        @app.get("/metrics")
        async def metrics():
            return {}

    def _add_failing(self):
        app = self.app

        @app.post("/fail")
        async def fail(request: Request):
            try:
                raise KeyError((await request.body()).decode(errors="replace"))
            except KeyError as error:
                raise RuntimeError(f"cannot do {SECRET}") from error

        @app.post("/refuse")
        async def refuse():
            raise ApiError(429, "full", code="overloaded", headers={"Retry-After": "3"})

    def _add_waiting(self):
        app = self.app

        @app.post("/slow")
        async def slow():
            self.began.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        @app.post("/stuck")
        async def stuck():
            raise TimeoutError(SECRET)

        @app.get("/later")
        async def later(tasks: BackgroundTasks):
            async def finish():
                await asyncio.sleep(0.02)
                self.finished.set()

            tasks.add_task(finish)
            return {}

    def _add_streams(self):
        app = self.app

        @app.get("/stream")
        async def stream():
            async def parts():
                for number in range(3):
                    await asyncio.sleep(0.05)
                    yield str(number)

            return StreamingResponse(parts())

        @app.get("/broken-stream")
        async def broken_stream():
            async def parts():
                yield "a"
                raise RuntimeError(SECRET)

            return StreamingResponse(parts())

    def _add_big(self):
        app = self.app

        @app.post("/big")
        async def big(times: int = 1):
            return Response(b"x" * BIG * times)

        @app.post("/hold/{size}")
        async def hold(request: Request, size: int, wait: int = 1):
            self.outgoing.hold(request, size)
            self.began.set()
            await asyncio.sleep(30 * wait)
            return {}

    def ask(self, method, path, **more):
        return asyncio.run(self.ask_async(method, path, **more))

    async def ask_async(self, method, path, base_url="http://127.0.0.1:8000", **more):
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            return await client.request(method, path, **more)

    def counts(self):
        """Answers by route and status."""
        return {
            (sample.labels["route"], int(sample.labels["status"])): sample.value
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "reasonembed_requests_total"
        }

    def rejected(self, reason):
        return self.metrics.registry.get_sample_value(
            "reasonembed_rejected_total", {"reason": reason}
        )


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys.txt"
    return SimpleNamespace(path=path, key=add_key(path, "ann"))


@pytest.fixture
def lines(caplog):
    """Lines of the access log, read as JSON."""
    caplog.set_level(logging.DEBUG, logger=ACCESS)
    return lambda: [json.loads(one.getMessage()) for one in caplog.records if one.name == ACCESS]


def error_of(response):
    """The error object, whose shape is checked."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


# Ids, headers, counts: on every status.

ANSWERS = {
    200: ("GET", "/items/1", {}),
    403: ("POST", "/echo", {"headers": {"Sec-Fetch-Site": "cross-site"}}),
    404: ("GET", f"/nowhere/{SECRET}", {}),
    405: ("DELETE", "/echo", {}),
    408: ("POST", "/slow", {}),
    413: ("POST", "/echo", {"content": b"x" * (LIMIT + 1)}),
    415: ("POST", "/echo", {"headers": {"Content-Encoding": "gzip"}, "content": b"x"}),
    429: ("POST", "/refuse", {}),
    500: ("POST", "/fail", {"content": SECRET.encode()}),
}


@pytest.mark.parametrize("status", ANSWERS)
def test_every_status_has_ids_timings_security_headers_and_a_count(status, lines):
    site = Site(timeout_s=0.05)
    method, path, more = ANSWERS[status]
    headers = {**more.get("headers", {}), "X-Request-ID": "mine-1", "traceparent": PARENT}
    response = site.ask(method, path, **{**more, "headers": headers})
    assert response.status_code == status
    assert response.headers["x-request-id"] == "mine-1"
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", response.headers["traceparent"])
    assert response.headers["traceparent"] != PARENT
    assert response.headers["openai-processing-ms"].isdigit()
    assert response.headers["x-total-time"].isdigit()
    for name, value in SECURITY_HEADERS.items():
        assert response.headers[name] == value
    assert "access-control-allow-origin" not in response.headers
    (line,) = lines()
    assert line["status"] == status and line["request_id"] == "mine-1"
    assert line["trace_id"] == TRACE and line["parent_id"] == PARENT.split("-")[2]
    assert site.counts() == {(line["route"], status): 1}


def test_401_too(key_file, lines):
    site = Site(KeyFile(key_file.path))
    response = site.ask("POST", "/echo", headers={"X-Request-ID": "mine-1"})
    assert response.status_code == 401 and response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert site.counts() == {("/echo", 401): 1}


@pytest.mark.parametrize("status", [403, 408, 413, 415, 429, 500])
def test_our_errors_have_openais_shape(status):
    method, path, more = ANSWERS[status]
    response = Site(timeout_s=0.05).ask(method, path, **more)
    error = error_of(response)
    assert error["type"] and SECRET not in error["message"]
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("sent", ["", " ", "a b", "x" * 129, "a\tb", "{}", "é"])
def test_an_id_that_is_not_plain_is_replaced(sent):
    response = Site().ask("GET", "/health", headers={"X-Request-ID": sent.encode()})
    assert re.fullmatch(r"req-[0-9a-f]{32}", response.headers["x-request-id"])


def test_ids_differ():
    site = Site()
    assert len({site.ask("GET", "/health").headers["x-request-id"] for _ in range(10)}) == 10


def test_a_proxy_may_write_the_id_itself(lines):
    site = Site(sends_request_id=False)
    response = site.ask("GET", "/items/1", headers={"X-Request-ID": "mine-1"})
    assert "x-request-id" not in response.headers and lines()[0]["request_id"] == "mine-1"


def test_timings_have_teis_names():
    headers = Site().ask("POST", "/echo", content=b"abc").headers
    assert headers["x-tokenization-time"] == "250"
    assert headers["x-queue-time"] == "500"
    assert headers["x-inference-time"] == "125"
    assert headers["x-compute-tokens"] == "7"
    assert headers["x-compute-time"] == headers["x-total-time"]


def test_timings_of_several_embeddings_add_up():
    request = Request({"type": "http", "headers": [], "method": "POST"})
    note_timings(request, Timings(1), tokens=1)  # without the middleware it is nobody's
    exchange = Exchange.begin(request.scope)
    note_timings(request, Timings(1, 2, 3), tokens=4)
    note_timings(request, Timings(1, 2, 3), tokens=4)
    assert exchange.timings == Timings(2, 4, 6) and exchange.tokens == 8


def test_tracestate_is_passed_on_with_a_valid_parent_only():
    site = Site()
    given = {"traceparent": PARENT, "tracestate": "rojo=1"}
    assert site.ask("GET", "/health", headers=given).headers["tracestate"] == "rojo=1"
    assert "tracestate" not in site.ask("GET", "/health", headers={"tracestate": "a=1"}).headers


def test_a_route_may_have_a_policy_of_its_own():
    response = Site().ask("GET", "/page")
    assert response.headers.get_list("content-security-policy") == ["default-src 'none'"]


# Keys.


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
def test_probes_need_no_key(key_file, path):
    assert Site(KeyFile(key_file.path)).ask("GET", path).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/items/1", "/metrics", "/docs", "/openapi.json", "/", "/nowhere", "/health/", "//health"],
)
def test_every_other_path_needs_one(key_file, path):
    site = Site(KeyFile(key_file.path))
    response = site.ask("GET", f"http://127.0.0.1:8000{path}")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"
    assert site.rejected("invalid_api_key") == 1


def test_forms_of_the_key(key_file, lines):
    site, key = Site(KeyFile(key_file.path)), key_file.key
    password = base64.b64encode(f"anyone:{key}".encode()).decode()
    for headers in (
        bearer(key),
        {"Authorization": f"bearer  {key}"},
        {"X-API-Key": key},
        {"Authorization": "Bearer unused", "X-API-Key": key},
        {"Authorization": f"Basic {password}"},
    ):
        assert site.ask("GET", "/items/1", headers=headers).status_code == 200, headers
    assert {line["key"] for line in lines()} == {"ann"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "KEY"},
        {"Authorization": "Token KEY"},
        {"Authorization": "Basic KEY"},
        {"Authorization": "Basic !"},
        {"Authorization": "Bearer KEY KEY"},
        {"Authorization": "Bearer kEY"},
        {"X-API-Key": ""},
        {"X-API-Key": "Bearer KEY"},
        {"Cookie": "key=KEY"},
    ],
)
def test_what_is_no_key(key_file, headers, caplog):
    caplog.set_level(logging.DEBUG)
    given = {name: value.replace("KEY", key_file.key) for name, value in headers.items()}
    given = {name: value.replace("kEY", key_file.key[:-1]) for name, value in given.items()}
    response = Site(KeyFile(key_file.path)).ask("GET", "/items/1", headers=given)
    assert response.status_code == 401
    assert key_file.key not in response.text and key_file.key not in caplog.text


def test_a_key_in_the_query_string_does_not_count(key_file):
    site = Site(KeyFile(key_file.path))
    assert site.ask("GET", f"/items/1?api_key={key_file.key}").status_code == 401


def test_browsers_are_asked_for_a_password(key_file):
    site = Site(KeyFile(key_file.path))
    response = site.ask("GET", "/", headers={"Accept": "text/html,*/*"})
    assert response.headers["www-authenticate"].startswith("Basic ")


def test_rotation_while_it_runs(key_file):
    now = [0.0]
    site = Site(KeyFile(key_file.path, clock=lambda: now[0]))
    new = add_key(key_file.path, "bob")
    now[0] += 1
    assert site.ask("GET", "/items/1", headers=bearer(new)).status_code == 200
    assert site.ask("GET", "/items/1", headers=bearer(key_file.key)).status_code == 200
    remove_key(key_file.path, "ann")
    now[0] += 1
    assert site.ask("GET", "/items/1", headers=bearer(key_file.key)).status_code == 401


def test_an_empty_key_file_refuses_everybody(tmp_path):
    path = tmp_path / "keys.txt"
    path.touch()
    site = Site(KeyFile(path))
    assert site.ask("GET", "/items/1", headers=bearer("")).status_code == 401
    assert site.ask("GET", "/items/1", headers=bearer("x")).status_code == 401
    assert site.ask("GET", "/livez").status_code == 200


# Where requests come from.


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "10.0.0.7", "a.localhost",
     "box", "localhost."],
)  # fmt: skip
def test_hosts_that_nobody_else_can_name(host):
    assert Site().ask("GET", "/items/1", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
     "evil.example.", "a:b:c", "[::1].evil.example"],
)  # fmt: skip
def test_foreign_hosts_are_refused_on_loopback(host):
    site = Site()
    response = site.ask("GET", "/items/1", headers={"Host": host})
    assert response.status_code == 403 and error_of(response)["code"] == "foreign_host"
    assert host not in response.text
    assert site.rejected("foreign_host") == 1


def test_a_public_name_is_fine_with_keys_or_by_choice(key_file):
    named = {"Host": "search.example.com"}
    keyed = Site(KeyFile(key_file.path), keys_file=str(key_file.path))
    assert keyed.ask("GET", "/items/1", headers={**named, **bearer(key_file.key)}).is_success
    assert Site(allow_anonymous=True).ask("GET", "/items/1", headers=named).is_success


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_cannot_make_a_browser_ask(site):
    headers = {"Sec-Fetch-Site": site}
    response = Site().ask("POST", "/echo", headers=headers)
    assert response.status_code == 403 and error_of(response)["code"] == "cross_site"
    assert Site().ask("GET", "/page", headers=headers).status_code == 200, "a link may lead here"
    for own in ("same-origin", "none"):
        assert Site().ask("POST", "/echo", headers={"Sec-Fetch-Site": own}).status_code == 200


def test_websockets_are_closed():
    site, sent = Site(), []

    async def send(message):
        sent.append(message)

    asyncio.run(site.app({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# Bodies.


async def chunks(size, step=100):
    for start in range(0, size, step):
        yield b"x" * min(step, size - start)


@pytest.mark.parametrize("size", [0, 1, LIMIT - 1, LIMIT])
def test_bodies_up_to_the_limit_arrive_whole(size):
    for content in (b"x" * size, chunks(size)):
        assert Site().ask("POST", "/echo", content=content).json() == {"size": size}


def test_bodies_over_the_limit_are_refused_however_they_come():
    for content in (b"x" * (LIMIT + 1), chunks(LIMIT + 1), chunks(50 * LIMIT)):
        site = Site()
        response = site.ask("POST", "/echo", content=content)
        assert response.status_code == 413 and "max_body_bytes (1,000 bytes)" in response.text
        assert site.rejected("body_too_large") == 1


@pytest.mark.parametrize("declared", ["1001", "0001001", "9" * 5_000])
def test_a_declared_length_is_enough(declared):
    async def never():
        await asyncio.Event().wait()
        yield b""

    headers = {"Content-Length": declared}
    assert Site().ask("POST", "/echo", content=never(), headers=headers).status_code == 413


def test_a_body_is_bounded_whatever_its_declared_length():
    for declared in ("5", "-1", "x", "٣"):
        headers = {"Content-Length": declared.encode()}
        content = chunks(LIMIT + 1)
        assert Site().ask("POST", "/echo", content=content, headers=headers).status_code == 413


def test_compressed_bodies_are_refused_unread():
    bomb = gzip.compress(b"x" * 10**6)
    response = Site().ask("POST", "/echo", content=bomb, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415 and response.headers["accept-encoding"] == "identity"
    assert error_of(response)["code"] == "unsupported_encoding"
    plain = Site().ask("POST", "/echo", content=b"abc", headers={"Content-Encoding": "identity"})
    assert plain.json() == {"size": 3}


# Time.


def test_work_that_takes_too_long_is_cancelled():
    async def check():
        site = Site(timeout_s=0.05)
        response = await site.ask_async("POST", "/slow")
        assert response.status_code == 408 and error_of(response)["code"] == "timeout"
        assert response.headers["x-should-retry"] == "false"
        assert site.cancelled.is_set()
        assert site.rejected("timeout") == 1

    asyncio.run(check())


def test_a_body_that_never_ends_is_given_up():
    async def drip():
        while True:
            yield b""
            await asyncio.sleep(0.01)

    assert Site(timeout_s=0.05).ask("POST", "/echo", content=drip()).status_code == 408


def test_a_timeout_of_the_routes_own_is_a_failure():
    assert Site().ask("POST", "/stuck").status_code == 500


def test_an_answer_that_has_begun_may_take_its_time():
    assert Site(timeout_s=0.1).ask("GET", "/stream").text == "012"


# Clients that go.


def scope_of(path, method):
    return {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [], "root_path": "", "scheme": "http",
        "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "http_version": "1.1",
    }  # fmt: skip


async def run_raw(site, path, receive, *, method="POST"):
    """Calls the app as a server would; the messages that it sent."""
    sent = []

    async def send(message):
        sent.append(message)

    await site.app(scope_of(path, method), receive, send)
    return sent


def test_a_route_ends_when_its_client_goes(lines, caplog):
    async def check():
        site, messages = Site(), [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await site.began.wait()
            return {"type": "http.disconnect"}

        assert await run_raw(site, "/slow", receive) == []
        assert site.cancelled.is_set()
        assert asyncio.current_task().cancelling() == 0
        return site

    site = asyncio.run(check())
    assert site.counts() == {("/slow", 499): 1} and lines()[0]["status"] == 499
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("failure", [OSError, RuntimeError, KeyError])
def test_a_broken_connection_is_a_client_that_went(failure):
    async def check():
        site, messages = Site(), [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await site.began.wait()
            raise failure

        await run_raw(site, "/slow", receive)
        return site.counts()

    assert asyncio.run(check()) == {("/slow", 499): 1}


def test_a_client_that_goes_within_its_body(caplog):
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"x", "more_body": 1}]
    site = Site()

    async def receive():
        return messages.pop()

    assert asyncio.run(run_raw(site, "/echo", receive)) == []
    assert site.counts() == {("/echo", 499): 1}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_disconnection_after_the_answer_is_none():
    site = Site()
    assert site.ask("GET", "/later").status_code == 200
    assert site.finished.is_set() and not site.cancelled.is_set()
    assert site.counts() == {("/later", 200): 1}


def test_an_answer_is_counted_before_its_last_part_is_sent():
    async def check():
        site, counted = Site(), []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            counted.append(sum(site.counts().values()))

        await site.app(scope_of("/health", "GET"), receive, send)
        return counted

    assert asyncio.run(check()) == [0, 1]


def test_cancellation_from_outside_is_passed_on():
    async def check():
        site, messages = Site(), [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        task = asyncio.create_task(run_raw(site, "/slow", receive))
        await site.began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert site.cancelled.is_set() and len(asyncio.all_tasks()) == 1, "nothing is left running"
        return site.counts()

    assert asyncio.run(check()) == {("/slow", 503): 1}


def test_a_stream_that_breaks_is_no_whole_answer(lines):
    async def check():
        site, messages = Site(), [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        sent = await run_raw(site, "/broken-stream", receive, method="GET")
        assert [message.get("more_body") for message in sent[1:]] == [True]
        return site.counts()

    assert asyncio.run(check()) == {("/broken-stream", 500): 1}


# Counts and logs.


def test_counts_are_those_of_the_client(key_file):
    site, seen = Site(KeyFile(key_file.path), timeout_s=0.05), {}
    asked = [
        ("GET", "/items/1", "/items/{item_id}"),
        ("GET", "/items/2", "/items/{item_id}"),
        ("POST", "/echo", "/echo"),
        ("POST", "/fail", "/fail"),
        ("POST", "/slow", "/slow"),
        ("GET", "/echo", "/echo"),
        ("GET", "/nowhere/a", "unmatched"),
        ("GET", "/nowhere/b", "unmatched"),
        ("GET", "/stream", "/stream"),
    ]
    for number, (method, path, route) in enumerate(asked * 3):
        headers = {} if number % 3 == 0 else bearer(key_file.key)
        status = site.ask(method, path, headers=headers).status_code
        seen[route, status] = seen.get((route, status), 0) + 1
    assert site.counts() == seen
    observed = sum(
        sample.value
        for metric in site.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "reasonembed_request_seconds_count"
    )
    assert observed == len(asked) * 3


TEXTS = st.text(min_size=6).filter(lambda text: text.strip() == text and text.isprintable())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    marked=TEXTS.map(lambda text: f"§{text}§"),
    path=st.sampled_from(["/echo", "/fail", "/nowhere/", "/items/", "/stuck"]),
    method=st.sampled_from(["GET", "POST", "QUERY"]),
)
def test_no_text_of_users_is_logged_or_a_label(marked, path, method, caplog):
    caplog.clear()
    caplog.set_level(logging.INFO)
    site, quoted = Site(), httpx.QueryParams({"q": marked})
    target = f"{path}{quoted}" if path.endswith("/") else f"{path}?{quoted}"
    body = json.dumps({"input": marked}, ensure_ascii=False).encode()
    headers = {"X-Request-ID": marked.encode(), "User-Agent": marked.encode(),
               "traceparent": marked.encode(), "Referer": marked.encode()}  # fmt: skip
    site.ask(method, target, content=body, headers=headers)
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("reasonembed"))
    exposed = site.metrics.exposition()[0].decode()
    assert ACCESS in {record.name for record in caplog.records}
    assert "§" not in ours and str(quoted)[2:] not in ours
    assert "§" not in exposed and str(quoted)[2:] not in exposed


def test_a_failure_is_logged_with_its_places_and_causes_but_not_its_words(caplog):
    Site().ask("POST", "/fail", content=SECRET.encode())
    (record,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    text = record.getMessage()
    assert "builtins.RuntimeError" in text and "because of builtins.KeyError" in text
    assert "test_middleware.py" in text
    assert SECRET not in text and record.exc_info is None


def test_who_debugs_sees_the_words(caplog):
    caplog.set_level(logging.DEBUG, logger="reasonembed.serving.middleware")
    Site().ask("POST", "/fail")
    assert SECRET in caplog.text


def test_routine_probes_are_logged_at_debug_level_only(caplog):
    caplog.set_level(logging.INFO, logger=ACCESS)
    site = Site()
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        site.ask("GET", path)
    assert not caplog.records
    site.ask("POST", "/livez")
    assert len(caplog.records) == 1


def test_the_access_log_is_lines_of_json():
    import io

    logger, stream = logging.getLogger(ACCESS), io.StringIO()
    try:
        start_access_log(stream)
        start_access_log(stream)
        Site().ask("POST", "/echo", content=b"abc")
    finally:
        for handler in list(logger.handlers):
            if getattr(handler, "stream", None) is stream:
                logger.removeHandler(handler)
        logger.propagate, logger.level = True, logging.NOTSET
        logger.manager._clear_cache()
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["route"] == "/echo" and entry["status"] == 200 and entry["tokens"] == 7
    assert entry["tokenize_ms"] == 250 and entry["queue_ms"] == 500 and entry["forward_ms"] == 125


# Over real sockets.


@pytest.mark.parametrize("http", ["auto", "h11"])
def test_refusals_reach_clients_that_are_still_sending(key_file, http):
    site = Site(KeyFile(key_file.path))
    site.settings = ServeConfig(model="echo", limits={"max_body_bytes": 4_000_000})
    large, headers = b"x" * 6_000_000, bearer(key_file.key)
    with listening(site.app, http=http) as url, httpx.Client(base_url=url) as client:
        for _ in range(5):
            assert client.post("/echo", content=large).status_code == 401
            assert client.post("/echo", content=large, headers=headers).status_code == 413
        assert client.get("/items/1", headers=bearer(key_file.key)).status_code == 200
    assert site.counts() == {
        ("/echo", 401): 5, ("/echo", 413): 5, ("/items/{item_id}", 200): 1
    }  # fmt: skip


def test_work_of_a_client_that_hangs_up_is_cancelled():
    site = Site()
    with listening(site.app) as url:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=url, timeout=0.2) as client:
            client.post("/slow")
        deadline = time.monotonic() + 5
        while not site.counts() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert site.cancelled.is_set() and site.counts() == {("/slow", 499): 1}


def test_bodies_that_are_held_at_once_are_bounded(monkeypatch):
    monkeypatch.setattr("reasonembed.serving.middleware._BODIES", 2)

    async def check():
        site, gate = Site(), asyncio.Event()

        async def held():
            yield b"x" * (LIMIT - 10)
            await gate.wait()
            yield b"x" * 10

        first = [asyncio.create_task(site.ask_async("POST", "/echo", content=held())) for _ in "ab"]
        await asyncio.sleep(0.05)
        refused = await site.ask_async("POST", "/echo", content=b"x" * 100)
        assert refused.status_code == 429 and error_of(refused)["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1" and site.rejected("overloaded") == 1
        assert refused.headers["retry-after-ms"] == "1000"
        assert (await site.ask_async("GET", "/items/1")).status_code == 200
        gate.set()
        assert [one.json() for one in await asyncio.gather(*first)] == [{"size": LIMIT}] * 2
        later = await site.ask_async("POST", "/echo", content=b"x" * LIMIT)
        return later.json()

    assert asyncio.run(check()) == {"size": LIMIT}


def test_a_body_has_less_time_than_an_answer(monkeypatch):
    monkeypatch.setattr("reasonembed.serving.middleware._BODY_S", 0.05)

    async def drip():
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    site = Site(timeout_s=10)
    response = site.ask("POST", "/echo", content=drip())
    assert response.status_code == 408 and "body did not arrive within 0.05 s" in response.text
    assert site.rejected("timeout") == 1


# Answers that nobody reads.


async def stuck_reader(site, path, taken):
    """Calls the app as a server would whose client stops reading after some messages."""
    messages, go = [{"type": "http.request", "body": b"", "more_body": False}], asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.Event().wait()

    async def send(message):
        taken.append(message)
        if len(taken) > 2:
            await go.wait()

    task = asyncio.create_task(site.app(scope_of(path, "POST"), receive, send))
    while len(taken) <= 2:
        await asyncio.sleep(0)
    return task, go


def test_answers_count_until_their_last_part_was_taken():
    async def check():
        site, taken = Site(), []
        task, go = await stuck_reader(site, "/big", taken)
        assert site.outgoing.held == BIG  # not what it was thought to be, but what it is
        assert site.counts() == {}
        go.set()
        await task
        assert site.outgoing.held == 0
        assert b"".join(one["body"] for one in taken[1:]) == b"x" * BIG
        assert [one["more_body"] for one in taken[1:]] == [True] * (len(taken) - 2) + [False]
        return site.counts()

    assert asyncio.run(check()) == {("/big", 200): 1}


def test_no_work_is_begun_while_answers_are_not_read():
    async def check():
        site, readers = Site(), []
        while not site.outgoing.is_full:
            readers.append(await stuck_reader(site, "/big", []))
        assert len(readers) == ROOM // BIG
        refused = await site.ask_async("POST", "/big")
        assert refused.status_code == 429 and error_of(refused)["code"] == "overloaded"
        assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("2", "2000")
        assert site.rejected("overloaded") == 1
        assert (await site.ask_async("GET", "/livez")).status_code == 200
        for task, go in readers:
            go.set()
            await task
        assert (await site.ask_async("POST", "/big")).status_code == 200

    asyncio.run(check())


def test_a_client_that_reads_no_more_is_left(monkeypatch):
    monkeypatch.setattr(middleware, "_UNREAD_S", 0.02)

    async def check():
        site = Site()
        task, _ = await stuck_reader(site, "/big", [])
        await task
        assert site.outgoing.held == 0
        return site.counts()

    assert asyncio.run(check()) == {("/big", 499): 1}


def test_a_client_that_reads_no_more_before_its_answer_begins_is_left_too(monkeypatch):
    """So it is where requests come in a row and the first one's answer is not read."""
    monkeypatch.setattr(middleware, "_UNREAD_S", 0.02)
    site = Site()
    scope = scope_of("/hold/100", "POST") | {"query_string": b"wait=0"}
    asyncio.run(unread(site, scope, [{"type": "http.request", "body": b"", "more_body": False}]))
    assert site.outgoing.held == 0
    assert site.counts() == {("/hold/{size}", 499): 1}


@pytest.mark.parametrize("is_gone", [True, False])
def test_an_error_that_nobody_reads_is_no_failure(is_gone, monkeypatch):
    monkeypatch.setattr(middleware, "_UNREAD_S", 5 if is_gone else 0.02)
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    if is_gone:
        messages.append({"type": "http.disconnect"})
    site = Site()
    asyncio.run(unread(site, scope_of("/fail", "POST"), messages))
    assert site.counts() == {("/fail", 499): 1}


async def unread(site, scope, messages):
    """A request whose answer cannot even begin, as its client reads nothing."""
    gate = asyncio.Event()

    async def receive():
        if not messages:
            await gate.wait()
        await asyncio.sleep(0.01)
        return messages.pop(0)

    async def send(_):
        await gate.wait()

    task = asyncio.create_task(site.app(scope, receive, send))
    done, _ = await asyncio.wait({task}, timeout=2)
    gate.set()
    assert done, "it waits for the client"
    await task


def test_an_answer_has_room_before_it_is_computed():
    async def check():
        site = Site()
        slow = asyncio.create_task(site.ask_async("POST", f"/hold/{ROOM - 10}"))
        await site.began.wait()
        assert site.outgoing.held == ROOM - 10
        refused = await site.ask_async("POST", "/hold/11")
        assert refused.status_code == 429
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert site.outgoing.held == 0
        assert (await site.ask_async("POST", f"/hold/{10 * ROOM}?wait=0")).status_code == 200
        assert site.outgoing.held == 0

    asyncio.run(check())


def test_a_client_that_does_not_read_keeps_its_answer_counted():
    """Over sockets: a server hands everything to the system unless it is given parts."""
    site = Site()
    with listening(site.app) as url:
        slow = socket.create_connection(url[7:].split(":"))
        slow.sendall(b"POST /big?times=20 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        deadline = time.monotonic() + 5
        while site.outgoing.held < 20 * BIG and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert site.outgoing.held == 20 * BIG  # and stays, since none is read
        assert httpx.post(f"{url}/big").status_code == 429
        slow.close()
        deadline = time.monotonic() + 5
        while site.outgoing.held and time.monotonic() < deadline:
            time.sleep(0.01)
    assert site.outgoing.held == 0, "it hung up"


@pytest.mark.parametrize("is_behind_proxy", [False, True])
def test_a_server_that_stops_says_so(is_behind_proxy):
    """Behind a proxy a cancellation means that the client has gone."""

    async def check():
        site, sent = Site(sends_request_id=not is_behind_proxy), []

        async def receive():
            await asyncio.sleep(0)
            if not sent and not site.began.is_set():
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        task = asyncio.create_task(site.app(scope_of("/slow", "POST"), receive, send))
        await site.began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return site, sent

    site, sent = asyncio.run(check())
    if is_behind_proxy:
        assert not sent and site.counts() == {("/slow", 499): 1}
        return
    start, body = sent
    assert start["status"] == 503 and dict(start["headers"])[b"retry-after"]
    assert json.loads(body["body"])["error"]["code"] == "unavailable"
    assert site.counts() == {("/slow", 503): 1}
