"""At start and at undo: hooks are put on by sglang's `HookRegistry`, and taken off again."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any


def put_on(replacements: Mapping[str, Callable[..., Any]]) -> None:
    """Register what stands in for each target. Hooks are applied here unless `load_plugins()` is about to apply all of them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType, _current_plugin_source

    for target, replacement in replacements.items():
        _restore(target)
        HookRegistry.register(target, replacement, HookType.AROUND)
    if _current_plugin_source.get() is None:
        HookRegistry.apply_hooks()


def take_off(replacements: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Put back every target; other plugins' hooks stay. Returns the targets that another patch covers: they stay hooked."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    covered = []
    for target, replacement in replacements.items():
        if not _restore(target):
            covered.append(target)
        others = [entry for entry in HookRegistry._hooks.pop(target, []) if entry[1] is not replacement]
        if others:
            HookRegistry._hooks[target] = others
    HookRegistry.apply_hooks()
    return covered


def covered(targets: Mapping[str, Any]) -> list[str]:
    """Targets whose hooks lie under a patch that is no hook of sglang's. Hooks can't be applied anew there."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [target for target in targets if target in HookRegistry._patched and not _is_hook(_found(target)[2])]


def beneath_hooks(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function that sglang's hooks of a method wrap: its own code, or a patch of others that lies under the hooks."""
    found, layer = method, method
    while hasattr(layer, "__wrapped__"):
        wrapped = layer.__wrapped__
        if _is_hook(layer):
            found = wrapped
        layer = wrapped
    return found


def _restore(target: str) -> bool:
    """Take the hooks off a target, so that they can be applied anew. False if a patch covers them."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if target not in HookRegistry._patched:
        return True
    owner, name, method = _found(target)
    if not _is_hook(method):
        return False
    while _is_hook(method):
        method = method.__wrapped__
    if any(base.__dict__.get(name) is method for base in owner.__mro__[1:]):
        delattr(owner, name)  # it was inherited
    else:
        setattr(owner, name, method)
    HookRegistry._patched.discard(target)
    return True


def _found(target: str) -> tuple[Any, str, Any]:
    owner, _, name = target.rpartition(".")
    found: Any = pkgutil.resolve_name(owner)
    return found, name, found.__dict__.get(name)


def _is_hook(method: Any) -> bool:
    """Whether sglang's registry made this wrapper. Its globals tell; `functools.wraps` does not copy those."""
    from sglang.srt.plugins import hook_registry

    return getattr(method, "__globals__", None) is vars(hook_registry) and hasattr(method, "__wrapped__")
