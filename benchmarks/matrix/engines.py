"""Which releases of each engine matter, what its adapter needs of them, and how to make the lightest environment for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.sglang import releases as sglang
from nsa_plugin.adapters.vllm import releases as vllm
from nsa_plugin.adapters.vllm.in_place import ESSENTIAL
from nsa_plugin.adapters.vllm.v2.target import hooks as v2_target

TESTS = Path(__file__).parents[2] / "tests"


@dataclass(frozen=True)
class Needs:
    """What the adapter needs of one generation of releases.

    Attributes
    ----------
    module : a release that has this module is of the generation
    paths : the needs of each path
    strategies : what a strategy needs beyond that, on any path
    """

    module: str
    paths: Mapping[str, tuple[Need, ...]]
    strategies: Mapping[str, tuple[Need, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """An engine in the release matrix.

    Attributes
    ----------
    releases : oldest first
    needs : one entry per generation, newest first
    strategies : what its adapter offers
    requirements : file with the environment of the newest release
    pinned : distributions whose version comes from the release's own metadata
    bare : distributions that are installed, as the engine itself, without their dependencies
    path : folders for PYTHONPATH
    variables : environment variables
    """

    releases: tuple[str, ...]
    needs: tuple[Needs, ...]
    strategies: tuple[str, ...]
    requirements: Path
    pinned: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    path: tuple[Path, ...] = ()
    variables: tuple[tuple[str, str], ...] = (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""))


SGLANG = tuple(
    Needs(
        names.module,
        {
            "draft decode": names.needs(), "target verify": names.needs(),
            "draft extend": (*names.needs(), *names.needs("draft extend")),
        },
        {"graph": names.needs("graph")},
    )
    for names in sglang.GENERATIONS
)  # fmt: skip
ENGINES = {
    "sglang": Engine(
        releases=("0.5.11", "0.5.12", "0.5.13", "0.5.14", "0.5.15.post1", "0.5.18", "0.5.20", "0.5.22", "0.5.23"),
        needs=SGLANG,
        strategies=("graph", "share", "copy"),
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
                    "draft decode": (*vllm.NEEDS, *(need for row in ESSENTIAL for need in row.needs)),
                    v2_target.PATH: v2_target.needs(), v2_target.FIRST_PASS: v2_target.needs(),
                },
            ),
        ),
        strategies=("graph",),
        requirements=TESTS / "vllm" / "requirements.txt",
        variables=(
            ("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""), ("VLLM_TARGET_DEVICE", "cpu"), ("VLLM_PLUGINS", ""),
            ("VLLM_LOGGING_LEVEL", "WARNING"),
        ),
    ),
}  # fmt: skip
