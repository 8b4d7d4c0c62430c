import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from reasonembed.config import ServeConfig
from reasonembed.errors import ConfigError, ModelError
from reasonembed.serving.assembly import assemble, check_indexes, open_llm, open_warm
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.protocol import IndexInfo
from tests.serving.shelf import MODEL


def info(name="a", fingerprint="f", dimension=64):
    return IndexInfo(
        name=name,
        num_documents=1,
        dimension=dimension,
        model="another",
        fingerprint=fingerprint,
        task="generic",
        instruction=None,
        kinds=("dense",),
    )


def test_the_whole_service_in_this_process():
    with TestClient(assemble(ServeConfig(model="echo")), base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/embeddings", json={"model": "echo", "input": ["a b", "a b"]})
        first, second = (row["embedding"] for row in answer.json()["data"])
        np.testing.assert_allclose(np.linalg.norm(first), 1, rtol=1e-6)
        assert first == second
        assert client.app.state.model == "echo"
        for _ in range(100):
            if client.get("/readyz").status_code == 200:
                break
        assert client.get("/readyz").status_code == 200


def test_the_model_is_described_once(monkeypatch):
    described, describe = [], Metrics.describe

    def noted(self, model):
        described.append(model.name)
        describe(self, model)

    monkeypatch.setattr(Metrics, "describe", noted)
    assemble(ServeConfig(model="echo"))
    assert described == ["echo"]


def test_an_index_of_another_model_is_refused():
    check_indexes(MODEL, [info(), info(name="b")])
    with pytest.raises(ModelError, match=r"'a' was made with another .* cannot be compared"):
        check_indexes(MODEL, [info(fingerprint="g")])


def test_an_index_of_words_alone_fits_any_model():
    check_indexes(MODEL, [info(fingerprint="", dimension=0)])


def test_two_indexes_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two indexes are called 'a'"):
        check_indexes(MODEL, [info(), info()])


def test_a_service_open_to_all_is_refused_before_the_model_is_loaded():
    with pytest.raises(ConfigError, match="keys"):
        assemble(ServeConfig(model="/no/such/model", host="0.0.0.0"))


def test_one_engine_for_both_where_the_llm_is_the_same():
    llm = {"model": "scripted:0", "engine": "scripted"}
    config = ServeConfig.model_validate(
        {"model": "echo", "rewrite": {"llm": llm}, "rerank": {"llm": llm}}
    )
    both = open_llm(config)
    assert both.rewriting is not None and both.grading is not None
    assert both.grading._engine is both.rewriting._rewriter._engine
    assert open_llm(ServeConfig(model="echo")).rewriting is None


def test_neither_ray_nor_torch_is_imported_with_the_app():
    code = "import sys, reasonembed.serving.assembly; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ray", "torch", "transformers", "vllm", "ray_jobs"} & set(done.stdout.split())


def test_the_end_of_the_app_ends_the_threads():
    with TestClient(assemble(ServeConfig(model="echo")), base_url="http://127.0.0.1") as client:
        client.post("/v1/embeddings", json={"model": "echo", "input": "a"})
    ours = ("forward", "tokenise")
    deadline = time.monotonic() + 5
    while left := [one for one in threading.enumerate() if one.name.startswith(ours)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_a_stated_speed_says_how_long_a_longest_text_takes():
    echo = {"max_tokens": 1_000, "tokens_per_s": 500}
    opened = open_warm(ServeConfig.model_validate({"model": "echo", "echo": echo}))
    assert opened.served.longest_s == 2.0
