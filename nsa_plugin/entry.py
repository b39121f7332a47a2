"""The engines' entry points. They never raise: an engine must start, whatever fails in this package."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.settings import PREFIX, Settings

if TYPE_CHECKING:
    from nsa_plugin.adapters.base import Adapter
    from nsa_plugin.host import Host

_hosts: dict[str, Host] = {}
"""Engine to its host in this process. A host lives as long as its engine is patched."""


def register_sglang() -> None:
    """Install the sglang adapter (entry-point group `sglang.srt.plugins`)."""
    register("sglang", logging.getLogger("sglang.srt.plugins.nsa_plugin"))


def register_vllm() -> None:
    """Install the vLLM adapter (entry-point group `vllm.general_plugins`), and carry the settings to Ray's workers."""
    logger = logging.getLogger("vllm.plugins.nsa_plugin")
    try:
        from nsa_plugin.adapters.vllm.ray_settings import carry_settings

        if problem := carry_settings(PREFIX):  # first of all: "off" must reach the workers, and so must wrong settings
            logger.warning("nsa-plugin: %s", problem)
    except Exception as error:
        logger.exception("nsa-plugin: settings may not reach Ray's workers: %s", error)
    register("vllm", logger)


def register(engine: str, logger: logging.Logger, *plugins: object) -> None:
    """Install the adapter for `engine`, once per process. An engine's entry point calls this; it never raises.

    Parameters
    ----------
    engine : str
        Name of the adapter.
    logger : Logger
        The engine's own logger. It gets one line: what was installed, or why nothing was.
    plugins : objects
        Plugins besides those of the entry-point group `nsa_plugin`; one of them may offer the adapter.
    """
    from nsa_plugin import __version__

    try:
        if engine in _hosts:
            _hosts[engine].introduce()
            return
        settings = Settings.from_environment()
        for speaker in (logger, logging.getLogger("nsa_plugin")):
            _let_speak(speaker, settings.log_level)
        for _, mistake in settings.mistakes:
            logger.warning("nsa-plugin: %s; the default is used", mistake)
        if settings.strategy == "off":
            logger.info("nsa-plugin %s: off (NSA_PLUGIN_STRATEGY); %s is left as it is", __version__, engine)
            return
        from nsa_plugin.host import Host

        host = Host(settings)
        host.manager.load_third_parties()
        for plugin in plugins:
            host.manager.register(plugin)
        adapter = host.manager.adapter(engine)
        if adapter is None:
            logger.error("nsa-plugin %s: no adapter for %s; it is left as it is", __version__, engine)
            return
        host.look_at_switch_file()  # before the adapter acts
        if problems := adapter.install(host):
            logger.warning("nsa-plugin %s: %s is left as it is: %s", __version__, engine, "; ".join(problems))
            return
        _hosts[engine] = host
        host.watch_switch_file()
        for variable in settings.beyond(getattr(adapter, "features", frozenset())):
            logger.warning("nsa-plugin: %s can't be had with %s: it is ignored", variable, engine)
        host.introduce(functools.partial(_introduce, logger, host, adapter))
    except Exception as error:
        logger.exception("nsa-plugin %s: %s is left as it is: %s", __version__, engine, error)


def _introduce(logger: logging.Logger, host: Host, adapter: Adapter) -> None:
    from nsa_plugin import __version__

    off = f"; switched off for now: {'; '.join(host.reasons)}" if host.reasons else ""
    logger.info("nsa-plugin %s: strategy %s; %s%s", __version__, host.settings.strategy, adapter.summary(), off)


def _let_speak(logger: logging.Logger, level: int | None) -> None:
    """Set a logger's level to `level`; without one, to INFO, unless somebody has configured logging: then leave it."""
    ancestor, said = logger, bool(logging.getLogger().handlers)
    while ancestor.parent is not None and not said:
        said, ancestor = ancestor.level != logging.NOTSET, ancestor.parent
    if level is not None or not said:
        logger.setLevel(logging.INFO if level is None else level)


def disable() -> list[str]:
    """Use the engines' own paths from the next replay on, in this process and until `enable`.

    The switch file does not undo it. To switch other processes use the file that NSA_PLUGIN_SWITCH_FILE names.

    Returns
    -------
    list of str
        What goes on as before, one line each, with the reason: work in CUDA graphs that can't be switched there.

    Raises
    ------
    UnavailableError
        The plugin is not installed into an engine in this process.
    """
    return _switch(False, "nsa_plugin.disable()")


def enable() -> list[str]:
    """Undo `disable`, and whatever a verification or the switch file switched off. Returns and raises as `disable`."""
    return _switch(True, "nsa_plugin.enable()")


def _switch(on: bool, why: str) -> list[str]:
    if not _hosts:
        raise UnavailableError(
            "nsa-plugin is not installed into an engine in this process; call this in the process that runs the model, "
            "or let NSA_PLUGIN_SWITCH_FILE name a file and create it"
        )
    return [line for host in _hosts.values() for line in host.switch(on, why)]
