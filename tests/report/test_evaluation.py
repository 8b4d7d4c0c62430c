from reasonembed.report import write_report
from reasonembed.run import Run
from tests.report.parsed_page import Page, page_of


def test_queries_that_moved_stand_with_text_and_gold(whole):
    text = page_of(whole).text
    gained, lost = text.split("Gained most")[1].split("Lost most")
    assert "asked 0 plain e0 0.631 → 1.000 d0" in gained and "asked 1" not in gained
    assert "asked 1 plain e1 0.631 → 0.000 d1" in lost and "asked 0" not in lost


def test_without_the_collection_ids_remain(whole, monkeypatch, tmp_path):
    missing = whole.run.config.evaluate.model_copy(update={"collection": str(tmp_path / "gone")})
    run = Run(whole.run.config.model_copy(update={"evaluate": missing}))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "the collection cannot be read" in page.text
    assert "0.631 → 1.000" in page.text
