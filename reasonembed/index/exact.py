"""Exact inner-product top-k with exclusion before the cut, and the merge of shards.

Letters in names: Q queries, N documents, K results a query, D vector length, B a block's documents.

The method is a filter in front of an exact score. Blocks of scores come from a float32 matrix
product, whose rounding depends on the shape of the block. A running lower bound of each query's
k-th best score, lowered by twice the rounding error that such a product can have, lets through
every document that may belong to the result and few others. Those are scored once more in float64
and rounded to float32: the score of a pair depends on its two vectors alone, so equal vectors tie
exactly and no block size, shard or neighbour changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Protocol

import numpy as np
import numpy.typing as npt
import threadpoolctl

Scores = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

NO_DOCUMENT = -1  # position that fills a row with fewer than k results; its score is -inf

# Where larger blocks stop being faster; 1024 x 4096 scores are 16 MiB a core.
QUERY_BLOCK = 1_024
DOCUMENT_BLOCK = 4_096
_MIN_QUERY_BLOCK = 64  # below, a product shared by all cores is faster than one a core
_PRODUCTS_OF_FEW = 2**16  # of a block where queries are few: one query takes larger blocks
_FEW_QUERIES = 32  # below, a product is twice as fast with the documents on the left
_ALL_CORES = Lock()  # the limit of threads is the whole process's: two searches must not set it
_SMALLEST = float(np.finfo(np.float32).tiny)
_RESCORE_NUMBERS = 2**17  # gathered at a time as float64: 1 MiB, so that they stay in the cache


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a document, in no order.

    Attributes:
        rows: Of the queries.
        positions: Of the documents.
        products: Inner products as a matrix product rounds them.
    """

    rows: Positions
    positions: Positions
    products: Scores

    def where(self, keep: npt.NDArray[np.bool_]) -> Pairs:
        """Some of them."""
        return Pairs(self.rows[keep], self.positions[keep], self.products[keep])


class Filter(Protocol):
    """Lets through every pair that may belong to the result, and few others.

    That is every pair whose product is at most `margin_Q` below the k-th best of its query, the
    excluded ones left out.
    """

    def __call__(
        self,
        queries_QD: Vectors,
        documents_ND: Vectors,
        *,
        k: int,
        margin_Q: Scores,
        excluded: tuple[Positions, Positions],
    ) -> Pairs:
        """Filters; `excluded` are rows and positions of pairs, by position; k is at most N."""
        ...


def search(
    queries_QD: Vectors,
    documents_ND: Vectors,
    *,
    k: int,
    excluded: Sequence[Collection[int] | Positions] | None = None,
    query_block: int = QUERY_BLOCK,
    document_block: int | None = None,
    accelerator: Filter | None = None,
    longest: float | None = None,
) -> tuple[Scores, Positions]:
    """The k documents of largest inner product for every query.

    Excluded documents are removed before the cut, so a query loses no result to them however many
    they are. Order: score descending, then position ascending. A score is the inner product summed
    in float64 and rounded to float32.

    Args:
        queries_QD: float32, finite.
        documents_ND: float32, finite.
        k: Results a query, at least 1.
        excluded: For each query the positions in 0..N-1 that it must not return; None for none.
        query_block: Queries a matrix product; no effect on the result.
        document_block: Documents a matrix product; default by the number of queries; no effect on
            the result.
        accelerator: Filters instead of the CPU, see `index.accelerator`; no effect on the result.
        longest: `longest_norm` of the documents or more, where it is known: they are then read
            once, where they would be read twice, and are not checked again. No effect on the
            result.

    Returns:
        scores_QK float32 and positions_QK int64, K = min(k, N). A query with fewer than K documents
        left has its row filled with score -inf and position -1.

    Raises:
        ValueError: Shapes, dtypes, k or an excluded position do not fit, or a vector is not finite.
    """
    _check(queries_QD, documents_ND, k=k, excluded=excluded)
    num_results = min(k, len(documents_ND))
    scores_QK = np.full((len(queries_QD), num_results), -np.inf, dtype=np.float32)
    positions_QK = np.full((len(queries_QD), num_results), NO_DOCUMENT, dtype=np.int64)
    if num_results == 0:
        return scores_QK, positions_QK
    longest = longest_norm(documents_ND) if longest is None else longest
    margin_Q = _rounding_margin(queries_QD, longest)
    block = document_block or _document_block(len(queries_QD))
    pairs = accelerator or partial(_filter, document_block=block)

    def one_block(start: int) -> None:
        block = slice(start, start + query_block)
        found = pairs(
            queries_QD[block],
            documents_ND,
            k=num_results,
            margin_Q=margin_Q[block],
            excluded=_excluded_pairs(excluded[block] if excluded else [], len(documents_ND)),
        )
        exact = pair_scores(queries_QD[block], documents_ND, found.rows, found.positions)
        _write_top(found, exact, scores_QK[block], positions_QK[block])

    # A block has a core to itself: filtering runs on one, and would leave the others idle beside
    # products that take all of them.
    cores = _cores()
    per_core = math.ceil(len(queries_QD) / cores)
    if cores == 1 or per_core < _MIN_QUERY_BLOCK:
        for start in range(0, len(queries_QD), query_block):
            one_block(start)
    else:
        query_block = min(query_block, per_core)
        starts = range(0, len(queries_QD), query_block)
        with (
            _ALL_CORES,
            threadpoolctl.threadpool_limits(1, "blas"),
            ThreadPoolExecutor(cores) as pool,
        ):
            list(pool.map(one_block, starts))
    return scores_QK, positions_QK


def merge_topk(shards: Sequence[tuple[Scores, Positions]], *, k: int) -> tuple[Scores, Positions]:
    """The top k of several shards' results: what one search over all of them returns.

    Args:
        shards: For each shard its scores (Q, any) and ids (Q, any); the ids are those of the whole
            corpus (position in the shard plus the shard's offset), or -1 where a row is filled.
        k: Results a query.

    Returns:
        scores_QK and ids_QK, score descending, then id ascending; filled as in `search`.

    Raises:
        ValueError: There is no shard, or shards differ in their number of queries.
    """
    if not shards:
        raise ValueError("merge_topk needs the results of at least one shard")
    if len({array.shape[0] for shard in shards for array in shard}) != 1:
        raise ValueError(f"shards differ in queries: {[shard[0].shape for shard in shards]}")
    scores = np.concatenate([scores for scores, _ in shards], axis=1).astype(np.float32)
    ids = np.concatenate([ids for _, ids in shards], axis=1).astype(np.int64)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


@cache
def _cores() -> int:
    """Threads that a matrix product may take, as `OMP_NUM_THREADS` and the like say.

    Asked once: going through the process's libraries takes longer than a small search.
    """
    return max(
        (
            one["num_threads"]
            for one in threadpoolctl.threadpool_info()
            if one["user_api"] == "blas"
        ),
        default=1,
    )


def _check(
    queries_QD: Vectors,
    documents_ND: Vectors,
    *,
    k: int,
    excluded: Sequence[Collection[int] | Positions] | None,
) -> None:
    for name, vectors in (("queries", queries_QD), ("documents", documents_ND)):
        if vectors.ndim != 2 or vectors.dtype != np.float32:
            raise ValueError(
                f"{name} must be a float32 matrix, got {vectors.dtype} of shape {vectors.shape}"
            )
    if queries_QD.shape[1] != documents_ND.shape[1]:
        raise ValueError(
            f"queries have {queries_QD.shape[1]} dimensions, documents {documents_ND.shape[1]}; "
            "were they encoded by the same model?"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if excluded is not None and len(excluded) != len(queries_QD):
        raise ValueError(f"excluded has {len(excluded)} entries for {len(queries_QD)} queries")


def longest_norm(documents_ND: Vectors) -> float:
    """The largest L2 norm of documents, 0 of none; what `search` has to know of all of them.

    Raises:
        ValueError: A vector is not finite, or so long that float32 does not hold its square.
    """
    return float(_norms("documents", documents_ND).max(initial=0))


def _norms(name: str, vectors: Vectors) -> npt.NDArray[np.float64]:
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise ValueError(
            f"{name}[{bad[0]}] is not finite or too long ({len(bad)} of {len(norms)} rows)"
        )
    exact: npt.NDArray[np.float64] = norms.astype(np.float64)
    return exact


def _rounding_margin(queries_QD: Vectors, longest: float) -> Scores:
    """Twice the largest error of a float32 inner product with each query, whatever its order.

    The error of a sum of D products is at most D 2^-24 |q||d|; 8 more terms cover the rounding of
    the exact score, of the norms and of the bound itself, the last summand products that underflow.
    """
    dimension = queries_QD.shape[1]
    norms_Q = _norms("queries", queries_QD)
    error_Q = (dimension + 8) * 2.0**-24 * norms_Q * longest + dimension * _SMALLEST
    margin_Q: Scores = (2 * error_Q).astype(np.float32)
    return margin_Q


def _document_block(num_queries: int) -> int:
    """Documents a product, such that few queries are not many small products."""
    return max(DOCUMENT_BLOCK, _PRODUCTS_OF_FEW // max(1, num_queries))


def _filter(
    queries_QD: Vectors,
    documents_ND: Vectors,
    *,
    k: int,
    margin_Q: Scores,
    excluded: tuple[Positions, Positions],
    document_block: int,
) -> Pairs:
    """Every pair that may belong to the result, and few others."""
    best_QK = np.full((len(queries_QD), k), -np.inf, dtype=np.float32)
    found: list[Pairs] = []
    for start, products_QB in _products(queries_QD, documents_ND, excluded, document_block):
        is_first = start == 0 and products_QB.shape[1] > k
        if is_first:  # nothing is known yet: a partition spares the block from passing whole
            best_QK = np.partition(products_QB, -k, axis=1)[:, -k:]
        new = _passing(products_QB, best_QK.min(axis=1) - margin_Q, start)
        if not is_first:
            best_QK = _raise_best(best_QK, new)
        found.append(new)
    everything = Pairs(
        np.concatenate([part.rows for part in found]),
        np.concatenate([part.positions for part in found]),
        np.concatenate([part.products for part in found]),
    )
    floor_Q = best_QK.min(axis=1) - margin_Q
    return everything.where(everything.products >= floor_Q[everything.rows])


def _products(
    queries_QD: Vectors,
    documents_ND: Vectors,
    excluded: tuple[Positions, Positions],
    document_block: int,
) -> Iterator[tuple[int, Scores]]:
    """Start of each block and its products (Q, B); excluded pairs are -inf."""
    rows, positions = excluded
    for start in range(0, len(documents_ND), document_block):
        products_QB = _product(queries_QD, documents_ND[start : start + document_block])
        low, high = np.searchsorted(positions, [start, start + document_block])
        products_QB[rows[low:high], positions[low:high] - start] = -np.inf
        yield start, products_QB


def _product(queries_QD: Vectors, documents_BD: Vectors) -> Scores:
    # The library copies the matrix on the right into a form of its own: it should be the small one.
    if len(queries_QD) < _FEW_QUERIES:
        products: Scores = np.ascontiguousarray((documents_BD @ queries_QD.T).T)
    else:
        products = queries_QD @ documents_BD.T
    return products


def _excluded_pairs(
    excluded: Sequence[Collection[int] | Positions], num_documents: int
) -> tuple[Positions, Positions]:
    """Rows and positions of the excluded pairs, by position."""
    rows = np.repeat(np.arange(len(excluded)), [len(one) for one in excluded])
    positions = np.concatenate([np.empty(0, np.int64), *map(as_positions, excluded)])
    bad = positions[(positions < 0) | (positions >= num_documents)]
    if len(bad):
        raise ValueError(f"excluded position {bad[0]} is not in 0..{num_documents - 1}")
    order = np.argsort(positions, kind="stable")
    return rows[order], positions[order]


def as_positions(positions: Collection[int] | Positions) -> Positions:
    """Positions as an array; one that is an array already is not gone through."""
    if isinstance(positions, np.ndarray):
        return positions
    return np.fromiter(positions, np.int64, len(positions))


def _passing(products_QB: Scores, floor_Q: Scores, start: int) -> Pairs:
    # -inf is excluded, and would pass a floor of -inf.
    floor_Q = np.maximum(floor_Q, np.finfo(np.float32).min)
    # Flat, because numpy finds the few True of a vector several times faster than of a matrix.
    flat = np.flatnonzero(products_QB >= floor_Q[:, None])
    rows, columns = np.divmod(flat, products_QB.shape[1])
    return Pairs(rows, columns + start, products_QB.ravel()[flat])


def _raise_best(best_QK: Scores, new: Pairs) -> Scores:
    """The best products so far, with those of `new` (sorted by row) taken in."""
    if not len(new.rows):
        return best_QK
    counts_Q = np.bincount(new.rows, minlength=len(best_QK))
    ranks = np.arange(len(new.rows)) - (np.cumsum(counts_Q) - counts_Q)[new.rows]
    padded = np.full((len(best_QK), int(counts_Q.max())), -np.inf, dtype=np.float32)
    padded[new.rows, ranks] = new.products
    num_results = best_QK.shape[1]
    both = np.concatenate([best_QK, padded], axis=1)
    return np.partition(both, -num_results, axis=1)[:, -num_results:]


def pair_scores(
    queries_QD: Vectors, documents_ND: Vectors, rows: Positions, positions: Positions
) -> Scores:
    """Inner products of pairs, summed in float64 and rounded to float32: the scores of `search`.

    Products of float32 numbers are exact in float64; each sum runs over one row alone, so that it
    does not depend on which other pairs are scored with it, as it would in a matrix product.

    Args:
        queries_QD: float32.
        documents_ND: float32.
        rows: Query of each pair.
        positions: Document of each pair.
    """
    exact = np.empty(len(rows), dtype=np.float32)
    step = max(1, _RESCORE_NUMBERS // max(1, queries_QD.shape[1]))
    for start in range(0, len(exact), step):
        part = slice(start, start + step)
        left = queries_QD[rows[part]].astype(np.float64)
        left *= documents_ND[positions[part]]
        exact[part] = left.sum(axis=1)
    return exact


def _write_top(found: Pairs, exact: Scores, scores_QK: Scores, positions_QK: Positions) -> None:
    """Fills the rows of the result from the pairs, best first."""
    order = np.lexsort((found.positions, -exact, found.rows))
    rows = found.rows[order]
    counts_Q = np.bincount(rows, minlength=len(scores_QK))
    ranks = np.arange(len(rows)) - (np.cumsum(counts_Q) - counts_Q)[rows]
    kept = ranks < scores_QK.shape[1]
    target = (rows[kept], ranks[kept])
    scores_QK[target] = exact[order][kept]
    positions_QK[target] = found.positions[order][kept]
