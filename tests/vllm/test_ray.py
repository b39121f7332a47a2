"""Settings reach Ray's workers by vLLM's own choice of what to copy from the driver's environment."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_plugin import entry
from nsa_plugin.adapters.vllm import ray_settings as ray
from nsa_plugin.settings import NAMES, PREFIX

SETTINGS = [PREFIX + name for name in NAMES.values()]


@pytest.fixture(autouse=True)
def _no_settings() -> Iterator[None]:
    others = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "VLLM_RAY_EXTRA"))}
    with mock.patch.dict(os.environ, others, clear=True):
        yield


def copied() -> set[str]:
    """What of the environment vLLM copies to Ray's actors."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    return {name for name in get_env_vars_to_copy() if name in os.environ}


@given(
    st.dictionaries(st.sampled_from(SETTINGS), st.text("xyz", min_size=1), min_size=1),
    st.lists(st.sampled_from(["MINE_", " MY_ ", "", "NSA_", PREFIX]), max_size=4),
)
def test_every_setting_is_copied_and_what_the_user_has_copied_stays(
    settings: dict[str, str], prefixes: list[str]
) -> None:
    theirs = {"MINE_A": "1", "MY_B": "2", "OTHER": "3", "VLLM_PLUGINS": "nsa_plugin"}
    given = {ray.CARRIED: ",".join(prefixes)} if prefixes else {}
    with mock.patch.dict(os.environ, theirs | settings | given):
        before = copied()
        for _ in range(2):
            assert ray.carry_settings(PREFIX) == ""
        assert copied() == before | set(settings) | {ray.CARRIED}
        assert "VLLM_PLUGINS" in before and "OTHER" not in copied()
        assert os.environ[ray.CARRIED].count(PREFIX) <= max(1, prefixes.count(PREFIX))


def test_without_a_setting_nothing_changes() -> None:
    before = dict(os.environ)
    assert ray.carry_settings(PREFIX) == ""
    assert dict(os.environ) == before


@pytest.mark.parametrize("has_ray", [True, False])
def test_a_vllm_without_means_is_told_where_ray_could_be_used(has_ray: bool, caplog: Any) -> None:
    import vllm.envs

    known = {name: get for name, get in vllm.envs.environment_variables.items() if name != ray.CARRIED}
    find = importlib.util.find_spec
    spec = importlib.util.spec_from_loader("ray", None) if has_ray else None
    with (
        mock.patch.object(vllm.envs, "environment_variables", known),
        mock.patch.object(
            importlib.util, "find_spec", lambda name, *rest: spec if name == "ray" else find(name, *rest)
        ),
        mock.patch.dict(os.environ, NSA_PLUGIN_STRATEGY="off", NSA_PLUGIN_VERIFY="10"),
        caplog.at_level(logging.WARNING, "vllm.plugins.nsa_plugin"),
    ):
        problem = ray.carry_settings(PREFIX)
    assert bool(problem) == has_ray
    assert not has_ray or problem.endswith("NSA_PLUGIN_STRATEGY='off' NSA_PLUGIN_VERIFY='10' ray start …")


DRIVER = """
import json, os
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.ray.ray_env import get_env_vars_to_copy
print(json.dumps(sorted(name for name in get_env_vars_to_copy() if name in os.environ)))
"""


@pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="vllm.general_plugins")),
    reason="nsa-plugin is not installed in this environment",
)
@pytest.mark.parametrize(
    "settings", [{"NSA_PLUGIN_STRATEGY": "off", "NSA_PLUGIN_SWITCH_FILE": "/x"}, {"NSA_PLUGIN_STRATEGY": "wrong"}]
)
def test_a_driver_that_leaves_vllm_alone_has_its_settings_copied_too(settings: dict[str, str]) -> None:
    """Switched off there, or refused because of its settings: the workers must not be on."""
    environment = {**os.environ, **settings, "VLLM_PLUGINS": "nsa_plugin"}
    done = subprocess.run([sys.executable, "-c", DRIVER], env=environment, capture_output=True, text=True, check=True)
    assert {*settings, "VLLM_PLUGINS"} <= set(json.loads(done.stdout.splitlines()[-1]))


def test_an_error_is_logged_and_stops_nothing(caplog: Any) -> None:
    with mock.patch.object(ray, "carry_settings", side_effect=OSError("planted")), mock.patch.object(entry, "register"):
        entry.register_vllm()
    assert "settings may not reach Ray's workers: planted" in caplog.text
