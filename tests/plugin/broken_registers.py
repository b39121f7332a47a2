"""Entry points that break the contract, for the conformance kit to catch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "custom_adapter"))
import toy_adapter
from nsa_plugin import __version__, entry


def raises() -> None:
    """Lets an unknown setting, and whatever else, reach the engine."""
    from nsa_plugin.host import Host
    from nsa_plugin.settings import Settings

    host = Host(Settings.from_environment())
    host.manager.register(toy_adapter.ToyPlugin())
    adapter = host.manager.adapter("toy")
    assert adapter is not None
    adapter.install(host)
    entry._hosts["toy"] = host
    toy_adapter.logger.info("%s auto %s", __version__, adapter.summary())


def says_nothing() -> None:
    """Through no logger of the engine."""
    toy_adapter.logger.disabled = True
    try:
        toy_adapter.register()
    finally:
        toy_adapter.logger.disabled = False


def says_two_lines() -> None:
    """One of its own besides."""
    toy_adapter.register()
    toy_adapter.logger.info("nsa-plugin %s is here", __version__)


def ignores_the_switch() -> None:
    """Patches although it is told not to."""
    toy_adapter.register()
    if not entry._hosts:
        raises()
