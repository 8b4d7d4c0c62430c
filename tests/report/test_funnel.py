from tests.report.parsed_page import page_of
from tests.report.small_run import Builder, llm


def test_the_funnel_counts_every_loss(whole):
    text = page_of(whole).text
    funnel = text.split("what was lost, and why")[1].split("Examples")[0]
    judged = whole.run.artifact("judgments").statuses()
    assert "1 × document: held out for evaluation" in funnel
    assert "3 × document: over the cap" in funnel
    assert "2 × filtered: 50–51% copied plain" in funnel
    assert "6 × source or its duplicate, shut out before the cut" in funnel
    assert "24 × candidates beyond the first 3 of a query" in funnel
    assert f"{judged['invalid']} × invalid: no grade plain" in funnel
    assert "2 × queries: no usable query" in funnel


def test_rows_that_wait_are_not_lost(tmp_path):
    builder = Builder(tmp_path).make("corpus", "plan")
    builder.generate()
    rows = builder.run.artifact("queries").read().to_pylist()
    half = Builder(tmp_path / "half").make("corpus", "plan")
    half.commit("queries", rows[:3], inputs=["seeds"])
    assert "5 × not asked yet" in page_of(half).text


def test_many_reasons_are_summed_up(tmp_path):
    builder = Builder(tmp_path).make("corpus", "plan")
    seeds = builder.run.artifact("seeds").read().to_pylist()
    base = {"query": None, "source_doc_id": "d1", "task": "generic", "status": "error"}
    rows = [
        {"query_id": seed["query_id"], **base, **llm(f"reason {chr(97 + place)}")}
        for place, seed in enumerate(seeds)
    ]
    builder.commit("queries", rows, inputs=["seeds"])
    text = page_of(builder).text
    assert text.count("1 × error: reason") == 5 and "3 × other reasons" in text
