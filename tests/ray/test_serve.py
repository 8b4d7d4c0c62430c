"""`reasonembed serve RUN --index …` as a user starts it: one model, four ways to its vectors."""

import json
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import numpy as np
import openai
import pytest

from reasonembed.embedder.contract import resolve_contract
from reasonembed.embedder.encode import Backbone, Embedder, load_backbone
from reasonembed.embedder.tokenisation import apply_template
from reasonembed.index.store import StoredIndex
from reasonembed.run import Run
from tests.ray.processes import end_session, free_ports, reasonembed, start_reasonembed

INSTRUCTION = "Find it."  # the run's own leaves no room in the 48 tokens of its tiny model
TEXTS = ["why does a loop skip every second element", "About lists case 3: lists1 lists2", "é 中"]
# The same weights in the same precision: only the order of sums differs.
MIN_COSINE = 0.9999


@dataclass
class Service:
    """A running service, and what its readiness said until it was up."""

    url: str
    process: subprocess.Popen[str]
    statuses: list[int]


@pytest.fixture(scope="module")
def run(tiny):
    return Run.existing(tiny[0] / "run")


@pytest.fixture(scope="module")
def index(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes") / "cases"
    built = reasonembed("index", "build", str(run.dir), "--out", str(folder))
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def service(run, index):
    [port] = free_ports(1)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    more = ("--index", str(index), "--port", str(port), "--set", "index_shards=2")
    process = start_reasonembed("serve", str(run.dir), *more, **streams)
    url, statuses = f"http://127.0.0.1:{port}", []
    try:
        while (not statuses or statuses[-1] != 200) and process.poll() is None:
            statuses.append(status(f"{url}/readyz"))
            time.sleep(0.2)
        assert process.poll() is None, process.stdout.read()
        yield Service(url, process, statuses)
    finally:
        end_session(process.pid)


def status(url):
    """0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def post(url, path, **body):
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def over_http(service, texts, **fields):
    data = post(service.url, "/v1/embeddings", model="run", input=texts, **fields)["data"]
    return np.array([row["embedding"] for row in data], dtype=np.float32)


def search(service, query, **fields):
    asked = {"index": "cases", "instruction": INSTRUCTION, "truncate": "end", "top_k": 3}
    return post(service.url, "/v1/search", query=query, **asked, **fields)["data"]


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


def test_ready_means_ready(service):
    """Nothing listens, then it loads, then it is there; never a wrong 200 in between."""
    seen = [
        status for i, status in enumerate(service.statuses) if status != service.statuses[i - 1]
    ]
    assert set(seen) <= {0, 404, 503, 200} and service.statuses[-1] == 200
    assert service.statuses.count(200) == 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("role", ["query", "document"])
def test_training_export_sentence_transformers_and_http_agree(run, service, role):
    from sentence_transformers import SentenceTransformer

    instruction = INSTRUCTION if role == "query" else None
    trained = in_training_code(run, TEXTS, instruction=instruction)
    plain = SentenceTransformer(str(run.model_dir), device="cpu")
    template = run.config.train.encoder.query_template
    prompt = apply_template(template, query="", instruction=INSTRUCTION) if instruction else None
    asked = {"instruction": INSTRUCTION} if instruction else {}
    others = {
        "sentence-transformers": plain.encode(TEXTS, normalize_embeddings=True, prompt=prompt),
        "http": over_http(service, TEXTS, input_type=role, truncate="end", **asked),
        "export": Embedder.load_export(run.model_dir).encode_documents(TEXTS)
        if instruction is None
        else Embedder.load_export(run.model_dir).encode_queries(TEXTS, instruction=instruction),
    }
    for name, vectors in others.items():
        cosine = (vectors * trained).sum(axis=1)
        assert cosine.min() >= MIN_COSINE, f"{name}: {cosine}"


def test_the_served_model_is_trained(run, service):
    before = Embedder.load(run.config.train.encoder).encode_documents(TEXTS)
    assert ((over_http(service, TEXTS) * before).sum(axis=1) < MIN_COSINE).any()


def test_openai_client(service):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "run"
    answer = client.embeddings.create(model="run", input=TEXTS)  # the client asks for base64
    found = np.array([row.embedding for row in answer.data], dtype=np.float32)
    np.testing.assert_array_equal(found, over_http(service, TEXTS))
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="run", input="")
    assert caught.value.param.startswith("input")


def test_a_search_over_two_shards_finds_what_the_whole_index_holds(service, index):
    text = "About sockets case 4: sockets28 sockets0 sockets3"
    asked = {"input_type": "query", "instruction": INSTRUCTION, "truncate": "end"}
    whole = StoredIndex.load(index)
    _, positions_QK = whole.dense(over_http(service, [text], **asked), k=3)
    [found] = search(service, text, kind="dense", return_documents=True)
    assert [hit["id"] for hit in found["hits"]] == whole.doc_ids(positions_QK[0].tolist())
    assert found["hits"][0]["document"]["text"].startswith("About")
    [found] = search(service, text, kind="bm25")
    assert found["hits"][0]["id"] == "d004"
    [without] = search(service, text, kind="hybrid", excluded_ids=["d004"])
    assert len(without["hits"]) == 3 and "d004" not in {hit["id"] for hit in without["hits"]}


def test_the_page_and_the_interface_are_there(service):
    assert status(f"{service.url}/") == status(f"{service.url}/openapi.json") == 200


def test_a_second_service_says_that_the_port_is_taken(run, service):
    port = service.url.rpartition(":")[2]
    second = reasonembed("serve", str(run.dir), "--port", port)
    assert second.returncode == 2
    assert f"something else listens on 127.0.0.1:{port}" in second.stderr


def test_sigterm_drains(run, service):
    """The last test of the service: requests under way end, then it is gone, and says so."""
    answers, texts = [], [f"word{i} and more of them" for i in range(400)]
    sending = [
        threading.Thread(target=lambda: answers.append(over_http(service, texts))) for _ in range(3)
    ]
    for thread in sending:
        thread.start()
    time.sleep(0.3)
    service.process.send_signal(signal.SIGTERM)
    for thread in sending:
        thread.join(60)
    assert [len(one) for one in answers] == [400] * 3
    assert service.process.wait(timeout=60) == 0
    printed = service.process.stdout.read()
    assert f"Serving run at {service.url}" in printed and "curl" in printed, printed
    assert "/v1/search" in printed and "Ctrl-C ends it" in printed and "Ending" in printed
    assert status(f"{service.url}/readyz") == 0
