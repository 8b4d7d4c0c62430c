"""What `make docs` adds to the pages: the reference of the code, and the decisions.

The reference has a page for each room of the library, made from docstrings without importing
anything, so a new module is in it by itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Links that leave docs/ lead to files of the repository, which are no part of the site.
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s]*)\)")
_ON_CLUSTERS = ("planning.md", "chaos.md", "autoscaling.md", "watching.md")


def _rooms() -> dict[str, list[str]]:
    """The modules of each page of the reference, by its name."""
    found: dict[str, list[str]] = {}
    for file in sorted(ROOT.glob("reasonembed/**/*.py")) + sorted(ROOT.glob("ray_jobs/*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        room = "ray_jobs" if parts[0] == "ray_jobs" else parts[1] if parts[1:] else ""
        if not room or any(part.startswith("_") for part in parts):
            continue
        is_room = parts[0] == "ray_jobs" or (ROOT / "reasonembed" / room).is_dir()
        found.setdefault(room if is_room else "reasonembed", []).append(".".join(parts))
    return found


def _title(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()


def on_config(config: Any) -> Any:
    """Puts what lies in folders into the navigation."""
    code = [{room: f"reference/{room}.md"} for room in _rooms()]
    decisions = [
        {_title(file): f"decisions/{file.name}"} for file in sorted(DOCS.glob("decisions/*.md"))
    ]
    sections = {name: pages for entry in config["nav"] for name, pages in entry.items()}
    sections["Reference"].append({"Code": code})
    extra = [{_title(DOCS / name): name} for name in _ON_CLUSTERS if (DOCS / name).exists()]
    sections["Background"] += [*extra, {"Decisions": decisions}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the reference."""
    for room, modules in _rooms().items():
        text = f"# `{room}`\n\n" + "\n".join(
            f"::: {module}\n    options:\n      show_submodules: false\n" for module in modules
        )
        files.append(File.generated(config, f"reference/{room}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leaves the words of a link that goes to the repository, and not the link."""
    depth = page.file.src_uri.count("/")

    def shown(link: re.Match[str]) -> str:
        leaves = link[2].count("../") > depth
        return link[1] if leaves else link[0]

    return _OUTSIDE.sub(shown, markdown)
