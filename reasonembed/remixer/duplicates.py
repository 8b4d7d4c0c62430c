"""Texts that are nearly the same: word n-grams as sets, compared by their Jaccard similarity.

What queries are used is decided here: of queries that are nearly the same, one.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.schemas import Status

_QUERY_WORDS = 3
_DOCUMENT_WORDS = 5
_PERMUTATIONS = 128
_SEED = 1  # of the permutations; fixed, so that every job finds the same pairs
_MIN_RECALL = 0.999


def shingles(text: str, *, size: int) -> frozenset[int]:
    """Hashes of the text's word n-grams, the same on every machine; 64 bits each.

    Case and punctuation do not count. A text of fewer words is one n-gram, so that it can still
    equal another; a blank text has none.

    Args:
        text: Any text.
        size: Words in an n-gram.
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) < size:
        grams = [" ".join(words) or text.strip()]
    else:
        grams = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
    return frozenset(
        int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest())
        for gram in grams
        if gram
    )


def similarity(a: frozenset[int], b: frozenset[int]) -> float:
    """Jaccard similarity in [0, 1]: shared over all; 0 where both are empty."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def near_duplicates(
    texts: Mapping[str, str], *, of: Collection[str], max_similarity: float
) -> frozenset[str]:
    """Documents whose word 5-grams are more alike than allowed to those of a given document.

    Exact, by an index of the given documents' n-grams; the others are looked at one by one.

    Args:
        texts: By id.
        of: Ids of the given documents, which are never in the result; those without a text are
            passed over.
        max_similarity: Similarity in [0, 1] up to which a document is no near-duplicate.
    """
    sizes: list[int] = []
    holders: dict[int, list[int]] = defaultdict(list)
    for number, doc_id in enumerate(sorted(texts.keys() & of)):
        grams = shingles(texts[doc_id], size=_DOCUMENT_WORDS)
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(number)
    found = set()
    for doc_id in texts.keys() - of if holders else ():
        grams = shingles(texts[doc_id], size=_DOCUMENT_WORDS)
        shared = Counter(number for gram in grams for number in holders.get(gram, ()))
        if any(n > max_similarity * (len(grams) + sizes[i] - n) for i, n in shared.items()):
            found.add(doc_id)
    return frozenset(found)


def usable_queries(queries: pa.Table, *, max_similarity: float) -> tuple[pa.Table, dict[str, str]]:
    """Queries that later stages use, and those that were left out as near-duplicates.

    Args:
        queries: Rows of `schemas.QUERIES`; at least `query_id`, `query` and `status`.
        max_similarity: See `near_duplicate_queries`.

    Returns:
        The rows whose status is ok and that are no near-duplicates, in their order, and what
        `near_duplicate_queries` says of the others.
    """
    usable = queries.filter(pc.equal(queries.column("status"), str(Status.OK)))
    ids = usable.column("query_id").to_pylist()
    dropped = near_duplicate_queries(
        ids, usable.column("query").to_pylist(), max_similarity=max_similarity
    )
    return usable.filter(pa.array([id_ not in dropped for id_ in ids], pa.bool_())), dropped


def near_duplicate_queries(
    query_ids: Sequence[str], texts: Sequence[str], *, max_similarity: float
) -> dict[str, str]:
    """Queries that are more alike than allowed to one that is kept, by their word 3-grams.

    In the order of ids a query is kept unless one that is kept already is more alike to it than
    `max_similarity`, or equal. So the result follows from the set of queries, and of two
    near-duplicates the smaller id stays. Candidates come from MinHash bands, which miss a pair
    above the limit with a probability below 0.001 (for limits of 0.06 and more); every candidate
    is compared exactly, so no query is left out wrongly.

    Args:
        query_ids: Unique.
        texts: Of the queries, in the same order.
        max_similarity: Jaccard similarity in [0, 1]; with 1 only equal sets of 3-grams count.

    Returns:
        The id that is kept, by each id that is left out.
    """
    from datasketch import MinHash, MinHashLSH

    bands = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(max_similarity))
    empty = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=_to_32_bits)
    text_of = dict(sorted(zip(query_ids, texts, strict=True)))
    dropped: dict[str, str] = {}
    for query_id, text in text_of.items():
        grams = shingles(text, size=_QUERY_WORDS)
        signature = empty.copy()
        signature.update_batch(sorted(grams))
        alike = [
            kept
            for kept in bands.query(signature)
            if _are_alike(grams, shingles(text_of[kept], size=_QUERY_WORDS), max_similarity)
        ]
        if alike:
            dropped[query_id] = min(alike)
        else:
            bands.insert(query_id, signature)
    return dropped


def _are_alike(a: frozenset[int], b: frozenset[int], max_similarity: float) -> bool:
    value = similarity(a, b)
    return value > max_similarity or value == 1.0


def _to_32_bits(gram: int) -> int:
    return gram >> 32  # what the permutations take


def _bands(similarity_limit: float) -> tuple[int, int]:
    """Bands and rows of a band: as few candidates as the recall allows.

    Two sets of similarity s agree in one of b bands of r rows with probability 1 − (1 − s^r)^b.
    """
    for rows in range(_PERMUTATIONS // 2, 1, -1):  # the index wants two bands at least
        bands = _PERMUTATIONS // rows
        if 1 - (1 - similarity_limit**rows) ** bands >= _MIN_RECALL:
            return bands, rows
    return _PERMUTATIONS, 1
