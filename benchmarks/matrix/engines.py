"""Which releases of each engine matter, what its adapter needs of them, and how to make the lightest environment for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.matrix.builders import BACKENDS, unexamined
from benchmarks.matrix.static import Wheel
from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.sglang import releases as sglang
from nsa_plugin.adapters.vllm import releases as vllm
from nsa_plugin.adapters.vllm.builders import ESSENTIAL
from nsa_plugin.adapters.vllm.v1.proposer import PATH as V1_PATH
from nsa_plugin.adapters.vllm.v2.target import hooks as v2_target

TESTS = Path(__file__).parents[2] / "tests"


@dataclass(frozen=True)
class Needs:
    """What the adapter needs of one generation of releases.

    Attributes
    ----------
    module : a release that has this module is of the generation
    paths : by path, the needs of each strategy that the adapter offers for it
    """

    module: str
    paths: Mapping[str, Mapping[str, tuple[Need, ...]]]


@dataclass(frozen=True)
class Engine:
    """An engine in the release matrix.

    Attributes
    ----------
    releases : oldest first
    needs : one entry per generation, newest first
    requirements : file with the environment of the newest release
    pinned : distributions whose version comes from the release's own metadata
    bare : distributions that are installed, as the engine itself, without their dependencies
    path : folders for PYTHONPATH
    unexamined : what the source in a wheel has that nobody has looked at, by dotted path
    variables : environment variables
    """

    releases: tuple[str, ...]
    needs: tuple[Needs, ...]
    requirements: Path
    pinned: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    path: tuple[Path, ...] = ()
    unexamined: Callable[[Wheel], list[str]] = lambda wheel: []
    variables: tuple[tuple[str, str], ...] = (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""))


SGLANG: Mapping[str, tuple[tuple[sglang.Part, ...], tuple[str, ...]]] = {
    "draft decode": (("all",), ("share", "copy")),
    "target verify": (("all",), ("share", "copy")),
    "draft extend": (("all", "draft extend"), ("share", "copy")),
    "dense FlashAttention": (("all", "dense FlashAttention", "recorded draft extend"), ("share",)),
    "dense FlashMLA": (("all", "dense FlashMLA"), ("share",)),
}
"""By path, the parts that it needs, and the strategies besides `graph`, which needs a part of its own."""


def _sglang(names: sglang.Generation) -> Needs:
    """Those of a generation of sglang."""
    paths: dict[str, dict[str, tuple[Need, ...]]] = {}
    for path, (parts, strategies) in SGLANG.items():
        needs = tuple(need for part in parts for need in names.needs(part))
        paths[path] = {"graph": (*needs, *names.needs("graph")), **dict.fromkeys(strategies, needs)}
    return Needs(names.module, paths)


ENGINES = {
    "sglang": Engine(
        releases=("0.5.11", "0.5.12", "0.5.13", "0.5.14", "0.5.15.post1", "0.5.18", "0.5.20", "0.5.22", "0.5.23"),
        needs=tuple(map(_sglang, sglang.GENERATIONS)),
        requirements=TESTS / "sglang" / "requirements.txt",
        pinned=("transformers",),
        bare=("compressed-tensors==0.18.0", "gguf==0.19.0", "openai==2.8.0", "xgrammar==0.2.1"),
        path=(TESTS / "sglang" / "stubs",),
    ),
    "vllm": Engine(
        releases=("0.28.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"),
        needs=(
            Needs(
                vllm.MODULE,
                {
                    "draft decode": {"graph": (*vllm.NEEDS, *(need for row in ESSENTIAL for need in row.needs))},
                    V1_PATH: {"copy": vllm.V1_NEEDS},
                    v2_target.PATH: {"graph": v2_target.needs()},
                    v2_target.FIRST_PASS: {"graph": v2_target.needs()},
                },
            ),
        ),
        requirements=TESTS / "vllm" / "requirements.txt",
        unexamined=lambda wheel: unexamined(wheel.sources(BACKENDS)),
        variables=(
            ("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""), ("VLLM_TARGET_DEVICE", "cpu"), ("VLLM_PLUGINS", ""),
            ("VLLM_LOGGING_LEVEL", "WARNING"),
        ),
    ),
}  # fmt: skip
