import pytest

from tests.embedder.families import make_model
from tests.embedder.tiny import save_checkpoint, save_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """An encoder without dropout and with a pooler, which no vector comes from."""
    folder = tmp_path_factory.mktemp("bert")
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    make_model("bert", vocab_size=400, **no_dropout).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
