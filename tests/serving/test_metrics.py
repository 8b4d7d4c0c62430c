import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from reasonembed.serving.metrics import Metrics
from reasonembed.serving.protocol import BatchStats, ServedModel

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "serving.json"
NAMES = {
    "reasonembed_requests_total": {"route", "status"},
    "reasonembed_request_seconds": {"route"},
    "reasonembed_tokenize_seconds": set(),
    "reasonembed_queue_seconds": set(),
    "reasonembed_forward_seconds": set(),
    "reasonembed_serialize_seconds": set(),
    "reasonembed_tokens_total": {"role"},
    "reasonembed_batch_tokens": set(),
    "reasonembed_batch_fill_ratio": set(),
    "reasonembed_padding_ratio": set(),
    "reasonembed_queue_tokens": set(),
    "reasonembed_rejected_total": {"reason"},
    "reasonembed_truncated_inputs_total": set(),
    "reasonembed_cache_hits_total": set(),
    "reasonembed_cache_misses_total": set(),
    "reasonembed_model_info": {"name", "fingerprint", "dimension"},
}
MODEL = ServedModel(
    name='odd "name"\n',
    fingerprint="f" * 16,
    dimension=8,
    max_query_tokens=64,
    max_document_tokens=64,
    vocabulary_size=100,
    created=0,
)


def used():
    """Metrics in which everything was counted once."""
    metrics = Metrics()
    metrics.describe(MODEL)
    metrics.requests.labels("/v1/embeddings", "200").inc()
    metrics.request_seconds.labels("/v1/embeddings").observe(0.02)
    metrics.tokens.labels("query").inc(7)
    metrics.rejected.labels("overloaded").inc()
    return metrics


def samples(metrics, accept=""):
    text, content_type = metrics.exposition(accept)
    read = parse_openmetrics if "openmetrics" in content_type else parse
    return [sample for family in read(text.decode()) for sample in family.samples]


def test_every_documented_name_is_there_with_its_labels():
    found = {}
    for sample in samples(used()):
        name = re.sub(r"_(bucket|sum|count)$", "", sample.name)
        found.setdefault(name, set()).update(set(sample.labels) - {"le"})
    assert found == NAMES


def test_forms():
    metrics = used()
    text, content_type = metrics.exposition()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert text.endswith(b"\n") and b"_created" not in text
    opened, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert opened.endswith(b"# EOF\n")
    accept = "application/openmetrics-text; version=1.0.0"
    assert {s.name for s in samples(metrics)} == {s.name for s in samples(metrics, accept)}


@pytest.mark.parametrize("accept", ["", "*/*", "text/html", "application/json;;q=,", "text/plain"])
def test_whoever_asks_oddly_gets_the_plain_form(accept):
    assert Metrics().exposition(accept)[1] == "text/plain; version=0.0.4; charset=utf-8"


def test_names_follow_prometheus_rules():
    text = used().exposition()[0].decode()
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    for name, kind in kinds.items():
        assert name.startswith("reasonembed_")
        assert (kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mib|percent)(_|$)", name)


def test_several_ingresses_name_themselves_in_every_sample():
    metrics = Metrics(ingress="replica-1")
    metrics.requests.labels("/health", "200").inc()
    found = samples(metrics)
    assert found and all(sample.labels["ingress"] == "replica-1" for sample in found)


def test_two_services_do_not_share_counts():
    one, other = Metrics(), Metrics()
    one.truncated_inputs.inc()
    assert other.registry.get_sample_value("reasonembed_truncated_inputs_total") == 0


def test_batches_are_ratios_of_their_budget():
    metrics = Metrics()
    metrics.took_part(
        [
            BatchStats(texts=2, tokens=60, padded_tokens=80, seconds=1, budget_tokens=100),
            BatchStats(texts=1, tokens=150, padded_tokens=150, seconds=1, budget_tokens=100),
        ]
    )
    value = metrics.registry.get_sample_value
    assert value("reasonembed_batch_tokens_sum") == 210
    assert value("reasonembed_batch_fill_ratio_sum") == pytest.approx(0.8 + 1.0)
    assert value("reasonembed_padding_ratio_sum") == pytest.approx(0.25)
    assert value("reasonembed_padding_ratio_count") == 2


# The dashboard.


@pytest.fixture(scope="module")
def board():
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def expressions(board):
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in board["templating"]["list"]:
        yield variable.get("definition", "")


def test_every_metric_of_the_dashboard_is_ours_or_ray_serves(board):
    exposed = {sample.name for sample in samples(used())}
    named = {
        name
        for text in expressions(board)
        for name in re.findall(r"\b[a-z]+_[a-z_]+\b", re.sub(r"\$__\w+|\"[^\"]*\"", "", text))
    } - {"histogram_quantile", "label_values"}
    assert named
    for name in named:
        assert name in exposed or name.startswith("ray_serve_"), name


def test_the_dashboard_shows_every_metric_of_ours(board):
    shown = " ".join(expressions(board))
    assert [name for name in NAMES if name not in shown] == []


def test_labels_of_the_dashboard_are_those_of_the_metrics(board):
    for text in expressions(board):
        for name, selectors in re.findall(r"(reasonembed_\w+)\{([^}]*)\}", text):
            known = NAMES[re.sub(r"_(bucket|sum|count)$", "", name)] | {"job"}
            assert set(re.findall(r"(\w+)(?:=|!)", selectors)) <= known, text


def test_the_dashboard_is_whole(board):
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used_ones = set(re.findall(r"\$\{?([a-z]+)", json.dumps(board)))
    assert used_ones <= variables
    for panel in panels:
        if panel["type"] != "row":
            assert panel["title"] and panel["description"] and panel["targets"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_panels_do_not_overlap(board):
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
