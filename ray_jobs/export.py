"""Merges the adapter and writes a model that sentence-transformers, vLLM and the service load."""

from pathlib import Path
from typing import Any

import ray

from ray_jobs.job import Job, main
from reasonembed.artifacts import digest
from reasonembed.config import EncoderConfig
from reasonembed.embedder.contract import resolve_contract
from reasonembed.models import resolve
from reasonembed.redapter.export import export
from reasonembed.schemas import stable_hash


@ray.remote(num_cpus=1)
def _export(
    encoder: EncoderConfig,
    *,
    cache_dir: str | None,
    adapter: Path,
    output: Path,
    instruction: str,
    texts: list[str],
) -> int:
    weights = resolve(encoder.model, cache_dir=cache_dir)
    contract = export(
        weights,
        adapter,
        resolve_contract(weights, encoder),
        output_dir=output,
        instruction=instruction,
        golden_texts=texts,
    )
    return contract.dimension


def run(job: Job) -> dict[str, Any]:
    """Writes `export/model`."""
    directory = job.run.directory("export")
    job.run.begin("export", directory)
    if (finished := directory.finished()) is not None:
        return finished
    store = job.run.corpus_store()
    ranked = sorted(store.doc_ids, key=stable_hash)
    golden = store.texts(ranked[: job.run.config.export.golden_texts])
    dimension = ray.get(
        _export.remote(
            job.run.encoders.backbone,
            cache_dir=job.run.config.runtime.cache_dir,
            adapter=(job.run.dir / "train" / "adapter").absolute(),
            output=job.run.model_dir.absolute(),
            instruction=job.run.instruction,
            texts=golden,
        )
    )
    weights = digest(job.run.model_dir / "model.safetensors")
    summary = {"dimension": dimension, "golden texts": len(golden), "weights": weights}
    directory.finish(summary)
    return summary


if __name__ == "__main__":
    main(run, stage="export", description=__doc__)
