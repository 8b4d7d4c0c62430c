"""Systems under comparison: what they are, how they search, and what they score."""
