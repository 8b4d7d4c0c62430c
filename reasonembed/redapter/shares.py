"""How a global batch is shared out among workers, known to all of them without a message."""

from __future__ import annotations


def share_sizes(num_queries: int, *, world_size: int) -> list[int]:
    """Queries of a global batch that each worker takes; they differ by one at most."""
    least, more = divmod(num_queries, world_size)
    return [least + (rank < more) for rank in range(world_size)]
