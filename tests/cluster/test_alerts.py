"""Alerts parse, ask for what our code reports, and name labels that their result has."""

import re

import promql_parser
import pytest

from ray_jobs.metrics import METRICS
from reasonembed.serving.metrics import Metrics
from tests.cluster.files import documents

GROUPS = documents("alerts.yaml")[0]["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
EACH = pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
RAY_PREFIX = "ray_"  # Ray's, before the names of what its users report
_SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "info": ("_info",),
}
_SERVICE_LABELS = {"ingress", "le", "reason", "role", "route", "status"}


def selectors(expression):
    """Names and labels of the series that an expression asks for."""
    found = []

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {one.name for one in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def reported():
    """Labels of each series that our code reports, by its name as Prometheus has it."""
    found = {}
    for metric in Metrics(ingress="a").registry.collect():
        for suffix in _SUFFIXES.get(metric.type, ("",)):
            found[metric.name + suffix] = _SERVICE_LABELS
    for name, metric in METRICS.items():
        for suffix in _SUFFIXES["histogram"] if metric.kind == "histogram" else ("",):
            found[RAY_PREFIX + name + suffix] = {*metric.labels, "le"}
    return found


@EACH
def test_the_fields_are_those_of_prometheus(rule):
    assert {"alert", "expr", "for", "labels", "annotations"} == rule.keys()
    assert promql_parser.parse_duration(rule["for"]).total_seconds() >= 60
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert {"summary"} <= rule["annotations"].keys() <= {"summary", "description"}


@EACH
def test_it_asks_for_what_our_code_reports(rule):
    known, asked = reported(), selectors(rule["expr"])
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"]))))
    assert asked
    for name, labels in asked:
        assert labels | grouped <= known[name], name


@EACH
def test_it_names_labels_that_its_result_has(rule):
    named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
    kept = set()
    for names in re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"]):
        kept |= {name.strip() for name in names.split(",")}
    assert named <= kept


def is_one_series_a_group(node):
    """Whether labels that our code does not know (`instance`, `WorkerId`) are summed away."""
    if isinstance(node, promql_parser.ParenExpr):
        return is_one_series_a_group(node.expr)
    if isinstance(node, promql_parser.BinaryExpr):
        sides = [one for one in (node.lhs, node.rhs) if not is_number(one)]
        return all(is_one_series_a_group(one) for one in sides)
    if isinstance(node, promql_parser.Call) and node.func.name == "histogram_quantile":
        return is_one_series_a_group(node.args[1])
    return isinstance(node, promql_parser.AggregateExpr)


def is_number(node):
    return isinstance(node, promql_parser.NumberLiteral)


@EACH
def test_what_is_compared_is_one_series_a_group(rule):
    """Shards and drivers that were started again have series of their own: else many match many."""
    assert is_one_series_a_group(promql_parser.parse(rule["expr"])) or "absent" in rule["expr"]


def test_series_that_are_not_summed_are_found():
    broken = "avg_over_time(a[5m]) > on (run) 0.5 * sum by (run) (b)"
    assert not is_one_series_a_group(promql_parser.parse(broken))


def test_a_stage_that_never_committed_stands_still_too():
    (rule,) = [rule for rule in RULES if rule["alert"] == "StageStandsStill"]
    # A counter of an actor has no series before its first commit, so nothing would be compared.
    kinds = {METRICS[name.removeprefix(RAY_PREFIX)].kind for name, _ in selectors(rule["expr"])}
    assert kinds == {"gauge"}


def test_names_are_told_apart():
    groups = {group["name"] for group in GROUPS}
    assert len(groups) == len(GROUPS)
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_what_is_misspelt_is_found():
    assert selectors("sum(rate(a_total{b='c'}[5m])) / d") == [("a_total", {"b"}), ("d", set())]
    with pytest.raises(ValueError):
        promql_parser.parse("sum(rate(a_total[5m])")
