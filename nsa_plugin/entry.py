"""The engines' entry points. They never raise: an engine must start whatever state this package is in."""

from __future__ import annotations

import logging

from nsa_plugin import __version__
from nsa_plugin.settings import Settings

_hosts: dict[str, object] = {}
"""One per engine and process, kept alive for as long as the engine is patched."""


def register_sglang() -> None:
    """Install the sglang adapter (entry-point group `sglang.srt.plugins`)."""
    register("sglang", logging.getLogger("sglang.srt.plugins.nsa_plugin"))


def register_vllm() -> None:
    """Install the vLLM adapter (entry-point group `vllm.general_plugins`)."""
    register("vllm", logging.getLogger("vllm.plugins.nsa_plugin"))


def register(engine: str, logger: logging.Logger, *plugins: object) -> None:
    """Install the adapter for `engine`, once per process; what an engine's entry point calls. It never raises.

    Parameters
    ----------
    engine : str
        Name of the adapter.
    logger : Logger
        The engine's own, for the one line that says what was done or why nothing was.
    plugins : objects
        To be asked besides those of the entry-point group `nsa_plugin`: one may offer the adapter.
    """
    try:
        if engine in _hosts:
            return
        settings = Settings.from_environment()
        logger.setLevel(settings.log_level)
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
        if problems := adapter.install(host):
            logger.warning("nsa-plugin %s: %s is left as it is: %s", __version__, engine, "; ".join(problems))
            return
        _hosts[engine] = host
        logger.info("nsa-plugin %s: strategy %s; %s", __version__, settings.strategy, adapter.summary())
    except Exception as error:
        logger.exception("nsa-plugin %s: %s is left as it is: %s", __version__, engine, error)
