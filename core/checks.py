"""Checks of what a caller hands in, one field at a time: each names the field, what was expected, what came, what to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa_plugin.core.errors import InvalidTypeError, reject

INTEGERS = (torch.int32, torch.int64)
INT32 = (torch.int32,)


def at_least(name: str, value: object, least: int) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        reject(name, f"an int >= {least}", repr(value), error=InvalidTypeError)
    if value < least:
        reject(name, f"an int >= {least}", value)


@dataclass(frozen=True, slots=True)
class TensorChecks:
    """Checks of tensors that belong together (shapes, dtypes, devices, strides; no values).

    Parameters
    ----------
    device : torch.device
        Where all of them must be.
    of : str
        The field that says so, for messages.
    """

    device: torch.device
    of: str

    def tensor(self, name: str, value: object, dimensions: int, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        """Raise unless `value` is a tensor of one of `dtypes`, of so many dimensions, on the device; return it."""
        if not isinstance(value, torch.Tensor):
            reject(name, "a tensor", type(value).__name__, error=InvalidTypeError)
        if value.dtype not in dtypes:
            wanted, came = " or ".join(map(_plain, dtypes)), _plain(value.dtype)
            reject(name, wanted, came, fix=f"convert with .to({dtypes[0]})", error=InvalidTypeError)
        if value.dim() != dimensions:
            reject(name, f"{dimensions} dimension(s)", f"shape {tuple(value.shape)}")
        if value.device != self.device:
            reject(name, f"device {self.device} (that of {self.of})", f"device {value.device}")
        return value

    def vector(
        self, name: str, value: object, size: int, dtypes: tuple[torch.dtype, ...] = INT32, *, contiguous: bool = False
    ) -> None:
        """Raise unless `value` is a vector of at least `size` entries, none of them the same one twice."""
        tensor = self.tensor(name, value, 1, dtypes)
        if tensor.shape[0] < size:
            reject(name, f"at least {size} entries", tensor.shape[0], fix="make the buffers for the largest batch")
        if size > 1 and tensor.stride(0) == 0:
            reject(name, "a stride other than 0", tensor.stride(), fix="do not pass an expanded tensor")
        if contiguous and not tensor.is_contiguous():
            reject(name, "a contiguous vector", f"strides {tensor.stride()}", fix="allocate it without gaps")

    def table(
        self, name: str, value: object, rows: int, columns: int, dtypes: tuple[torch.dtype, ...] = INT32,
        *, contiguous_rows: bool = False,
    ) -> None:  # fmt: skip
        """Raise unless `value` has at least so many rows and columns, no entry of which is the same as another."""
        tensor = self.tensor(name, value, 2, dtypes)
        if tensor.shape[0] < rows:
            reject(name, f"at least {rows} rows", tensor.shape[0], fix="make the buffers for the largest batch")
        if tensor.shape[1] < columns:
            reject(name, f"at least {columns} columns", tensor.shape[1])
        if (rows > 1 and tensor.stride(0) == 0) or (columns > 1 and tensor.stride(1) == 0):
            reject(name, "strides without overlap", tensor.stride(), fix="do not pass an expanded tensor")
        if contiguous_rows and tensor.stride(1) != 1:
            reject(name, "rows of stride 1", f"strides {tensor.stride()}", fix="allocate it without gaps in a row")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
