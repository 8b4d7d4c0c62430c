import pytest

from reasonembed.config import ServeConfig
from reasonembed.serving.backend import OpenModel, open_model


@pytest.fixture
def echo_config() -> ServeConfig:
    return ServeConfig.model_validate(
        {"model": "echo", "echo": {"dimension": 32, "max_tokens": 64}}
    )


@pytest.fixture
def echo_model(echo_config: ServeConfig) -> OpenModel:
    return open_model(echo_config)
