from tests.report.parsed_page import page_of
from tests.report.small_run import STAGES, Builder


def test_labels_by_task_length_and_level(tmp_path):
    builder = Builder(tmp_path).make(*STAGES[: STAGES.index("annotate")])
    levels = {
        row["query_id"]: row["education_level"]
        for row in builder.run.artifact("seeds").read().to_pylist()
    }
    rows = [
        builder.judgment(row["query_id"], doc_id, grade)
        for row in builder.usable()
        for doc_id, grade in (("d0", 5), ("d1", 1), ("d2", 1), ("d3", None))
    ]
    builder.commit("judgments", rows)
    text = page_of(builder).text
    by_task = text.split("Relevance label by task")[1].split("Relevance label by")[0]
    pairs = len(rows)
    assert f"generic {pairs} 67% 0% 0% 0% 33% {pairs // 4} 2.33" in by_task
    by_level = text.split("Relevance label by education level")[1].split("Triviality")[0]
    for level in set(levels[row["query_id"]] for row in builder.usable()):
        number = 4 * sum(levels[row["query_id"]] == level for row in builder.usable())
        assert f"{level} {number} 67%" in by_level
    assert "Relevance label by words asked" in text


def test_a_run_with_a_filter_and_one_with_samples_from_elsewhere(tmp_path):
    llm = {"llm": {"model": "m", "engine": "scripted"}}
    builder = Builder(tmp_path / "a", filter=llm).make("corpus", "filter")
    text = page_of(builder).text
    assert "2 of 13 stages are done, plan is next" in text
    assert "documents of the domain 5" in text
    assert "1 × document: another domain 1 × error: refused" in text
    sources = {"sources": [{"path": "x"}]}
    text = page_of(Builder(tmp_path / "b", assemble=sources)).text
    assert "0 of 5 stages are done, corpus is next" in text
    assert "The samples were made elsewhere" in text
    assert "judged pairs" not in text
