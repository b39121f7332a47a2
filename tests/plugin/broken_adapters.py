"""Adapters for the example's toy engine that each break one line of the contract, by what the kit must say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import toy_engine
from nsa_plugin import ForwardMode
from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.reporting import Stage
from toy_adapter import Prepared, ToyAdapter, _replace

# probe


class SeesNothing(ToyAdapter):
    def probe(self) -> list[str]:
        return []


class SaysTooLittle(ToyAdapter):
    def probe(self) -> list[str]:
        return [problem.partition(",")[0] for problem in super().probe()]


class GoesByTheVersion(ToyAdapter):
    def probe(self) -> list[str]:
        known = toy_engine.__version__ == "1.4"
        return super().probe() if known else [f"looked for 1.4, found {toy_engine.__version__}; install 1.4"]


class DoesNotWarn(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        with mock.patch("toy_adapter.warn_if_untested"):
            return super().install(host)


class ProbeRaises(ToyAdapter):
    def probe(self) -> list[str]:
        if toy_engine.StepBuffers is None:
            raise TypeError("planted")
        return super().probe()


class ProbePatches(ToyAdapter):
    def probe(self) -> list[str]:
        setattr(toy_engine.Forward, "probed", True)  # noqa: B010
        return super().probe()


# install and undo


class InstallsRegardless(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        problems = super().probe()
        with mock.patch.object(self, "probe", list):
            super().install(host)
        return problems


class InstallsHalf(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        with mock.patch.object(self, "undo"):
            return super().install(host)


class HidesAFailure(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        with suppress(RuntimeError), mock.patch.object(self, "undo"):
            return super().install(host)
        return []


class InstallsTwice(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        if self._originals:
            _replace(toy_engine.Forward, "prepare", self._prepare)
        return super().install(host)


class ClaimsSuccessTheSecondTime(ToyAdapter):
    asked = False

    def install(self, host: Any) -> list[str]:
        if self.asked:
            return []
        self.asked = True
        return super().install(host)


class InstallsNothing(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        return self.probe()


class UndoesHalf(ToyAdapter):
    def undo(self) -> None:
        self._originals.pop("capture", None)
        super().undo()


class UndoesWithACopy(ToyAdapter):
    def undo(self) -> None:
        for name, original in list(self._originals.items()):
            self._originals[name] = lambda forward, batch, original=original: original(forward, batch)
        super().undo()


class LeavesAnAttribute(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        setattr(toy_engine.Forward, "plugin", self)  # noqa: B010
        return super().install(host)


class CannotComeBack(ToyAdapter):
    gone = False

    def install(self, host: Any) -> list[str]:
        return ["looked for the past, found nothing; start anew"] if self.gone else super().install(host)

    def undo(self) -> None:
        self.gone = self.gone or bool(self._originals)
        super().undo()


# ledger


class HidesAPatch(ToyAdapter):
    """Replaces more than its ledger says."""

    def install(self, host: Any) -> list[str]:
        with mock.patch.object(self, "ledger", super().ledger):
            return super().install(host)

    def ledger(self) -> Sequence[LedgerRow]:
        return super().ledger()[:1]


class ClaimsAPatch(ToyAdapter):
    """Replaces less than its ledger says."""

    def install(self, host: Any) -> list[str]:
        with mock.patch.object(self, "ledger", super().ledger):
            return super().install(host)

    def ledger(self) -> Sequence[LedgerRow]:
        rows = super().ledger()
        return (*rows, replace(rows[0], target="toy_engine.StepBuffers.__init__"))


class GivesNoReason(ToyAdapter):
    def ledger(self) -> Sequence[LedgerRow]:
        return [replace(row, why="") for row in super().ledger()]


# describe and faithful: what a plan is told and does


def preparing(**methods: Callable[..., Any]) -> type[ToyAdapter]:
    """The toy adapter with other methods of `Prepared`."""
    return type("Broken", (ToyAdapter,), {"prepared": type("BrokenPrepared", (Prepared,), methods)})


def described(change: Callable[[Any, Any], dict[str, Any]], batch_change: Any = None) -> type[ToyAdapter]:
    """With some fields of the descriptor replaced."""

    def describe(forward: Any, batch: Any) -> Any:
        good = Prepared.describe(forward, batch)
        return replace(good, **change(good, batch))

    return preparing(describe=staticmethod(describe))


def _only_its_own_type(forward: Any, batch: Any) -> Any:
    if isinstance(batch, SimpleNamespace):
        raise TypeError("expected a Batch")
    return Prepared.describe(forward, batch)


def _reads_on_the_host(good: Any, batch: Any) -> dict[str, Any]:
    return {"num_steps": good.num_steps + 0 * batch.lengths[0].item()} if batch.size else {}


def _late_offsets(good: Any, batch: Any) -> dict[str, Any]:
    return {"step_offsets": tuple(range(good.num_steps)) if good.num_steps > 1 else ()}


def _wrong_for_int32(good: Any, batch: Any) -> dict[str, Any]:
    """Reads something else for int32."""
    return {"seq_lens": batch.requests if batch.lengths.dtype is torch.int32 else batch.lengths}


def _ignores_strides(good: Any, batch: Any) -> dict[str, Any]:
    """Takes the two columns of the scheduler's table for contiguous."""
    whole = torch.as_strided(batch.lengths, (batch.size,), (1,), batch.lengths.storage_offset() if batch.size else 0)
    return {"seq_lens": whole}


def _wrong_draft_tokens(good: Any, batch: Any) -> dict[str, Any]:
    verify = good.mode is ForwardMode.TARGET_VERIFY
    return {"seq_lens": batch.lengths + 1 if verify else batch.lengths}


def _only_the_first_time(prepared: Any, batch: Any) -> None:
    if not getattr(prepared, "ran", False):
        prepared.ran = True
        Prepared.run(prepared, batch)


def _fails_without_requests(prepared: Any, batch: Any) -> None:
    if batch.size == 0:
        raise ZeroDivisionError
    Prepared.run(prepared, batch)


def _skips_idle(prepared: Any, batch: Any) -> None:
    if batch.size and bool((batch.lengths == 1).all()) and hasattr(prepared, "ran"):
        return
    prepared.ran = True
    Prepared.run(prepared, batch)


def _ignores_padding(prepared: Any, batch: Any) -> None:
    """Leaves the metadata of padded rows as it was."""
    kept = [buffers.kept.clone() for buffers in prepared._buffers]
    Prepared.run(prepared, batch)
    if batch.size and int(batch.lengths[-1]) == 1 and int(batch.requests[-1]) == 0 and hasattr(prepared, "ran"):
        for buffers, before in zip(prepared._buffers, kept, strict=True):
            buffers.kept[-2] = before[-2]
    prepared.ran = True


def _moves_buffers(prepared: Any, batch: Any) -> None:
    Prepared.run(prepared, batch)
    prepared._buffers[-1].kept = prepared._buffers[-1].kept.clone()


def _misses_the_last_step(prepared: Any, batch: Any) -> None:
    last = prepared._buffers[-1].lengths.clone()
    Prepared.run(prepared, batch)
    if len(prepared._buffers) > 3:
        prepared._buffers[-1].lengths.copy_(last)


class DoesNotServe(ToyAdapter):
    """Patches, and lets the engine do everything."""

    def _capture(self, forward: Any, batch: Any) -> None:
        self._originals["capture"](forward, batch)


class ServesByCopying(ToyAdapter):
    """Whatever strategy it was asked for."""

    def _capture(self, forward: Any, batch: Any) -> None:
        with mock.patch.object(type(self._host), "strategies", ("copy",)):
            super()._capture(forward, batch)


# errors


class LetsErrorsThrough(ToyAdapter):
    def _prepare(self, forward: Any, batch: Any) -> None:
        prepared = self._plans(forward).get(batch.size)
        self._originals["prepare"](forward, batch) if prepared is None else prepared.run(batch)


class LetsErrorsThroughAtCapture(ToyAdapter):
    def _fall_back(self, forward: Any, batch: Any, stage: Stage, strategy: str, error: Exception, *more: Any) -> None:
        super()._fall_back(forward, batch, stage, strategy, error)
        if stage == "capture":
            raise error


class DoesNotRecompute(ToyAdapter):
    def _fall_back(self, forward: Any, batch: Any, stage: Stage, strategy: str, error: Exception, *more: Any) -> None:
        with mock.patch.dict(self._originals, prepare=lambda forward, batch: None):
            super()._fall_back(forward, batch, stage, strategy, error)


class FailsSilently(ToyAdapter):
    def _fall_back(self, forward: Any, batch: Any, stage: Stage, strategy: str, error: Exception, *more: Any) -> None:
        self._originals["prepare"](forward, batch)


class HidesTheCause(ToyAdapter):
    def _fall_back(self, forward: Any, batch: Any, stage: Stage, strategy: str, error: Exception, *more: Any) -> None:
        super()._fall_back(forward, batch, stage, strategy, RuntimeError("something went wrong"))


class TriesAgain(ToyAdapter):
    def _fall_back(self, forward: Any, batch: Any, stage: Stage, strategy: str, error: Exception, *more: Any) -> None:
        prepared = self.prepared(self._host, forward, batch, "copy") if stage == "replay" else None
        super()._fall_back(forward, batch, stage, strategy, error)
        if prepared is not None:
            self._plans(forward)[batch.size] = prepared


class NeverPlans(ToyAdapter):
    """Its own code does not go through the host: planted errors do not reach it."""

    def _capture(self, forward: Any, batch: Any) -> None:
        self._originals["capture"](forward, batch)
        self._host.path("toy", "draft decode", mock.Mock()).using("share")


# what only a GPU shows


def allocates(prepared: Any, batch: Any) -> None:
    prepared.spare = [torch.empty(4096, device=batch.lengths.device)]
    Prepared.run(prepared, batch)


def syncs(prepared: Any, batch: Any) -> None:
    int(batch.lengths.sum()) if batch.size else 0
    Prepared.run(prepared, batch)


# beyond attributes


REGISTRY: list[str] = []


class LeavesAnEntry(ToyAdapter):
    """In a registry of the engine, which is no attribute of what it patches."""

    def install(self, host: Any) -> list[str]:
        REGISTRY.append("toy")
        return super().install(host)


BROKEN: list[tuple[str, type[ToyAdapter], str]] = [
    ("probe", SeesNothing, "prepare missing: not named"),
    ("probe", SaysTooLittle, "what to do"),
    ("probe", GoesByTheVersion, "goes by the version"),
    ("probe", DoesNotWarn, "needs one warning"),
    ("probe", ProbeRaises, "it raised TypeError"),
    ("probe", ProbePatches, "the probe changed probed"),
    ("install", InstallsRegardless, "patched all the same"),
    ("install", InstallsHalf, "patched all the same"),
    ("install", HidesAFailure, "returned no problem"),
    ("install", InstallsTwice, "second install"),
    ("install", ClaimsSuccessTheSecondTime, "claims to have worked"),
    ("install", InstallsNothing, "changed no attribute"),
    ("undo", UndoesHalf, "capture is not what it was"),
    ("undo", UndoesWithACopy, "prepare is not what it was"),
    ("undo", LeavesAnAttribute, "plugin is not what it was"),
    ("undo", CannotComeBack, "second install() found"),
    ("ledger", HidesAPatch, "prepare: install() replaces it, but the ledger has no row for it"),
    ("ledger", LeavesAnAttribute, "plugin: install() replaces it"),
    ("ledger", ClaimsAPatch, "toy_engine.StepBuffers.__init__: the ledger has a row for it"),
    ("ledger", GivesNoReason, "toy_engine.Forward.capture: the row of the ledger has no 'why'"),
    ("describe", described(lambda good, batch: {"seq_lens": batch.lengths.clone()}), "clone"),
    ("describe", described(lambda good, batch: {"seq_lens": batch.lengths.contiguous()}), "clone"),
    ("describe", described(_reads_on_the_host), "it ran aten._local_scalar_dense"),
    ("describe", preparing(describe=staticmethod(_only_its_own_type)), "SimpleNamespace: it raised TypeError"),
    ("describe", preparing(describe=staticmethod(lambda forward, batch: None)), "not a BatchDescriptor"),
    ("describe", DoesNotServe, "never saw a batch of"),
    ("faithful", described(_late_offsets), "draft of 3 steps: round 0, consumer 0: lengths"),
    ("faithful", described(_wrong_for_int32), "draft of 7 steps, int32: round"),
    ("faithful", described(_ignores_strides), "consumer 0: lengths"),
    ("faithful", described(_wrong_draft_tokens), "verification: round"),
    ("faithful", preparing(run=_only_the_first_time), "draft of 1 step: round 1"),
    ("faithful", preparing(run=_fails_without_requests), "it fell back: toy draft decode capture share"),
    ("faithful", preparing(run=_skips_idle), "round 3"),
    ("faithful", preparing(run=_ignores_padding), "round 2"),
    ("faithful", preparing(run=_misses_the_last_step), "consumer 6: lengths"),
    ("faithful", DoesNotServe, "does not serve 'draft decode'"),
    ("faithful", ServesByCopying, "share, draft of 1 step: it does not serve"),
    ("addresses", preparing(run=_moves_buffers), "kept"),
    ("errors", LetsErrorsThrough, "the engine saw it"),
    ("errors", LetsErrorsThroughAtCapture, "the engine saw it"),
    ("errors", DoesNotRecompute, "lengths"),
    ("errors", FailsSilently, "one line with the cause"),
    ("errors", HidesTheCause, "one line with the cause"),
    ("errors", TriesAgain, "tried again"),
    ("errors", NeverPlans, "never reached"),
]
"""Line of the contract, an adapter that breaks it, and part of what must be said."""
