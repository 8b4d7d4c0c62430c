"""What would keep a run from its end is said at once, by resource, label, path and server."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import ray.exceptions
from ray_jobs.job import session
from ray_jobs.preflight import (
    Machine,
    Need,
    Preflight,
    Probe,
    _patience_s,
    check_address,
    check_engine,
    check_listens,
    explain_refusal,
    lacking,
    needs,
)
from reasonembed.config import RuntimeConfig, load
from reasonembed.errors import ClusterError
from tests.ray.processes import free_ports
from tests.ray.tiny_run import write_config

H100 = {"ray.io/accelerator-type": "H100", "ray.io/market-type": "spot"}
A100 = {"ray.io/accelerator-type": "A100", "ray.io/market-type": "on-demand"}


def runtime(**changes):
    return RuntimeConfig.model_validate(changes)


def lack(wanted, have, *, is_private=False):
    return lacking(wanted, have, is_private=is_private)


def test_only_the_stages_that_run_are_looked_at():
    config = runtime(annotate={"min_actors": 3, "max_actors": 3, "num_gpus": 2})
    assert [need.name for need in needs(config, ("generate", "audit"))] == ["generate", "annotate"]
    assert {need.name for need in needs(config)} >= {"train", "mine", "distill", "embed"}
    have = [Machine({"CPU": 8, "GPU": 4}, {})]
    assert lack(needs(config, ("generate",)), have) == []
    (line,) = lack(needs(config, ("audit",)), have)
    assert "runtime.annotate asks for 6 GPUs, the cluster has 4" in line


def test_room_is_counted_node_by_node():
    need = Need("generate", 2, {"CPU": 1, "GPU": 4})
    assert lack([need], [Machine({"CPU": 8, "GPU": 2}, {}, 4)]) == [
        "runtime.generate asks for 2 × (1 CPU, 4 GPU); the cluster has room for 0"
    ]
    assert lack([need], [Machine({"CPU": 8, "GPU": 8}, {})]) == []


def test_kinds_and_markets_are_said_with_those_that_there_are():
    config = runtime(generate={"num_gpus": 1, "accelerators": ["H100"], "market": "on-demand"})
    have = [Machine({"CPU": 8, "GPU": 8}, H100, 2), Machine({"CPU": 8, "GPU": 8}, A100)]
    (line,) = lack(needs(config, ("generate",)), have)
    assert "ray.io/accelerator-type in(H100)" in line and "ray.io/market-type !spot" in line
    assert "2 × H100, spot; 1 × A100, on-demand" in line
    spot_first = runtime(generate={"num_gpus": 1, "accelerators": ["A100"], "market": "spot-first"})
    assert lack(needs(spot_first, ("generate",)), have) == []


def test_what_the_autoscaler_may_start_counts():
    need = needs(runtime(generate={"min_actors": 4, "max_actors": 8, "num_gpus": 1}), ("generate",))
    head = Machine({"CPU": 4}, {})
    assert lack(need, [head]) and not lack(need, [head, Machine({"CPU": 8, "GPU": 1}, None, 4)])
    h100 = needs(runtime(generate={"num_gpus": 1, "accelerators": ["H100"]}), ("generate",))
    group = {"CPU": 8, "GPU": 1, "accelerator_type:A100": 1}
    assert lack(h100, [head, Machine(group, None, 4)])


def test_a_pool_must_leave_something_for_what_reads_and_writes():
    (line,) = lack(needs(runtime(train={"num_workers": 8}), ("train",)), [Machine({"CPU": 8}, {})])
    assert "runtime.train asks for 8 CPUs and leaves nothing" in line
    assert "the cluster's 8 logical CPUs; lower it, or add nodes" in line
    elastic = runtime(train={"num_workers": 8, "min_workers": 2})
    assert lack(needs(elastic, ("train",)), [Machine({"CPU": 8}, {})]) == []


def test_the_cure_is_of_where_it_runs():
    wanted = needs(runtime(generate={"num_gpus": 1, "num_cpus": 4}), ("generate",))
    (gpu,) = lack(wanted, [Machine({"CPU": 8}, {})], is_private=True)
    assert "this machine has 0; lower it, or join a cluster by RAY_ADDRESS" in gpu
    (cpu,) = lack(wanted, [Machine({"CPU": 4, "GPU": 1}, {})], is_private=True)
    assert "this machine's 4 logical CPUs; lower it, or raise runtime.logical_cpus" in cpu
    (joined,) = lack(wanted, [Machine({"CPU": 8}, {})])
    assert "the cluster has 0; lower it, or add nodes" in joined


# ---- addresses, versions, keys ------------------------------------------------------------------


def test_an_address_where_nothing_answers_is_refused_at_once():
    (port,) = free_ports(1)
    with pytest.raises(
        ClusterError, match=f"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:{port}"
    ):
        check_address(f"127.0.0.1:{port}")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        check_address("127.0.0.1:63790")
    with pytest.raises(ClusterError, match="where jobs are submitted"):
        check_address("http://head:8265")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        check_address(f"ray://127.0.0.1:{listening.getsockname()[1]}")
    check_address("auto")


def test_another_version_and_a_wrong_token_are_said_with_their_cure():
    mismatch = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.58.0\n")
    assert "Ray: 2.58.0 Run with the cluster's versions" in str(explain_refusal(mismatch, "h:1"))
    refused = ray.exceptions.AuthenticationError("invalid token")
    assert "RAY_AUTH_TOKEN" in str(explain_refusal(refused, "h:1"))
    assert "cannot join the Ray cluster at h:1: x" in str(explain_refusal(ValueError("x"), "h:1"))


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            good = self.headers["Authorization"] == "Bearer good"
            self.send_response((200 if good else 401) if self.path == "/v1/models" else 404)
            self.end_headers()

        def log_message(self, *_):
            """Says nothing."""

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_a_server_is_asked_with_the_key(server):
    assert check_engine(f"{server}/v1", "good", name="KEY") == []
    (line,) = check_engine(f"{server}/v1", "expired", name="KEY")
    assert "refuses the key in KEY (401)" in line and "expired or" not in line
    assert check_engine(f"{server}/other", "expired", name="KEY") == []  # lists no models
    (port,) = free_ports(1)
    gone = f"http://127.0.0.1:{port}"
    assert "does not answer" in check_engine(gone, None, name="KEY")[0]
    assert check_listens(server, "runtime.endpoints.x") == []
    assert "runtime.endpoints.x: nothing" in check_listens(gone, "runtime.endpoints.x")[0]


def test_what_speaks_no_http_is_no_server():
    def greet(listening):
        connection, _ = listening.accept()
        with connection:
            connection.recv(1_000)
            connection.sendall(b"SSH-2.0-x\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=greet, args=(listening,), daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        assert "does not answer" in check_engine(address, None, name="KEY")[0]
    assert "does not answer" in check_engine("http://h:port/v1", None, name="KEY")[0]
    assert "nothing listens" in check_listens("http://h:port", "runtime.endpoints.x")[0]


# ---- workers ------------------------------------------------------------------------------------


def test_a_worker_says_what_it_does_not_see(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    probe = Probe(
        str(tmp_path), "marker", {"train.encoder.model": "/models/x"}, {"k": "NO_SUCH_KEY"}
    )
    lines = "\n".join(probe.problems("answer"))
    assert "is not the driver's folder there" in lines and "s3://" in lines
    assert "train.encoder.model: /models/x is no checkpoint" in lines
    assert "NO_SUCH_KEY is not set there" in lines
    (tmp_path / "marker").write_text("here")
    assert Probe(str(tmp_path), "marker").problems("answer") == []
    assert (tmp_path / "answer").read_text() == "seen"


def test_models_that_lie_in_a_folder_are_looked_for_wherever_it_is_named_from(
    tmp_path, monkeypatch
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    models = ("generate.llm.model=own", "annotate.llm.model=/no/such", "rewrite.llm.model=a/hub-id")
    overrides = [*models, *(f"{one.partition('.')[0]}.llm.engine=vllm" for one in models)]
    config = load(write_config(tmp_path), overrides=overrides)
    stages = ("generate", "annotate", "rewrite")
    look = Preflight(config, run_dir=str(tmp_path), stages=stages, is_private=False)
    assert look._folders == {"generate.llm.model": "own", "annotate.llm.model": "/no/such"}


def test_a_node_that_must_install_packages_first_gets_time_for_it():
    assert _patience_s({"env_vars": {}}) == 60
    assert _patience_s({"pip": {}}) == 660
    assert _patience_s({"uv": {}, "config": {"setup_timeout_seconds": 1_800}}) == 1_860


def test_an_unreachable_cluster_is_said_before_work_starts_and_costs_nothing(tmp_path, monkeypatch):
    config = load(write_config(tmp_path))
    made = tmp_path / "run" / "corpus" / "_stage.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with (
        pytest.raises(ClusterError, match="no Ray cluster answers"),
        session(config, prepare=lambda run: run.discard_from("corpus")),
    ):
        pass
    assert made.is_file()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_everything_that_is_wrong_with_a_cluster_is_said_at_once(tmp_path, monkeypatch):
    """Two nodes on this machine; the second is asked, too."""
    from ray.cluster_utils import Cluster

    file = write_config(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2, labels=H100)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        good = load(file)
        check = {"run_dir": str(tmp_path / "run"), "is_private": False}
        Preflight(good, stages=("generate", "train"), **check).check()
        assert not list((tmp_path / "run").glob(".preflight*"))
        ghost, asked = {"NodeID": "e" * 56, "NodeManagerAddress": "10.9.9.9"}, Preflight._asked
        monkeypatch.setattr(
            Preflight,
            "_asked",
            lambda self, probe, nodes, answers: asked(
                self, probe, [*nodes, ghost], answers | {ghost["NodeID"]: "answer"}
            ),
        )  # a node that has gone since they were counted
        Preflight(good, stages=("generate", "train"), **check).check()
        bad = load(
            file,
            overrides=[
                "runtime.generate.num_gpus=2",
                "train.encoder.model=/no/such/model",
                "rewrite.llm={model: m, engine: openai}",
                f"runtime.engine.base_url=http://127.0.0.1:{free_ports(1)[0]}/v1",
            ],
        )
        with pytest.raises(ClusterError) as refused:
            Preflight(bad, stages=("generate", "train", "rewrite"), **check).check()
        said = str(refused.value)
        assert said.startswith("3 things"), said
        for part in ("generate asks for 2 GPUs", "/no/such/model", "does not answer", "(node "):
            assert part in said, said
    finally:
        ray.shutdown()
        cluster.shutdown()
