"""The page of the service: static files that ask its own routes, and nothing of any other host.

Texts of documents and users reach the page as data alone: it writes them with `textContent`, and
the Content-Security-Policy of every answer lets it run scripts and styles of this package only.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
"""What the page is made of, and of which type; nothing is built."""


def router() -> APIRouter:
    """`GET /`, and the files that it names under `/page/`."""
    routes = APIRouter()
    _add_file(routes, "/", "index.html")
    for name in FILES:
        if name != "index.html":
            _add_file(routes, f"/page/{name}", name)
    return routes


def read_file(name: str) -> bytes:
    """A file of the page."""
    return (files(__name__) / name).read_bytes()


def _add_file(routes: APIRouter, path: str, name: str) -> None:
    content, kind = read_file(name), f"{FILES[name]}; charset=utf-8"

    @routes.get(path, name=f"page {name}")
    async def file() -> Response:
        return Response(content, headers={"content-type": kind})
