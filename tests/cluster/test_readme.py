"""cluster/README.md names every file, and its commands are those of the files."""

import re

from tests.cluster.files import CLUSTER, ROOT, TAG

TEXT = (CLUSTER / "README.md").read_text("utf-8")


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and all((CLUSTER / link).exists() for link in links)


def test_every_file_is_named():
    ours = {path for path in CLUSTER.rglob("*.yaml")} | {CLUSTER / "Dockerfile"}
    for path in ours:
        name = path.relative_to(CLUSTER).as_posix()
        assert name in TEXT or f"{name.split('/')[0]}/" in TEXT, name


def test_the_image_is_built_as_the_dockerfile_says():
    dockerfile = (CLUSTER / "Dockerfile").read_text("utf-8")
    commands = re.findall(r"^ +(docker build .*)$", TEXT, re.M)
    assert len(commands) == 2
    assert all(f"#   {one}\n" in dockerfile and TAG in one for one in commands)


def test_what_is_not_ours_is_marked():
    """Names that stand for the reader's own are in files that say where to change them."""
    placeholders = re.compile(r"registry\.example\.com|my-project|0{12}|203\.0\.113\.")
    for path in CLUSTER.rglob("*.yaml"):
        text = path.read_text("utf-8")
        assert not placeholders.search(text) or "CHANGE" in text, path


def test_what_it_says_of_configurations_holds():
    text = (ROOT / "configs" / "bright-qwen3-8b.yaml").read_text("utf-8")
    assert "num_gpus: 4" in text and "num_workers: 8" in text
