"""Published benchmarks that are folders of queries, judgments and documents.

R2MED (arXiv:2505.14558), LIMIT (arXiv:2508.21038) and BrowseComp-Plus (arXiv:2508.06600).
Where the hub gives the queries, the corpus is that of the same commit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reasonembed import hub, tasks
from reasonembed.corpus import holds_corpus
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.folders import Files, find_files, read_files
from reasonembed.evaluation.specs import Spec, local_folders

_R2MED = {
    "biology": "Biology",
    "bioinformatics": "Bioinformatics",
    "medical-sciences": "Medical-Sciences",
    "medxpertqa-exam": "MedXpertQA-Exam",
    "medqa-diag": "MedQA-Diag",
    "pmc-treatment": "PMC-Treatment",
    "pmc-clinical": "PMC-Clinical",
    "iiyi-clinical": "IIYi-Clinical",
}
_LIMIT = {"limit": "LIMIT", "limit-small": "LIMIT-small"}
_JUDGMENTS = {
    "evidence": ("qrel_evidence.txt",),
    "gold": ("qrel_golds.txt", "qrel_gold.txt"),
}


def load_r2med(spec: Spec, data_dir: Path | None) -> list[Collection]:
    """R2MED's tasks: `r2med/<Set>` or `R2MED/<Set>` in `data_dir`, or the hub.

    Raises:
        EvaluationError: The data cannot be had, is damaged, or contradicts itself.
    """
    spec.refuse_options()
    found = []
    for task in spec.choose(tuple(_R2MED)):
        name = _R2MED[task]
        places = local_folders(data_dir, f"r2med/{name}", f"R2MED/{name}")
        files = _find(places, f"R2MED/{name}", "query.jsonl", home=f"r2med/{name}")
        about = tasks.get(f"r2med-{task}")
        found.append(read_files(files, name=f"r2med/{task}", task=about, benchmark="r2med"))
    return found


def load_limit(spec: Spec, data_dir: Path | None) -> list[Collection]:
    """LIMIT or LIMIT-small, whose 46 documents `data_dir` may hold as `limit_small`.

    Raises:
        EvaluationError: The data cannot be had, is damaged, or contradicts itself.
    """
    spec.refuse_options()
    spec.choose((spec.name,))
    name = _LIMIT[spec.name]
    places = local_folders(data_dir, spec.name, spec.name.replace("-", "_"), name)
    files = _find(places, f"orionweller/{name}", "queries.jsonl", home=spec.name)
    about = tasks.get("generic")
    return [read_files(files, name=spec.name, task=about, benchmark=spec.name)]


def load_browsecomp(spec: Spec, data_dir: Path | None) -> list[Collection]:
    """BrowseComp-Plus with its two judgments: documents of evidence, and those with the answer.

    Its queries are published in disguise, so that no model is trained on them. They are read from
    what the authors' program makes of them (`topics-qrels/queries.tsv`), never fetched.

    Raises:
        EvaluationError: The data are not at hand, are damaged, or contradict themselves.
    """
    spec.refuse_options()
    chosen = spec.choose(tuple(_JUDGMENTS))
    folders = local_folders(data_dir, spec.name, "BrowseComp-Plus")
    inside = [path for one in folders for path in (one / "topics-qrels", one)]
    topics = next((path for path in inside if (path / "queries.tsv").is_file()), None)
    if topics is None:
        raise EvaluationError(
            f"{spec.text}: topics-qrels/queries.tsv is not at hand; make it with "
            "scripts_build_index/decrypt_dataset.py of github.com/texttron/BrowseComp-Plus, and "
            f"give the folder above {spec.name} as data_dir"
        )
    source = next((str(one) for one in (topics, topics.parent) if holds_corpus(one)), None)
    corpus = source or hub.address("Tevatron/browsecomp-plus-corpus", "data/*.parquet")
    about = tasks.get("generic")
    return [
        read_files(
            Files(topics / "queries.tsv", _judgments(topics, kind), corpus=corpus),
            name=f"{spec.name}/{kind}",
            task=about,
            benchmark=spec.name,
        )
        for kind in chosen
    ]


def _find(places: list[Path], repo: str, queries: str, *, home: str) -> Files:
    """The files of a benchmark in the first folder that holds its queries, or on the hub."""
    for place in places:
        if (place / queries).is_file():
            found = find_files(place)
            break
    else:
        found = _fetch(places, repo, queries, home)
    return found if found.corpus else replace(found, corpus=hub.address(repo, "corpus.jsonl"))


def _fetch(places: list[Path], repo: str, queries: str, home: str) -> Files:
    looked = f"{queries} is not in {', '.join(map(str, places))}, and " if places else ""
    try:
        snapshot = hub.fetch(repo, [queries, "qrels.jsonl"], error=EvaluationError)
        corpus = hub.address(repo, "corpus.jsonl", revision=snapshot.commit)
        # Also where the corpus lies in the hub's cache by now: its name must stay the same.
        return replace(find_files(snapshot.folder), corpus=corpus)
    except EvaluationError as error:
        raise EvaluationError(
            f"{looked}{error}; or put {queries}, qrels.jsonl and corpus.jsonl into {home} of a "
            "folder and give that as data_dir"
        ) from error


def _judgments(folder: Path, kind: str) -> Path:
    found = next((folder / n for n in _JUDGMENTS[kind] if (folder / n).is_file()), None)
    if found is None:
        raise EvaluationError(f"{folder} holds no {_JUDGMENTS[kind][0]}")
    return found
