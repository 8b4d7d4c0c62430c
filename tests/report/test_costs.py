import json

from tests.report.parsed_page import page_of
from tests.report.small_run import Builder


def test_every_run_of_a_stage_counts(tmp_path):
    builder = Builder(tmp_path).make("corpus", "plan", "generate")
    again = builder.run.artifact("queries").read()
    builder.commit("queries", again, inputs=["seeds"], part="again")
    for seconds, outcome in ((60.0, "failed"), (40.0, "done")):
        note = {"stage": "generate", "started": 0.0, "seconds": seconds, "outcome": outcome}
        with (builder.run.dir / "timeline.jsonl").open("a") as stream:
            stream.write(json.dumps(note) + "\n")
    costs = page_of(builder).text.split("tokens/s")[1]
    # 8 rows, twice: 10 tokens read and 2 written each; 192 tokens in 100 s
    assert "generate 3 1 min 40 s 8 160 32 2" in costs
