import json

import pytest

from reasonembed.embedder import Embedder
from reasonembed.embedder.golden import GOLDEN_FILE, verify_golden, write_golden
from reasonembed.errors import ModelError
from tests.embedder.tiny import encoder_config


@pytest.fixture
def golden(checkpoint, tmp_path):
    embedder = Embedder.load(encoder_config(checkpoint), device="cpu")
    write_golden(embedder, ["a set", "why {x}"], instruction="find", directory=tmp_path)
    return embedder, tmp_path


def test_what_was_written_is_verified(golden):
    embedder, folder = golden
    verify_golden(embedder, folder)
    roles = [row["role"] for row in json.loads((folder / GOLDEN_FILE).read_text())]
    assert roles == ["query", "query", "document", "document"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("token_ids", [1, 2], "token ids"),
        ("vector", [1.0] + [0.0] * 31, "cosine"),
        ("vector", [float("nan")] * 32, "cosine"),
    ],
)
def test_a_difference_is_an_error(golden, key, value, message):
    embedder, folder = golden
    rows = json.loads((folder / GOLDEN_FILE).read_text())
    rows[-1][key] = value
    (folder / GOLDEN_FILE).write_text(json.dumps(rows))
    with pytest.raises(ModelError, match=message):
        verify_golden(embedder, folder)


def test_a_missing_file_is_an_error(golden, tmp_path_factory):
    with pytest.raises(ModelError, match="export the model again"):
        verify_golden(golden[0], tmp_path_factory.mktemp("empty"))
