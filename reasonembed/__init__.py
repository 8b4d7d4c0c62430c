"""ReasonEmbed: retrieval that reasons.

A plain Python library; where it runs, and on how many machines, is decided in `ray_jobs`.
"""

__version__ = "0.1.0"
