"""The open-loop generator that the service is measured and broken with."""

import asyncio
import itertools
import statistics

import pytest
from aiohttp import web

from benchmarks.load import Call, Load, Outcome, arrivals, summarise


def test_arrivals_are_as_many_as_asked_for_and_irregular():
    times = arrivals(50.0, 100.0, seed=1)
    assert len(times) == pytest.approx(5_000, rel=0.05)
    assert times == sorted(times) and times[0] > 0 and times[-1] < 100
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)  # as of a Poisson process
    assert arrivals(50.0, 100.0, seed=1) == times != arrivals(50.0, 100.0, seed=2)


def test_latency_counts_from_when_it_was_due():
    call = Call("/", b"", tokens=10)
    outcomes = [Outcome(call, due_s=i, done_s=i + 2.0, status=200) for i in range(10)]
    outcomes.append(Outcome(call, due_s=1, done_s=1.1, status=429, retry_after="1"))
    summary = summarise(outcomes, duration_s=10.0)
    assert summary.statuses == {200: 10, 429: 1}
    assert summary.p50_s == summary.p99_s == 2.0
    assert summary.requests_per_s == 10 / 11 and summary.tokens_per_s == 100 / 11


def test_nothing_answered_is_no_number():
    assert summarise([], duration_s=1.0).requests_per_s == 0
    assert str(summarise([], duration_s=1.0).p99_s) == "nan"


def test_requests_leave_though_none_is_answered():
    """A server that answers after half a second has many requests at once."""

    async def measure():
        at_once = [0, 0]

        async def slow(request):
            at_once[0] += 1
            at_once[1] = max(at_once)
            await asyncio.sleep(0.5)
            at_once[0] -= 1
            return web.json_response({}, status=429, headers={"Retry-After": "2"})

        app = web.Application()
        app.router.add_post("/x", slow)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        load = Load(f"http://127.0.0.1:{port}", lambda i: Call("/x", b"{}"), rate=100, duration_s=1)
        await load.run()
        await runner.cleanup()
        return load, at_once[1]

    load, most = asyncio.run(measure())
    assert most > 20
    assert {(one.status, one.retry_after) for one in load.outcomes} == {(429, "2")}
    assert min(one.latency_s for one in load.outcomes) >= 0.5


def test_a_server_that_is_not_there_is_an_outcome():
    load = Load("http://127.0.0.1:9", lambda i: Call("/x", b"{}"), rate=20, duration_s=0.5)
    asyncio.run(load.run())
    assert load.outcomes and {one.status for one in load.outcomes} == {0}
    assert load.outcomes[0].error
