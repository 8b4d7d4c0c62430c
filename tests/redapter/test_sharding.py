"""FSDP2 on gloo against one process, and checkpoints across numbers of workers."""

import itertools
import multiprocessing
import sys
import types

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from reasonembed.config import TrainRuntime
from reasonembed.embedder.contract import resolve_contract
from reasonembed.embedder.encode import Embedder, load_backbone
from reasonembed.errors import ConfigError, DriftError, ModelError
from reasonembed.redapter import loop, sharding, step
from tests.redapter import shard_worker
from tests.redapter.samples import samples
from tests.redapter.saved import state_of

# Sums over shards and chunks run in another order: about 1e-6 of the largest entry in float32,
# and some steps of Adam, which divides by roots of small squares, let that grow.
RELATIVE = 1e-4
# In bfloat16 the sharded model casts whole layers, the unsharded one single products: 2^-8 each.
HALF = 5e-2
LOOKED_AT = ("loss", "query_loss", "rewritten_loss", "grad_norm", "effective_batch_size")


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """An uninterrupted run of one process: its folder and its steps."""
    folder = tmp_path_factory.mktemp("alone")
    result, rows = shard_worker.train(checkpoint, folder)
    return folder, result, rows


@pytest.fixture(scope="module")
def pooled(bert, tmp_path_factory):
    """An uninterrupted run of one process on all weights of a model with a pooler."""
    folder = tmp_path_factory.mktemp("pooled")
    _, rows = shard_worker.train(bert, folder, changes=shard_worker.ALL)
    return folder, rows


@pytest.fixture(scope="module")
def groups(checkpoint, bert, alone, pooled, tmp_path_factory):
    """What 2 and 4 processes found, by number and rank, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("groups")
    resume_from = alone[0] / "checkpoint-2"
    # What the processes need is imported once, in the server that they are forked from.
    multiprocessing.set_forkserver_preload([shard_worker.__name__])
    for count in (2, 4):
        torch.multiprocessing.start_processes(
            shard_worker.run,
            args=(count, checkpoint, folder, resume_from, bert, pooled[0] / "checkpoint-2"),
            nprocs=count,
            start_method="forkserver",
        )
    found = {
        (count, rank): torch.load(folder / f"{count}-{rank}.pt", weights_only=True)
        for count in (2, 4)
        for rank in range(count)
    }
    return folder, found


def assert_like(found, expected, *, relative):
    for one, other in zip(found["metrics"], expected["metrics"], strict=True):
        for name in LOOKED_AT:
            assert one[name] == pytest.approx(other[name], rel=relative), name
    for kind in ("gradients", "weights"):
        assert found[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            limit = relative * max(tensor.abs().max().item(), 1e-3)
            assert (found[kind][name] - tensor).abs().max() <= limit, (kind, name)


@pytest.mark.parametrize("case", [name for name in shard_worker.CASES if name != "bfloat16"])
def test_any_number_of_shards_gives_the_gradient_of_one_process(checkpoint, groups, case):
    expected = shard_worker.steps(checkpoint, shard_worker.CASES[case])
    assert max(g.abs().max() for g in expected["gradients"].values()) > 1e-3
    for (count, _), found in groups[1].items():
        if case in shard_worker.cases(count):
            assert_like(found[case], expected, relative=RELATIVE)


def test_shards_multiply_in_bfloat16_and_learn_in_float32(checkpoint, groups):
    half = shard_worker.CASES["bfloat16"]
    expected = shard_worker.steps(checkpoint, half)["metrics"]
    exact = shard_worker.steps(checkpoint, half | {"dtype": "float32"})["metrics"]
    for rank in range(2):
        found = groups[1][2, rank]["bfloat16"]
        for one, other, precise in zip(found["metrics"], expected, exact, strict=True):
            assert one["query_loss"] == pytest.approx(other["query_loss"], rel=HALF)
            assert one["query_loss"] != precise["query_loss"]
        assert {w.dtype for w in found["weights"].values()} == {torch.float32}


def test_what_is_false_on_one_worker_is_false_on_all(groups):
    assert [found["agreed"] for found in groups[1].values()] == [[False, True]] * 6


def assert_same_run(found, expected):
    assert [row["ids"] for row in found] == [row["ids"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in (*LOOKED_AT, "step", "learning_rate"):
            assert one[name] == pytest.approx(other[name], rel=RELATIVE), (one["step"], name)


@pytest.mark.parametrize("count", [2, 4])
def test_more_workers_go_on_where_one_stopped(groups, alone, count):
    assert_same_run(groups[1][count, 0]["resumed"], alone[2][2:])


@pytest.mark.parametrize("count", [2, 4])
def test_one_worker_goes_on_where_more_stopped(checkpoint, tmp_path, groups, alone, count):
    saved = groups[0] / f"resumed-by-{count}" / "checkpoint-4"
    assert len(list(saved.glob("*.distcp"))) == count
    result, rows = shard_worker.train(checkpoint, tmp_path, resume_from=saved)
    assert_same_run(rows, alone[2][4:])
    name = "adapter_model.safetensors"
    learnt, expected = load_file(result.weights_dir / name), load_file(alone[1].weights_dir / name)
    assert learnt.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(learnt[key], tensor, rtol=1e-2, atol=RELATIVE)


def test_weights_outside_the_forward_pass_are_in_checkpoints_of_any_number_of_workers(
    bert, tmp_path, groups, pooled
):
    assert_same_run(groups[1][2, 0]["pooled"], pooled[1][2:])
    saved = groups[0] / "pooled-by-2" / "checkpoint-4"
    _, rows = shard_worker.train(bert, tmp_path, resume_from=saved, changes=shard_worker.ALL)
    assert_same_run(rows, pooled[1][4:])
    of_one, of_two = (state_of(f / "checkpoint-6") for f in (pooled[0], saved.parent))
    names = [set(dict(_leaves(state["optimizer"]["state"]))) for state in (of_one, of_two)]
    assert names[0] == names[1]
    assert any("pooler" in "".join(path) for path in names[0])


def test_shards_write_the_same_names_and_shapes_as_one_process(groups, alone):
    of_one, of_two = (
        state_of(folder / "checkpoint-6") for folder in (alone[0], groups[0] / "resumed-by-2")
    )
    for kind in ("learnt", "optimizer"):
        one, two = (dict(_leaves(state[kind])) for state in (of_one, of_two))
        assert one.keys() == two.keys() and len(one) > 10
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.shape == two[name].shape and value.dtype == two[name].dtype, name


def _leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list):
        yield from _leaves(dict(enumerate(value)), path)
    else:
        yield path, value


def test_a_kill_while_saving_leaves_the_checkpoint_before(checkpoint, tmp_path, alone):
    process = multiprocessing.get_context("forkserver").Process(
        target=shard_worker.die_while_saving, args=(checkpoint, str(tmp_path))
    )
    process.start()
    process.join(120)
    assert process.exitcode == -9

    def checkpoints():
        return sorted(path.name for path in tmp_path.glob("*checkpoint-*"))

    assert checkpoints() == [".checkpoint-4", "checkpoint-2"]  # the torn one has a dot
    _, rows = shard_worker.train(checkpoint, tmp_path, resume_from=tmp_path / "checkpoint-2")
    assert_same_run(rows, alone[2][2:])
    assert checkpoints() == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_what_a_checkpoint_must_fit(checkpoint, tmp_path, alone):
    saved = alone[0] / "checkpoint-2"
    with pytest.raises(ModelError, match=r"no checkpoint: trainer\.json is missing"):
        shard_worker.train(checkpoint, tmp_path, resume_from=alone[0])
    config, runtime = shard_worker.settings(checkpoint, shard_worker.RUN)
    for other, rows in (
        (config.model_copy(update={"temperature": 0.2}), samples()),
        (config, samples(count=7)),
        (config.model_copy(update={"lora": None}), samples()),
    ):
        with pytest.raises(DriftError, match="other settings or samples"):
            loop.train(
                other,
                rows,
                weights=checkpoint,
                runtime=runtime,
                output_dir=tmp_path,
                report=lambda *_: None,
                resume_from=saved,
            )


def test_a_machine_that_is_about_to_go_is_waited_for(checkpoint, tmp_path, alone):
    asked = itertools.count()
    _, rows = shard_worker.train(checkpoint, tmp_path, is_leaving=lambda: next(asked) == 2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (2, 3, 4, 6)
    ]
    assert next(asked) == 5  # once a step but the last
    _, rest = shard_worker.train(checkpoint, tmp_path, resume_from=tmp_path / "checkpoint-3")
    assert_same_run(rest, rows[3:])


# ---- all weights ------------------------------------------------------------------------------


def test_all_weights_become_a_plain_folder_that_loads_alone(checkpoint, tmp_path):
    config, runtime = shard_worker.settings(checkpoint, {"lora": None, "max_steps": 2})
    result = loop.train(
        config,
        samples(),
        weights=checkpoint,
        runtime=runtime,
        output_dir=tmp_path,
        report=lambda *_: None,
    )
    trained, before = (load_backbone(f, dtype="float32") for f in (result.weights_dir, checkpoint))
    assert type(trained.model) is type(before.model)
    moved = [
        not torch.equal(one, other)
        for one, other in zip(trained.model.parameters(), before.model.parameters(), strict=True)
    ]
    assert all(moved)
    saved = state_of(tmp_path / "checkpoint-2")["learnt"]
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(saved[name], parameter)
    vectors = Embedder(result.weights_dir, result.contract, device="cpu").encode_documents(["key"])
    assert vectors.shape == (1, resolve_contract(checkpoint, config.encoder).dimension)


# ---- what the runtime asks for ----------------------------------------------------------------


def test_activations_computed_again_draw_the_same_dropout(checkpoint):
    lora = shard_worker.LORA | {"dropout": 0.3}
    plain, again = (
        shard_worker.steps(checkpoint, {"lora": lora, "chunk_tokens": 40} | more)
        for more in ({}, {"activation_checkpointing": True})
    )
    assert_like(again, plain, relative=1e-6)


def test_sharding_needs_a_process_group(checkpoint):
    with pytest.raises(ConfigError, match="process group"):
        shard_worker.steps(checkpoint, {"lora": None}, sharding="fsdp")


def test_compilation_without_a_compiler_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = load_backbone(checkpoint, dtype="float32").model
    with pytest.raises(ConfigError, match="there is no no-such-compiler"):
        sharding._compile(model, use_gpu=False, name="tiny")


def test_kernels_that_are_not_installed_are_named(checkpoint):
    model = load_backbone(checkpoint, dtype="float32").model
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        sharding._use_liger(model, name="tiny")
    with pytest.raises(ValueError, match="needs use_gpu"):
        TrainRuntime(kernels="liger")


def test_kernels_replace_layers_but_no_head(checkpoint, monkeypatch):
    model = load_backbone(checkpoint, dtype="float32").model
    asked = {}
    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = lambda **settings: asked.update(settings)
    table = types.ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {model.config.model_type: None}
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", table)
    sharding._use_liger(model, name="tiny")
    assert asked.pop("model") is model
    assert {name for name, is_on in asked.items() if is_on} == {"rope", "rms_norm", "swiglu"}
    table.MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    with pytest.raises(ConfigError, match="liger has none for tiny"):
        sharding._use_liger(model, name="tiny")


@pytest.mark.slow
def test_compiled_layers_draw_the_same_dropout_with_and_without_a_graph(checkpoint):
    config, runtime = shard_worker.settings(
        checkpoint, {"lora": shard_worker.LORA | {"dropout": 0.5}, "compile": True}
    )
    state = loop._prepare(config, checkpoint, runtime)
    for name, parameter in state.placed.learnt.items():
        if "lora_B" in name:  # begins with 0, and dropout before it would change nothing
            torch.nn.init.normal_(parameter)
    texts = [tuple(range(5, 9 + i)) for i in range(7)]

    def passes(seed):
        return step._Passes(state.encode, texts, [[4, 5, 6], [0, 1, 2, 3]], seed=seed)

    found = passes(7)
    first = found.first()[:4]
    assert torch.equal(first, found._forward(1))
    assert (first - passes(8).first()[:4]).abs().max() > 1e-2


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradient(checkpoint):
    plain = shard_worker.steps(checkpoint, {"lora": None, "chunk_tokens": 40})
    compiled = shard_worker.steps(checkpoint, {"lora": None, "chunk_tokens": 40, "compile": True})
    assert_like(compiled, plain, relative=RELATIVE)
