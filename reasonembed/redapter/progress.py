"""What training carries from step to step besides weights and optimizer; part of a checkpoint.

All workers compute it from the same global batch, so that it is equal on all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from reasonembed.errors import ModelError

_LOG = logging.getLogger(__name__)
_CAP_STEPS = 50  # steps that the running κ looks back to
_PAPER_CAP = 5.0
_LEAST_RATIO = 1e-6


@dataclass
class Progress:
    """The running κ, and the steps that were skipped.

    Attributes:
        log_cap: Logarithm of κ, a running mean over steps of the batch's quantile; ratios reach
            from 0 to 1/ε, so they are averaged as logarithms.
        cap_steps: Steps that it was taken from.
        skipped: Steps that were skipped because loss or gradient was not finite.
        skipped_in_a_row: Of these, the last ones without a good step in between.
    """

    log_cap: float = 0.0
    cap_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    _skipped_ids: list[str] = field(default_factory=list, repr=False)

    @property
    def cap(self) -> float:
        """κ for the next step: of the steps before it; the paper's 5 before the first."""
        return math.exp(self.log_cap) if self.cap_steps else _PAPER_CAP

    def observe(self, ratio_B: torch.Tensor, *, quantile: float) -> None:
        """Moves κ towards the batch's quantile of l / (l′ + ε).

        κ_t = exp(mean over past steps of log quantile): the plain mean over the first 50 steps,
        after that an exponential one of the same length.

        Args:
            ratio_B: Of the global batch, finite.
            quantile: Share of samples that are to stay below κ.
        """
        ratio_B = ratio_B.double().clamp(min=_LEAST_RATIO)
        value = math.log(float(torch.quantile(ratio_B, quantile)))
        self.cap_steps += 1
        self.log_cap += (value - self.log_cap) / min(self.cap_steps, _CAP_STEPS)

    def count_step(
        self,
        step: int,
        *,
        loss: float,
        norm: float,
        query_ids: Sequence[str],
        max_skipped_steps: int,
        cure: str,
    ) -> bool:
        """Counts a step; whether it was taken.

        Args:
            step: Its number.
            loss: Of the global batch.
            norm: Of the global gradient.
            query_ids: Of the global batch.
            max_skipped_steps: How many may be skipped in a row.
            cure: What may help, for the message.

        Raises:
            ModelError: One more step than that was skipped in a row; names the batches' queries.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            self._skipped_ids.clear()
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._skipped_ids += [one for one in query_ids if one not in self._skipped_ids]
        said = f"step {step}: loss {loss}, gradient norm {norm}"
        if self.skipped_in_a_row > max_skipped_steps:
            raise ModelError(
                f"{said}; {self.skipped_in_a_row} such steps in a row, at most {max_skipped_steps} "
                f"may be skipped; {cure}; queries of these batches: {', '.join(self._skipped_ids)}"
            )
        _LOG.warning("%s; the step is skipped, queries: %s", said, ", ".join(query_ids))
        return False

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes up what `state_dict` gave; counts are counts again."""
        self.log_cap = float(state["log_cap"])
        self.cap_steps = int(state["cap_steps"])
        self.skipped = int(state["skipped"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
