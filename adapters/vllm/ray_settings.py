"""Runs at start: settings on their way to Ray's workers, which get only some variables of the driver's environment."""

from __future__ import annotations

import importlib.util
import os

CARRIED = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
"""vLLM's own variable (0.28 and later): prefixes, separated by commas, of further variables that are copied."""


def carry_settings(prefix: str) -> str:
    """Make vLLM copy the settings, whose names begin with `prefix`, to Ray's workers. The user's own prefixes stay.

    vLLM copies `VLLM_PLUGINS` by itself. Without any setting this does nothing. Returns an empty string, or the problem and
    its remedy where Ray is installed and this vLLM has no such variable.
    """
    given = sorted(name for name in os.environ if name.startswith(prefix))
    if not given or importlib.util.find_spec("vllm") is None:
        return ""
    import vllm.envs

    if CARRIED in vllm.envs.environment_variables:
        copied = [other for other in map(str.strip, os.environ.get(CARRIED, "").split(",")) if other]
        if not any(prefix.startswith(other) for other in copied):
            os.environ[CARRIED] = ",".join([*copied, prefix])
        return ""
    if importlib.util.find_spec("ray") is None:
        return ""
    line = " ".join(f"{name}={os.environ[name]!r}" for name in given)
    return (
        f"looked for {CARRIED}, with which vLLM copies settings to Ray's workers, found no such variable; under Ray, start it "
        f"on every node with: {line} ray start …"
    )
