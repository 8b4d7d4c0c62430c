"""What training carries from step to step besides weights and optimizer; part of a checkpoint.

All workers compute it from the same global batch, so that it is equal on all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from reasonembed.errors import ModelError

_LOG = logging.getLogger(__name__)
_CAP_STEPS = 50  # steps that the running κ looks back to
_PAPER_CAP = 5.0
_LEAST_RATIO = 1e-6
_NAMED = 1000  # queries of skipped steps that are named, the latest ones


@dataclass
class Progress:
    """The running κ, and the steps that were skipped.

    Attributes:
        log_cap: Logarithm of κ, a running mean over steps of the batch's quantile; ratios reach
            from 0 to 1/ε, so they are averaged as logarithms.
        cap_steps: Steps that it was taken from.
        skipped_in_a_row: Steps that were skipped since the last good one, because loss or gradient
            was not finite.
        skipped_ids: Queries of their batches.
    """

    log_cap: float = 0.0
    cap_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_ids: list[str] = field(default_factory=list, repr=False)

    @property
    def cap(self) -> float:
        """κ for the next step: of the steps before it; the paper's 5 before the first."""
        return math.exp(self.log_cap) if self.cap_steps else _PAPER_CAP

    def observe(self, ratio_B: torch.Tensor, *, quantile: float) -> None:
        """Moves κ towards the batch's quantile of l / (l′ + ε).

        κ_t = exp(mean over past steps of log quantile): the plain mean over the first 50 steps,
        after that an exponential one of the same length.

        Args:
            ratio_B: Of the global batch; those that are not finite do not count, and if none is,
                κ stays.
            quantile: Share of samples that are to stay below κ.
        """
        ratio_B = ratio_B[ratio_B.isfinite()].double().clamp(min=_LEAST_RATIO)
        if not len(ratio_B):
            return
        value = math.log(float(torch.quantile(ratio_B, quantile)))
        self.cap_steps += 1
        self.log_cap += (value - self.log_cap) / min(self.cap_steps, _CAP_STEPS)

    def count_step(
        self,
        step: int,
        *,
        loss: float,
        norm: float,
        is_finite: bool,
        query_ids: Sequence[str],
        max_skipped_steps: int,
        cure: str,
    ) -> bool:
        """Counts a step; whether it was taken.

        Args:
            step: Its number.
            loss: Of the global batch.
            norm: Of the global gradient.
            is_finite: Whether both are, on every worker.
            query_ids: Of the global batch.
            max_skipped_steps: How many may be skipped in a row.
            cure: What may help, for the message.

        Raises:
            ModelError: One more step than that was skipped in a row; names the batches' queries.
        """
        if is_finite:
            self.skipped_in_a_row = 0
            self.skipped_ids.clear()
            return True
        self.skipped_in_a_row += 1
        self.skipped_ids = list(dict.fromkeys([*self.skipped_ids, *query_ids]))[-_NAMED:]
        said = f"step {step}: loss {loss}, gradient norm {norm}"
        if self.skipped_in_a_row > max_skipped_steps:
            raise ModelError(
                f"{said}; {self.skipped_in_a_row} such steps in a row, at most {max_skipped_steps} "
                f"may be skipped; {cure}; queries of these batches: {', '.join(self.skipped_ids)}"
            )
        _LOG.warning("%s; the step is skipped, queries: %s", said, ", ".join(query_ids))
        return False

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; counts are counts again."""
        self.log_cap = float(state["log_cap"])
        self.cap_steps = int(state["cap_steps"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self.skipped_ids = list(state["skipped_ids"])
