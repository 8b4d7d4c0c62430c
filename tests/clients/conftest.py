"""A server with the packaged model behind keys, one that is soon full, and offline vectors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.clients.expected import DOCUMENTS, PACKAGED, SERVE, Computed
from tests.clients.process import PYTHON, Server, environment, reasonembed, serving

# The clients have an environment of their own (`make clients`); another one passes them over whole.
if importlib.util.find_spec("langchain_openai") is None:
    collect_ignore_glob = ["test_*.py"]

# Offline, huggingface_hub's client would refuse every address, also that of this machine.
os.environ |= {"HAYSTACK_TELEMETRY_ENABLED": "False", "HF_HUB_OFFLINE": "0"}


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Computed]]:
    """Embeds texts in a process without a server: `offline(texts, role="query")`."""
    settings = tmp_path_factory.mktemp("offline") / "serve.json"
    settings.write_text(json.dumps(SERVE))
    command = [PYTHON, str(Path(__file__).with_name("offline.py")), str(settings)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        lines_in, lines_out = process.stdin, process.stdout
        assert lines_in is not None and lines_out is not None

        def compute(texts: list[str], *, role: str = "document", instruction: str = "") -> Computed:
            asked = {"role": role, "instruction": instruction, "texts": texts}
            lines_in.write(json.dumps(asked) + "\n")
            lines_in.flush()
            found = json.loads(lines_out.readline())
            return Computed(Path(found["path"]), np.float32(found["vectors"]), found["ids"])

        yield compute
        lines_in.close()
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The packaged model with instructions for queries, an index, and a key."""
    folder = tmp_path_factory.mktemp("server")
    corpus, keys = folder / "corpus.jsonl", folder / "keys.txt"
    lines = [json.dumps({"id": name, "text": text}) for name, text in DOCUMENTS.items()]
    corpus.write_text("\n".join(lines))
    encoder = [
        f"--set=encoder.{key}={json.dumps(value)}" for key, value in SERVE["encoder"].items()
    ]
    index = str(folder / "nature")
    reasonembed("index", "build", str(corpus), "--out", index, "--model", PACKAGED, *encoder)
    key = reasonembed("keys", "add", str(keys), "tests").split()[0]
    settings = {**SERVE, "indexes": [index], "keys_file": str(keys)}
    with serving(settings, folder, model="minilm", key=key) as running:
        yield running


@pytest.fixture(scope="session")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Hashes at 200 tokens a second; 300 may wait, so that the second large request gets 429."""
    settings = {
        "model": "echo",
        "echo": {"tokens_per_s": 200},
        "limits": {"max_request_tokens": 300, "max_queued_tokens": 300},
        "cache_mib": 0,
    }
    with serving(settings, tmp_path_factory.mktemp("slow"), model="echo") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=server.key, base_url=server.openai_url, max_retries=0) as made:
        yield made
