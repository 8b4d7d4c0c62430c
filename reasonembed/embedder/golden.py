"""Golden token ids and vectors: an export proves at load that it still is what was exported.

A newer tokenizer library, a wrong dtype or a damaged file shows here, not as a silent loss of
quality.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reasonembed.embedder.contract import TokenisationContract
from reasonembed.embedder.tokenisation import Role, TokenIds
from reasonembed.errors import ModelError

GOLDEN_FILE = "golden.json"
# Another machine or batch changes the last bits: about 1e-7 in float32, 2e-3 in 16 bits.
MIN_COSINE = {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.995}
"""Of a vector and what it should be, by the type of the weights."""


class _Tokenises(Protocol):
    def tokenise(
        self, texts: Sequence[str], *, role: Role, instruction: str = ""
    ) -> list[TokenIds]: ...


class _Encoder(_Tokenises, Protocol):
    @property
    def contract(self) -> TokenisationContract: ...

    def encode_ids(self, sequences: Sequence[TokenIds]) -> NDArray[np.float32]: ...


def write_golden(
    encoder: _Encoder, texts: Sequence[str], *, instruction: str, directory: Path
) -> None:
    """Writes `golden.json`: each text as query and as document, its ids and its vector.

    Args:
        encoder: An `Embedder`.
        texts: Any texts.
        instruction: Of the queries.
        directory: Folder of the export.
    """
    rows = []
    for role in Role:
        used = instruction if role is Role.QUERY else ""
        ids = encoder.tokenise(texts, role=role, instruction=used)
        vectors = encoder.encode_ids(ids)
        rows += [
            {
                "role": role.value,
                "text": text,
                "instruction": used,
                "token_ids": list(tokens),
                "vector": [float(value) for value in vector],
            }
            for text, tokens, vector in zip(texts, ids, vectors, strict=True)
        ]
    content = json.dumps(rows, ensure_ascii=False, indent=1)
    (directory / GOLDEN_FILE).write_text(content, encoding="utf-8")


def verify_golden(encoder: _Encoder, directory: Path) -> None:
    """Checks an encoder against its `golden.json`.

    Raises:
        ModelError: The file is missing, or a text gives other token ids or another vector.
    """
    verify_golden_ids(encoder, directory)
    least = MIN_COSINE[encoder.contract.dtype]
    for row in _rows(directory):
        golden = np.asarray(row["vector"], dtype=np.float32)
        found = encoder.encode_ids([tuple(row["token_ids"])])[0]
        if found.shape != golden.shape:
            raise ModelError(
                f"{directory}: vectors have {len(found)} dimensions, golden ones {len(golden)}; "
                "the weights are not the exported ones"
            )
        cosine = float(found @ golden / (np.linalg.norm(found) * np.linalg.norm(golden)))
        if not cosine >= least:  # NaN fails as well
            raise ModelError(
                f"{directory}: {row['role']} {row['text'][:60]!r} has cosine {cosine:.6f} to its "
                f"golden vector, at least {least} is expected; the weights are not the exported "
                "ones"
            )


def verify_golden_ids(tokenizer: _Tokenises, directory: Path) -> None:
    """Checks a tokenizer against `golden.json`; needs no weights.

    Args:
        tokenizer: An `Embedder`, or a `ContractTokenizer` alone.
        directory: Folder of the export.

    Raises:
        ModelError: The file is missing, or a text gives other token ids.
    """
    for row in _rows(directory):
        role, text = Role(row["role"]), row["text"]
        [ids] = tokenizer.tokenise([text], role=role, instruction=row["instruction"])
        if list(ids) != row["token_ids"]:
            raise ModelError(
                f"{directory}: {role} {text[:60]!r} gives token ids {list(ids)[:8]}..., golden "
                f"are {row['token_ids'][:8]}...; the tokenizer is not the exported one"
            )


def _rows(directory: Path) -> list[dict[str, Any]]:
    file = directory / GOLDEN_FILE
    if not file.is_file():
        raise ModelError(f"{directory} holds no {GOLDEN_FILE}; export the model again")
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"cannot read {file}: {error}; export the model again") from error
    return rows
