"""Repro files: the batch of a verification that failed, for `nsa-plugin verify` on any machine.

A file is an `.npz` without pickled objects. It holds lengths, request rows, the live columns of the token or block table,
the engine's values, the plugin's values, and `json` (settings, versions, sizes). It holds no token, text or cache content.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nsa_plugin.adapters.reporting import Mismatch, differing
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor, BlockTable, ForwardMode, Geometry, TokenTable
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, PastEnd, bind_draft_steps
from nsa_plugin.core.errors import InvalidValueError, NsaPluginError, UnavailableError, reject
from nsa_plugin.core.group_rows import GroupMetadata, GroupRows, live_pages
from nsa_plugin.core.metadata import PLANES, equal_in_pieces, live_entries, table_sizes
from nsa_plugin.settings import Settings

LIMIT_FILES = 10
"""Largest number of repro files in a directory."""
LIMIT_BYTES = 64 << 20
"""Largest size of a file's arrays, in bytes and uncompressed."""
FILE_PREFIX = "nsa-plugin-repro"
DISTRIBUTIONS = ("nsa-plugin", "torch", "triton", "sglang", "sglang-kernel", "vllm")


def write(directory: Path, mismatch: Mismatch, settings: Settings) -> Path:
    """Write a repro file and return its path.

    Raises
    ------
    UnavailableError
        The directory holds `LIMIT_FILES` files, the batch is larger than `LIMIT_BYTES`, or numpy is not installed.
    OSError
        The directory can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if len(list(directory.glob(f"{FILE_PREFIX}-*.npz"))) >= LIMIT_FILES:
        raise UnavailableError(f"{directory} holds {LIMIT_FILES} repro files already; move them away")
    arrays, facts = _batch(mismatch.batch, mismatch.geometry)
    size = sum(array.numel() * array.element_size() for array in arrays.values())
    left_out = []
    sizes = dataclasses.replace(mismatch.geometry, table_width=facts["width"])
    columns = {name: width for name, (width, _) in table_sizes(sizes).items()}
    for step, *sides in mismatch.values:
        wrong = differing(*sides)
        for side, values in zip(("expected", "got"), sides, strict=True):
            for name, value in values.items():
                key = f"{side}/{step}/{name}"
                value = value[:, : columns[name]] if name in columns else value
                size += value.numel() * value.element_size()
                if size > LIMIT_BYTES or (name in columns and name not in wrong):
                    size -= value.numel() * value.element_size()
                    left_out.append(key)
                else:
                    arrays[key] = value
    if size > LIMIT_BYTES:
        raise UnavailableError(f"a repro file of {size >> 20} MiB would be too large (limit: {LIMIT_BYTES >> 20})")
    facts |= {
        "engine": mismatch.engine, "path": mismatch.path, "strategy": mismatch.strategy, "fields": mismatch.fields,
        "limits": None if mismatch.limits is None else {**dataclasses.asdict(mismatch.limits), "past_end": mismatch.limits.past_end.value},
        "left_out": left_out, "settings": {name: value for name, value, _ in settings.rows()}, "versions": _versions(),
    }  # fmt: skip
    name = f"{FILE_PREFIX}-{mismatch.engine}-{mismatch.path.replace(' ', '-')}-{os.getpid()}"
    number = sum(1 for _ in directory.glob(f"{name}-*.npz"))
    path = directory / f"{name}-{number}.npz"
    partial = path.with_suffix(".partial")
    numpy = _numpy()
    with partial.open("wb") as file:
        numpy.savez_compressed(
            file, json=json.dumps(facts), **{key: array.cpu().numpy() for key, array in arrays.items()}
        )
    partial.rename(path)
    return path


@dataclasses.dataclass(frozen=True)
class Repro:
    """A loaded repro file.

    Attributes
    ----------
    batch : BatchDescriptor
    geometry : Geometry
    expected, got : mappings of (step, field) to tensor
        The live values of the engine's own path, and those of the plugin.
    facts : mapping
        Engine, path, strategy, fields that differed, settings, versions.
    limits : DraftLimits or None
        Limits of a draft whose positions advance from step to step (vLLM); None for other batches.
    """

    batch: BatchDescriptor
    geometry: Geometry
    expected: Mapping[tuple[int, str], torch.Tensor]
    got: Mapping[tuple[int, str], torch.Tensor]
    facts: Mapping[str, Any]
    limits: DraftLimits | None = None


def load(path: Path) -> Repro:
    """Read a repro file; its tensors are on the CPU.

    Raises
    ------
    InvalidValueError
        The file is no repro file, or a damaged one.
    OSError
        The file can't be read.
    UnavailableError
        numpy is not installed.
    """
    numpy = _numpy()
    sides: dict[str, dict[tuple[int, str], torch.Tensor]] = {"expected": {}, "got": {}}
    try:
        with numpy.load(path, allow_pickle=False) as stored:
            facts = json.loads(str(stored["json"]))
            arrays = {key: torch.from_numpy(stored[key]) for key in stored.files if key != "json"}
        for key in [key for key in arrays if "/" in key]:
            side, step, name = key.split("/")
            sides[side][int(step), name] = arrays.pop(key)
        slots: TokenTable | BlockTable
        if facts["block_size"] is None:
            slots = TokenTable(arrays["table"], arrays["requests"])
        else:
            slots = BlockTable(arrays["table"], facts["block_size"])
        batch = BatchDescriptor(
            ForwardMode(facts["mode"]), facts["batch_size"], arrays["seq_lens"], slots, facts["num_steps"],
            tuple(facts["step_offsets"]), facts["draft_tokens"], arrays.get("extend_lens"), arrays.get("query_start_loc"),
            arrays.get("accepted"),
        )  # fmt: skip
        geometry = Geometry(**facts["geometry"])
        limits = facts.get("limits")
        if limits is not None:
            limits = DraftLimits(limits["max_model_len"], PastEnd(limits["past_end"]), limits["padding_slot"])
        repro = Repro(batch, geometry, sides["expected"], sides["got"], facts, limits)
        _check(repro)
    except OSError:
        raise
    except NsaPluginError as error:
        reject(str(path), "a repro file of nsa-plugin", f"one with a wrong entry ({error})", error=InvalidValueError)
    except (
        Exception
    ) as error:  # numpy, zipfile and json raise many types for a foreign file, with advice that does not apply
        got = f"a file of another kind, or a damaged one ({type(error).__name__})"
        reject(str(path), "a repro file of nsa-plugin", got, error=InvalidValueError)
    return repro


def _check(repro: Repro) -> None:
    """Raise if an entry is missing or has another type, or if an index lies outside of its table."""
    facts, batch = repro.facts, repro.batch
    for name, kind in (("engine", str), ("path", str), ("strategy", str), ("fields", list), ("versions", dict)):
        if not isinstance(facts.get(name), kind):
            reject(name, kind.__name__, type(facts.get(name)).__name__)
    if not repro.expected or not repro.got:
        reject("values", "the engine's and the plugin's", "none")
    if not all(0 <= step < batch.num_steps for step, _ in (*repro.expected, *repro.got)):
        reject("values", f"draft steps of 0 to {batch.num_steps - 1}", "others")
    if isinstance(batch.slots, TokenTable):
        _within("requests", batch.slots.req_pool_indices, len(batch.slots.req_to_token) - 1)
    _within("seq_lens", batch.seq_lens, repro.geometry.table_width)


def _within(name: str, values: torch.Tensor, largest: int) -> None:
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= largest:
        reject(name, f"values of 0 to {largest}", f"{int(values.min())} to {int(values.max())}")


def recompute(repro: Repro, impl: api.Impl) -> dict[str, list[str]]:
    """Compute the batch again with `impl` and compare it with the recorded values.

    Returns
    -------
    dict of "engine" and "plugin" to list of str
        Fields that differ from the engine's and from the plugin's recorded values, as "step N: field". Not compared are
        fields that only the engine's own functions compute (schedules, plans), and numbers of requests, of which a file
        keeps the order only.
    """
    if impl == "triton" and torch.cuda.is_available():
        repro = _on_gpu(repro)
    if repro.batch.query_start_loc is not None:
        computed = _groups(repro, impl)
    else:
        computed = _draft_steps(repro, impl) if repro.limits is not None else _planes(repro, impl)
    differences: dict[str, list[str]] = {"engine": [], "plugin": []}
    for who, recorded in (("engine", repro.expected), ("plugin", repro.got)):
        for (step, name), value in sorted(recorded.items()):
            ours = computed(step, name, value)
            if ours is not None and not equal_in_pieces(ours.cpu(), value):
                differences[who].append(f"step {step}: {name}")
    return differences


Computed = Callable[[int, str, torch.Tensor], torch.Tensor | None]
"""(step, field, recorded value) to the recomputed value; None for a field that only the engine's functions compute."""


def _planes(repro: Repro, impl: api.Impl) -> Computed:
    """Recomputed planes of a batch that `precompute` prepares for all steps."""
    result = api.precompute(repro.batch, repro.geometry, impl=impl)

    def computed(step: int, name: str, recorded: torch.Tensor) -> torch.Tensor | None:
        if name not in PLANES or name == "pools.requests":
            return None
        return live_entries(result, result.step(step), step, (name,)).get(name, torch.empty(0))

    return computed


def _groups(repro: Repro, impl: api.Impl) -> Computed:
    """What attention groups keep of the rows, "group N plane". Pages of tables and blocks of a group's own are not known."""
    batch, geometry = repro.batch, repro.geometry

    def computed(step: int, name: str, recorded: torch.Tensor) -> torch.Tensor | None:
        plane, made = name.split(" ")[-1].partition("[")[0], torch.zeros_like(recorded, device=batch.seq_lens.device)
        if plane not in GroupRows.__dataclass_fields__:
            return None
        value: Any = (made,) if plane == "query_lens" else made
        out = GroupMetadata((GroupRows(**{plane: value}),), batch, geometry)
        api.bind_precompute(batch, out, impl=impl)(batch)
        if made.dim() == 2:
            made.masked_fill_(~live_pages(batch, geometry, made.shape[1], by_row=plane == "row_pages"), -1)
        return made

    return computed


def _draft_steps(repro: Repro, impl: api.Impl) -> Computed:
    """Recomputed fields of a draft whose positions advance from step to step: positions, slots, lengths, block tables."""
    batch, slots, limits = repro.batch, repro.batch.slots, repro.limits
    assert isinstance(slots, BlockTable) and limits is not None
    bs, device = batch.batch_size, batch.seq_lens.device
    before = batch.seq_lens[:bs].long() + (batch.step_offsets or (0,))[0] - 1

    def new(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(max(bs, 1), dtype=dtype, device=device)

    steps = [DraftStep(new(torch.int64), new(torch.int64), new(torch.int32)) for _ in range(batch.num_steps)]
    bind_draft_steps(steps, limits, impl=impl)(before - 1, before, slots, bs, bs)
    request = torch.arange(bs, device=device)
    starts = torch.arange(slots.block_table.shape[1], device=device) * slots.block_size

    def computed(step: int, name: str, recorded: torch.Tensor) -> torch.Tensor | None:
        made = steps[step]
        blocks = torch.where(starts < made.seq_lens[:bs, None], slots.block_table[:bs], -1)
        values = {
            "positions": made.positions[:bs], "slot_mapping": made.slots[:bs], "seq_lens": made.seq_lens[:bs],
            "block_table": blocks[:, : recorded.shape[-1] if recorded.dim() else 0], "req_id_per_token": request,
            "indices": request, "decode_lens": torch.ones_like(request), "per_req_decode_lens": torch.ones_like(request),
            "query_start_loc": torch.arange(bs + 1, device=device),
        }  # fmt: skip
        ours = values.get(name.rpartition(".")[2])
        return None if ours is None else ours.to(recorded.dtype)

    return computed


def _batch(batch: BatchDescriptor, geometry: Geometry) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Arrays of a batch (of its table only the used rows and live columns), and the sizes that restore it."""
    size = batch.batch_size
    seq_lens = batch.seq_lens[:size]
    longest = int(seq_lens.max()) + batch.added_tokens + max(batch.offsets) if size else 0
    unit = geometry.page_size
    if isinstance(batch.slots, BlockTable):
        unit = max(unit, batch.slots.block_size)
    width = min(max(-(-longest // unit) * unit, unit), geometry.table_width)
    arrays = {"seq_lens": seq_lens}
    if batch.extend_lens is not None:
        arrays["extend_lens"] = batch.extend_lens[:size]
    if batch.accepted is not None:
        arrays["accepted"] = batch.accepted[:size]
    if batch.query_start_loc is not None:
        arrays["query_start_loc"] = batch.query_start_loc[: size + 1]
    block_size = None
    if isinstance(batch.slots, TokenTable):
        used, rows = torch.unique(batch.slots.req_pool_indices[:size], return_inverse=True)
        arrays["table"] = batch.slots.req_to_token[used, :width]
        arrays["requests"] = rows
    else:
        block_size = batch.slots.block_size
        arrays["table"] = batch.slots.block_table[:size, : -(-width // block_size)]
    facts = {
        "mode": batch.mode.value, "batch_size": size, "num_steps": batch.num_steps, "block_size": block_size,
        "step_offsets": batch.step_offsets, "draft_tokens": batch.draft_tokens, "width": width,
        "geometry": dataclasses.asdict(dataclasses.replace(geometry, table_width=width)),
    }  # fmt: skip
    return {name: array.contiguous() for name, array in arrays.items()}, facts


def _on_gpu(repro: Repro) -> Repro:
    batch, slots = repro.batch, repro.batch.slots
    moved = dataclasses.replace(
        slots, **{field.name: _to_gpu(getattr(slots, field.name)) for field in dataclasses.fields(slots)}
    )
    optional = {name: _to_gpu(getattr(batch, name)) for name in ("extend_lens", "query_start_loc", "accepted")}
    batch = dataclasses.replace(batch, seq_lens=batch.seq_lens.cuda(), slots=moved, **optional)
    return dataclasses.replace(repro, batch=batch)


def _to_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise UnavailableError("repro files need numpy; pip install numpy") from error
    return numpy
