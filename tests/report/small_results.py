"""A results folder as an evaluation leaves it, made without systems."""

from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.excerpts import write_excerpts
from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.evaluation.results import Result, result_dir, write_result


def collection(name="bright/biology", *, queries=4, text="plain", gold="d0"):
    ids = [f"q{i}" for i in range(queries)]
    return Collection(
        name=name,
        queries={id_: f"asked {id_} {text}" for id_ in ids},
        qrels={id_: {gold: 1} for id_ in ids},
        excluded={"q1": frozenset({"x1", "x2"})},
        task="generic",
        instruction="",
        corpus_source=None,
        benchmark=name.split("/")[0] if "/" in name else "",
        revision="current",
    )


def ranked(gold_places, *, gold="d0", depth=12, prefix="d"):
    """A run that puts the gold document of each query at a place, from 1; None: not at all."""
    run = {}
    for number, place in enumerate(gold_places):
        others = [f"{prefix}{i + 1}" for i in range(depth)]
        if place is not None:
            others[place - 1] = gold
        run[f"q{number}"] = {id_: float(depth - n) for n, id_ in enumerate(others)}
    return run


def write(
    results,
    system,
    run,
    given,
    /,
    *,
    protocol="bright",
    seed=None,
    text="plain",
    excerpts=True,
    **provenance,
):
    folder = result_dir(results, protocol=protocol, collection=given.name, system=system)
    folder = folder if seed is None else folder / f"seed-{seed}"
    measured = evaluate_run(run, given.qrels)
    made = {"revision": given.revision, "collection": given.fingerprint(), "corpus": "c0"}
    result = Result(
        system=system,
        seed=seed,
        collection=given.name,
        benchmark=given.benchmark or given.name,
        protocol=protocol,
        headline="ndcg@10",
        metrics=measured,
        credited=measured,
        provenance=made | {"packages": {"numpy": "2"}, "weights": f"w-{system}"} | provenance,
    )
    write_result(result, folder)
    if excerpts:
        write_excerpts(
            folder, given, run, texts=lambda ids: {id_: f"document {id_} {text}" for id_ in ids}
        )
    return folder
