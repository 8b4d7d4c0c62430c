"""Every command that a page shows is run, or read by the program itself, or marked.

A command is a line of a block `console` that starts with `$`, or of a block without a language that
starts with a program's name. Where the block's title says `needs a cloud` or `needs a GPU` it is
not run; its `reasonembed` and `ray_jobs` calls and its files are checked all the same.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer
import yaml
from typer.main import get_command

from reasonembed import config
from reasonembed.cli import app
from tests.ray.processes import end_session, free_ports

# typer carries a click of its own, Ray uses the other.
TYPERS_USAGE = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
TYPERS_EXIT = typer.Exit
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = {"needs a cloud", "needs a GPU", "ends every Ray on this machine"}
OURS = ("reasonembed", "python", "make")
RAY = {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}
# Only where a block says why they are not run.
ELSEWHERE = {"docker", "kubectl", "nvidia-smi", "sky"}
SHELL = {"cd", "curl", "export"}
PROGRAMS = {*OURS, *RAY, *ELSEWHERE, *SHELL}
_BLOCK = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# What a page says of a command behind it: after a sign, or after two blanks and no option.
_COMMENT = re.compile(r"\s+#\s.*$|\s{2,}[a-zA-Z].*$")


@dataclass(frozen=True)
class Command:
    """A line that a reader types."""

    page: str
    text: str
    title: str = ""
    exits: int = 0

    @property
    def words(self):
        """Without optional brackets, and with the program's own name."""
        words = shlex.split(re.sub(r"\[(--.*?)\]", r"\1", self.text).replace("$PWD", "/tmp"))
        return [words[0].removeprefix(".venv/bin/"), *words[1:]]

    def __str__(self):
        return f"{self.page}: {self.text[:60]}"


def commands_of(text, page):
    for _, language, rest, body in _BLOCK.findall(text):
        named = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        for line in whole_lines(body):
            typed = line.removeprefix("$ ")
            is_typed = typed != line if language == "console" else line.split(" ")[0] in PROGRAMS
            if is_typed and language in ("console", "", "bash"):
                yield Command(page, typed, named.get("title", ""), int(named.get("exits", 0)))


def whole_lines(body):
    """Lines as a shell takes them, joined after a backslash and inside quotation marks."""
    waiting = ""
    for line in re.sub(r"\s*\\\n\s*", " ", body).splitlines():
        waiting = f"{waiting}\n{line}" if waiting else _COMMENT.sub("", line.strip())
        if waiting.split(" ")[0] not in {"$", *PROGRAMS} or waiting.count("'") % 2 == 0:
            yield waiting
            waiting = ""


COMMANDS = sorted(
    {
        command
        for page in PAGES
        for command in commands_of(page.read_text("utf-8"), str(page.relative_to(ROOT)))
    },
    key=str,
)


# ---- reading ------------------------------------------------------------------------------------


def read(words):
    """Lets the program itself read a command, without doing anything."""
    program, *rest = words
    if program == "reasonembed":
        return read_click(get_command(app), words)
    if program in RAY:
        ends = rest.index("--") if "--" in rest else len(rest)
        module = import_module(RAY[program])
        # `serve` needs its entry point once a command of a group is read.
        read_click(module.cli, [program, *rest[:ends], *(["--", "true"] if rest[ends:] else [])])
        if rest[ends + 1 :]:
            read(rest[ends + 1 :])
        return None
    if program == "python":
        return read_module(rest)
    if program == "make":
        targets = re.findall(r"^([\w$()./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        known = [target.replace("$(VENV)", ".venv") for target in targets]
        assert set(rest) <= set(known), f"no target {rest}"
        return None
    raise AssertionError(f"{program}: nobody checks this; mark the block, or teach this test")


def read_click(command, words):
    """Parses as the program does: unknown commands, options and values that are no choice fail."""
    name, *rest = words
    above = None
    while True:
        try:
            above = command.make_context(name, list(rest), parent=above)
        except (click.exceptions.Exit, TYPERS_EXIT):  # of --help
            return
        rest = [*getattr(above, "_protected_args", ()), *above.args]
        if not hasattr(command, "commands") or not rest:
            return
        name, command, rest = command.resolve_command(above, rest)


def read_module(rest):
    if rest[0] != "-m":
        assert (ROOT / rest[0]).is_file(), rest[0]
        return
    assert importlib.util.find_spec(rest[1]), rest[1]
    if rest[1].startswith("ray_jobs.") and "--help" not in rest:
        from ray_jobs.job import arguments_of

        arguments_of(None).parse_args(rest[2:])


def files_of(words):
    return [word for word in words if re.match(r"(configs|cluster)/[\w./-]+$", word)]


def settings_of(words):
    """The configuration that a command names, with its overrides."""
    named = [word for word in words if re.fullmatch(r"configs/[\w-]+\.yaml", word)]
    given = [after for word, after in pairwise(words) if word == "--set"]
    overrides = [one for one in given if "KEY" not in one and not one.startswith("a.b")]
    return [(name, overrides) for name in named]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_shown_can_be_given(command):
    assert command.title in MARKS | {""}, "another title than those that mean something"
    program = command.words[0]
    if program in ELSEWHERE:
        assert command.title, f"{program} is not run here: say why in the block's title"
    elif program not in SHELL:
        read(command.words)
    for name in files_of(command.words):
        assert (ROOT / name).exists(), name
    for name, overrides in settings_of(command.words):
        config.load(ROOT / name, overrides=overrides)


def test_there_are_commands_of_every_tutorial():
    pages = {command.page for command in COMMANDS}
    assert {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/tutorials/*.md")} <= pages
    assert "README.md" in pages


@pytest.mark.parametrize(
    "wrong",
    [
        "reasonembed runn CONFIG",
        "reasonembed run CONFIG --retri error",
        "reasonembed samples RUN --form nothing --out x",
        "reasonembed evaluate compar a b",
        "ray job sumbit -- python -m ray_jobs.plan",
        "ray job submit -- python -m ray_jobs.nothing --config FILE",
        "python -m ray_jobs.plan --conf FILE --nothing",
        "make nothing",
        "wget x",
    ],
)
def test_a_wrong_command_is_found(wrong):
    with pytest.raises((click.UsageError, TYPERS_USAGE, AssertionError, SystemExit)):
        read(Command("", wrong).words)


# ---- running ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    sorted([*ROOT.glob("docs/how-to/*.md"), *ROOT.glob("docs/tutorials/*.md")]),
    ids=lambda page: page.name,
)
def test_configurations_shown_load(page):
    base = yaml.safe_load((ROOT / "configs" / "bright-qwen3-8b.yaml").read_text("utf-8"))
    base["runtime"] = {}
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```$", page.read_text("utf-8"), re.DOTALL | re.M):
        shown = yaml.safe_load(block)
        config.parse(shown if "run_dir" in shown else merged(base, shown), where=block)


def merged(base, patch):
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return patch
    return base | {key: merged(base.get(key), value) for key, value in patch.items()}


class Reader:
    """Types a page's commands in order, in one shell of one folder, but for those that are marked.

    The environment that `make` would make is the one at hand.
    """

    def __init__(self, folder, **exported):
        binaries = Path(sys.executable).parent
        (folder / ".venv").symlink_to(binaries.parent)
        for name in ("cluster", "configs", "ray_jobs", "reasonembed", "requirements", "tests"):
            (folder / name).symlink_to(ROOT / name)
        self.folder, self.printed, self.seconds = folder, {}, []
        self._exported = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(Path.home())}
        self._exported |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
        self._exported |= {"PYTHONPATH": str(folder), "RAY_USAGE_STATS_ENABLED": "0", **exported}

    def type_all(self, page, replaced=()):
        for command in commands_of((ROOT / "docs" / page).read_text("utf-8"), page):
            if command.title or command.words[0] == "make":
                continue
            if command.words[0] == "export":
                self._exported |= dict([command.words[1].split("=", 1)])
                continue
            text = command.text
            for old, new in replaced:
                text = text.replace(old, new)
            began = time.monotonic()
            done = subprocess.run(
                text,
                shell=True,
                cwd=self.folder,
                env=self._exported,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == command.exits, f"{command}\n{done.stdout}"
            self.printed[command.text] = done.stdout
            self.seconds.append((command.text, round(time.monotonic() - began, 1)))


def test_fast_commands_do_what_they_say():
    reasonembed = shutil.which("reasonembed", path=str(Path(sys.executable).parent))
    done = subprocess.run([reasonembed, "version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_tutorials_of_laptop_and_cluster_step_by_step(tmp_path):
    reader = Reader(tmp_path)
    reader.type_all("tutorials/laptop.md")
    assert any("[12/12] evaluate" in out for out in reader.printed.values())
    assert (tmp_path / "runs" / "rehearsal" / "run" / "report.html").exists()

    port, dashboard, agent = free_ports(3)
    head = (
        "(setsid .venv/bin/ray start --head --block --num-cpus=4 --include-dashboard=true "
        f"--dashboard-agent-listen-port={agent} --temp-dir=/tmp/re-{os.getpid()} "
        f"--port={port} --dashboard-port={dashboard} > head.log 2>&1 & echo $! > head.pid) ; "
        f"for i in $(seq 60); do .venv/bin/ray job list --address http://127.0.0.1:{dashboard} "
        "> /dev/null 2>&1 && break; sleep 1; done"
    )
    shown = ".venv/bin/ray start --head --num-cpus=4 --port=6399 --dashboard-port=8299"
    try:
        reader.type_all("tutorials/cluster.md", [(shown, head), ("8299", str(dashboard))])
    finally:
        # Never `ray stop`: that ends every Ray on the machine.
        end_session(int((tmp_path / "head.pid").read_text()))
        sys.stdout.write(json.dumps(reader.seconds, indent=1))
    assert any("[12/12] evaluate" in out for out in reader.printed.values())
    assert (tmp_path / "runs" / "cluster" / "report.html").exists()
