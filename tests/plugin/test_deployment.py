"""The deployment examples: parsed, held to Kubernetes' schemas, and to the settings and launch lines that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsa_plugin import launch_lines
from nsa_plugin.cli import main
from nsa_plugin.settings import NAMES, PREFIX, Settings

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
ENGINES = [("kubernetes", "sglang"), ("compose", "vllm")]
KUBERNETES = ("1.30", "1.37")
"""Releases whose schemas are asked: the oldest and the newest of these examples."""


@pytest.fixture
def folder(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath / "examples/deployment"


def manifests(folder: Path) -> dict[str, Any]:
    """By kind and name."""
    documents = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in documents}


def environments(folder: Path) -> Iterator[dict[str, str]]:
    yield manifests(folder)["ConfigMap/nsa-plugin"]["data"]
    yield yaml.safe_load((folder / "compose.yaml").read_text())["services"]["vllm"]["environment"]


@pytest.mark.parametrize("release", KUBERNETES)
def test_the_manifests_fit_kubernetes_schemas(folder: Path, release: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for manifest in manifests(folder).values():
        validate.validate(manifest, release, strict=True)
    wrong = manifests(folder)["Deployment/sglang"]
    wrong["spec"]["template"]["spec"]["containers"][0]["envFroom"] = []
    with pytest.raises(validate.ValidationError, match="envFroom"):
        validate.validate(wrong, release, strict=True)


def test_the_settings_are_valid(folder: Path) -> None:
    for environment in environments(folder):
        settings = Settings.from_environment(environment)
        assert settings.metrics == {"prometheus"} and settings.switch_file is not None


def test_every_setting_that_a_file_names_exists(folder: Path) -> None:
    known = {PREFIX + name for name in NAMES.values()}
    for file in folder.iterdir():
        assert set(re.findall(rf"{PREFIX}[A-Z_]+", file.read_text())) <= known, file.name


def test_what_the_pod_mounts_is_where_the_settings_look(folder: Path) -> None:
    there = manifests(folder)
    settings = there["ConfigMap/nsa-plugin"]["data"]
    pod = there["Deployment/sglang"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in (*pod["initContainers"], *pod["containers"]):
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} <= volumes.keys()
        assert not any("subPath" in mount for mount in mounts.values()), "such a mount never changes"
        switch_file = Path(settings["NSA_PLUGIN_SWITCH_FILE"])
        source = volumes[mounts[str(switch_file.parent)]["name"]]["configMap"]
        switch = there[f"ConfigMap/{source['name']}"]
        assert switch_file.name not in switch.get("data", {}), "the plugin would start switched off"
        for variable in ("NSA_PLUGIN_REPRO_DIR", "PROMETHEUS_MULTIPROC_DIR"):
            assert "emptyDir" in volumes[mounts[settings[variable]]["name"]]
        assert {"configMapRef": {"name": "nsa-plugin"}} in container["envFrom"]
    assert 'rm -rf "$PROMETHEUS_MULTIPROC_DIR"/*' in pod["containers"][0]["args"][0]


def test_what_compose_mounts_is_where_the_settings_look(folder: Path) -> None:
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["vllm"]
    assert service["environment"]["PROMETHEUS_MULTIPROC_DIR"] in service["tmpfs"]
    (volume,) = service["volumes"]
    assert volume.split(":")[1] == str(Path(service["environment"]["NSA_PLUGIN_SWITCH_FILE"]).parent)
    root = (folder / service["build"]["context"]).resolve()
    assert (root / "pyproject.toml").is_file() and (root / service["build"]["dockerfile"]).is_file()
    assert service["build"]["args"].keys() == {"ENGINE_IMAGE"}


def launched(text: str) -> list[str]:
    """The engine's arguments in a shell text."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    return words[words.index("sglang.launch_server" if "sglang.launch_server" in words else "serve") + 1 :]


@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_the_launch_lines_are_the_printed_ones(folder: Path, kind: str, engine: str) -> None:
    if kind == "kubernetes":
        pod = manifests(folder)["Deployment/sglang"]["spec"]["template"]["spec"]
        line, where = pod["containers"][0]["args"][0], ["--enable-metrics", "--host", "0.0.0.0", "--port", "30000"]
    else:
        line = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["vllm"]["command"][0]
        where = []
    assert launched(line) == [*launch_lines.arguments(engine), *where]


def test_the_init_containers_verb_exists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (doctor,) = manifests(folder)["Deployment/sglang"]["spec"]["template"]["spec"]["initContainers"]
    assert doctor["command"][0] == "nsa-plugin"
    with pytest.raises(SystemExit) as stopped:
        main([*doctor["command"][1:], "--help"])
    assert stopped.value.code == 0


def test_the_containerfile_installs_what_the_package_needs(folder: Path, pytestconfig: pytest.Config) -> None:
    import tomllib

    text = (folder / "Containerfile").read_text()
    assert re.findall(r"^(?:ARG|FROM) .*", text, re.MULTILINE) == ["ARG ENGINE_IMAGE", "FROM ${ENGINE_IMAGE}"]
    project = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["project"]
    needed = {need for need in project["dependencies"] if not need.startswith("torch")}
    assert set(re.findall(r'"(\w+>=[\d.]+)"', text)) == needed, "the engine brings torch, and pip installs the rest"


def test_the_files_that_the_readme_names_exist(folder: Path) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text())
    assert len(targets) >= 4
    assert all((folder / target).exists() for target in targets)
