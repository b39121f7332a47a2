"""Alarms: the first event of each kind is seen, the rules fire when they should, rules and dashboard ask for what there is."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, TokenTable, monitoring
from nsa_plugin.adapters.reporting import Fallback, Mismatch, Stage
from nsa_plugin.host import Host
from nsa_plugin.settings import NAMES, Settings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="prometheus_client is not installed"
)
PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
BATCH = BatchDescriptor(
    ForwardMode.DECODE, 1, torch.tensor([3]), TokenTable(torch.arange(64).view(1, 64), torch.tensor([0]))
)
EVENTS = ("fall-back", "verification", "mismatch")
PATHS = (f"path {number}" for number in itertools.count())
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def event_counters() -> Series:
    """What a scrape sees of the counters of events."""
    metrics = monitoring.prometheus()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for counter in (metrics.fallbacks, metrics.verifications, metrics.mismatches)
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def reporting() -> Host:
    return Host(Settings(metrics=frozenset({"prometheus"})))


def happen(host: Host, event: str, path: str, strategy: str, stage: Stage, error: Exception) -> None:
    """One event of each kind; a mismatch is what a verification finds."""
    logger = logging.getLogger("toy")
    if event == "fall-back":
        host.fell_back(logger, Fallback("toy", path, stage, strategy, error))
        return
    host.verified("toy", path, strategy)
    if event == "mismatch":
        values = ((0, {"page_table_1": torch.zeros(2)}, {"page_table_1": torch.ones(2)}),)
        host.mismatched(logger, Mismatch("toy", path, strategy, BATCH, Geometry(8, 16, 64), values))


def become_known(host: Host, how: str, path: str) -> None:
    """What an adapter calls first of all for a path."""
    if how == "instrument":
        host.instrument(lambda batch: None, "toy", path, "graph", 3)
    elif how == "durations":
        host.durations("toy", path, "graph", 3)
    elif how == "buffers":
        host.buffers("toy", path, "graph", 8)
    else:
        happen(host, "fall-back", path, "graph", "capture", ValueError())


class Unforeseen(Exception):
    """An error type that nothing could have named before."""


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["instrument", "durations", "buffers", "a fall-back"]),
    st.lists(
        st.tuples(
            st.sampled_from(EVENTS),
            st.sampled_from(monitoring.SERVED_WITH),
            st.sampled_from(get_args(Stage)),
            st.sampled_from([ValueError("a"), torch.OutOfMemoryError("b"), Unforeseen("c")]),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_an_increase_sees_the_first_event_of_each_kind(how: str, events: list[tuple[str, str, Stage, Any]]) -> None:
    """`increase()` is by how much a series grew from one scrape to the next; one that the earlier scrape lacks counts 0."""
    host, path = reporting(), next(PATHS)
    become_known(host, how, path)
    seen = 0.0
    for event, strategy, stage, error in events:
        before = event_counters()
        happen(host, event, path, strategy, stage, error)
        seen += sum(value - before[which] for which, value in event_counters().items() if which in before)
    expected = {"fall-back": 1, "verification": 1, "mismatch": 2}
    assert seen == sum(expected[event] for event, *_ in events)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([str(shutil.which("promtool")), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@PROMTOOL
def test_prometheus_sees_the_first_event_of_each_kind(tmp_path: Path) -> None:
    """`increase()` itself, over the series that two scrapes give: before and after one event of each kind."""
    host, path = reporting(), next(PATHS)
    become_known(host, "instrument", path)
    before = event_counters()
    for event in ("fall-back", "mismatch"):
        happen(host, event, path, "graph", "replay", Unforeseen())
    series, asked = [], []
    for (name, labels), value in event_counters().items():
        if ("path", path) not in labels:
            continue
        which = "{" + ",".join(f'{label}="{text}"' for label, text in labels) + "}"
        start = f"{before[name, labels]:g}" if (name, labels) in before else "_"
        series.append({"series": name + which, "values": f"{start}x40 {value:g}x200"})
        if value:
            expr = f"increase({name}{which}[1h]) > bool 0.9"
            asked.append({"expr": expr, "eval_time": "60m", "exp_samples": [{"labels": which, "value": 1}]})
    assert len(asked) == len(EVENTS)
    file = tmp_path / "increase.yml"
    file.write_text(json.dumps({"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": asked}]}))
    promtool("test", "rules", file)


@PROMTOOL
def test_each_alert_fires_when_it_should_and_not_before(pytestconfig: pytest.Config) -> None:
    promtool("check", "rules", pytestconfig.rootpath / "examples/monitoring/alerts.yml")
    promtool("test", "rules", pytestconfig.rootpath / "tests/plugin/alerts.yml")


def series_that_there_are() -> dict[str, set[str]]:
    """Labels of each of this package's series, after one event of every kind."""
    import prometheus_client

    host, path = reporting(), next(PATHS)
    durations = host.durations("toy", path, "share", 3)
    assert durations is not None
    durations(1e-5)
    host.buffers("toy", path, "share", 1)
    for event in EVENTS:
        happen(host, event, path, "share", "replay", ValueError())
    host.flush_metrics()
    return {
        sample.name: set(sample.labels)
        for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("nsa_plugin_")
    }


def test_no_label_is_one_that_means_something_else_in_an_engines_own_metrics() -> None:
    """vLLM numbers its engines with `engine`; sglang has the ranks; Prometheus adds `job` and `instance`."""
    theirs = {"engine", "model_name", "engine_type", "tp_rank", "pp_rank", "dp_rank", "moe_ep_rank", "job", "instance"}
    assert not theirs & set().union(*series_that_there_are().values())


def test_the_alert_rules_ask_for_metrics_labels_and_settings_that_there_are(pytestconfig: pytest.Config) -> None:
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    there = series_that_there_are()
    file = pytestconfig.rootpath / "examples/monitoring/alerts.yml"
    (group,) = yaml.safe_load(file.read_text())["groups"]
    assert len(group["rules"]) == 4
    for rule in group["rules"]:
        (name,) = re.findall(r"nsa_plugin_\w+", rule["expr"])
        scraped = {"job", "instance"}
        left = scraped if "by (job, instance)" in rule["expr"] else scraped | there[name]
        text = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= left, rule["alert"]
        assert set(re.findall(r'(\w+)="', rule["expr"])) <= there[name], rule["alert"]
        assert set(re.findall(r"NSA_PLUGIN_(\w+)", text)) <= set(NAMES.values()), rule["alert"]


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(pytestconfig: pytest.Config) -> None:
    there = series_that_there_are()
    dashboard = json.loads((pytestconfig.rootpath / "examples/monitoring/grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) >= 12
    names = set()
    for expression in asked:
        (name,) = re.findall(r"nsa_plugin_\w+", expression)
        (labels,) = re.findall(r"by \(([^)]*)\)", expression)
        assert set(labels.split(", ")) <= there[name], expression
        names.add(name)
    assert {name for name in there if not name.endswith("_created")} == names
    places = [tuple(panel["gridPos"][side] for side in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
