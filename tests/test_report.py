import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.charts import Series, bar_chart, line_chart, meter, number, smoothed, tag
from reasonembed.config import parse
from reasonembed.corpus import text_hash
from reasonembed.errors import StorageError
from reasonembed.evaluation.scorecard import scorecard
from reasonembed.remixer.assemble import assemble_samples
from reasonembed.remixer.plan import plan_seeds
from reasonembed.report import write_report
from reasonembed.run import STAGES, Run
from reasonembed.schemas import ARTIFACTS, from_rows

HOSTILE = (
    """</pre><script src="http://evil.example/x.js">alert('1')</script>&amp; "é" 😀 \x00 {{x}} $y"""
)
NUM_DOCS, VARIANTS = 8, 2


def llm(detail=None, *, model="m", tokens=10, finish_reason="stop"):
    return {
        "detail": detail,
        "finish_reason": finish_reason,
        "prompt_tokens": tokens,
        "completion_tokens": 2,
        "seed": 0,
        "model": model,
    }


class Builder:
    """A small run, written stage by stage as the jobs write it; no model, no cluster."""

    def __init__(self, folder, *, text="plain", engine="scripted", model="m", **settings):
        self.text, self.folder = text, folder
        llm_config = {"llm": {"model": model, "engine": engine}}
        annotate = llm_config | {"audit_queries": 2, "candidates_per_query": 3}
        self.run = Run(
            parse(
                {
                    "run_dir": str(folder / "run"),
                    "corpus": {"source": str(folder / "data")},
                    "plan": {"min_chars": 1, "variants": VARIANTS, "max_seeds_per_task": 4},
                    "generate": llm_config,
                    "mine": {"encoder": {"model": "miner-model"}},
                    "annotate": annotate,
                    "rewrite": llm_config,
                    "train": {"encoder": {"model": "backbone-model"}, "batch_queries": 2},
                    "evaluate": {"collection": str(folder / "data")},
                }
                | settings,
                where="test",
            )
        )
        self.run.dir.mkdir(parents=True)
        self._collection()

    def _collection(self):
        data = self.folder / "data"
        (data / "qrels").mkdir(parents=True)
        rows = [json.dumps({"_id": f"e{i}", "text": f"asked {i} {self.text}"}) for i in range(3)]
        (data / "queries.jsonl").write_text("\n".join(rows))
        qrels = "".join(f"e{i}\td{i}\t1\n" for i in range(3))
        (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)

    def make(self, *stages):
        for stage in stages:
            with self.run.timed(stage) as note:
                note["result"] = getattr(self, stage)() or {}
        return self

    def commit(self, kind, rows, *, inputs=(), part="part"):
        artifact = self.run.artifact(kind)
        identity = {f"input.{one}": self.run.artifact(one).stage().fingerprint for one in inputs}
        artifact.begin(identity | {"kind": kind}, version="0.1.0")
        table = rows if hasattr(rows, "num_rows") else from_rows(rows, artifact.schema, where=kind)
        artifact.commit(part, table)

    def corpus(self):
        rows = [
            {
                "doc_id": f"d{i}",
                "text": f"document {i} {self.text}",
                "title": self.text,
                "task": "generic",
                "parent_id": None,
                "text_hash": text_hash(str(i)),
                "group_id": f"g{i}",
            }
            for i in range(NUM_DOCS)
        ]
        self.commit("corpus", rows)

    def plan(self):
        corpus = self.run.artifact("corpus").read()
        plan = plan_seeds(corpus, self.run.config.plan, held_out={"d0"})
        self.commit("seeds", plan.seeds, inputs=["corpus"])
        return {f"not a seed: {key}": count for key, count in plan.funnel.items()}

    def generate(self):
        seeds = self.run.artifact("seeds").read().to_pylist()
        rows = [
            {
                "query_id": seed["query_id"],
                "query": f"query {number} {self.text}" if number > 1 else None,
                "source_doc_id": seed["source_doc_id"],
                "task": "generic",
                "status": "ok" if number > 1 else "filtered",
                **llm(None if number > 1 else f"{50 + number}% copied {self.text}"),
            }
            for number, seed in enumerate(seeds)
        ]
        self.commit("queries", rows, inputs=["seeds"])

    def usable(self):
        rows = self.run.artifact("queries").read().to_pylist()
        return [row for row in rows if row["status"] == "ok"]

    def embed(self):
        return {"document vectors": NUM_DOCS, "query vectors": len(self.usable())}

    def mine(self):
        rows = [
            {
                "query_id": row["query_id"],
                "source_doc_id": row["source_doc_id"],
                "task": "generic",
                "retriever": "miner-model",
                "doc_ids": [f"d{i}" for i in range(NUM_DOCS) if f"d{i}" != row["source_doc_id"]],
                "scores": [0.5] * (NUM_DOCS - 1),
                "num_excluded": 1,
            }
            for row in self.usable()
        ]
        self.commit("candidates", rows, inputs=["queries"])

    def judgment(self, query_id, doc_id, label):
        detail = None if label else f"no grade {self.text}"
        return {
            "query_id": query_id,
            "doc_id": doc_id,
            "relevance_label": label,
            "expected_label": label and label + 0.25,
            "confidence": None,
            "analysis": f"analysis {self.text}",
            "status": "ok" if label else "invalid",
            **llm(detail),
        }

    def annotate(self):
        grades = {"d0": 5, "d1": 1, "d2": 2, "d3": None}
        rows = [
            self.judgment(row["query_id"], doc_id, grades.get(doc_id))
            for row in self.run.artifact("candidates").read().to_pylist()
            for doc_id in row["doc_ids"][:3]
        ]
        self.commit("judgments", rows, inputs=["candidates"])

    def audit(self):
        # e0: gold above the other; e1: below. Agreement is chance.
        rows = [
            self.judgment(f"e{query}", f"d{doc}", grade)
            for query, doc, grade in ((0, 0, 4), (0, 5, 2), (1, 1, 2), (1, 5, 4))
        ]
        self.commit("audit", rows, inputs=["corpus"])

    def rewrite(self):
        rows = [
            {
                "query_id": row["query_id"],
                "rewritten_query": f"{row['query']}\nthought {self.text}",
                "status": "ok",
                **llm(),
            }
            for row in self.usable()
        ]
        self.commit("rewrites", rows, inputs=["queries"])

    def assemble(self):
        assembly = assemble_samples(
            *(self.run.artifact(kind).read() for kind in ("queries", "judgments", "rewrites")),
            corpus=self.run.corpus_store(),
            config=self.run.config.assemble,
            instructions={"generic": "Find."},
        )
        self.commit("samples", assembly.samples, inputs=["queries", "judgments", "rewrites"])
        return assembly.funnel

    def train(self, steps=4):
        directory = self.run.directory("train")
        directory.begin({"input.samples": self.run.artifact("samples").stage().fingerprint})
        for step in range(steps):
            self.log(step, loss=3.0 - step / 10)
        directory.finish({"steps": steps})

    def log(self, step, **changed):
        names = "loss query_loss rewritten_loss intensity_min intensity_median intensity_max"
        names += " intensity_capped_share positive_rank grad_norm"
        row = dict.fromkeys(names.split(), 1.0)
        row |= {"step": float(step), "learning_rate": 1e-4, "step_s": 0.5, "tokens_per_s": 100.0}
        with (self.run.dir / "train" / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(row | changed) + "\n")

    def export(self):
        self.run.directory("export").begin({})
        self.run.directory("export").finish({})

    def evaluate(self):
        right = {f"e{i}": {f"d{i}": 2.0, "d5": 1.0} for i in range(3)}
        wrong = {f"e{i}": {f"d{i}": 1.0, "d5": 2.0} for i in range(3)}
        after = wrong | {"e0": right["e0"]} | {"e1": {}}
        runs = {"bm25": right, "miner": wrong, "before": wrong, "after": after}
        card = scorecard(runs, self.run.collection, baseline="before", system="after")
        self.run.directory("evaluate").begin({})
        self.run.directory("evaluate").finish(card)


class Page(HTMLParser):
    """Text and tags of a page; fails where an element is not closed, or closed twice."""

    VOID = frozenset({"meta"})

    def __init__(self, markup):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(markup)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"{name} closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page_of(builder):
    """The report, after the checks that hold for every report."""
    markup = write_report(builder.run).read_text(encoding="utf-8")
    page = Page(markup)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action") and not name.startswith("on")
        assert name != "href" or value.startswith("#")
    style = markup.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"\b(nan|inf)\b", page.text, re.IGNORECASE)
    assert page.tags.count("svg") == len(
        [value for name, value in page.attributes if name == "viewbox"]
    )
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("whole")).make(*STAGES)


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
    assert "http" not in markup and "src=" not in markup


def test_hostile_texts_stay_texts(tmp_path):
    builder = Builder(tmp_path, text=HOSTILE, model=HOSTILE).make(*STAGES)
    page = page_of(builder)
    assert "cannot be drawn" not in page.text
    assert "\x00" not in page.text
    shown = HOSTILE.replace("\x00", "\ufffd")
    for place in ("document 0", "query", "thought", "analysis", "asked 0", "no grade"):
        assert re.search(f"{place}( \\d+)? {re.escape(shown)}", page.text), place


def test_the_verdict_is_the_scorecard_s(whole):
    text = page_of(whole).text
    card = whole.run.directory("evaluate").finished()
    figures = {name: f"{values['ndcg@10']:.4f}" for name, values in card["systems"].items()}
    assert figures["before"] != figures["after"]
    assert f"from {figures['before']} to {figures['after']}" in text
    assert f"BM25 {figures['bm25']}, the miner {figures['miner']}" in text
    assert "No difference that these queries can show" in text
    assert "Ranked better than the trained model, without any training: BM25" in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.2, "Training helped"), (-0.2, -0.01, "Training did harm"), (-0.1, 0.1, "No differ")],
)
def test_the_verdict_follows_the_interval(whole, low, high, said, monkeypatch):
    card = whole.run.directory("evaluate").finished()
    card["comparison"] |= {"low": low, "high": high}
    monkeypatch.setattr("reasonembed.artifacts.StageDirectory.finished", lambda self: card)
    assert said in page_of(whole).text


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


def test_agreement_is_stated_plainly(whole):
    text = page_of(whole).text
    assert "grade (1 to 5), which makes the samples, is no better than guessing: AUC 0.50" in text
    assert "No gain can be credited" in text
    assert "No language model ran here" in text


@pytest.mark.parametrize(
    ("model", "said"),
    [("SmolLM2-135M-Instruct", "135 million parameters"), ("Qwen/Qwen3-32B", "hold for these")],
)
def test_reading_depends_on_the_models(tmp_path, model, said):
    assert said in page_of(Builder(tmp_path, engine="openai", model=model)).text


def test_examples_do_not_depend_on_the_moment(whole):
    first, second = (page_of(whole).text.split("Examples")[2] for _ in range(2))
    assert first == second
    assert "Best positive d0, label 5.25" in first
    assert "Hardest negative (the miner's first) d1, label 1.25" in first
    assert "thought plain" in first and "Rows that failed" in first


def test_no_sample_and_one_step(tmp_path):
    builder = Builder(tmp_path).make(*STAGES[:8])
    builder.commit("samples", ARTIFACTS["samples"].schema.empty_table(), inputs=["queries"])
    builder.run.directory("train").begin({})
    builder.log(0)
    text = page_of(builder).text
    assert "No query became a sample" in text and "1 steps" in text
    assert "cannot be drawn" not in text


def test_a_step_that_stands_twice_counts_as_its_later_line(tmp_path):
    builder = Builder(tmp_path).make(*STAGES[:10])
    builder.log(3, loss=0.123456)
    builder.log(2, loss=math.nan, grad_norm=math.inf)
    markup = write_report(builder.run).read_text(encoding="utf-8")
    page = page_of(builder)
    assert "4 steps" in page.text and "3: 0.123456" in markup and "3: 2.7" not in markup
    assert "2: 2.8" not in markup


def test_torn_lines_cost_nothing_else(tmp_path):
    builder = Builder(tmp_path).make(*STAGES[:10])
    for name in ("timeline.jsonl", "train/log.jsonl"):
        with (builder.run.dir / name).open("a") as stream:
            stream.write('{"stage": "exp')
    text = page_of(builder).text
    assert "10 of 12 stages are done" in text and "4 steps" in text


def test_a_damaged_part_costs_its_sections_alone(tmp_path):
    builder = Builder(tmp_path).make(*STAGES)
    (builder.run.dir / "judgments" / "data" / "part.parquet").write_bytes(b"torn")
    text = page_of(builder).text
    assert "cannot be drawn: StorageError" in text
    assert "Gained most" in text and "Mean rank of the positive" in text


def test_odd_notes_are_shown_as_dashes(tmp_path):
    builder = Builder(tmp_path).make("corpus", "plan")
    with (builder.run.dir / "timeline.jsonl").open("a") as stream:
        stream.write('{"stage": "generate"}\n[1]\n{"seconds": NaN, "stage": "generate"}\n')
        stream.write('{"stage": "plan", "outcome": "done", "result": {"not a seed: x": "many"}}\n')
    assert "cannot be drawn" not in page_of(builder).text


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


def test_a_failed_stage_is_seen(tmp_path):
    builder = Builder(tmp_path).make("corpus")
    with pytest.raises(RuntimeError), builder.run.timed("plan"):
        raise RuntimeError("stopped")
    page = page_of(builder)
    assert "✗ plan" in page.text and "1 of 12 stages are done, plan is next" in page.text


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


def test_runtime_does_not_change_the_fingerprint(tmp_path):
    def shown(name, **settings):
        text = page_of(Builder(tmp_path / name, **settings)).text
        return re.search(r"Configuration ([0-9a-f]{32})", text)[1]

    # Same corpus and collection names: only the fields under test differ.
    data = {"corpus": {"source": "python-stdlib"}, "evaluate": {"collection": "python-stdlib"}}
    assert shown("a", **data) == shown("b", runtime={"batch_tokens": 7}, **data)
    assert shown("c", **data) != shown("d", export={"golden_texts": 3}, **data)


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    builder = Builder(tmp_path)
    (builder.run.dir / ".report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(builder.run)


# ---- charts -------------------------------------------------------------------------------------

ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(ANY, ANY), max_size=20), st.sampled_from(["line", "dots"]))
def test_any_points_make_a_chart_inside_its_frame(points, form):
    markup = line_chart("t", [Series("a", points, form), Series("b", points)], x_label="x")
    Page(markup)
    assert not re.search(r"\b(nan|inf)\b", markup)
    for pair in re.findall(r'points="([^"]*)"', markup):
        for x, y in (map(float, point.split(",")) for point in pair.split()):
            assert 0 <= x <= 440 and 0 <= y <= 230


def test_a_chart_keeps_the_ends_of_a_long_series():
    points = [(float(step), float(step)) for step in range(10_000)]
    drawn = re.search(r'points="([^"]*)"', line_chart("t", [Series("a", points)], x_label="x"))[1]
    first, *_, last = drawn.split()
    assert first.startswith("54.0,") and last.split(",")[0] == "432.0"
    assert len(drawn.split()) == 300


def test_smoothing_is_a_mean_of_neighbours():
    values = [3.0, 0.0, 6.0, math.nan, 9.0]
    points = list(enumerate(values))
    assert smoothed(points) == [(0, 1.5), (1, 3.0), (2, 5.0), (4, 7.5)]


def test_bars_are_as_high_as_their_values():
    markup = bar_chart("t", [("a", 1.0), ("b", 2.0), ("c", 0.0)], x_label="x")
    low, high, none = (float(found) for found in re.findall(r' height="([\d.]+)"', markup))
    assert high == pytest.approx(2 * low, abs=0.1) and none == 0
    assert "no data" in bar_chart("t", [("a", 0.0)], x_label="x")


@given(ANY)
def test_a_meter_is_never_wider_than_its_frame(share):
    width = float(re.search(r"width:([\d.]+)%", meter(share, label="l"))[1])
    assert 0 <= width <= 100


def test_markup_is_escaped_once():
    inner = tag("b", "<&>", title='"')
    assert tag("p", inner, "'") == '<p><b title="&quot;">&lt;&amp;&gt;</b>&#x27;</p>'


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,234"), (None, "–"), (math.nan, "–"), (math.inf, "–"), (True, "–"), ("1", "–")],
)
def test_numbers(value, shown):
    assert number(value) == shown
