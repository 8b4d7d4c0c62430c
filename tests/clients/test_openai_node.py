"""The `openai` package of npm, from a script that prints what it got."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.clients.expected import DOCUMENTS, same

PACKAGES = Path(os.environ.get("REASONEMBED_NPM", Path(sys.prefix) / "npm"))

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(
        shutil.which("node") is None or not (PACKAGES / "node_modules" / "openai").is_dir(),
        reason="needs node, and `make clients` with it",
    ),
]
TEXTS = list(DOCUMENTS.values())


@pytest.fixture(scope="module")
def found(server, slow_server) -> dict:
    script = Path(__file__).with_name("openai_client.mjs")
    arguments = [PACKAGES, server.openai_url, server.key, json.dumps(TEXTS), slow_server.openai_url]
    done = subprocess.run(
        ["node", script, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_base64_is_its_default_and_holds_the_bits_of_float(found, offline):
    computed = offline(TEXTS)
    assert np.float32(found["decoded"]).tobytes() == np.float32(found["plain"]).tobytes()
    assert same(found["decoded"], computed.vectors)
    assert found["usage"]["prompt_tokens"] == sum(map(len, computed.ids))


def test_extensions_dimensions_and_models(found, offline):
    assert same(found["query"], offline(TEXTS, role="query").vectors)
    assert same(found["short"], np.float32(found["plain"])[:, :128])
    assert found["listed"] == ["minilm", "org/minilm", "minilm:query", "minilm:document"]


def test_2048_inputs_in_order(found, offline):
    assert found["indices"] == list(range(2_048))
    assert same(found["last"], offline(["number 2047"]).vectors)


def test_its_own_errors_and_its_retry(found):
    failures = found["failures"]
    assert failures["empty"]["name"] == "BadRequestError"
    assert failures["empty"]["param"] == "input"
    assert failures["model"]["name"] == "NotFoundError"
    assert failures["model"]["code"] == "model_not_found"
    assert failures["key"]["name"] == "AuthenticationError"
    assert found["retried"] == [251, 251]
