"""Samples for tests, made of a few words."""

from reasonembed.redapter.batches import Sample, samples_from_rows


def sample_rows(*, task: str = "stdlib", count: int = 8, negatives: int = 5) -> list[dict]:
    def passage(kind: str, i: int, j: int) -> dict:
        text = f"{kind} {task} keeps key {i} while a loop {j} walks"
        return {"doc_id": f"{kind}{i}-{j}", "text": text, "label": 4.0, "text_hash": f"h{text}"}

    return [
        {
            "query_id": f"{task}-{i}",
            "task": task,
            "instruction": "find what helps",
            "query": f"why does key {i} follow",
            "rewritten_query": f"why does key {i} follow the order of insertion {i}",
            "positives": [passage("positive", i, j) for j in range(2)],
            "negatives": [passage("negative", i, j) for j in range(negatives)],
            "source_doc_id": None,
            "split": "train",
        }
        for i in range(count)
    ]


def samples(**kinds: object) -> list[Sample]:
    return samples_from_rows(sample_rows(**kinds))
