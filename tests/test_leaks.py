import pytest

from reasonembed.config import load
from reasonembed.errors import ConfigError
from reasonembed.leaks import check_no_secrets

SECRETS = [
    "sk-" + "a1B2" * 8,
    "hf_" + "a" * 34,
    "AKIA" + "ABCDEFGH12345678",
    "ghp_" + "x" * 36,
    "https://user:hunter2@host/v1",
    "abfs://container@host/run?client_id=a&client_secret=hunter2",
    "https://host/run?sv=2&sig=hunter2",
    "-----BEGIN RSA PRIVATE KEY-----",
    "Bearer " + "abcdef0123456789" * 2,
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_refused_by_its_place_and_never_shown(secret):
    data = {"runtime": {"engine": {"base_url": "x"}, "list": ["ok", {"deep": secret}]}}
    with pytest.raises(ConfigError, match=r"runtime\.list\.1\.deep") as refused:
        check_no_secrets(data, where="the configuration")
    assert secret not in str(refused.value)


def test_a_name_is_enough_where_names_count():
    check_no_secrets({"env_vars": {"HF_TOKEN": "x"}}, where="configuration")
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "password"):
        with pytest.raises(ConfigError, match=name):
            check_no_secrets({"env_vars": {name: "x"}}, where="environment", by_name=True)
    harmless = {"TOKENIZERS_PARALLELISM": "false", "RAY_AUTH_TOKEN_PATH": "/f", "HF_TOKEN": ""}
    check_no_secrets({"env_vars": harmless}, where="environment", by_name=True)


@pytest.mark.parametrize("file", ["quickstart", "bright-qwen3-8b", "msmarco-llama31-8b"])
def test_configurations_that_ship_hold_none(file):
    config = load(f"configs/{file}.yaml").model_dump(mode="json")
    check_no_secrets(config, where=file)
