"""The filter of exact search on a GPU, or whatever device torch knows. Loaded only where one is."""

from __future__ import annotations

import weakref
from threading import Lock

import numpy as np
import torch

from reasonembed.index.exact import Pairs, Positions, Scores, Vectors

_PRODUCTS = 2**28  # held at a time: 1 GiB of float32, and once more to find the best of them


class TorchFilter:
    """An `exact.Filter` on one device.

    The documents stay there as long as the same array is searched. Products are float32 proper:
    TF32 would round further than the margin allows.

    Args:
        device: Such as `cuda`.
        products: Largest number of products held at a time.
    """

    def __init__(self, device: str, *, products: int = _PRODUCTS) -> None:
        self._device, self._products = torch.device(device), products
        self._lock = Lock()  # blocks come from several threads, memory is planned for one
        # Weakly, so that whoever holds the array can free it before reading the next one.
        self._held: weakref.ref[Vectors] | None = None
        self._documents_ND = torch.empty(0)

    @torch.inference_mode()
    def __call__(
        self,
        queries_QD: Vectors,
        documents_ND: Vectors,
        *,
        k: int,
        margin_Q: Scores,
        excluded: tuple[Positions, Positions],
    ) -> Pairs:
        """See `exact.Filter`."""
        with self._lock:
            self._load(documents_ND)
            torch.set_float32_matmul_precision("highest")
            queries = torch.tensor(queries_QD, device=self._device)
            margin = torch.tensor(margin_Q, device=self._device)
            return self._filter(queries, margin, k=k, excluded=excluded)

    def _load(self, documents_ND: Vectors) -> None:
        if self._held is None or documents_ND is not self._held():
            self._documents_ND = torch.empty(0)  # freed before the next ones come
            self._documents_ND = torch.tensor(documents_ND, device=self._device)
            self._held = weakref.ref(documents_ND)

    def _filter(
        self,
        queries_QD: torch.Tensor,
        margin_Q: torch.Tensor,
        *,
        k: int,
        excluded: tuple[Positions, Positions],
    ) -> Pairs:
        rows, positions = excluded
        step = max(1, self._products // len(queries_QD))
        best_QK = torch.full((len(queries_QD), k), -torch.inf, device=self._device)
        lowest = torch.finfo(torch.float32).min  # -inf is excluded and would pass a floor of -inf
        found = []
        for start in range(0, len(self._documents_ND), step):
            products_QB = queries_QD @ self._documents_ND[start : start + step].T
            low, high = np.searchsorted(positions, [start, start + step])
            barred = (torch.tensor(rows[low:high]), torch.tensor(positions[low:high] - start))
            products_QB[tuple(one.to(self._device) for one in barred)] = -torch.inf
            best_QK = torch.cat([best_QK, products_QB], dim=1).topk(k, dim=1).values
            floor_Q = (best_QK[:, -1] - margin_Q).clamp(min=lowest)
            passing = (products_QB >= floor_Q[:, None]).nonzero(as_tuple=True)
            found.append((passing[0], passing[1] + start, products_QB[passing]))
        columns = (torch.cat(parts) for parts in zip(*found, strict=True))
        pairs = Pairs(*(column.cpu().numpy() for column in columns))
        floor = (best_QK[:, -1] - margin_Q).cpu().numpy()
        return pairs.where(pairs.products >= floor[pairs.rows])
