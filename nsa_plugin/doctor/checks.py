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

from nsa_plugin import launch_lines, monitoring
from nsa_plugin.adapters.base import Adapter, PathPlan
from nsa_plugin.adapters.build import named
from nsa_plugin.adapters.probe import installed_version
from nsa_plugin.doctor.check import Check, Status
from nsa_plugin.doctor.loading import LOADING, loading
from nsa_plugin.doctor.patches import Ledger, ledger
from nsa_plugin.estimate.acceptance import with_exact_lengths
from nsa_plugin.estimate.model import Measured
from nsa_plugin.host import Host
from nsa_plugin.settings import PREFIX, SettingError, Settings

ENGINES = tuple(LOADING)
VERSIONS = ("torch", "triton", "pluggy", "prometheus-client")
DRIVER = Path("/proc/driver/nvidia/version")
SECTIONS = ("path", "engine", "setting", "plugin", "environment")
"""Sections of the report, in their order."""


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes
    ----------
    checks : list of Check
        What matters most comes first.
    patches : dict of str to ledger
        Engine to what its adapter patches, for adapters that say so.
    """

    checks: list[Check]
    patches: dict[str, Ledger]


def diagnose() -> Report:
    """Run all checks. No GPU is touched: `nvidia-smi` and `/proc` tell of GPUs and driver."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpus = _gpus()
    checks: list[Check] = []
    settings, understood = Settings(), False
    try:
        settings, understood = Settings.from_environment(), True
        checks += _settings(settings)
    except SettingError as error:
        message, _, fix = str(error).partition("; ")
        checks.append(
            Check("setting", f"{PREFIX}*", "fail", message, fix or "write an expected value, or unset the variable")
        )
    host = Host(settings)
    loaded = host.manager.load_third_parties()
    adapters = host.manager.adapters()
    here = [name for name in ENGINES if installed(name)]
    checks += loading(here, settings)
    for name in dict.fromkeys((*ENGINES, *adapters)):
        if name in ENGINES and name not in here:
            checks.append(Check("engine", name, "note", "not installed", more=True))
        else:
            found = _engine(host, name, adapters.get(name), gpus)
            checks += [
                check for check in found if understood or check.section != "path"
            ]  # else every path is the engine's
    checks += [*_plugins(host, loaded), *_environment(gpus)]
    shown = [name for name in adapters if name in here or name not in ENGINES] or list(adapters)
    patches = {name: rows for name in shown if (rows := ledger(adapters[name]))}
    return Report(sorted(checks, key=lambda check: SECTIONS.index(check.section)), patches)


def installed(engine: str) -> bool:
    """Whether a distribution of that name is installed."""
    return installed_version(engine) != "unknown"


def _environment(gpus: list[str]) -> Iterator[Check]:
    yield Check("environment", "nsa-plugin", "ok", named())
    for index, gpu in enumerate(gpus):
        yield Check("environment", f"GPU {index}", "ok", gpu)
    import torch

    if not gpus:
        fix = (
            "install a build of torch for CUDA, on a machine with a GPU"
            if torch.version.cuda is None
            else "check the driver (nvidia-smi) and the container's GPU access"
        )
        yield Check("environment", "GPU", "note", "none found; strategy graph needs one", fix)
    if DRIVER.exists():
        found = re.search(r"(\d+\.\d+[.\d]*)", DRIVER.read_text())
        yield Check("environment", "NVIDIA driver", "ok", found.group(1) if found else "unknown")
    for name in VERSIONS:
        detail = installed_version(name).replace("unknown", "not installed")
        yield Check("environment", name, "ok", detail, more=name != "torch")
    cuda = torch.version.cuda or "none: a build without CUDA"
    yield Check("environment", "CUDA toolkit of torch", "ok", cuda, more=True)
    python = f"{platform.python_version()} on {platform.platform()}"
    yield Check("environment", "python", "ok", python, more=True)


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


def _majors(gpus: list[str]) -> set[str]:
    """Major compute capability of each GPU that names one."""
    found = (re.search(r"(\d+)\.\d+$", gpu) for gpu in gpus)
    return {match.group(1) for match in found if match}


def _settings(settings: Settings) -> Iterator[Check]:
    problems: dict[str, tuple[str, str]] = {}
    for variable, mistake in settings.mistakes:
        yield Check("setting", variable, "fail", mistake, f"unset {variable}, or write an expected value")
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
        meaning = (
            "draft steps see the draft tokens before them: acceptance changes; single answers may differ by rounding"
        )
        yield Check("setting", "NSA_PLUGIN_STEP_LENGTHS", "note", meaning)
    for name, value, source in settings.rows():
        problem, fix = problems.get(name, ("", ""))
        detail = f"{value or '(none)'}, from {source}" + (f": {problem}" if problem else "")
        default = source == "default" and not problem
        yield Check("setting", name, "fail" if problem else "ok", detail, fix, more=default)


def _writable(directory: Path) -> bool:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _engine(host: Host, name: str, adapter: Adapter | None, gpus: list[str]) -> Iterator[Check]:
    settings = host.settings
    release = installed_version(name)
    if adapter is None:
        yield Check("engine", name, "fail", f"{release}, but there is no adapter for it", "reinstall nsa-plugin")
        return
    problems = _guarded(adapter)
    for problem in problems:
        found, _, fix = problem.rpartition("; ")
        yield Check("engine", name, "note" if settings.strategy == "off" else "fail", f"{release}: {found}", fix)
    if not problems:
        yield Check("engine", name, "ok", f"{release}: all that is needed is there")
        if name in launch_lines.ENGINES:
            yield Check("engine", f"{name}: launch line", "ok", launch_lines.line(name), more=True)
    for line in () if problems else _untested(adapter):
        yield Check("engine", f"{name}: untested", "note", line, "set NSA_PLUGIN_VERIFY=1000 for a while")
    for variable in settings.beyond(getattr(adapter, "features", frozenset())):
        yield Check(
            "engine", f"{name}: {variable}", "fail", "can't be had with this engine", f"unset {variable} for it"
        )
    if "step_lengths" in getattr(adapter, "features", ()) and settings.step_lengths != "exact":
        measured = Measured.load()
        gain = "; ".join(with_exact_lengths(measured, steps) for steps in (4, 7))
        yield Check("engine", f"{name}: exact step lengths", "ok", f"off; {gain}", more=settings.strategy == "off")
    yield from _paths(name, _plans(host, adapter), settings.strategy, gpus, bool(problems))


def _paths(name: str, plans: list[PathPlan], wanted: str, gpus: list[str], broken: bool) -> Iterator[Check]:
    """What each path of an engine would get; what other machines or models would choose is for who wants more."""
    majors, gpu = _majors(gpus), bool(gpus)
    met = [wanted in ("auto", "off", plan.strategy) and (wanted != "graph" or gpu) for plan in plans]
    for plan, fulfilled in zip(plans, met, strict=True):
        waits = plan.strategy == "graph" and not gpu
        why = "once there is a GPU; none was found" if waits else plan.why
        left = plan.strategy == "off" != wanted
        detail = ("left to the engine" if left else f"strategy {plan.strategy}") + (f" ({why})" if why else "")
        lacking: Status = "note" if any(met) or broken else "fail"
        fix = "set NSA_PLUGIN_STRATEGY=auto" + (", or run it where a GPU is" if waits else "")
        elsewhere = plan.gpus is not None and (not gpus or bool(majors)) and not majors & plan.gpus
        yield Check(
            "path", f"{name}: {plan.path}", "ok" if fulfilled and not left else lacking, detail,
            "" if fulfilled else fix, more=elsewhere,
        )  # fmt: skip


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


def _plans(host: Host, adapter: Adapter) -> list[PathPlan]:
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
        ours_alone = set(names) <= {"built-in"}
        yield Check("plugin", hook, "ok", ", ".join(names) or "(built-in default)", more=ours_alone)
