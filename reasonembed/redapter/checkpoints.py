"""Checkpoints that any number of workers can go on from, and the weights that remain at the end.

Writes `checkpoint-<step>` (torch.distributed.checkpoint): each worker's pieces of what is learnt
and of the optimizer, and `trainer.json`. Sharded or not, by one worker or by many: the names and
shapes in it are the same. The folder appears under its name when it is whole, or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from reasonembed.embedder.contract import load_tokenizer
from reasonembed.errors import DriftError, ModelError
from reasonembed.models import quiet_transformers
from reasonembed.redapter.sharding import Placed
from reasonembed.redapter.workers import is_distributed

_TRAINER = "trainer.json"
_LEARNT, _OPTIMIZER = "learnt", "optimizer"
_FOLDER = re.compile(r"(\.?)checkpoint-(\d+)")  # with a dot while it is written

# Told of every save and load of a single process; there it is what is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


class Remembers(Protocol):
    """What a run remembers besides weights and optimizer; equal on all workers."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its values, as JSON has them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


class Saved:
    """A checkpoint that is written, or will be.

    Attributes:
        path: Where it lies when it is whole.
    """

    def __init__(self, path: Path, writing: Future[None]) -> None:
        self.path = path
        self._writing = writing

    def wait(self) -> Path:
        """Returns when this worker's part is done; on rank 0, when the checkpoint is whole.

        Raises what went wrong in writing it.
        """
        self._writing.result()
        return self.path


class Checkpoints:
    """Writes and reads the checkpoints of a run; made by all workers alike.

    Args:
        output_dir: Seen by all workers, unless it is not shared.
        placed: What is trained.
        optimizer: Of `placed.parameters`.
        identity: What the run is made of, the number of workers left out.
        memory: What else is remembered.
        is_shared: Whether all workers write to one folder. If not, each one's `output_dir` gets its
            own pieces, and a checkpoint is whole where all of them are put together.
    """

    def __init__(
        self,
        output_dir: Path,
        placed: Placed,
        optimizer: torch.optim.Optimizer,
        *,
        identity: str,
        memory: Remembers | None = None,
        is_shared: bool = True,
    ) -> None:
        self._leads = _rank() == 0 or not is_shared  # in its folder
        self._output_dir = output_dir
        self._placed = placed
        self._optimizer = optimizer
        self._identity = identity
        self._memory = memory
        self._last: Saved | None = None
        self._committer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Of its own: what is said about a checkpoint must not mix with what is said about a step;
        # and gloo, for a GPU's group cannot talk about what lies in main memory.
        self._group = dist.new_group(backend="gloo") if is_distributed() else None

    def save(self, step: int) -> Saved:
        """Copies the state and begins to write it as `checkpoint-<step>`; called by all workers.

        The one before is waited for, so that at most one copy is held.
        """
        self.wait()
        target = self._output_dir / f"checkpoint-{step}"
        scratch = self._output_dir / f".checkpoint-{step}"
        if self._leads:
            shutil.rmtree(scratch, ignore_errors=True)  # of a worker that was killed in writing
            scratch.mkdir(parents=True)
        if _rank() == 0:
            (scratch / _TRAINER).write_text(json.dumps(self._about(step), indent=1))
        if self._group is not None:
            dist.barrier(self._group)
        writing = async_save(
            self._state(), checkpoint_id=scratch, process_group=self._group, no_dist=not self._group
        )
        assert isinstance(writing, Future), "an answer of staging in the background"
        final = target if self._leads else None
        self._last = Saved(target, self._committer.submit(_commit, writing, scratch, final))
        return self._last

    def forget_after(self, step: int) -> None:
        """Removes what a run that was killed left beyond `step`, whole or not; by all workers.

        Nobody goes on from there any more, and nobody else would remove it.
        """
        if self._leads and self._output_dir.is_dir():
            for path in self._output_dir.iterdir():
                found = _FOLDER.fullmatch(path.name)
                if found and (found[1] or int(found[2]) > step):
                    shutil.rmtree(path)
        if self._group is not None:
            dist.barrier(self._group)

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong."""
        if self._last is not None:
            self._last.wait()

    def load(self, checkpoint: Path, *, learnt_from: str) -> int:
        """Restores weights, optimizer and memory; called by all workers.

        Args:
            checkpoint: Of `save`, by any number of workers.
            learnt_from: What the run learns from, for the message.

        Returns:
            Steps that the checkpoint has seen.

        Raises:
            DriftError: It is of another identity.
            ModelError: It is no checkpoint.
        """
        about = _read_about(checkpoint)
        if about["identity"] != self._identity:
            raise DriftError(
                f"{checkpoint} was trained with other settings or {learnt_from} "
                f"({about['identity']}, now {self._identity}); train into a new folder"
            )
        state = self._state()
        load(
            state,
            checkpoint_id=checkpoint,
            process_group=self._group,
            no_dist=self._group is None,
        )
        _put_learnt(self._placed.model, state[_LEARNT])
        set_optimizer_state_dict(
            self._placed.model, self._optimizer, state[_OPTIMIZER], options=_trained()
        )
        if self._memory is not None:
            self._memory.load_state_dict(about["memory"])
        return int(about["step"])

    def _state(self) -> dict[str, Any]:
        _complete(self._optimizer)
        model = self._placed.model
        return {
            _LEARNT: _learnt(self._placed),
            _OPTIMIZER: get_optimizer_state_dict(model, self._optimizer, options=_trained()),
        }

    def _about(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "identity": self._identity,
            "memory": dict(self._memory.state_dict()) if self._memory is not None else {},
        }


def load_learnt(checkpoint: Path, placed: Placed) -> None:
    """Restores the weights alone, in a process that is on its own.

    Raises:
        ModelError: It is no checkpoint, or one of other parameters.
    """
    _read_about(checkpoint)
    state = {_LEARNT: _learnt(placed)}
    try:
        load(state, checkpoint_id=checkpoint, no_dist=True)
    except (RuntimeError, ValueError, CheckpointException) as error:
        raise ModelError(f"{checkpoint} holds other parameters than are trained") from error
    _put_learnt(placed.model, state[_LEARNT])


def write_weights(placed: Placed, target: Path, *, weights: Path, dtype: str) -> None:
    """Writes what was learnt in a form that others read; called by all workers, rank 0 writes.

    Adapters become a folder of peft (`adapter_config.json` tells), whole weights a folder of
    transformers with config, safetensors and tokenizer.

    Args:
        placed: Trained.
        target: Made anew; replaced if it exists.
        weights: Checkpoint that the training began with.
        dtype: Of whole weights; adapters stay float32.
    """
    whole = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=_is_adapted(placed.model)
    )
    state = get_model_state_dict(placed.model, options=whole)
    if _rank() == 0:
        with _replacing(target) as scratch, quiet_transformers():
            if _is_adapted(placed.model):
                # Embeddings are frozen; without the flag peft asks the hub whether they changed.
                placed.model.save_pretrained(scratch, state_dict=state, save_embedding_layers=False)
            else:
                _plain(placed.model, state, dtype=dtype).save_pretrained(scratch)
                load_tokenizer(weights).save_pretrained(scratch)
    if is_distributed():
        dist.barrier()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def _plain(model: Any, state: Mapping[str, Any], *, dtype: str) -> Any:
    """A model of the same class without shards, float32 masters cast to `dtype`."""
    from transformers import AutoModel

    kind = getattr(torch, dtype)
    with torch.device("meta"):
        plain = AutoModel.from_config(model.config, dtype=kind)
    plain.load_state_dict({name: part.to(kind) for name, part in state.items()}, assign=True)
    return plain


def _trained() -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True, strict=False)


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Gives parameters without a gradient so far the state that AdamW begins with.

    Outside the forward pass, as BERT's pooler, they never have one. Without it a checkpoint would
    lack them, and what is loaded must be the same whichever parameters have had gradients.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _learnt(placed: Placed) -> dict[str, Any]:
    """What is trained, by name; a weight that serves two layers stands there once."""
    state = get_model_state_dict(placed.model, options=_trained())
    return {name: part for name, part in state.items() if name in placed.learnt}


def _put_learnt(model: Any, learnt: dict[str, Any]) -> None:
    set_model_state_dict(model, learnt, options=_trained())


def _read_about(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / _TRAINER
    if not file.is_file():
        raise ModelError(f"{checkpoint} is no checkpoint: {_TRAINER} is missing")
    about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return about


def _commit(writing: Future[Any], scratch: Path, target: Path | None) -> None:
    """Waits until all workers have written, then gives the folder its name, if it is its turn."""
    writing.result()
    if target is not None:
        if target.exists():  # of a run that was resumed from an earlier step, or of another run
            shutil.rmtree(target)
        scratch.rename(target)


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _rank() -> int:
    return dist.get_rank() if is_distributed() else 0
