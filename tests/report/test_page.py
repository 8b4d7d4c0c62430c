import re

import pytest

from reasonembed.errors import StorageError
from reasonembed.report import write_report
from tests.report.parsed_page import page_of
from tests.report.small_run import STAGES, Builder

HOSTILE = (
    """</pre><script src="http://evil.example/x.js">alert('1')</script>&amp; "é" 😀 \x00 {{x}} $y"""
)


def test_every_partial_run_has_a_report(tmp_path):
    builder = Builder(tmp_path)
    page = page_of(builder)
    assert "0 of 12 stages are done, corpus is next" in page.text
    for number_done, stage in enumerate(STAGES, start=1):
        text = page_of(builder.make(stage)).text
        assert "cannot be drawn" not in text, stage
        is_whole = number_done == len(STAGES)
        assert ("Not evaluated yet" in text) != is_whole
        assert f"{number_done} of 12" in text or is_whole
    assert "not run yet" not in text.lower()


def test_a_page_needs_nothing_from_elsewhere(whole):
    markup = write_report(whole.run).read_text(encoding="utf-8")
    assert "://" not in markup and "src=" not in markup


def test_hostile_texts_stay_texts(tmp_path):
    builder = Builder(tmp_path, text=HOSTILE, model=HOSTILE).make(*STAGES)
    page = page_of(builder)
    assert "cannot be drawn" not in page.text
    assert "\x00" not in page.text
    shown = HOSTILE.replace("\x00", "\ufffd")
    for place in ("document 0", "query", "thought", "analysis", "asked 0", "no grade"):
        assert re.search(f"{place}( \\d+)? {re.escape(shown)}", page.text), place


def test_a_damaged_part_costs_its_sections_alone(tmp_path):
    builder = Builder(tmp_path).make(*STAGES)
    (builder.run.dir / "judgments" / "data" / "part.parquet").write_bytes(b"torn")
    text = page_of(builder).text
    assert "cannot be drawn: StorageError" in text
    assert "Gained most" in text and "Mean rank of the positive" in text


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    builder = Builder(tmp_path)
    (builder.run.dir / ".report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(builder.run)
