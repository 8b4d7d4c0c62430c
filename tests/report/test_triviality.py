import numpy as np

from reasonembed.artifacts import Artifact
from reasonembed.config import flatten
from reasonembed.report import write_report
from reasonembed.schemas import embeddings, from_rows, text_id
from tests.report.parsed_page import page_of
from tests.report.small_run import STAGES, Builder


def section(builder):
    return page_of(builder).text.split("Triviality")[2].split("Contamination")[0]


def commit_vectors(builder, name, **changed):
    run = builder.run
    rng = np.random.default_rng(0)
    texts = [(row["text"], None) for row in run.artifact("corpus").read().to_pylist()]
    texts += [(row["query"], run.task.instruction) for row in builder.usable()]
    rows = [
        {"id": text_id(text, instruction=instruction), "vector": rng.normal(size=4)}
        for text, instruction in texts
    ]
    schema = embeddings(4)
    folder = run.dir / "embeddings" / name
    artifact = Artifact(folder, schema=schema, key=("id",), name=name)
    artifact.begin(flatten(run.config.mine.encoder, prefix="encoder") | {"weights": "w"} | changed)
    artifact.commit("part", from_rows(rows, schema, where="test"))


def test_positives_stand_beside_the_control(whole):
    text = section(whole)
    assert "6 of 6 samples; ranks among 8 distinct texts" in text
    # "query N plain" shares one of its three words with every "document M plain", and two with its
    # source where N is M: in two queries of six.
    shares = "higher 0.333 (0.333) 0.444 (0.333) −0.111"
    assert f"share of the query's words in the document {shares}" in text
    # Document N comes first, then the others in the order of the corpus, where d0 is first.
    assert "BM25 rank lower 2.000 (2.000) 3.667 (3.000) −1.667" in text
    assert "no difference that these queries can show rank by the miner" in text
    # d0 comes first among the candidates of every query, and mining has not seen the source.
    assert "rank by the miner lower 1.000 (1.000) – – –" in text
    assert "vectors are not at hand" in text


def test_the_miner_s_vectors_are_found_without_its_weights(tmp_path):
    builder = Builder(tmp_path).make(*STAGES)
    commit_vectors(builder, "miner-model-1")
    commit_vectors(builder, "other-model-1", **{"encoder.pooling": "cls"})
    text = section(builder)
    assert "vectors are not at hand" not in text
    row = text.split("rank by the miner lower ")[1].split("BM25")[0]
    assert "–" not in row.split("less")[0].split("more")[0].split("no difference")[0]
    # A second folder with these settings: whose weights mined cannot be told.
    commit_vectors(builder, "miner-model-2", weights="v")
    assert "vectors are not at hand" in section(builder)


def test_of_two_folders_with_the_miner_s_settings_the_one_that_mined_is_taken(tmp_path):
    """As in a second round over shared vectors: both rounds' models are called `model`."""
    builder = Builder(tmp_path).make(*STAGES)
    commit_vectors(builder, "miner-model-1")
    before = section(builder)
    commit_vectors(builder, "miner-model-2", weights="v")
    candidates = builder.run.artifact("candidates")

    def mined_by(weights):
        identity = candidates.stage().identity | {"weights": weights}
        candidates.begin(identity, may_change=lambda field: field == "weights")

    mined_by("w")
    assert section(builder) == before
    mined_by("another")
    assert "vectors are not at hand" in section(builder)


def test_the_section_is_the_same_each_time(whole):
    first, second = (section(whole) for _ in range(2))
    assert first == second
    one, two = (write_report(whole.run).read_text(encoding="utf-8") for _ in range(2))
    assert one.split("Triviality")[2] == two.split("Triviality")[2]


def test_queries_that_leave_their_sources_are_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr("reasonembed.report.triviality._ON_TOPIC_RANK", 2)
    builder = Builder(tmp_path).make(*STAGES)
    said = "Half of the queries rank their own source below 3: they hardly speak of it"
    assert said in section(builder)
    monkeypatch.setattr("reasonembed.report.triviality._ON_TOPIC_RANK", 3)
    assert "rank their own source below" not in section(builder)
