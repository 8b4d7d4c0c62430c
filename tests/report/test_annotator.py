import json
from dataclasses import asdict

from reasonembed.remixer.agreement import label_agreement
from tests.report.parsed_page import page_of
from tests.report.small_run import STAGES, Builder


def section(builder):
    return page_of(builder).text.split("Annotator")[2].split("Training")[0]


def before(tmp_path):
    return Builder(tmp_path).make(*STAGES[: STAGES.index("annotate")])


def test_one_analysis_a_pair_has_nothing_to_compare(whole):
    assert "One analysis a pair, no cascade, no distilled annotator." in section(whole)


def test_votes_and_the_cascade_are_summed_up(tmp_path):
    builder = before(tmp_path)
    ids = [row["query_id"] for row in builder.usable()]
    routes = [("quick", [], 10), ("full", [4, 4, 2], 30), ("checked", [1, 1], 30)]
    rows = [
        builder.judgment(id_, "d0", 1 if route != "full" else 4)
        | {"route": route, "votes": votes, "quick_label": 1.2, "prompt_tokens": tokens}
        for id_, (route, votes, tokens) in zip(ids, routes, strict=False)
    ]
    builder.commit("judgments", rows)
    text = section(builder)
    # Of three votes one pair in three is equal, of two all: 2/3 on average.
    assert "2 pairs were analysed more than once: two analyses give the same label in 67%" in text
    assert "are 1.00 apart on average" in text
    assert "33% took the quick label, 33% were unsure and analysed, 33% were sure" in text
    assert "Quick label against analysis: equal in 100% of 1 pairs" in text


def test_the_distilled_annotator_stands_beside_its_teacher(tmp_path):
    builder = before(tmp_path)
    agreement = asdict(label_agreement([1, 2, 4, 5], [1, 3, 4, 4]))
    cost = {"num_pairs": 4, "read_per_1000": 5_000.0, "cached_per_1000": 0.0}
    kit = {
        "pairs": 4,
        "pairs without majority": 0,
        "teacher": {"models": ["big"], "consistency": {"exact": 0.75}, "cost": cost},
        "student": {"models": ["small"], "consistency": None, "cost": None},
        "agreement": agreement,
    }
    (builder.run.dir / "annotator").mkdir()
    (builder.run.dir / "annotator" / "agreement.json").write_text(json.dumps(kit))
    text = section(builder)
    assert "model big small" in text
    assert "two analyses of a pair agree 0.750 –" in text
    assert "tokens read for 1,000 pairs 5,000 –" in text
    assert "equal 0.500" in text and "within one 1.000" in text
    assert "4 2 4.500" in text  # twice the student said 4; the teacher 4 and 5
