"""What may be imported where: by the rules in pyproject.toml, and in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "vllm", "ray", "faiss")
LIGHT = (
    "reasonembed.schemas",
    "reasonembed.config",
    "reasonembed.tasks",
    "reasonembed.artifacts",
    "reasonembed.corpus",
    "reasonembed.hub",
    "reasonembed.records",
    "reasonembed.errors",
    "reasonembed.progress",
    "reasonembed.run",
    "reasonembed.models",
    "reasonembed.llm.protocol",
    "reasonembed.llm.http",
    "reasonembed.llm.scripted",
    "reasonembed.llm.vllm",
    "reasonembed.redapter.best",
    "reasonembed.redapter.log",
    "reasonembed.redapter.trackers",
    "reasonembed.remixer.agreement",
    "reasonembed.remixer.annotate",
    "reasonembed.remixer.assemble",
    "reasonembed.remixer.audit",
    "reasonembed.remixer.contamination",
    "reasonembed.remixer.distill",
    "reasonembed.remixer.duplicates",
    "reasonembed.remixer.filter",
    "reasonembed.remixer.formats",
    "reasonembed.remixer.generate",
    "reasonembed.remixer.lines",
    "reasonembed.remixer.mine",
    "reasonembed.remixer.msmarco",
    "reasonembed.remixer.plan",
    "reasonembed.remixer.rewrite",
    "reasonembed.remixer.triviality",
    "reasonembed.index.exact",
    "reasonembed.index.fusion",
    "reasonembed.index.places",
    "reasonembed.index.shards",
    "reasonembed.evaluation.datasets",
    "reasonembed.systems.benchmark",
    "reasonembed.evaluate_cli",
    "reasonembed.cli",
)
IMPORT_LIMIT_S = 0.3


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_light_modules_load_nothing_heavy():
    # One interpreter, one module after the other, so that the first to break the rule is named.
    out = python(
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [one for one in {HEAVY!r} if one in sys.modules]\n"
        "    if heavy:\n"
        "        sys.exit(f'{name} imports {heavy}')\n"
        "print('light')"
    )
    assert out == "light\n"


def test_every_remixer_stage_is_looked_at():
    stages = {path.stem for path in (ROOT / "reasonembed" / "remixer").glob("*.py")}
    listed = {name.rpartition(".")[2] for name in LIGHT if ".remixer." in name}
    assert stages - listed == {"__init__", "answers"}  # answers is imported by the others


def test_the_package_itself_is_imported_at_once():
    code = (
        "import time; t = time.perf_counter(); import reasonembed; print(time.perf_counter() - t)"
    )
    # The best of three: a busy machine makes single measurements long, never short.
    assert min(float(python(code)) for _ in range(3)) < IMPORT_LIMIT_S


def test_the_library_never_imports_the_shell_by_being_imported():
    out = python(
        "import sys\nimport reasonembed.cli, reasonembed.run\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'ray_jobs'])"
    )
    assert out == "[]\n"


def test_the_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.fail("import-linter is not installed; install the dev extra")
    done = subprocess.run(
        [str(lint), "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
