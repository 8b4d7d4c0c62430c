"""How a collection is named on the command line.

`NAME[@REVISION][+OPTION]…[:TASK,TASK…]`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonembed.errors import EvaluationError

_SPEC = re.compile(
    r"(?P<name>[^@+:]+)(@(?P<revision>[^+:]+))?(?P<options>(\+[^+:]+)*)(:(?P<tasks>.+))?"
)


@dataclass(frozen=True)
class Spec:
    """A name taken apart.

    Attributes:
        text: As it was given.
        name: Of a benchmark.
        revision: After "@", or None.
        options: After each "+".
        tasks: After ":", as written; empty for all.
    """

    text: str
    name: str
    revision: str | None
    options: tuple[str, ...]
    tasks: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Takes a name apart.

        Raises:
            EvaluationError: It has another form.
        """
        parts = _SPEC.fullmatch(text)
        if parts is None:
            raise EvaluationError(
                f"{text!r} is no name of collections; the form is "
                "NAME[@REVISION][+OPTION]...[:TASK,TASK...], such as bright+gpt4_reason:biology"
            )
        tasks = tuple(one.strip() for one in (parts["tasks"] or "").split(",") if one.strip())
        options = tuple(parts["options"].split("+")[1:])
        return cls(text, parts["name"], parts["revision"], options, tasks)

    def choose(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """The tasks asked for, in the order asked; all of them where none was named.

        Case does not matter, nor whether "-" or "_" is written.

        Raises:
            EvaluationError: There is no such task, or one stands twice.
        """
        known = {_plain(task): task for task in tasks}
        chosen = [known.get(_plain(task)) for task in self.tasks]
        for asked, task in zip(self.tasks, chosen, strict=True):
            if task is None:
                raise EvaluationError(
                    f"{self.text}: {self.name} has no task {asked!r}; there are: {', '.join(tasks)}"
                )
            if chosen.count(task) > 1:
                raise EvaluationError(f"{self.text}: task {asked!r} stands twice; name it once")
        return tuple(task for task in chosen if task is not None) or tuple(tasks)

    def refuse_options(self) -> None:
        """For benchmarks without revisions and options.

        Raises:
            EvaluationError: Some were given.
        """
        if self.revision is not None or self.options:
            raise EvaluationError(
                f"{self.text}: {self.name} takes neither @REVISION nor +OPTION; "
                f"write {self.name} or {self.name}:TASK"
            )


def local_folders(data_dir: Path | None, *names: str) -> list[Path]:
    """Those folders of `data_dir` in which files of a benchmark may lie.

    Raises:
        EvaluationError: `data_dir` is no folder.
    """
    if data_dir is None:
        return []
    if not data_dir.is_dir():
        raise EvaluationError(f"data_dir {data_dir} is no folder; leave it out to use the hub")
    return [path for path in (data_dir / name for name in names) if path.is_dir()]


def _plain(task: str) -> str:
    return task.lower().replace("_", "-")
