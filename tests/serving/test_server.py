import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from reasonembed.config import ServeConfig
from reasonembed.errors import ConfigError
from reasonembed.serving.server import (
    base_url,
    check_port,
    fetch,
    left_out,
    say_hints,
    settings_of,
)
from tests.ray.processes import free_ports

ROOT = Path(__file__).parents[2]


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port():
    [port] = free_ports(1)
    return port


def test_a_model_alone_has_defaults():
    assert settings_of("echo") == ServeConfig(model="echo")


def test_what_is_given_goes_before_the_file_and_overrides_before_all(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"model": "a", "port": 1, "name": "b", "cache_mib": 3}))
    found = settings_of("c", file=file, given={"port": 2, "name": None}, overrides=["cache_mib=4"])
    assert (found.model, found.port, found.name, found.cache_mib) == ("c", 2, "b", 4)
    assert settings_of(None, file=file).model == "a"


def test_a_file_of_serve_deploy_is_taken_as_well(tmp_path):
    file = tmp_path / "x.yaml"
    http_options = {"host": "127.0.0.2", "port": 7, "keep_alive_timeout_s": 9}
    application = {"import_path": "ray_jobs.serve:build_app", "args": {"model": "echo"}}
    file.write_text(yaml.safe_dump({"http_options": http_options, "applications": [application]}))
    found = settings_of(None, file=file)
    assert (found.model, found.host, found.port) == ("echo", "127.0.0.2", 7)
    file.write_text(yaml.safe_dump({"applications": [application, application]}))
    with pytest.raises(ConfigError, match="one application"):
        settings_of(None, file=file)


def test_a_run_brings_its_own_settings(tmp_path):
    from reasonembed.config import load
    from reasonembed.run import Run
    from tests.ray.tiny_run import write_config

    run = Run(load(write_config(tmp_path), overrides=["runtime.serve.port=81"]))
    run.dir.mkdir()
    run.save_config()
    assert settings_of(str(run.dir)).port == 81
    assert settings_of(str(run.dir), given={"port": 82}).port == 82


def test_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    found = settings_of("model", given={"indexes": ("model", "elsewhere")})
    assert found.model == str(tmp_path / "model")
    assert found.indexes == (str(tmp_path / "model"), str(tmp_path / "elsewhere"))
    assert settings_of("org/model").model == "org/model"
    # Whatever opens them, it says where it looked.
    found = settings_of("echo", given={"keys_file": "keys.txt", "cache_dir": "c"})
    assert (found.keys_file, found.cache_dir) == (str(tmp_path / "keys.txt"), str(tmp_path / "c"))


def test_an_llm_in_a_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotator").mkdir()
    given = {"rewrite": {"llm": {"model": "org/x"}}, "rerank": {"llm": {"model": "annotator"}}}
    found = settings_of("echo", given=given)
    assert found.rewrite.llm.model == "org/x"
    assert found.rerank.llm.model == str(tmp_path / "annotator")


def test_a_folder_called_echo_is_not_the_model_echo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo").mkdir()
    assert settings_of("echo").model == "echo"


def test_what_is_left_out_of_a_file_is_said(tmp_path):
    file = tmp_path / "x.yaml"
    application = {"import_path": "ray_jobs.serve:build_app", "args": {"model": "echo"}}
    file.write_text(yaml.safe_dump({"applications": [application]}))
    assert left_out(file) is None
    file.write_text(yaml.safe_dump({"applications": [application | {"deployments": []}]}))
    assert "deployments" in left_out(file)
    file.write_text(yaml.safe_dump({"model": "echo"}))
    assert left_out(file) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"file": "x: 1"}, "x: unknown key"),
        ({"overrides": ["limits.max_inputs=0"]}, "limits.max_inputs"),
        ({"target": None}, "serve what"),
    ],
)
def test_mistakes_are_named(tmp_path, fields, message):
    if "file" in fields:
        (tmp_path / "x.yaml").write_text(fields["file"])
        fields = {"file": tmp_path / "x.yaml"}
    with pytest.raises(ConfigError, match=message):
        settings_of(fields.pop("target", "echo"), **fields)


def test_a_port_in_use_is_said(taken):
    with pytest.raises(ConfigError, match=f"something else listens on 127.0.0.1:{taken}"):
        check_port(ServeConfig(model="echo", port=taken))
    check_port(ServeConfig(model="echo", port=free_port()))


def test_an_address_of_another_machine_is_said():
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        check_port(ServeConfig(model="echo", host="192.0.2.1"))


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 9}, "http://127.0.0.1:9"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"ssl_certfile": "c", "ssl_keyfile": "k"}, "https://127.0.0.1:8000"),
    ],
)
def test_address(fields, url):
    assert base_url(ServeConfig(model="echo", **fields)) == url


def test_fetch_tells_an_answer_from_none():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "loading"}}')

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert fetch(f"http://127.0.0.1:{server.server_port}/readyz") == (503, "loading")
        server.shutdown()
    assert fetch(f"http://127.0.0.1:{free_port()}/readyz")[0] == 0


def test_hints_fit_the_service():
    def hints(**fields):
        lines = []
        config = ServeConfig(model="echo", **fields)
        say_hints(config, base_url(config), model="m", say=lines.append)
        return "\n".join(lines)

    plain = hints()
    assert "/v1/embeddings" in plain and '"model": "m"' in plain and "Ctrl-C" in plain
    assert "/v1/search" not in plain and "Bearer" not in plain
    full = hints(indexes=("a",), keys_file="k", ssl_certfile="c", ssl_keyfile="k")
    assert "/v1/search" in full and "Bearer $KEY" in full and "--cacert" in full


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "reasonembed.cli", "serve", "echo", "--in-process", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ask_for(url, num_words):
    body = json.dumps({"model": "echo", "input": "word " * num_words}).encode()
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{url}/v1/embeddings", body, headers)


def wait_ready(url, process):
    deadline = time.monotonic() + 60
    while fetch(f"{url}/readyz")[0] != 200:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)


def test_in_process_answers_and_drains():
    """A request under way when the signal comes is answered."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    answers = []

    def ask():
        with urllib.request.urlopen(ask_for(url, 200), timeout=30) as answer:
            answers.append(answer.status)

    with start("--port", str(port), "--set", "echo.tokens_per_s=150") as process:
        wait_ready(url, process)
        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        asking.join()
    assert process.returncode == 0, err
    assert answers == [200]
    assert f"Serving echo at {url}" in out and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--host", "0.0.0.0"], "reasonembed keys add"), (["--set", "x=1"], "x: unknown key")],
)
def test_mistakes_end_it_before_anything_is_loaded(arguments, message):
    with start(*arguments) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in err


def test_a_request_that_takes_longer_than_the_drain_is_told_so_and_the_process_ends():
    """Its forward pass, of 40 s, runs on in a thread that nobody waits for."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    answers = []

    def ask():
        try:
            urllib.request.urlopen(ask_for(url, 2_000), timeout=60)
        except urllib.error.HTTPError as error:
            answers.append((error.code, error.headers["Retry-After"], json.loads(error.read())))

    settings = ["--set", "echo.tokens_per_s=50", "--set", "drain_s=1"]
    with start("--port", str(port), *settings) as process:
        wait_ready(url, process)
        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - started < 10
        asking.join()
    assert process.returncode == 0, err
    [(status, retry_after, body)] = answers
    assert status == 503 and int(retry_after) >= 1
    assert body["error"]["code"] == "unavailable"
