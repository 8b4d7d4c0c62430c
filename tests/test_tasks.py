from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from reasonembed import config, tasks
from reasonembed.errors import ConfigError

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def test_the_table_is_complete_and_keyed_by_name():
    assert len(tasks.BRIGHT) == 12
    assert len(tasks.R2MED) == 8
    assert set(tasks.TASKS) == {*tasks.BRIGHT, *tasks.R2MED, "msmarco", "generic", "python-stdlib"}
    assert all(tasks.get(name).name == name for name in tasks.TASKS)


PUBLISHED = {
    "biology": "Given a Biology post, retrieve relevant passages that help answer the post.",
    "earth_science": "Given an Earth Science post, retrieve relevant passages that help answer the "
    "post.",
    "economics": "Given an Economics post, retrieve relevant passages that help answer the post.",
    "psychology": "Given a Psychology post, retrieve relevant passages that help answer the post.",
    "robotics": "Given a Robotics post, retrieve relevant passages that help answer the post.",
    "stackoverflow": "Given a Stack Overflow post, retrieve relevant passages that help answer the "
    "post.",
    "sustainable_living": "Given a Sustainable Living post, retrieve relevant passages that help "
    "answer the post.",
    "leetcode": "Given a Coding problem, retrieve relevant examples that help answer the problem.",
    "pony": "Given a Pony question, retrieve relevant passages that help answer the question.",
    "aops": "Given a Math problem, retrieve relevant examples that help answer the problem.",
    "theoremqa_questions": "Given a Math problem, retrieve relevant examples that help answer the "
    "problem.",
    "theoremqa_theorems": "Given a Math problem, retrieve relevant theorems that help answer the "
    "problem.",
}


def test_bright_instructions_are_those_of_the_authors():
    # Word for word, in the order of the paper's tables; other words give other vectors.
    assert {name: tasks.get(name).instruction for name in tasks.BRIGHT} == PUBLISHED
    assert tuple(PUBLISHED) == tasks.BRIGHT


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


def test_every_relation_tells_writers_what_it_means():
    assert set(tasks.RELATIONS) == set(get_args(tasks.Relation))
    assert {task.relation for task in tasks.TASKS.values()} == set(tasks.RELATIONS)
    assert len(set(tasks.RELATIONS.values())) == len(tasks.RELATIONS)
    assert all(text.endswith(".") for text in tasks.RELATIONS.values())


def test_a_configuration_adds_tasks_of_its_own(tmp_path: Path):
    file = tmp_path / "run.yaml"
    data = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    own = {"display_name": "Court rulings", "relation": "concept", "query_kind": "a legal question"}
    data["tasks"] = {"law": own}
    data["corpus"]["task"] = "law"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    table = config.load(file).task_table
    assert table["law"].name == "law"
    assert table["law"].query_kind == "a legal question"
    assert table["law"].instruction == tasks.get("generic").instruction  # where none is given
    assert {name: table[name] for name in tasks.TASKS} == dict(tasks.TASKS)


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(ConfigError, match=r"'bilogy'.*biology.*python-stdlib"):
        tasks.get("bilogy")


def test_the_table_needs_no_heavy_package():
    code = "import sys, reasonembed.tasks; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
