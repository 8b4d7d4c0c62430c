"""Made-up requests, valid and not, against the whole app over the model `echo`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from rich.console import Console
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.types import ASGIApp, Receive, Scope, Send

from reasonembed.config import ServeConfig
from reasonembed.progress import Reporter
from reasonembed.serving.assembly import assemble
from reasonembed.serving.building import build_here, index_config
from reasonembed.systems.local import LocalWork

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
TEXTS = {"a": "Roots hold the soil.", "b": "Leaves fall in autumn.", "c": "Roads cost money."}
# Some fields exclude each other and some limits are configured, which a schema cannot say: such
# requests fit it and are refused with 400.
NOT_CHECKED = [positive_data_acceptance]


class _App:
    """The app once a test has asked for it: what is made up is known before that.

    Its lifespan is left out: each case would run it, and an app has ended after the first.
    """

    app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})


schema = schemathesis.openapi.from_path(COMMITTED)
schema.app = _App()
answered: Counter[tuple[str, int]] = Counter()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [json.dumps({"doc_id": key, "text": text}) for key, text in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    out = folder / "biology"
    config = index_config(str(folder / "corpus.jsonl"), out=str(out), given={"model": "echo"})
    build_here(config, work=LocalWork(Reporter(Console(quiet=True))))
    schema.app.app = assemble(ServeConfig(model="echo", name="reasonembed", indexes=(str(out),)))


def check(case) -> None:
    response = case.call_and_validate(excluded_checks=NOT_CHECKED)
    answered[case.operation.label, response.status_code] += 1
    if response.status_code >= 400:
        assert set(response.json()) == {"error"}


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # shrinking takes longer than all the rest
        suppress_health_check=list(HealthCheck),
    )


@schema.parametrize()
@examples(25)
def test_no_request_breaks_the_server_or_the_document(app, case):
    check(case)


@pytest.mark.slow
@schema.parametrize()
@examples(300)
def test_many_requests(app, case):
    check(case)
