"""Vectors without any server: run by the service's Python, one line of JSON in, one out.

    {"role": "query", "instruction": "", "texts": ["why?"]}

is answered with where the weights lie, the vectors, and the token ids that the model gets. The one
argument is a file with the fields of `ServeConfig`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from reasonembed.config import load_serve
from reasonembed.embedder.encode import Embedder
from reasonembed.embedder.tokenisation import Role
from reasonembed.serving.target import Target, find_target


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    target = find_target(load_serve(settings, overrides=[], where="tests"))
    embedder = Embedder(target.path, target.contract)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(embedder, target, json.loads(line))) + "\n")
        sys.stdout.flush()


def _answer(embedder: Embedder, target: Target, asked: dict[str, Any]) -> dict[str, Any]:
    role, texts = Role(asked["role"]), asked["texts"]
    told = {} if role is Role.DOCUMENT else {"instruction": asked["instruction"]}
    if told == {"instruction": ""}:
        told = {"instruction": target.instruction}
    encode = embedder.encode_queries if role is Role.QUERY else embedder.encode_documents
    return {
        "path": str(target.path),
        "vectors": encode(texts, **told).tolist(),
        "ids": [list(ids) for ids in embedder.tokenise(texts, role=role, **told)],
    }


if __name__ == "__main__":
    main()
