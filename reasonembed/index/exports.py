"""An index in the forms of other programs: a FAISS file, points for Qdrant, a Lance data set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from reasonembed.errors import ConfigError
from reasonembed.index.exact import Vectors
from reasonembed.index.store import StoredIndex

Form = Literal["faiss", "qdrant", "lance"]
FORMS: tuple[str, ...] = get_args(Form)
_ROWS = 8_192  # of the matrix that are copied at a time


def export_index(stored: StoredIndex, out: Path, *, form: Form) -> list[Path]:
    """Writes documents and vectors in another program's form, whole or not at all.

    - `faiss`: an `IndexFlatIP`, and beside it `<out>.ids.jsonl`: of each row the doc id, as JSON.
    - `qdrant`: JSON lines, each a point of an upsert (`PUT /collections/<name>/points`): `id` is
      the document's position, `vector`, and `payload` with `doc_id`, `title` and `text`; and beside
      it `<out>.collection.json`, the body that makes the collection (`PUT /collections/<name>`).
    - `lance`: a data set with the columns `doc_id`, `title`, `text` and `vector`.

    Args:
        stored: A whole index that holds vectors.
        out: Does not exist yet.
        form: One of the three.

    Returns:
        What was written.

    Raises:
        ConfigError: The index holds no vectors, `out` exists, or a package is missing.
    """
    if stored.vectors_ND is None:
        raise ConfigError(
            f"{stored.folder} holds no vectors to export; build it without --no-dense"
        )
    if form not in FORMS:
        raise ConfigError(f"--to {form!r}: the forms are {', '.join(FORMS)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = {"faiss": [".ids.jsonl"], "qdrant": [".collection.json"], "lance": []}[form]
    targets = [out, *(out.with_name(out.name + ending) for ending in beside)]
    for target in targets:
        if target.exists():
            raise ConfigError(f"{target} exists; choose another --out, or delete it")
    partial = [target.with_name(f".{target.name}.partial") for target in targets]
    for scratch in partial:
        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)
    _WRITERS[form](stored, partial)
    for scratch, target in zip(reversed(partial), reversed(targets), strict=True):
        scratch.rename(target)  # the main file last: where it is, everything is
    return targets


def _faiss(stored: StoredIndex, files: list[Path]) -> None:
    try:
        import faiss
    except ImportError as error:
        raise _missing("faiss-cpu", "FAISS", error) from error
    index = faiss.IndexFlatIP(stored.about.dimension)
    for _, vectors_ND in _blocks(stored):
        index.add(vectors_ND)
    faiss.write_index(index, str(files[0]))
    with files[1].open("w", encoding="utf-8") as stream:
        for doc_id in stored.rows(["doc_id"]).column("doc_id"):
            stream.write(f"{json.dumps(doc_id.as_py(), ensure_ascii=False)}\n")


def _qdrant(stored: StoredIndex, files: list[Path]) -> None:
    with files[0].open("w", encoding="utf-8") as stream:
        for start, vectors_ND in _blocks(stored):
            payloads = stored.rows().slice(start, len(vectors_ND)).to_pylist()
            for number, (payload, vector) in enumerate(zip(payloads, vectors_ND, strict=True)):
                point = {"id": start + number, "vector": vector.tolist(), "payload": payload}
                stream.write(f"{json.dumps(point, ensure_ascii=False)}\n")
    # Dot, as our scores are: of vectors of length 1 it is the cosine.
    collection = {"vectors": {"size": stored.about.dimension, "distance": "Dot"}}
    files[1].write_text(json.dumps(collection, indent=1), encoding="utf-8")


def _lance(stored: StoredIndex, files: list[Path]) -> None:
    try:
        import lance
    except ImportError as error:
        raise _missing("pylance", "Lance", error) from error
    columns = stored.rows()
    vector = pa.field("vector", pa.list_(pa.float32(), stored.about.dimension))
    schema = columns.schema.append(vector)

    def batches() -> Iterator[pa.RecordBatch]:
        for start, vectors_ND in _blocks(stored):
            part = columns.slice(start, len(vectors_ND))
            flat = pa.array(vectors_ND.reshape(-1))
            held = pa.FixedSizeListArray.from_arrays(flat, stored.about.dimension)
            yield from part.append_column(vector, held).combine_chunks().to_batches()

    lance.write_dataset(batches(), str(files[0]), schema=schema)


_WRITERS: dict[Form, Callable[[StoredIndex, list[Path]], None]] = {
    "faiss": _faiss,
    "qdrant": _qdrant,
    "lance": _lance,
}


def _blocks(stored: StoredIndex) -> Iterator[tuple[int, Vectors]]:
    assert stored.vectors_ND is not None, "checked by `export_index`"
    for start in range(0, len(stored), _ROWS):
        yield start, np.array(stored.vectors_ND[start : start + _ROWS])


def _missing(package: str, name: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"the form of {name} needs the package {package} ({error}); install it with: pip install "
        f"{package}"
    )
