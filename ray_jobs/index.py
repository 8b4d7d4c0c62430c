"""Builds an index on disk, its vectors on an actor pool."""

import sys
from pathlib import Path

import ray

from ray_jobs.benchmark import RayWork
from ray_jobs.job import explained, join_or_start, parse_arguments, quiet
from reasonembed.config import IndexConfig, load_index, read_mapping
from reasonembed.index.store import StoredIndex
from reasonembed.progress import Reporter
from reasonembed.serving.building import build_index


def build_on_cluster(config: IndexConfig) -> StoredIndex:
    """Builds on the cluster that RAY_ADDRESS names, or on a private one.

    Args:
        config: What is built; on a cluster, in a folder that all nodes see.
    """
    out = Path(config.out).absolute()
    with quiet(out.with_name(f".{out.name}.ray.log")) as console:
        try:
            join_or_start(config.runtime)
            return build_index(config, work=RayWork(Reporter(console)))
        finally:
            ray.shutdown()


def main() -> None:
    """Runs the job from the command line: `--config FILE`, repeated `--set a.b=1`."""
    arguments = parse_arguments(__doc__)
    with explained():
        found = build_on_cluster(
            load_index(read_mapping(arguments.config), overrides=arguments.set)
        )
        sys.stdout.write(f"{found.folder}\n")


if __name__ == "__main__":
    main()
