from __future__ import annotations

import subprocess
import sys

import pytest

from reasonembed import tasks
from reasonembed.errors import ConfigError


def test_the_table_is_complete_and_keyed_by_name():
    assert len(tasks.BRIGHT) == 12
    assert len(tasks.R2MED) == 8
    assert set(tasks.TASKS) == {*tasks.BRIGHT, *tasks.R2MED, "msmarco", "generic", "python-stdlib"}
    assert all(tasks.get(name).name == name for name in tasks.TASKS)


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("biology", "Given a Biology post, retrieve relevant passages that help answer the post."),
        (
            "earth_science",
            "Given an Earth Science post, retrieve relevant passages that help answer the post.",
        ),
        (
            "economics",
            "Given an Economics post, retrieve relevant passages that help answer the post.",
        ),
        (
            "stackoverflow",
            "Given a Stack Overflow post, retrieve relevant passages that help answer the post.",
        ),
        (
            "leetcode",
            "Given a Coding problem, retrieve relevant examples that help answer the problem.",
        ),
        (
            "pony",
            "Given a Pony question, retrieve relevant passages that help answer the question.",
        ),
        ("aops", "Given a Math problem, retrieve relevant examples that help answer the problem."),
        (
            "theoremqa_theorems",
            "Given a Math problem, retrieve relevant theorems that help answer the problem.",
        ),
    ],
)
def test_bright_instructions_are_those_of_the_authors(name: str, instruction: str):
    assert tasks.get(name).instruction == instruction


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_every_entry_reads_as_a_sentence(task: tasks.Task):
    assert task.instruction.startswith("Given a")
    assert task.instruction.endswith(".")
    assert task.instruction == task.instruction.strip()
    assert task.relevance.startswith("A document is relevant if ")
    assert task.relevance.endswith(".")
    for kind in (task.query_kind, task.document_kind):
        article, noun = kind.split(maxsplit=1)
        assert article == ("an" if noun[0] in "AEIOUaeiou" else "a")


def test_the_relation_follows_the_family():
    assert {tasks.get(name).relation for name in tasks.BRIGHT[:7]} == {"concept"}
    assert [tasks.get(name).relation for name in tasks.BRIGHT[7:]] == [
        "algorithm",
        "syntax",
        "skill",
        "theorem",
        "theorem",
    ]
    assert {tasks.get(name).relation for name in tasks.R2MED} == {"helps"}


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(ConfigError, match=r"'bilogy'.*biology.*python-stdlib"):
        tasks.get("bilogy")


def test_the_table_needs_no_heavy_package():
    code = "import sys, reasonembed.tasks; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
