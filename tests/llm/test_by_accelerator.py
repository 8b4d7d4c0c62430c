"""One pool on several kinds of GPU: what the configuration says of each, and what vLLM is told."""

import pytest

from reasonembed.config import EngineRuntime, LLMConfig, RuntimeConfig
from reasonembed.errors import ConfigError
from reasonembed.llm.protocol import WithEngine
from reasonembed.llm.vllm import _context, _fewer_bits, _gpu_memory

ENGINE = EngineRuntime.model_validate(
    {
        "max_num_seqs": 256,
        "kv_cache_dtype": "fp8",
        "by_accelerator": {
            "H100": {"quantization": "fp8", "max_num_seqs": 1_024},
            "A10G": {"max_model_len": 8_192, "kv_cache_dtype": "auto", "kv_cache_gib": 6},
        },
    }
)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (None, {}),
        ("L4", {}),
        ("H100", {"quantization": "fp8", "max_num_seqs": 1_024}),
        ("A10G", {"max_model_len": 8_192, "kv_cache_dtype": "auto", "kv_cache_gib": 6}),
    ],
)
def test_what_is_not_given_stays(kind, changes):
    usual = ENGINE.model_dump() | {"by_accelerator": {}}
    assert ENGINE.on_accelerator(kind).model_dump() == usual | changes


def test_a_stage_takes_the_engine_of_its_node():
    make = WithEngine(LLMConfig(model="m"), ENGINE, None, lambda engine: engine)
    assert make.on_accelerator("H100").runtime.max_num_seqs == 1_024
    assert make.on_accelerator("H100").key != make.on_accelerator("A10G").key
    assert make.runtime is ENGINE


def test_what_vllm_is_told():
    config = LLMConfig(model="m", max_model_len=16_384)
    small = ENGINE.on_accelerator("A10G")
    assert _context(config, small) == 8_192
    assert _context(config, ENGINE) == 16_384
    assert _fewer_bits(small, on_gpu=True) == {}
    fewer = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    assert _fewer_bits(ENGINE.on_accelerator("H100"), on_gpu=True) == fewer
    assert _gpu_memory(small)["kv_cache_memory_bytes"] == 6 * 1024**3
    assert "kv_cache_memory_bytes" not in _gpu_memory(ENGINE)


def test_eight_bits_are_for_gpus():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: fp8 is for GPUs"):
        _fewer_bits(ENGINE, on_gpu=False)


POOLS = ("filter", "generate", "annotate", "rewrite", "distill")


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ({"train": {"market": "spot-first"}}, "no second choice"),
        ({"train": {"market": "preemptible"}}, "market"),
        ({"generate": {"accelerators": ["H100!"]}}, "accelerators"),
        ({"engine": {"by_accelerator": {"": {}}}}, "by_accelerator"),
        (
            {"engine": {"tensor_parallel_size": 4}, "annotate": {"num_gpus": 1}},
            r"annotate.num_gpus 1 < engine.tensor_parallel_size 4",
        ),
        (
            {
                **{name: {"accelerators": ["H100", "A100"]} for name in POOLS},
                "engine": {"by_accelerator": {"H1OO": {}}},
            },
            r"names 'H1OO', which no pool takes; pools take: A100, H100",
        ),
    ],
)
def test_pools_that_cannot_be_are_refused(runtime, said):
    with pytest.raises(ValueError, match=said):
        RuntimeConfig.model_validate(runtime)


def test_an_engine_of_four_gpus_may_have_an_actor_of_four():
    RuntimeConfig.model_validate(
        {"engine": {"tensor_parallel_size": 4}, "annotate": {"num_gpus": 4}}
    )
