import json

from reasonembed.report import write_report
from reasonembed.run import Run
from tests.report.parsed_page import Page, page_of
from tests.report.small_run import STAGES, Builder


def section(text):
    return text.split("Contamination")[2].split("Annotator")[0]


def test_the_run_s_own_evaluation_is_always_searched_for(whole):
    text = section(page_of(whole).text)
    assert "1 documents were kept out of the seeds" in text
    assert "Name others, as BEIR folders or files of BRIGHT's examples" in text
    assert "3 queries; 3 of 3 gold documents with their text" in text
    # The plan knew of d0 alone, which is the positive of every sample; d1 and d2 are gold as well.
    assert "2 seeds are among the documents that it names, such as d1." in text
    assert "gold document seed 2 in 2 2 in 2 –" in text
    assert "gold document positive 1 in 1 1 in 1 –" in text
    assert "exact: gold document d0 in positive d0 : document 0 plain" in text


def with_benchmarks(builder, *paths):
    report = builder.run.config.report.model_copy(update={"benchmarks": tuple(map(str, paths))})
    run = Run(builder.run.config.model_copy(update={"report": report}))
    return section(Page(write_report(run).read_text(encoding="utf-8")).text)


def test_configured_benchmarks_warn_and_are_searched_for(whole, tmp_path):
    query = whole.run.artifact("samples").read(columns=["query"]).to_pylist()[0]["query"]
    source = whole.run.artifact("seeds").read().to_pylist()[-1]["source_doc_id"]
    row = {"id": "7", "query": query.upper(), "gold_ids": [source], "excluded_ids": ["N/A"]}
    file = tmp_path / "topics.bright-aops-original.jsonl"
    file.write_text(json.dumps(row))
    text = with_benchmarks(whole, file, tmp_path / "gone")
    assert "Not searched for: report.benchmarks:" in text
    assert "gone' is neither" in text
    found = text.split("BRIGHT aops")[1]
    assert "has 1 queries; the revision of BRIGHT that published results are for has 111" in found
    assert f"1 seeds are among the documents that it names, such as {source}." in found
    assert "query query 1 in 1" in found
    assert "Name others" not in text


def test_without_the_collection_others_are_still_searched_for(whole, tmp_path):
    missing = whole.run.config.evaluate.model_copy(update={"collection": str(tmp_path / "gone")})
    run = Run(whole.run.config.model_copy(update={"evaluate": missing}))
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "own evaluation was not searched for: no collection" in section(text)


def test_before_there_are_samples_it_waits(tmp_path):
    text = page_of(Builder(tmp_path).make(*STAGES[:5])).text
    assert section(text).strip() == "Not run yet."
