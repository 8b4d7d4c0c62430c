"""Writes the trained model in the form that sentence-transformers, vLLM and the service load."""

from dataclasses import replace
from typing import Any

import ray

from ray_jobs.job import Job, main
from reasonembed.config import EncoderConfig
from reasonembed.embedder.contract import resolve_contract
from reasonembed.models import resolve
from reasonembed.redapter.export import Exported, export
from reasonembed.report.card import write_card
from reasonembed.report.facts import Facts
from reasonembed.run import Run
from reasonembed.schemas import stable_hash


@ray.remote(num_cpus=1)
def _export(
    encoder: EncoderConfig,
    *,
    run: Run,
    matryoshka: tuple[int, ...],
    texts: list[str],
) -> Exported:
    weights = resolve(encoder.model, cache_dir=run.config.runtime.cache_dir)
    contract = replace(resolve_contract(weights, encoder), matryoshka_dimensions=matryoshka)
    learnt = run.local("train/weights")
    with run.writing("export") as folder:
        return export(
            weights,
            learnt,
            contract,
            output_dir=folder / run.model_place.name,
            instruction=run.instruction,
            golden_texts=texts,
        )


def run(job: Job) -> dict[str, Any]:
    """Writes `export/model`."""
    directory = job.run.directory("export")
    job.run.begin("export", directory)
    if (finished := directory.finished()) is not None:
        return finished
    store = job.run.corpus_store()
    ranked = sorted(store.doc_ids, key=stable_hash)
    golden = store.texts(ranked[: job.run.config.export.golden_texts])
    exported = ray.get(
        _export.remote(
            job.run.encoders.backbone,
            run=job.run,
            matryoshka=job.run.config.train.matryoshka_dimensions,
            texts=golden,
        )
    )
    summary = {
        "dimension": exported.contract.dimension,
        "golden texts": len(golden),
        "cosine to backbone": round(exported.cosine_to_backbone, 6),
        "cosine to trained": round(exported.cosine_to_trained, 6),
        "weights": exported.contract.weights,
    }
    directory.finish(summary)
    write_card(Facts(job.run))
    return summary


if __name__ == "__main__":
    main(run, stage="export", description=__doc__)
