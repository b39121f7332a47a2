"""The checks. They hide GPUs from this process first, and import an engine only if it is installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nsa_plugin import launch_lines, monitoring
from nsa_plugin.adapters.base import Adapter, PathPlan
from nsa_plugin.adapters.probe import installed_version
from nsa_plugin.host import Host
from nsa_plugin.settings import SettingError, Settings

Status = Literal["ok", "note", "fail"]
ENGINES = ("sglang", "vllm")
VERSIONS = ("nsa-plugin", "torch", "triton", "pluggy", "prometheus-client")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes
    ----------
    section : "environment", "setting", "engine", "path" or "plugin"
    name : what was looked at
    detail : what was found
    status : "ok"; "note": worth knowing; "fail": something that was asked for can't be had
    fix : what to do about it; empty if nothing is to be done
    """

    section: str
    name: str
    status: Status
    detail: str
    fix: str = ""


def diagnose() -> list[Check]:
    """Run all checks. No GPU is touched: `nvidia-smi` and `/proc` tell of GPUs and driver."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpus = _gpus()
    checks = [*_environment(gpus)]
    try:
        settings = Settings.from_environment()
    except SettingError as error:
        return [
            *checks,
            Check("setting", "NSA_PLUGIN_*", "fail", str(error), "the plugin leaves every engine as it is"),
        ]
    checks += _settings(settings)
    host = Host(settings)
    loaded = host.manager.load_third_parties()
    adapters = host.manager.adapters()
    for name in dict.fromkeys((*ENGINES, *adapters)):
        checks += _engine(host, name, adapters.get(name), bool(gpus))
    if not any(installed(name) for name in ENGINES):
        status: Status = "fail" if settings.given & {"strategy", "verify", "step_lengths"} else "note"
        fix = "install the plugin into the engine's own environment"
        checks.append(Check("engine", "any", status, "neither sglang nor vLLM is installed here", fix))
    checks += _plugins(host, loaded)
    return checks


def installed(engine: str) -> bool:
    """Whether a distribution of that name is installed."""
    return installed_version(engine) != "unknown"


def _environment(gpus: list[str]) -> Iterator[Check]:
    yield Check("environment", "python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name in VERSIONS:
        yield Check("environment", name, "ok", installed_version(name).replace("unknown", "not installed"))
    import torch

    yield Check("environment", "CUDA toolkit of torch", "ok", torch.version.cuda or "none: a build without CUDA")
    for index, gpu in enumerate(gpus):
        yield Check("environment", f"GPU {index}", "ok", gpu)
    if not gpus:
        fix = "" if torch.version.cuda is None else "check the driver (nvidia-smi) and the container's GPU access"
        yield Check("environment", "GPU", "note", "none found; strategy graph needs one", fix)
    if DRIVER.exists():
        found = re.search(r"(\d+\.\d+[.\d]*)", DRIVER.read_text())
        yield Check("environment", "NVIDIA driver", "ok", found.group(1) if found else "unknown")


def _gpus() -> list[str]:
    """Name, memory and driver of each GPU, from `nvidia-smi`; empty without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return []


def _settings(settings: Settings) -> Iterator[Check]:
    problems: dict[str, tuple[str, str]] = {}
    for variable, mistake in settings.mistakes:
        yield Check("setting", variable, "fail", mistake, "mend it, or unset it: the default is used")
    for problem in monitoring.missing(settings).values():
        found, _, fix = problem.partition("; ")
        problems["NSA_PLUGIN_METRICS"] = (found, fix)
    if settings.repro_dir is not None and not _writable(settings.repro_dir):
        problems["NSA_PLUGIN_REPRO_DIR"] = ("it can't be written", "make it, or name another")
    if settings.switch_file is not None and not settings.switch_file.parent.is_dir():
        problems["NSA_PLUGIN_SWITCH_FILE"] = ("its directory does not exist", f"mkdir -p {settings.switch_file.parent}")
    if settings.plugins:
        known = {point.name for point in importlib.metadata.entry_points(group="nsa_plugin")}
        if absent := sorted(settings.plugins - known):
            problems["NSA_PLUGIN_PLUGINS"] = (f"not installed: {', '.join(absent)}", "install it, or take it off")
    if settings.verify and settings.repro_dir is None:
        yield Check(
            "setting", "NSA_PLUGIN_VERIFY", "note", "a difference would leave no repro file",
            "let NSA_PLUGIN_REPRO_DIR name a directory",
        )  # fmt: skip
    if settings.step_lengths == "exact":
        meaning = "draft steps see the draft tokens before them: acceptance may change, the verified output never"
        yield Check("setting", "NSA_PLUGIN_STEP_LENGTHS", "note", meaning)
    for name, value, source in settings.rows():
        problem, fix = problems.get(name, ("", ""))
        detail = f"{value or '(none)'}, from {source}" + (f": {problem}" if problem else "")
        yield Check("setting", name, "fail" if problem else "ok", detail, fix)


def _writable(directory: Path) -> bool:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _engine(host: Host, name: str, adapter: Adapter | None, gpu: bool) -> Iterator[Check]:
    settings = host.settings
    if name in ENGINES and not installed(name):
        yield Check("engine", name, "note", "not installed")
        return
    release = installed_version(name)
    if adapter is None:
        yield Check("engine", name, "fail", f"{release}, but there is no adapter for it", "report this")
        return
    problems = _guarded(adapter)
    for problem in problems:
        found, _, fix = problem.rpartition("; ")
        yield Check("engine", name, "note" if settings.strategy == "off" else "fail", f"{release}: {found}", fix)
    if not problems:
        yield Check("engine", name, "ok", f"{release}: all that is needed is there")
        if name in launch_lines.ENGINES:
            yield Check("engine", f"{name}: launch line", "ok", launch_lines.line(name))
    for line in () if problems else _untested(adapter):
        yield Check("engine", f"{name}: untested", "note", line, "let NSA_PLUGIN_VERIFY compare it for a while")
    wanted = settings.strategy
    plans = _paths(host, adapter)
    met = [wanted in ("auto", "off", plan.strategy) and (wanted != "graph" or gpu) for plan in plans]
    for plan, fulfilled in zip(plans, met, strict=True):
        why = "once there is a GPU; none was found" if plan.strategy == "graph" and not gpu else plan.why
        left = plan.strategy == "off" != wanted
        detail = ("left to the engine" if left else f"strategy {plan.strategy}") + (f" ({why})" if why else "")
        lacking: Status = "note" if any(met) or problems else "fail"
        fix = "" if fulfilled else "set NSA_PLUGIN_STRATEGY=auto"
        yield Check("path", f"{name}: {plan.path}", "ok" if fulfilled and not left else lacking, detail, fix)
    for variable in settings.beyond(getattr(adapter, "features", frozenset())):
        yield Check(
            "engine", f"{name}: {variable}", "fail", "can't be had with this engine", f"unset {variable} for it"
        )


def _guarded(adapter: Adapter) -> list[str]:
    try:
        return adapter.probe()
    except Exception as error:  # a half-importable engine may raise anything
        return [f"its probe failed ({type(error).__name__}: {error}); reinstall the engine, complete"]


def _untested(adapter: Adapter) -> list[str]:
    try:
        return adapter.untested()
    except Exception as error:  # a third party's adapter may lack it, too
        return [f"its adapter can't say what is untested ({type(error).__name__}: {error})"]


def _paths(host: Host, adapter: Adapter) -> list[PathPlan]:
    try:
        return adapter.paths(host)
    except Exception as error:
        return [PathPlan("all", "off", f"{type(error).__name__}: {error}")]


def _plugins(host: Host, loaded: list[str]) -> Iterator[Check]:
    found = {point.name for point in importlib.metadata.entry_points(group="nsa_plugin")}
    allowed = host.settings.plugins
    for name in sorted(found - set(loaded)):
        if allowed is None or name in allowed:
            yield Check("plugin", name, "fail", "it failed to load (see the log above)", "reinstall or uninstall it")
    for hook, names in host.manager.providers().items():
        yield Check("plugin", hook, "ok", ", ".join(names) or "(built-in default)")
