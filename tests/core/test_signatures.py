"""Whatever is handed to a public function in place of what it asks for, the error is typed and names what was wrong."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch

import nsa_plugin
from nsa_plugin import (
    InvalidTypeError,
    InvalidValueError,
    PrecomputedMetadata,
    ReplayPlan,
    UnavailableError,
)
from nsa_plugin.core import api, draft_steps, plan, step_update
from nsa_plugin.core.step_update import StepUpdate
from tests.batches import poisoned
from tests.core.test_group_rows import grouped
from tests.core.test_strides import GEOMETRY, batch, draft, update

TYPED = (InvalidTypeError, InvalidValueError, UnavailableError)
MODULES = (api, draft_steps, plan, step_update)


def made() -> PrecomputedMetadata:
    return poisoned(batch("tokens"), GEOMETRY)[0]


def drafted() -> dict[str, Any]:
    (positions, lengths, table), steps = draft()
    limits = draft_steps.DraftLimits(64, draft_steps.PastEnd.CLAMP)
    return {
        "steps": steps, "limits": limits, "impl": "auto", "positions": positions, "seq_lens": lengths, "table": table,
        "batch_size": 3, "num_rows": 4,
    }  # fmt: skip


def updated() -> dict[str, Any]:
    return dict(zip(("rows", "slots", "request_maps", "indexers"), update(), strict=True))


def core() -> dict[str, Any]:
    out = made()
    return {
        "batch": out.batch, "geometry": GEOMETRY, "impl": "reference", "out": out, "checked": False, "precomputed": out,
        "source": out, "destinations": [made().steps[0]], "device": torch.device("cpu"), "enabled": None,
        "consumers": [out.steps[0]], "strategy": "share", "derive": None, "bind": api.bind,
    }  # fmt: skip


def ragged() -> dict[str, Any]:
    out = poisoned(batch("ragged"), GEOMETRY)[0]
    return {"batch": out.batch, "geometry": GEOMETRY}


def blocks() -> dict[str, Any]:
    return {"batch": batch("blocks"), "geometry": GEOMETRY}


def running(**arguments: Any) -> None:
    ReplayPlan(batch("tokens"), GEOMETRY, [made().steps[0]], strategy="share").run(**arguments)


def stepping(**arguments: Any) -> None:
    StepUpdate(*update(), impl="reference").run(**arguments)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "precompute": (api.precompute, core), "fast_copy": (api.fast_copy, core), "resolve_impl": (api.resolve_impl, core),
    "best_impl": (api.best_impl, core),
    "bind_precompute": (api.bind_precompute, core), "bind_copy": (api.bind_copy, core), "bind": (api.bind, core),
    "ReplayPlan": (ReplayPlan, core), "bind_draft_steps": (draft_steps.bind_draft_steps, drafted),
    "check_source": (draft_steps.check_source, drafted), "StepUpdate": (StepUpdate, updated),
}  # fmt: skip
"""Each public function, and arguments that it takes."""
MORE: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "precompute ragged": (api.precompute, ragged), "precompute blocks": (api.precompute, blocks),
    "PrecomputedMetadata.allocate": (PrecomputedMetadata.allocate, lambda: {**core(), "tokens": True}),
    "ReplayPlan of groups": (ReplayPlan, lambda: {**core(), **grouped()}),
}  # fmt: skip
UNREAD = {"precompute": ("out.batch", "out.geometry"), "bind_precompute": ("out.batch",)}
"""What stands beside the buffers that are asked for."""


def public(module: ModuleType) -> set[str]:
    """Functions, and classes that check what they are made of."""
    return {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
        and not name.startswith("_")
        and (inspect.isfunction(value) or (inspect.isclass(value) and not is_dataclass(value)))
        and not (inspect.isclass(value) and (issubclass(value, enum.Enum) or Protocol in value.__mro__))
    }


def test_every_public_function_is_tried() -> None:
    assert set.union(*map(public, MODULES)) == CALLS.keys()
    theirs = {"disable", "enable"}  # take nothing
    functions = {
        name
        for name in nsa_plugin.__all__
        if inspect.isfunction(value := getattr(nsa_plugin, name)) or value is ReplayPlan
    }
    assert functions == theirs | {"precompute", "fast_copy", "ReplayPlan"} <= theirs | CALLS.keys()


def replaced(value: Any, name: str, optional: bool) -> Iterator[tuple[str, Any]]:
    """`value` and each field within it, in turn put in place by None and by something of no use."""
    if not optional:
        yield f"{name} = None", None
    yield f"{name} = object()", object()
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            may_lack = "None" in str(field.type) or field.type == "Lackable"
            for what, other in replaced(getattr(value, field.name), f"{name}.{field.name}", may_lack):
                yield what, replace(value, **{field.name: other})
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            for what, other in replaced(item, f"{name}[{index}]", False):
                yield what, type(value)([*value[:index], other, *value[index + 1 :]])


@pytest.mark.parametrize("name", [*CALLS, *MORE])
def test_nothing_of_another_type_is_taken_and_no_error_is_untyped(name: str) -> None:
    call, arguments = {**CALLS, **MORE}[name]
    parameters = inspect.signature(call).parameters
    given = {key: value for key, value in arguments().items() if key in parameters}
    call(**given)
    wrong = []
    for key in parameters:
        optional = "None" in str(parameters[key].annotation)
        for what, other in replaced(given.get(key), key, optional):
            if what.startswith(UNREAD.get(name, ("-",))):
                continue
            try:
                call(**{**given, key: other})
            except TYPED:
                continue
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                wrong.append(f"{what}: accepted")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("value", [None, object(), 3, "batch"])
def test_runs_refuse_what_is_no_batch_and_no_bool(value: Any) -> None:
    with pytest.raises(InvalidTypeError, match="batch: expected a BatchDescriptor"):
        running(batch=value)
    with pytest.raises(InvalidTypeError, match="first: expected True or False"):
        stepping(first=value)
