"""Exact search: dense top-k and BM25, both with exclusion before the cut."""
