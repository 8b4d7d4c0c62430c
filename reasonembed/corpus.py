"""Corpora: read from files or from the running interpreter, checked, hashed and grouped.

Writes the ``corpus`` artifact (``schemas.CORPUS``), which every later stage reads. The ``text``
column is what retrievers and language models see: a title, where a source has one, has already
been joined to it by `passage_text`.

Exact duplicates share a ``group_id``. BRIGHT's corpora contain up to 38 % of them (stackoverflow),
so that leaving a source document out by its id alone would let its twin back in.
"""

import dataclasses
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from reasonembed import hub
from reasonembed.errors import CorpusError
from reasonembed.fetched import fetched
from reasonembed.records import (
    Record,
    check_shards,
    parquet_columns,
    read_records,
    shown,
    table_files,
)
from reasonembed.schemas import CORPUS
from reasonembed.storage import is_uri

log = logging.getLogger(__name__)

PYTHON_STDLIB = "python-stdlib"
"""The source name of the documentation that the running interpreter carries."""

ID_COLUMNS = ("doc_id", "_id", "id", "docid")
TEXT_COLUMNS = ("text", "content", "contents")
MIN_PASSAGE_WORDS = 80
MAX_PASSAGE_WORDS = 200
MIN_DOCSTRING_WORDS = 8

# Curated, not discovered: importing everything in `sys.stdlib_module_names` would open a browser
# (antigravity), print (this), need a display or a terminal (tkinter, curses, readline), warn
# (deprecated modules) or depend on the platform. All names exist on Python 3.11, 3.12 and 3.13.
_STDLIB_MODULES = """
builtins abc argparse array ast asyncio atexit base64 bdb binascii bisect bz2 calendar cmath
cmd code codecs codeop collections collections.abc colorsys compileall concurrent.futures
configparser contextlib contextvars copy copyreg cProfile csv ctypes ctypes.util dataclasses
datetime dbm decimal difflib dis doctest email email.charset email.encoders email.generator
email.header email.headerregistry email.message email.mime.base email.mime.text email.parser
email.policy email.utils enum errno faulthandler filecmp fileinput fnmatch fractions ftplib
functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser
http http.client http.cookiejar http.cookies http.server imaplib importlib importlib.abc
importlib.machinery importlib.metadata importlib.resources importlib.util inspect io ipaddress
itertools json json.tool keyword linecache locale logging logging.config logging.handlers lzma
mailbox marshal math mimetypes mmap modulefinder multiprocessing multiprocessing.connection
multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc numbers
operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib
pprint profile pstats py_compile pyclbr pydoc queue quopri random re reprlib runpy sched
secrets select selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl
stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile
tempfile textwrap threading time timeit token tokenize tomllib trace traceback tracemalloc
types typing unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request
urllib.response urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.handlers
wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate xml.dom xml.dom.minidom
xml.dom.pulldom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils
xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""

# Hooks that test runners, debuggers and frameworks swap for their own, which would make the corpus
# depend on who reads it.
_REPLACED_BY_PROGRAMS = {
    "pdb.set_trace",
    "sys.breakpointhook",
    "sys.displayhook",
    "sys.excepthook",
    "sys.unraisablehook",
    "threading.excepthook",
    "warnings.formatwarning",
    "warnings.showwarning",
}


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        doc_id: Unique within its corpus.
        text: What is embedded and read, any title included; blank in few documents.
        title: The title alone, for display; ``""`` if there is none.
        task: Name of the retrieval task that it belongs to.
        parent_id: Id of the longer document that it was cut from, if it was.
    """

    doc_id: str
    text: str
    title: str
    task: str
    parent_id: str | None


def read_corpus(source: str, *, task: str = "generic", limit: int | None = None) -> pa.Table:
    """Read a corpus into a table of schema ``schemas.CORPUS``.

    Blank documents are kept, and counted in a warning. Crawled corpora, BRIGHT's among them, hold
    some; a figure stands for the corpus as published, and an id may even be gold. They share one
    duplicate group, no query can be written from them, and BM25 never returns them.

    Args:
        source: ``"python-stdlib"``; a ``.parquet``, ``.jsonl`` or ``.jsonl.gz`` file; a file name
            with ``*``, for several (``documents/biology-*.parquet``); a folder that holds
            ``corpus`` with one of these endings (BEIR's form) or in shards, or whose only content
            of the kind are ``.parquet`` files; an address in an object store of any of these; or
            one of `reasonembed.hub`. The id is taken from the first column there is of
            `ID_COLUMNS`, the text from `TEXT_COLUMNS`; ``title`` and ``parent_id`` are optional.
        task: Name of the retrieval task, the same for every document.
        limit: Read the first so many documents only; later rows are not looked at.

    Raises:
        CorpusError: The source cannot be read as a corpus; the message names the file and the line
            (JSONL, from 1) or row (Parquet, from 0) and what to change.
        StorageError: It lies in a store that cannot be read.
    """
    if limit is not None and limit < 1:
        raise CorpusError(f"limit is {limit}; it must be at least 1, or left out to read all")
    if source == PYTHON_STDLIB:
        documents: Iterable[Document] = _stdlib_of_a_fresh_interpreter(task)
    else:
        documents = _file_documents(corpus_files(source), task)
    kept = list(itertools.islice(documents, limit))
    if not kept:
        raise CorpusError(f"{source}: the corpus is empty; it needs at least one document")
    _warn_of_blanks(source, kept)
    return _to_table(kept)


def holds_corpus(folder: Path) -> bool:
    """Whether `read_corpus` finds a table called ``corpus`` in a folder."""
    return bool(_named_corpus(folder))


def check_only_added(before: pa.Table, now: pa.Table) -> None:
    """Checks that a corpus has grown and not changed.

    Args:
        before: `doc_id` and `text_hash` of the documents that a run was made from.
        now: The same columns, perhaps among others.

    Raises:
        CorpusError: A document's text is another one, or the document is gone.
    """
    texts = dict(zip(now["doc_id"].to_pylist(), now["text_hash"].to_pylist(), strict=True))
    old = zip(before["doc_id"].to_pylist(), before["text_hash"].to_pylist(), strict=True)
    changed = [doc_id for doc_id, text in old if texts.get(doc_id) != text]
    if changed:
        shown = ", ".join(repr(doc_id) for doc_id in changed[:3])
        raise CorpusError(
            f"{len(changed)} documents that this run was made from are gone or have another text: "
            f"{shown}; a run can grow by new documents only. Give changed texts new ids, or start "
            "another run_dir"
        )


def passage_text(title: str, text: str) -> str:
    """Join a title and a text into what is embedded and read: title, newline, text.

    A text that already starts with its title is returned as it is, so that joining twice (a corpus
    that was written and is read again) changes nothing.
    """
    title = title.strip()
    return text if not title or text.lstrip().startswith(title) else f"{title}\n{text}"


def text_hash(text: str) -> str:
    """128-bit BLAKE2b of the text with every run of white space made one space, in hex."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).hexdigest()


class CorpusStore:
    """Random access to a corpus by id; keeps the texts in Arrow memory."""

    def __init__(self, table: pa.Table) -> None:
        """Index a table of schema ``schemas.CORPUS``.

        Raises:
            CorpusError: An id occurs twice.
        """
        self._table = table
        self.doc_ids: list[str] = table["doc_id"].to_pylist()
        self._groups: list[str] = table["group_id"].to_pylist()
        self._rows: dict[str, int] = {}
        self._members: dict[str, list[str]] = {}
        for row, (doc_id, group_id) in enumerate(zip(self.doc_ids, self._groups, strict=True)):
            if doc_id in self._rows:
                raise CorpusError(
                    f"doc_id {doc_id!r} is in rows {self._rows[doc_id]} and {row}; ids must be "
                    "unique, so prefix them when corpora are joined"
                )
            self._rows[doc_id] = row
            self._members.setdefault(group_id, []).append(doc_id)

    def __len__(self) -> int:
        return len(self.doc_ids)

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self._rows

    def text(self, doc_id: str) -> str:
        """The text of a document. Raises CorpusError for an unknown id."""
        return str(self._table["text"][self._row(doc_id)])

    def texts(self, doc_ids: Iterable[str]) -> list[str]:
        """The texts of documents, in the order asked. Raises CorpusError for an unknown id."""
        return [self.text(doc_id) for doc_id in doc_ids]

    def task(self, doc_id: str) -> str:
        """The retrieval task of a document. Raises CorpusError for an unknown id."""
        return str(self._table["task"][self._row(doc_id)])

    def tasks(self, doc_ids: Iterable[str]) -> list[str]:
        """The tasks of documents, in the order asked. Raises CorpusError for an unknown id."""
        return [self.task(doc_id) for doc_id in doc_ids]

    def group(self, doc_id: str) -> str:
        """The duplicate group of a document. Raises CorpusError for an unknown id."""
        return self._groups[self._row(doc_id)]

    def group_members(self, group_id: str) -> tuple[str, ...]:
        """The ids of a duplicate group in corpus order. Raises CorpusError for an unknown group."""
        try:
            return tuple(self._members[group_id])
        except KeyError:
            raise CorpusError(f"group_id {group_id!r} is not in the corpus") from None

    def _row(self, doc_id: str) -> int:
        try:
            return self._rows[doc_id]
        except KeyError:
            raise CorpusError(
                f"doc_id {doc_id!r} is not in the corpus of {len(self)} documents; was another "
                "corpus, or another limit, used upstream?"
            ) from None


def _to_table(documents: list[Document]) -> pa.Table:
    hashes = [text_hash(document.text) for document in documents]
    columns: dict[str, list[str | None]] = {
        name: [getattr(document, name) for document in documents]
        for name in ("doc_id", "text", "title", "task", "parent_id")
    }
    return pa.table({**columns, "text_hash": hashes, "group_id": hashes}, schema=CORPUS)


# Files.


def corpus_files(source: str) -> list[Path]:
    """The files that `read_corpus` reads for a source.

    Raises:
        CorpusError: There are none.
        StorageError: They lie in a store that cannot be read.
    """
    path = fetched(source) if is_uri(source) and not source.startswith(hub.SCHEME) else Path(source)
    if source.startswith(hub.SCHEME):
        files = hub.fetch_address(source, error=CorpusError)
    elif "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = _named_corpus(path) or sorted(path.glob("*.parquet"))
    else:
        files = [path] if path.is_file() else []
    if not files:
        what = "the folder holds no corpus.jsonl and no .parquet files"
        raise CorpusError(
            f"{source}: {what if path.is_dir() else 'no such file'}; give a file, a BEIR "
            f"folder, a folder of .parquet files or {PYTHON_STDLIB!r}"
        )
    check_shards(files, error=CorpusError)
    return files


def _named_corpus(folder: Path) -> list[Path]:
    inside = folder / "corpus"
    shards = sorted(inside.glob("*.parquet")) if inside.is_dir() else []
    return table_files(folder, "corpus", error=CorpusError) or shards


def _file_documents(paths: list[Path], task: str) -> Iterator[Document]:
    places: dict[str, str] = {}
    for path in paths:
        for record in _records(path):
            document = _document(path, record, task)
            place = record.place if len(paths) == 1 else f"{record.place} of {path.name}"
            first = places.setdefault(document.doc_id, place)
            if first != place:
                raise CorpusError(
                    f"{path}: id {document.doc_id!r} is on {first} and on {place}; "
                    "make the ids unique"
                )
            yield document


def _records(path: Path) -> Iterator[Record]:
    if path.name.endswith(".parquet"):
        names = parquet_columns(path, error=CorpusError)
        _check_columns(path, names, names)
    return read_records(path, error=CorpusError, columns=_WANTED)


def _warn_of_blanks(source: str, documents: list[Document]) -> None:
    blank = [document.doc_id for document in documents if not document.text.strip()]
    if blank:
        log.warning(
            "%s: %d of %d documents are blank, such as %r; they are kept",
            *(source, len(blank), len(documents), blank[0]),
        )


_WANTED = (*ID_COLUMNS, *TEXT_COLUMNS, "title", "parent_id")


def _document(path: Path, record: Record, task: str) -> Document:
    where = f"{path}, {record.place}"
    id_column, text_column = _check_columns(where, record.fields, record.fields)
    doc_id = _string(where, record.fields, id_column)
    text = _string(where, record.fields, text_column, may_be_blank=True)
    title = _optional_string(where, record.fields, "title") or ""
    parent_id = _optional_string(where, record.fields, "parent_id")
    return Document(doc_id, passage_text(title, text), title, task, parent_id)


def _check_columns(where: object, names: Iterable[str], shown: Iterable[str]) -> tuple[str, str]:
    """The id and the text column among ``names``."""
    there, found = set(names), []
    for what, accepted in (("an id", ID_COLUMNS), ("a text", TEXT_COLUMNS)):
        column = next((name for name in accepted if name in there), None)
        if column is None:
            raise CorpusError(
                f"{where}: {what} column is missing; name it one of {', '.join(accepted)} "
                f"(there is: {', '.join(map(str, shown)) or 'nothing'})"
            )
        found.append(column)
    return found[0], found[1]


def _string(
    where: str, fields: Mapping[str, Any], column: str, *, may_be_blank: bool = False
) -> str:
    value = _optional_string(where, fields, column)
    if value is None:
        raise CorpusError(f"{where}: {column} is null; every document needs one")
    if not value.strip() and not may_be_blank:
        raise CorpusError(f"{where}: {column} is {value!r}, which is blank; fill it or drop it")
    return value


def _optional_string(where: str, fields: Mapping[str, Any], column: str) -> str | None:
    value = fields.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise CorpusError(
            f"{where}: {column} must be a string, got {shown(value)}; write it as one"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: {column} holds half of a surrogate pair (character {error.start}), "
            "which UTF-8 cannot carry; repair the escape"
        ) from error
    return value


# The Python standard library.


def stdlib_documents(*, task: str = "generic") -> Iterator[Document]:
    """The documentation inside the running interpreter, in an order that does not change.

    First the language reference (``pydoc_data.topics``) in passages of about `MIN_PASSAGE_WORDS` to
    `MAX_PASSAGE_WORDS` words, with ids such as ``topic:yield#0``; then one document for every
    public module, class, function, method and property whose docstring has at least
    `MIN_DOCSTRING_WORDS` words, with ids such as ``itertools.groupby`` and ``str.split``.
    Docstrings are kept whole. An object is one document, under the module that makes it public.

    The texts are those of this interpreter: another Python version gives another corpus.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from _topic_documents(topics, task)
    for doc_id, text in sorted(_Symbols().documents.items()):
        yield Document(doc_id, text, "", task, None)


def _stdlib_of_a_fresh_interpreter(task: str) -> list[Document]:
    """`stdlib_documents` of a child: large libraries patch the standard library of their process.

    Without it the corpus would depend on whether torch or ray happen to be loaded.
    """
    source = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, "-m", "reasonembed.corpus", task],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    if child.returncode:
        raise CorpusError(f"{PYTHON_STDLIB} cannot be read: {child.stderr.strip()[-500:]}")
    return [Document(**json.loads(line)) for line in child.stdout.splitlines()]


def cut_passages(
    text: str, *, min_words: int = MIN_PASSAGE_WORDS, max_words: int = MAX_PASSAGE_WORDS
) -> list[str]:
    """Cut a text at blank lines into passages of ``min_words`` to ``max_words`` words.

    A paragraph longer than ``max_words`` is cut at line ends, a longer line between words. A
    passage is closed as soon as it has ``min_words`` or the next paragraph would not fit; a last
    short one joins the one before it if both fit. No word is lost or moved; no passage is longer
    than ``max_words``.
    """
    passages: list[str] = []
    current, words = "", 0
    for block in _blocks(text, max_words):
        size = len(block.split())
        if current and (words >= min_words or words + size > max_words):
            passages.append(current)
            current, words = block, size
        else:
            current, words = (f"{current}\n\n{block}" if current else block), words + size
    if not current:
        return passages
    if passages and words < min_words and len(passages[-1].split()) + words <= max_words:
        current = f"{passages.pop()}\n\n{current}"
    return [*passages, current]


def _blocks(text: str, max_words: int) -> Iterator[str]:
    """Paragraphs, the long ones in pieces of at most ``max_words`` words."""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if len(paragraph.split()) <= max_words:
            if paragraph.strip():
                yield paragraph.rstrip()
            continue
        piece: list[str] = []
        for line in _short_lines(paragraph, max_words):
            if piece and len(" ".join([*piece, line]).split()) > max_words:
                yield "\n".join(piece)
                piece = []
            piece.append(line)
        yield "\n".join(piece)


def _short_lines(paragraph: str, max_words: int) -> Iterator[str]:
    for line in paragraph.splitlines():
        words = line.split()
        if len(words) <= max_words:
            yield line
        else:
            for start in range(0, len(words), max_words):
                yield " ".join(words[start : start + max_words])


def _topic_documents(topics: Mapping[str, str], task: str) -> Iterator[Document]:
    """Passages of all topics, each kept once.

    Topics overlap ("compound statements" repeats "the for statement"); a passage stays in the
    shortest topic that has it, where its number changes least between Python versions.
    """
    documents: dict[str, Document] = {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        sections = _sections(topics[topic])
        passages = [(title, part) for title, body in sections for part in cut_passages(body)]
        for number, (title, passage) in enumerate(passages):
            text, parent_id = passage_text(title, passage), f"topic:{topic}"
            document = Document(f"{parent_id}#{number}", text, title, task, parent_id)
            documents.setdefault(text_hash(text), document)
    yield from sorted(documents.values(), key=lambda document: document.doc_id)


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Heading and body of each section; headings are underlined lines."""
    heading, body = "", list[str]()
    for line in text.splitlines():
        is_underline = bool(re.fullmatch(r"([*=\-~^\"#])\1{2,}", line))
        if is_underline and body and len(body[-1]) == len(line):
            next_heading = body.pop()
            yield heading, "\n".join(body)
            heading, body = next_heading, []
        else:
            body.append(line)
    yield heading, "\n".join(body)


class _Symbols:
    """Collects the documented public objects of the standard library, each under one id."""

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        # Objects, not only their ids: a temporary that were freed could hand its id on.
        self._seen: dict[int, object] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._modules = _import_modules()
            for name, module in self._modules.items():
                self._add_module(name, module)

    def _add_module(self, name: str, module: types.ModuleType) -> None:
        if name != "builtins":
            self._add(name, module)
        prefix = "" if name == "builtins" else f"{name}."
        public = {attribute: getattr(module, attribute) for attribute in _public_names(module)}
        # Functions before classes: `random.choice` is also the method `random.Random.choice`.
        for attribute in sorted(public, key=lambda key: (isinstance(public[key], type), key)):
            value = public[attribute]
            doc_id = f"{prefix}{attribute}"
            if doc_id in _REPLACED_BY_PROGRAMS or _is_alias(attribute, value, public):
                continue
            if self._is_at_home(name, value) and self._is_new(value):
                self._add(doc_id, value)
                if isinstance(value, type):
                    self._add_members(doc_id, value)

    def _add_members(self, class_id: str, owner: type) -> None:
        """The class's own members, not inherited ones."""
        members = {name: raw for name, raw in vars(owner).items() if not name.startswith("_")}
        for name, raw in sorted(members.items()):
            if not _is_alias(name, raw, members) and self._is_new(raw):
                self._add(f"{class_id}.{name}", raw, callable_form=getattr(owner, name, raw))

    def _add(self, doc_id: str, value: object, *, callable_form: object = None) -> None:
        docstring = _own_docstring(value)
        if len(docstring.split()) >= MIN_DOCSTRING_WORDS:
            name = doc_id.rpartition(".")[2]
            header = _header(name, value if callable_form is None else callable_form)
            is_named = not header or docstring.startswith(name)
            self.documents[doc_id] = docstring if is_named else f"{header}\n\n{docstring}"

    def _is_new(self, value: object) -> bool:
        value = getattr(value, "__func__", value)
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        return True

    def _is_at_home(self, name: str, value: object) -> bool:
        """Whether no other module of the list declares the object and makes it public."""
        declared = getattr(value, "__module__", None)
        if isinstance(value, types.ModuleType):
            return False
        if name in ("builtins", declared) or not isinstance(declared, str):
            return True
        home = self._modules.get(declared)
        return home is None or getattr(home, getattr(value, "__name__", ""), None) is not value


def _is_alias(name: str, value: object, namespace: Mapping[str, object]) -> bool:
    """Whether the object stands in the same namespace under its true name too."""
    true_name = getattr(value, "__name__", name)
    if not isinstance(true_name, str):  # `unittest.mock.call` has an answer to every attribute
        return False
    return true_name != name and namespace.get(true_name) is value


def _import_modules() -> dict[str, types.ModuleType]:
    modules: dict[str, types.ModuleType] = {}
    for name in _STDLIB_MODULES.split():
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:  # an interpreter built without sqlite3, bz2, lzma, ctypes, ...
            log.warning("the corpus leaves out %s, which this Python lacks: %s", name, error)
    return modules


def _public_names(module: types.ModuleType) -> list[str]:
    """``__all__``, or else the public names of what the module or its C half declares."""
    if hasattr(module, "__all__"):
        return sorted(
            name for name in module.__all__ if not name.startswith("_") and hasattr(module, name)
        )
    own = {module.__name__, f"_{module.__name__}"}
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (module.__name__ == "builtins" or getattr(value, "__module__", None) in own)
    )


def _own_docstring(value: object) -> str:
    """The cleaned docstring; ``""`` for one that merely comes from the object's type."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    docstring = getattr(value, "__doc__", None)
    if not isinstance(docstring, str) or docstring == type(value).__doc__:
        return ""
    return inspect.cleandoc(docstring)


def _header(name: str, value: object) -> str:
    """The line ``name(parameters)``; ``""`` for what cannot be called."""
    if not callable(value) or isinstance(value, types.ModuleType):
        return ""
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError, AttributeError):
        # How C functions answer whose text signature is missing or names what is not there.
        signature = "<unknown>"
    # Defaults such as <object object at 0x7f..> differ from run to run.
    return f"{name}(...)" if "<" in signature else f"{name}{signature}"


if __name__ == "__main__":
    for one in stdlib_documents(task=sys.argv[1]):
        sys.stdout.write(json.dumps(dataclasses.asdict(one)) + "\n")
