"""One model, four ways to its vectors: training code, export, sentence-transformers, HTTP."""

import contextlib
import json
import signal
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from reasonembed.embedder.contract import resolve_contract
from reasonembed.embedder.encode import Backbone, Embedder, load_backbone
from reasonembed.run import Run
from tests.ray.processes import end_session, free_ports, start_reasonembed

TEXTS = ["why does a loop skip every second element", "About lists case 3: lists1 lists2", "é 中"]
# The same weights in the same precision: only the order of sums differs.
MIN_COSINE = 0.9999


@pytest.fixture(scope="module")
def run(tiny):
    return Run.existing(tiny[0] / "run")


@pytest.fixture(scope="module")
def url(run):
    [port] = free_ports(1)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    server = start_reasonembed("serve", str(run.dir), "--port", str(port), **streams)
    base = f"http://127.0.0.1:{port}"
    for _ in range(120):
        with contextlib.suppress(OSError):  # not up yet, or up and still loading
            with urllib.request.urlopen(f"{base}/health", timeout=5) as answer:
                assert answer.status == 200
            break
        assert server.poll() is None, server.stdout.read()
        time.sleep(0.5)
    yield base
    server.send_signal(signal.SIGTERM)
    try:
        assert server.wait(timeout=60) == 0
    finally:
        end_session(server.pid)


def over_http(url, texts, **fields):
    body = json.dumps({"model": "run", "input": texts, **fields}).encode()
    request = urllib.request.Request(
        f"{url}/v1/embeddings", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        data = json.load(answer)["data"]
    return np.array([row["embedding"] for row in data], dtype=np.float32)


def in_training_code(run, texts, *, instruction):
    """Backbone and adapter as they were trained, never merged."""
    from peft import PeftModel

    encoder = run.config.train.encoder
    weights = run.dir.parent / "checkpoint"
    backbone = load_backbone(weights, dtype="float32")
    model = PeftModel.from_pretrained(backbone.model, run.dir / "train" / "weights").eval()
    embedder = Embedder(Backbone(model, backbone.tokenizer), resolve_contract(weights, encoder))
    if instruction is None:
        return embedder.encode_documents(texts)
    return embedder.encode_queries(texts, instruction=instruction)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("role", ["query", "document"])
def test_training_export_sentence_transformers_and_http_agree(run, url, role):
    from sentence_transformers import SentenceTransformer

    instruction = run.instruction if role == "query" else None
    trained = in_training_code(run, TEXTS, instruction=instruction)
    plain = SentenceTransformer(str(run.model_dir), device="cpu")
    prompt = {"prompt_name": "query"} if role == "query" else {}
    others = {
        "sentence-transformers": plain.encode(TEXTS, normalize_embeddings=True, **prompt),
        "http": over_http(url, TEXTS, input_type=role, truncate="end"),
        "export": Embedder.load_export(run.model_dir).encode_documents(TEXTS)
        if instruction is None
        else Embedder.load_export(run.model_dir).encode_queries(TEXTS, instruction=instruction),
    }
    for name, vectors in others.items():
        cosine = (vectors * trained).sum(axis=1)
        assert cosine.min() >= MIN_COSINE, f"{name}: {cosine}"


def test_the_served_model_is_trained(run, url):
    before = Embedder.load(run.config.train.encoder).encode_documents(TEXTS)
    assert ((over_http(url, TEXTS) * before).sum(axis=1) < MIN_COSINE).any()


def test_models_and_errors(url):
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        assert json.load(answer)["data"][0]["id"] == "run"
    with pytest.raises(urllib.error.HTTPError) as caught:
        over_http(url, [""])
    assert caught.value.code == 400
    assert json.load(caught.value)["error"]["param"].startswith("input")
