"""Measures systems on collections, their models on actor pools."""

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import ray

from ray_jobs.job import explained, join_or_start, parse_arguments, quiet
from ray_jobs.ledger import run_planned
from reasonembed.artifacts import Ledger
from reasonembed.config import BenchmarkConfig, PoolConfig, load_benchmark
from reasonembed.progress import Reporter
from reasonembed.report.benchmark import write_benchmark_report
from reasonembed.run import statuses_from
from reasonembed.systems.benchmark import measure_all
from reasonembed.systems.local import Maker
from reasonembed.systems.table import table_lines


class RayWork:
    """Does the work on actor pools; see `systems.local.Work`.

    Args:
        reporter: Where to speak.
        retry: Statuses of rows that are computed again.
        owner: Folder that no other driver writes to.
    """

    def __init__(
        self, reporter: Reporter, *, retry: frozenset[str] = frozenset(), owner: str = ""
    ) -> None:
        self.reporter, self.retry, self.owner = reporter, retry, owner

    def compute(
        self,
        planned: pa.Table,
        artifact: Ledger,
        make: Maker,
        pool: PoolConfig,
        *,
        label: str,
        overlap: int = 1,
        cut: Callable[[pa.Table, int], list[pa.Table]] | None = None,
    ) -> int:
        """See `systems.local.Work.compute`."""
        return run_planned(
            self, planned, artifact, make, pool, label=label, overlap=overlap, cut=cut
        )


def measure_on_cluster(
    config: BenchmarkConfig, *, retry: frozenset[str] = frozenset()
) -> list[str]:
    """Measures on the cluster that RAY_ADDRESS names, or on a private one; says what came out.

    Args:
        config: What is measured; on a cluster, in a results folder that all nodes see.
        retry: Statuses of an LLM's answers that are asked for again.
    """
    results = Path(config.results_dir).absolute()
    with quiet(results / "logs" / "ray.log") as console:
        try:
            join_or_start(config.runtime)
            work = RayWork(Reporter(console), retry=retry, owner=str(results))
            found = measure_all(config, work=work)
        finally:
            ray.shutdown()
    return table_lines(found, place=results)


def main() -> None:
    """Runs the job from the command line: `--config FILE`, repeated `--set a.b=1`, `--retry`."""
    arguments = parse_arguments(__doc__)
    with explained():
        config = load_benchmark(arguments.config, overrides=arguments.set)
        lines = measure_on_cluster(config, retry=statuses_from(arguments.retry))
        sys.stdout.write("\n".join(lines) + "\n")
        page = write_benchmark_report(Path(config.results_dir))
        sys.stdout.write(f"Report, query by query: {page}\n")


if __name__ == "__main__":
    main()
