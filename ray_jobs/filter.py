"""Asks an LLM which documents belong to the domain, before seeds are chosen."""

from ray_jobs.job import Job


def run(job: Job) -> dict[str, int]:
    """Commits `domains`."""
    raise NotImplementedError
