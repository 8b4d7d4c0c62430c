import asyncio
import contextlib
import json

import httpx
import pytest
from fastapi import FastAPI

from reasonembed.errors import ModelError
from reasonembed.serving.exchange import ACCESS
from reasonembed.serving.starting import Starting


def inner(events):
    @contextlib.asynccontextmanager
    async def lifespan(_):
        events.append("up")
        yield
        events.append("down")

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    async def ready():
        return {"status": "ok"}

    return app


async def get(app, path, root_path="", **headers):
    transport = httpx.ASGITransport(app=app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path, headers={"x-request-id": "mine", **headers})


def test_it_answers_before_the_model_is_there_and_is_the_app_after():
    events, is_loaded = [], asyncio.Event()

    async def assemble():
        await is_loaded.wait()
        return inner(events)

    async def life():
        app = Starting(assemble, why=lambda: "golden vectors differ")
        await app.begin(patience_s=0.01)
        assert (await get(app, "/livez")).status_code == 200
        assert (await get(app, "/health")).json() == {"status": "starting"}
        for path in ("/readyz", "/v1/models"):
            refused = await get(app, path)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "server_error"
            assert "golden vectors differ" in refused.json()["error"]["message"]
            assert refused.headers["x-request-id"] == "mine"
            assert refused.headers["traceparent"] and refused.headers["cache-control"]
        is_loaded.set()
        await asyncio.sleep(0.01)
        assert (await get(app, "/readyz")).json() == {"status": "ok"}
        assert events == ["up"]
        await app.end()
        assert events == ["up", "down"]

    asyncio.run(life())


def test_a_person_gets_a_page_that_loads_itself_again():
    async def never():
        await asyncio.Event().wait()

    async def life():
        app = Starting(never, why=lambda: "<b> differs")
        await app.begin(patience_s=0.01)
        browser = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
        page = await get(app, "/", **browser)
        assert page.status_code == 503 and page.headers["content-type"].startswith("text/html")
        assert "the service is starting: &lt;b&gt; differs" in page.text
        assert '<meta http-equiv="refresh" content="2">' in page.text
        assert page.headers["retry-after"] == "2" and page.headers["x-request-id"] == "mine"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "style" not in page.text and "script" not in page.text  # that policy refuses them
        for path, accept in (("/", "*/*"), ("/v1/models", browser["accept"])):
            other = await get(app, path, accept=accept)
            assert (other.status_code, other.json()["error"]["code"]) == (503, "unavailable")
        app.drain()
        assert "the service is ending" in (await get(app, "/", **browser)).text
        await app.end()

    asyncio.run(life())


def test_health_is_found_below_a_prefix():
    """`serve deploy` may put the application there; paths hold the prefix then."""

    async def never():
        await asyncio.Event().wait()

    async def life():
        app = Starting(never)
        await app.begin(patience_s=0.01)
        for path, status in (("/below/livez", 200), ("/below/readyz", 503)):
            assert (await get(app, path, root_path="/below")).status_code == status
        page = await get(app, "/below/", root_path="/below", accept="text/html")
        assert page.headers["content-type"].startswith("text/html")
        await app.end()

    asyncio.run(life())


def test_behind_a_proxy_that_writes_it_the_id_is_not_sent_twice(caplog):
    async def never():
        await asyncio.Event().wait()

    async def life():
        app = Starting(never, sends_request_id=False)
        await app.begin(patience_s=0.01)
        with caplog.at_level("INFO", logger=ACCESS):
            refused = await get(app, "/v1/models")
        assert refused.status_code == 503 and "x-request-id" not in refused.headers
        [line] = [json.loads(record.getMessage()) for record in caplog.records]
        assert (line["status"], line["request_id"]) == (503, "mine")
        await app.end()

    asyncio.run(life())


def test_what_is_up_within_the_patience_meets_no_503():
    async def assemble():
        await asyncio.sleep(0.02)
        return inner([])

    async def life():
        app = Starting(assemble)
        await app.begin(patience_s=5)
        assert (await get(app, "/readyz")).status_code == 200
        await app.end()

    asyncio.run(life())


def test_a_failure_is_raised_or_told():
    async def fail_late():
        await asyncio.sleep(0.02)
        raise ModelError("the index was made by another model")

    async def life():
        with pytest.raises(ModelError):
            await Starting(fail_late).begin(patience_s=5)
        late = Starting(fail_late)
        await late.begin(patience_s=0.0)
        await asyncio.sleep(0.05)
        assert "another model" in (await get(late, "/readyz")).json()["error"]["message"]
        with pytest.raises(ModelError):
            late.check()

    asyncio.run(life())


def test_an_unexpected_failure_is_not_told_to_clients():
    async def fail():
        raise RuntimeError("/secret/path")

    async def life():
        app = Starting(fail)
        with pytest.raises(RuntimeError):
            await app.begin(patience_s=5)
        assert "/secret" not in (await get(app, "/readyz")).text

    asyncio.run(life())


def test_draining_refuses_what_is_new():
    async def assemble():
        return inner([])

    async def life():
        app = Starting(assemble)
        await app.begin(patience_s=5)
        app.drain()
        assert (await get(app, "/readyz")).status_code == 503
        assert (await get(app, "/livez")).status_code == 200
        assert (await get(app, "/health")).json() == {"status": "ending"}
        await app.end()

    asyncio.run(life())


def test_lifespan_messages_begin_and_end_it():
    events = []

    async def assemble():
        return inner(events)

    async def life():
        app = Starting(assemble)
        received = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        sent = []

        async def receive():
            await asyncio.sleep(0.02)
            return next(received)

        async def send(message):
            sent.append(message["type"])

        await app({"type": "lifespan"}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert events == ["up", "down"]

    asyncio.run(life())
