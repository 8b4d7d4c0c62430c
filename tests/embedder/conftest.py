import pytest

from tests.embedder.tiny import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))
