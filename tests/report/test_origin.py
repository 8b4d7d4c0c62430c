from tests.report.parsed_page import page_of
from tests.report.small_run import Builder


def test_lineage_tells_an_input_that_changed(tmp_path):
    builder = Builder(tmp_path).make("corpus", "plan", "generate")
    assert "(another one now)" not in page_of(builder).text
    builder.run.artifact("seeds").discard()
    builder.plan()
    assert "(another one now)" not in page_of(builder).text  # the same once more
    builder.run.artifact("seeds").discard()
    builder.run.artifact("seeds").begin({"kind": "other"})
    assert "seeds (another one now)" in page_of(builder).text


def test_a_password_in_an_address_stays_out(tmp_path):
    engine = {"base_url": "https://user:secret@llm.example/v1"}
    builder = Builder(tmp_path, runtime={"engine": engine})
    text = page_of(builder).text
    assert "secret" not in text and "llm.example/v1" in text
