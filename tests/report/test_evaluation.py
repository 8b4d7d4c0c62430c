from reasonembed.report import write_report
from reasonembed.report.blame import blame
from reasonembed.run import Run
from tests.report.parsed_page import Page, page_of
from tests.report.small_run import STAGES, Builder


def test_queries_that_moved_stand_with_text_gold_and_what_came_back(whole):
    text = page_of(whole).text
    gained, lost = text.split("Gained most")[1].split("Lost most")
    assert "e0 0.631 → 1.000 asked 0 plain" in gained and "asked 1" not in gained
    assert "e1 0.631 → 0.000 asked 1 plain" in lost and "asked 0" not in lost
    assert "Gold document it begins place by BM25 place by Miner" in gained
    assert "d0 document 0 plain 1 2 2 1" in gained
    assert "1 d0 2.0000 gold document 0 plain d5 2.0000 document 5 plain" in gained
    assert "d1 document 1 plain 1 2 2 –" in lost
    assert "Nothing was excluded." in gained


def test_the_closest_training_samples_stand_beside_them(whole):
    gained = page_of(whole).text.split("Gained most")[1].split("Lost most")[0]
    nearest = blame(whole.run, "e0")[0]
    assert f"0.9000 {nearest.query_id} {nearest.query}" in gained
    assert "d0, which came back as number 1, was its positive" in gained


def test_without_the_collection_the_queries_are_still_shown(whole, tmp_path):
    missing = whole.run.config.evaluate.model_copy(update={"collection": str(tmp_path / "gone")})
    run = Run(whole.run.config.model_copy(update={"evaluate": missing}))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "e0 0.631 → 1.000 asked 0 plain" in page.text


def test_without_excerpts_ids_remain(tmp_path):
    builder = Builder(tmp_path).make(*STAGES)
    (builder.run.dir / "evaluate" / "miner" / "excerpts.jsonl.gz").unlink()
    text = page_of(builder).text
    assert "What came back cannot be shown" in text and "--from evaluate --fresh" in text
    assert "e0 0.631 → 1.000" in text and "asked 0 plain 1 2" not in text


def test_an_evaluation_of_an_earlier_version_says_how_to_get_the_samples(tmp_path):
    builder = Builder(tmp_path).make(*STAGES)
    (builder.run.dir / "evaluate" / "closest.parquet").unlink()
    text = page_of(builder).text
    assert "The closest training samples cannot be shown" in text
    assert "--from evaluate --fresh" in text and "d0 document 0 plain 1 2 2 1" in text
    assert "Closest training samples" not in text
