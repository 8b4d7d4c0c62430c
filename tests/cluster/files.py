"""The files of cluster/, read once, and what the project says of versions."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
KUBERAY = ("cluster", "job", "service")
LAUNCHERS = ("aws", "gcp")


def documents(name: str) -> list[dict[str, Any]]:
    """Of a YAML file, by its path in cluster/."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text("utf-8")))


def ray_manifest(name: str) -> dict[str, Any]:
    """The first document of a file of cluster/kuberay/."""
    return documents(f"kuberay/{name}.yaml")[0]


def lock(target: str) -> dict[str, str]:
    """Versions by package."""
    lines = (ROOT / "requirements" / f"{target}.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
RAY = lock("cpu")["ray"]
PYTHON = ".".join(
    re.findall(r"python:(\d+)\.(\d+)", (CLUSTER / "Dockerfile").read_text("utf-8"))[0]
)
TAG = f"{PROJECT['project']['version']}-ray{RAY}-py{PYTHON.replace('.', '')}"
