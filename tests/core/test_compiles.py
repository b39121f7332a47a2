"""The metadata and copy kernels compile for Hopper, which needs no GPU. Interpreted kernels take what a compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nsa_plugin.core.kernels.fast_copy import copy_kernel
from nsa_plugin.core.kernels.metadata import metadata_kernel

LONGS = dict.fromkeys(("seq_lens", "extend_lens", "accepted", "req_pool_indices", "destinations", "sources"), "*i64")
TYPES = LONGS | dict.fromkeys(("table", "enabled", "live_lengths"), "*i32")

def compiled(kernel, **constants):
    types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert ".visible .entry" in made.asm["ptx"]

try:
    from triton.backends.nvidia.compiler import get_ptxas
    get_ptxas(90)
except Exception as error:
    print("skip:", type(error).__name__, error)
    sys.exit(0)
shared = dict(page_size=64, REAL=True, TOKENS=False, BLOCK=256)
sparse, dense = dict(WIDE=True, SUMS=True, ROWS=True), dict(WIDE=False, ROWS=False, KPOOL=1, POOLS=False, POOLED=False)
for k, pools, ragged in ((1, False, False), (4, True, False), (8, True, True)):
    compiled(metadata_kernel, TOKEN_TABLE=True, RAGGED=ragged, KPOOL=k, POOLS=pools, POOLED=pools, ACCEPTED=pools,
             SWITCHED=True, ALIGNED=True, TILE=512, **sparse, **shared)
for sums in (True, False):
    compiled(metadata_kernel, TOKEN_TABLE=True, RAGGED=False, ACCEPTED=False, SUMS=sums, SWITCHED=True, ALIGNED=False,
             TILE=2048, **dense, **shared)
for lacking in (True, False):
    compiled(copy_kernel, RAGGED=False, WIDE=True, LACKING=lacking, KPOOL=4, POOLED=True, ALIGNED=True, TILE=2048, **shared)
print("compiled")
"""


def test_for_hopper(tmp_path: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    if done.stdout.startswith("skip:"):
        pytest.skip(f"triton can't compile here: {done.stdout[5:].strip()}")
    assert done.stdout.strip() == "compiled"
