"""A service on a real port and a real browser before it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from reasonembed.config import ServeConfig
from reasonembed.progress import Reporter
from reasonembed.serving import assembly
from reasonembed.serving.building import build_here, index_config
from reasonembed.systems.local import LocalWork

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# No name is resolved, so that nothing but the service can be reached.
_OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"

HOSTILE = (
    "Leaves and <img src=x onerror='window.attacked=1'><script>window.attacked=1</script> "
    "\u202eright to left\u202c "
    "</blockquote></details><style>body{display:none}</style>" + "unbroken" * 400
)
DOCUMENTS = {
    "leaf-1": ("Autumn", "Trees lose their leaves in autumn when days get short and cold."),
    "leaf-2": ("Abscission", "A layer of cells at the base of the stalk cuts the leaf off."),
    "leaf-copy": ("Autumn", "Trees lose their leaves in autumn when days get short and cold."),
    "leaf-3": ("Chlorophyll", "The green of leaves is taken back into the trees before autumn."),
    "moss/a b?#%2F": ("", "Moss holds water, has no roots, and grows in the shade of trees."),
    "root": ("Roots", "Roots of trees hold the soil in place when rain falls on the slope."),
    "soil": ("Erosion", "Rain carries the soil away where trees are gone and leaves are few."),
    "road": ("Tax", "Taxes pay for the road, the bridge and the trees along both."),
    "bark": ("Bark", "Bark keeps insects and cold away from the wood of trees in autumn."),
    "sap": ("Sap", "Sap rises in spring when leaves of trees lose water to the air."),
    "constructor": ("Cambium", "Trees grow thicker in a ring of cells below the bark."),
    "<b>hostile</b>": ("<i>Leaves</i> of trees", HOSTILE),
}
"""Ids, titles and texts that a page can go wrong with stand among plain ones."""


def whole_text(doc_id: str) -> str:
    """A document as an index holds it."""
    title, text = DOCUMENTS[doc_id]
    return text if not title or text.startswith(title) else f"{title}\n{text}"


QUERIES = {
    "q1": "why do trees lose their leaves in autumn",
    "q2": "what holds the soil when rain falls",
    "<q3>": "which cells of trees let leaves fall",
}
GOLD = {
    "q1": {"leaf-1": 1, "leaf-2": 2},
    "q2": {"root": 1},
    "<q3>": {"leaf-2": 1, "constructor": 1},
}
EXCLUDED = {"q2": ["soil"]}


def build_index(folder: Path, *, instruction: str | None = None) -> Path:
    """An index of the documents, made by the model `echo`."""
    data = folder / "garden"
    (data / "qrels").mkdir(parents=True)
    corpus = [{"_id": key, "title": one[0], "text": one[1]} for key, one in DOCUMENTS.items()]
    _write_lines(data / "corpus.jsonl", corpus)
    _write_lines(data / "queries.jsonl", [{"_id": k, "text": text} for k, text in QUERIES.items()])
    rows = [{"query_id": key, "excluded_ids": ids} for key, ids in EXCLUDED.items()]
    _write_lines(data / "excluded.jsonl", rows)
    gold = [f"{key}\t{doc}\t{label}" for key, ids in GOLD.items() for doc, label in ids.items()]
    header = "query-id\tcorpus-id\tscore"
    (data / "qrels" / "test.tsv").write_text("\n".join([header, *gold, ""]), encoding="utf-8")
    config = index_config(str(data), out=str(folder / "index"), given={"model": "echo"})
    build_here(config, work=LocalWork(Reporter(Console(file=StringIO()))))
    return folder / "index"


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def assembled(config: ServeConfig, *, rewriting: Any = None) -> FastAPI:
    """The service of a configuration over the model `echo`; an LLM of ours may rewrite."""
    opened = assembly.open_warm(config)
    indexes = [assembly.open_part(folder) for folder in config.indexes]
    parts = assembly.Parts(
        model=opened.served,
        preparer=opened.preparer,
        embedder=assembly.batcher(opened, config),
        indexes=[assembly.PartedIndex(one.info, [one], one.stored.queries) for one in indexes],
        llm=assembly.LLM(rewriting=rewriting),
    )
    if rewriting is not None:
        llm = {"model": "scripted", "engine": "scripted"}
        config = ServeConfig.model_validate(config.model_dump() | {"rewrite": {"llm": llm}})
    return assembly.assemble_app(config, parts, keys=assembly.key_file(config))


@contextlib.contextmanager
def listening(app: FastAPI, *, http: str = "auto") -> Iterator[str]:
    """The address of an app behind a real server; `http` is its parser."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="error", access_log=False, http=http)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def find_browser() -> str | None:
    """Where a Chromium is; $CHROMIUM names another one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browsing(executable: str) -> Iterator[Any]:
    """A Chromium without a window that can reach this machine alone."""
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=[_OFFLINE, *sandbox])
        try:
            yield browser
        finally:
            browser.close()
