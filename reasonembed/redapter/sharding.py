"""Where a model lies while it is trained: whole on every worker, or cut over all of them (FSDP2).

Knows torch.distributed; neither losses nor batches nor checkpoints.

Scale: every worker holds its share of the one global loss's gradient (see `step`), so shares are
SUMMED, which FSDP2 must be told: by itself it averages, and on gloo it has no division at all.
Sharded or not, the gradient that the optimizer sees is ∇L for any number of workers.

Precision: sums over workers, optimizer and what is learnt are float32; matrix products run in the
type of the tokenisation contract.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from reasonembed.config import LoRAConfig, TrainRuntime
from reasonembed.errors import ConfigError, ModelError
from reasonembed.redapter.step import Reduction, SumAtEnd
from reasonembed.redapter.workers import is_distributed

_LIGER = {"rope": True, "rms_norm": True, "swiglu": True}
# Heads and their losses are replaced by default; a backbone has none.
_NO_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@dataclass(frozen=True)
class Placed:
    """A model in its place, ready to be trained.

    Attributes:
        model: The transformers model, wrapped by peft if adapters are learnt.
        learnt: Parameters that are trained, by name; DTensors if the model is sharded.
        reduction: Adds up the workers' gradients.
        autocast_dtype: In which an unsharded model multiplies; None: in that of its weights.
    """

    model: Any
    learnt: dict[str, torch.nn.Parameter]
    reduction: Reduction
    autocast_dtype: torch.dtype | None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return list(self.learnt.values())

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(iter(self.learnt.values())).device

    def precision(self) -> AbstractContextManager[Any]:
        """To be entered around every forward, for each anew.

        Anew, for weights that are cast inside are kept until it is left, those of a forward
        without gradient, too.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)


def weights_dtype(lora: LoRAConfig | None, *, dtype: str) -> str:
    """Type in which weights are loaded for training.

    In 16 bits an update of all weights would mostly be rounded away; adapters have 32 bits of
    their own beside frozen weights.

    Args:
        lora: None trains all weights.
        dtype: Of the forward pass.
    """
    return "float32" if lora is None else dtype


def place(
    model: Any,
    *,
    lora: LoRAConfig | None,
    task_type: str,
    name: str,
    dtype: str,
    runtime: TrainRuntime,
) -> Placed:
    """Adapts a model, prepares its layers as the runtime asks, and moves it to its device.

    The optimizer must be made afterwards: sharding replaces the parameters.

    Args:
        model: On the CPU, in `weights_dtype`, the same on every worker.
        lora: Adapters; None trains all weights.
        task_type: One of peft's `TaskType`.
        name: Of the model, for messages.
        dtype: Of the forward pass.
        runtime: Device, sharding, kernels, activation checkpointing, compilation.

    Raises:
        ModelError: The model has no projections to adapt, or no layers to prepare.
        ConfigError: Something that the runtime asks for is not there.
    """
    if runtime.kernels == "liger":
        _use_liger(model, name=name)
    if lora is not None:
        model = with_adapter(model, lora, task_type=task_type, name=name)
    if runtime.activation_checkpointing:
        _checkpoint_activations(model, name=name)
    if runtime.compile:
        _compile(model, use_gpu=runtime.use_gpu, name=name)
    computed = getattr(torch, dtype)
    if runtime.sharding == "fsdp":
        _shard(model, dtype=computed, use_gpu=runtime.use_gpu, name=name)
    else:
        model = model.to("cuda" if runtime.use_gpu else "cpu")
    model.train()
    is_sharded = runtime.sharding == "fsdp"
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Placed(
        model,
        learnt,
        reduction=SumByShards(model) if is_sharded else SumAtEnd(),
        autocast_dtype=None if is_sharded or computed is torch.float32 else computed,
    )


def with_adapter(model: Any, lora: LoRAConfig, *, task_type: str, name: str) -> Any:
    """The model with low-rank adapters on every projection; the rest is frozen."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets, outside = _projections(model, name=name)
    adapters = LoraConfig(
        task_type=TaskType(task_type),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=outside or None,
    )
    return get_peft_model(model, adapters)


def _projections(model: Any, *, name: str) -> tuple[list[str], list[str]]:
    """Names of the layers' projections, and modules of such a name that are in no layer.

    Of Qwen3 and Llama these are q, k, v, o, gate, up and down; of BERT query, key, value and
    dense, but not the dense one of its pooler.
    """
    blocks = _layers(model, name=name)
    inside = {id(module) for block in blocks for module in block.modules()}
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = {path.rpartition(".")[2] for path, module in found if id(module) in inside}
    if not targets:
        raise ModelError(f"{name} cannot be adapted: its layers have no linear projections")
    outside = [path for path, module in found if id(module) not in inside]
    return sorted(targets), [path for path in outside if path.rpartition(".")[2] in targets]


# ---- layers -----------------------------------------------------------------------------------


def _layers(model: Any, *, name: str) -> list[torch.nn.Module]:
    """The blocks that a transformer repeats, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    if not found:  # older families, such as MPNet, do not mark them
        stacks = (part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
        found = [block for stack in stacks for block in stack]
    if not found:
        raise ModelError(
            f"{name} has no stack of layers, so it can be neither adapted nor sharded nor "
            "compiled; choose another backbone, or train all its weights unsharded"
        )
    return found


def _checkpoint_activations(model: Any, *, name: str) -> None:
    try:
        # The generator's state is kept for each layer, so dropout falls as in the first pass.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"runtime.train.activation_checkpointing: {name}: {error}") from error


def _compile(model: Any, *, use_gpu: bool, name: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    if use_gpu and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "runtime.train.compile needs the package triton on GPUs; install it or choose false"
        )
    if not use_gpu and shutil.which(compiler) is None:
        raise ConfigError(
            f"runtime.train.compile needs a C++ compiler on CPUs, and there is no {compiler}; "
            "install g++, name another in CXX, or choose false"
        )
    for layer in _layers(model, name=name):
        layer.compile(dynamic=True)  # every batch has other lengths; in place, so names stay


def _use_liger(model: Any, *, name: str) -> None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ConfigError(
            "runtime.train.kernels: liger needs the package liger-kernel (pip install "
            f"liger-kernel), or choose none: {error}"
        ) from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"runtime.train.kernels: liger has none for {name} ({kind}); choose none")
    _apply_liger_kernel_to_instance(model=model, **_LIGER, **_NO_LIGER)


# ---- sharding ---------------------------------------------------------------------------------


def _shard(model: Any, *, dtype: torch.dtype, use_gpu: bool, name: str) -> None:
    if not is_distributed():
        raise ConfigError(
            "runtime.train.sharding: fsdp needs a process group, and none is initialised; train "
            "on Ray, under torchrun, or choose none"
        )
    mesh = init_device_mesh(
        "cuda" if use_gpu else "cpu", (dist.get_world_size(),), mesh_dim_names=("workers",)
    )
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for block in [*_layers(model, name=name), model]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        # The factor alone would become a PREMUL_SUM, which gloo does not have.
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)


class SumByShards:
    """FSDP2's reduce-scatter sums the gradients, in the last backward pass of a step alone.

    Until then each worker keeps its whole share in float32: the price of one reduction a step.

    Args:
        model: Its root is sharded.
    """

    needs_equal_passes = True

    def __init__(self, model: FSDPModule) -> None:
        self._model = model

    def before_backward(self, *, is_last: bool) -> None:
        """Holds the reduction back until the last pass."""
        self._model.set_requires_gradient_sync(is_last)

    def finish(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Nothing is left to do."""
