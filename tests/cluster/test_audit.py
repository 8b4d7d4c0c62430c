"""`make audit`: locks, secrets and the image; what of it needs no network is run here."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.cluster.files import CLUSTER, ROOT

BASELINE = ROOT / ".secrets.baseline"
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def hook(*paths, baseline=None):
    command = [sys.executable, "-m", "detect_secrets.pre_commit_hook", "--no-verify"]
    command += ["--baseline", str(baseline)] if baseline else []
    return subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, cwd=ROOT)


def test_no_secret_lies_in_what_is_copied_most(tmp_path):
    baseline = tmp_path / "baseline"  # the hook writes line numbers into it
    baseline.write_bytes(BASELINE.read_bytes())
    files = [path for folder in (CLUSTER, ROOT / "configs") for path in folder.rglob("*.yaml")]
    found = hook(*(path.relative_to(ROOT) for path in files), baseline=baseline)
    assert found.returncode in (0, 3), found.stdout  # 3: a known one has moved


def test_a_secret_would_be_found(tmp_path):
    leak = tmp_path / "config.yaml"
    leak.write_text("aws: " + "AKIA" + "IOSFODNN7EXAMPLX\n", "utf-8")
    assert hook(leak).returncode == 1


def test_what_is_known_was_looked_at():
    known = json.loads(BASELINE.read_text("utf-8"))["results"]
    assert all(one["is_secret"] is False for found in known.values() for one in found)


def test_make_audit_covers_every_lock():
    (recipe,) = re.findall(r"^audit:.*?\n((?:\t.*\n)+)", MAKEFILE, re.M)
    locks = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    locks = {name for name in locks if not name.startswith("overrides")}
    (named,) = re.findall(r"for lock in (.*?);", recipe)
    assert set(named.split()) == locks
    assert "--strict" in recipe  # a package that nobody could look up is no clean one
    assert "detect-secrets-hook" in recipe and "hadolint cluster/Dockerfile" in recipe
    assert "audit" in re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[0].split()
    assert Path(CLUSTER / "Dockerfile").is_file()
