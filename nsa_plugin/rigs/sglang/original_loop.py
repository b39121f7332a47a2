"""The code that this package starts from: sglang 0.5.6.post2's replay method, loaded from its wheel, never copied here."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin.core.batch import ForwardMode
from nsa_plugin.core.errors import UnavailableError, reject
from nsa_plugin.core.metadata import StepMetadata

RELEASE = "0.5.6.post2"
MEMBER = "sglang/srt/layers/attention/nsa_backend.py"
MODES = {
    ForwardMode.DECODE: "decode_or_idle",
    ForwardMode.TARGET_VERIFY: "target_verify",
    ForwardMode.DRAFT_EXTEND: "draft_extend",
}
"""That release's name of a forward mode."""
FIELDS = {
    "cache_seqlens": "cache_seqlens_int32",
    "cu_seqlens_k": "cu_seqlens_k",
    "seqlens_expanded": "nsa_seqlens_expanded",
    "nsa_cache_seqlens": "nsa_cache_seqlens_int32",
    "nsa_cu_seqlens_k": "nsa_cu_seqlens_k",
    "page_table_1": "page_table_1",
    "real_page_table": "real_page_table",
}
"""Field of `StepMetadata` to field of that release's `NSAMetadata`."""
METHODS = ("init_forward_metadata_replay_cuda_graph", "_transform_table_1_to_real")


def fetch_wheel(folder: Path) -> Path:
    """Path of the release's wheel in `folder`; downloads it with pip if it is not there.

    Raises
    ------
    UnavailableError
        pip could not fetch it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"sglang-{RELEASE}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"sglang=={RELEASE}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"pip could not fetch sglang {RELEASE}: {done.stderr.strip()[-500:]}")
    return next(iter(folder.glob(pattern)))


def load_methods(wheel: Path) -> dict[str, Callable[..., Any]]:
    """The methods of `NativeSparseAttnBackend` that prepare a replay, compiled from the wheel's source.

    Raises
    ------
    InvalidValueError
        The file is not the wheel of that release.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            tree = ast.parse(archive.read(MEMBER))
    except (zipfile.BadZipFile, KeyError) as error:
        reject(str(wheel), f"the wheel of sglang {RELEASE}", f"another file ({error})")
    backend = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "NativeSparseAttnBackend"
    )
    functions = [node for node in backend.body if isinstance(node, ast.FunctionDef) and node.name in METHODS]
    future = ast.parse("from __future__ import annotations").body
    module = ast.fix_missing_locations(ast.Module(body=[*future, *functions], type_ignores=[]))
    namespace: dict[str, Any] = {
        "torch": torch,
        # nsa/utils.py of that release
        "compute_nsa_seqlens": lambda original_seq_lens, nsa_index_topk: original_seq_lens.clamp(max=nsa_index_topk),
    }
    exec(compile(module, f"{wheel.name}/{MEMBER}", "exec"), namespace)
    return {name: namespace[name] for name in METHODS}


class OriginalBackend:
    """The attributes that the methods read, around them.

    Parameters
    ----------
    methods : from `load_methods`
    step : StepMetadata
        The buffers to fill.
    req_to_token, index_topk, page_size, draft_tokens : of the model and its cache
    """

    def __init__(
        self, methods: dict[str, Callable[..., Any]], step: StepMetadata, req_to_token: torch.Tensor,
        index_topk: int, page_size: int, draft_tokens: int,
    ) -> None:  # fmt: skip
        self._methods = methods
        self.metadata = SimpleNamespace(
            page_size=page_size,
            flashmla_metadata=None,
            **{theirs: getattr(step, ours) for ours, theirs in FIELDS.items()},
        )
        self.decode_cuda_graph_metadata: dict[int, SimpleNamespace] = {}
        self.req_to_token = req_to_token
        self.nsa_index_topk = index_topk
        self.real_page_size = page_size
        self.speculative_num_draft_tokens = draft_tokens
        self.nsa_decode_impl = "fa3"
        self.device = req_to_token.device

    def set_nsa_prefill_impl(self, forward_batch: object) -> None:
        """Dispatch state of that release: not metadata."""

    def _transform_table_1_to_real(self, table: torch.Tensor) -> Any:
        return self._methods["_transform_table_1_to_real"](self, table)

    def replay(
        self,
        mode: ForwardMode,
        seq_lens: torch.Tensor,
        requests: torch.Tensor,
        accepted: torch.Tensor | None,
        seq_lens_cpu: torch.Tensor,
    ) -> None:
        """Prepare a replay."""
        native = SimpleNamespace(**{f"is_{name}": lambda ours=ours: ours is mode for ours, name in MODES.items()})
        self.decode_cuda_graph_metadata[seq_lens.numel()] = self.metadata
        self._methods["init_forward_metadata_replay_cuda_graph"](
            self, bs=seq_lens.numel(), req_pool_indices=requests, seq_lens=seq_lens, seq_lens_sum=-1, encoder_lens=None,
            forward_mode=native, spec_info=SimpleNamespace(accept_length=accepted), seq_lens_cpu=seq_lens_cpu,
        )  # fmt: skip
