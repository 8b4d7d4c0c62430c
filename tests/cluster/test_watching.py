"""Dashboard and alerts ask for metrics, and for labels of them, that there are."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from ray_jobs.metrics import ACTOR_STATES, METRICS
from reasonembed.schemas import Status
from tests.serving.test_metrics import NAMES as SERVING

CLUSTER = Path(__file__).parents[2] / "cluster"
PREFIX = "ray_"  # Ray's, before names that jobs report
VALUES = {
    "status": {str(status) for status in Status},
    "kind": {"prompt", "cached", "completion", "spent", "planned"},
    "state": set(ACTOR_STATES),
}
_PART = r"_(bucket|sum|count)$"


@pytest.fixture(scope="module")
def board():
    return json.loads((CLUSTER / "grafana" / "pipeline.json").read_text(encoding="utf-8"))


def of_board():
    board = json.loads((CLUSTER / "grafana" / "pipeline.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (one["definition"] for one in board["templating"]["list"] if "definition" in one)


def of_alerts():
    rules = yaml.safe_load((CLUSTER / "alerts.yaml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


EXPRESSIONS = [*of_board(), *of_alerts()]


def labels_of(name):
    """Ours of a metric, as Prometheus has its name; None where there is no such metric."""
    bare = re.sub(_PART, "", name)
    if name.startswith(PREFIX):
        metric = METRICS.get(bare.removeprefix(PREFIX))
        if metric is None or (bare != name) != (metric.kind == "histogram"):
            return None  # a histogram has parts and no value of its own
        return set(metric.labels)
    return SERVING.get(name, SERVING.get(bare))


def names_in(text):
    return set(re.findall(r"\b(?:ray_)?reasonembed_\w+", text))


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_every_metric_exists(text):
    for name in names_in(text):
        assert labels_of(name) is not None, name


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_selectors_use_labels_and_values_that_metrics_have(text):
    for name, selectors in re.findall(r"((?:ray_)?reasonembed_\w+)\{([^}]*)\}", text):
        for label, _, wanted in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selectors):
            assert label in labels_of(name) | {"job"}, (name, label)
            if name.startswith(PREFIX) and label in VALUES:
                assert set(wanted.split("|")) <= VALUES[label], (name, wanted)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_sums_keep_labels_that_the_metrics_of_the_sum_have(text):
    known = set().union(*(labels_of(name) for name in names_in(text)), {"le", "NodeType"})
    for group in re.findall(r"\b(?:by|on|group_left) ?\(([^)]*)\)", text):
        assert set(filter(None, re.split(r",\s*", group))) <= known, text


def test_the_dashboard_shows_every_metric_of_a_run():
    shown = {re.sub(_PART, "", name) for text in of_board() for name in names_in(text)}
    assert shown == {PREFIX + name for name in METRICS}


def test_names_follow_prometheus_rules():
    for name, metric in METRICS.items():
        assert (metric.kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|minutes|kb|mib|percent)(_|$)", name)
        assert metric.text[0].isupper() and not metric.text.endswith(".")


def test_the_dashboard_is_whole(board):
    other = json.loads((CLUSTER / "grafana" / "serving.json").read_text(encoding="utf-8"))
    assert board.keys() == other.keys() and board["uid"] != other["uid"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", json.dumps(board))) == variables
    for panel in panels:
        if panel["type"] != "row":
            assert panel["title"] and panel["description"].endswith(".") and panel["targets"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)
            assert all(target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap(board):
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
