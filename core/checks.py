"""Checks of single fields. An error names the field, what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from nsa_plugin.core.errors import InvalidTypeError, reject

INTEGERS = (torch.int32, torch.int64)
INT32 = (torch.int32,)


T = TypeVar("T")


def instance(name: str, value: object, kind: type[T]) -> T:
    """Raise unless `value` is a `kind`; return it."""
    if not isinstance(value, kind):
        reject(name, f"a {kind.__name__}", type(value).__name__, error=InvalidTypeError)
    return value


def instances(name: str, values: object, kind: type[T]) -> Sequence[T]:
    """Raise unless `values` is a sequence of `kind`; return it."""
    if not isinstance(values, Sequence):
        reject(name, f"a sequence of {kind.__name__}", type(values).__name__, error=InvalidTypeError)
    for index, value in enumerate(values):
        instance(f"{name}[{index}]", value, kind)
    return values


def boolean(name: str, value: object) -> None:
    """Raise unless `value` is a bool."""
    if value is not True and value is not False:
        reject(name, "True or False", repr(value), error=InvalidTypeError)


def function(name: str, value: object, *, optional: bool = False) -> None:
    """Raise unless `value` is callable, or None where it is `optional`."""
    if not callable(value) and not (optional and value is None):
        reject(name, "a callable", type(value).__name__, error=InvalidTypeError)


def at_least(name: str, value: object, least: int) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        reject(name, f"an int >= {least}", repr(value), error=InvalidTypeError)
    if value < least:
        reject(name, f"an int >= {least}", value)


@dataclass(frozen=True, slots=True)
class TensorChecks:
    """Checks of tensors on one device: shapes, dtypes, devices and strides, no values.

    Parameters
    ----------
    device : torch.device
        Device that every tensor must be on.
    of : str
        Field whose device that is; messages name it.
    """

    device: torch.device
    of: str

    def tensor(self, name: str, value: object, dimensions: int, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        """Raise unless `value` is a tensor of one of `dtypes`, with that many dimensions, on the device; return it."""
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
        """Raise unless `value` is a vector of at least `size` entries, each in memory of its own."""
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
        """Raise unless `value` is a matrix of at least `rows` by `columns` entries, each in memory of its own."""
        tensor = self.tensor(name, value, 2, dtypes)
        if tensor.shape[0] < rows:
            reject(name, f"at least {rows} rows", tensor.shape[0], fix="make the buffers for the largest batch")
        if tensor.shape[1] < columns:
            reject(name, f"at least {columns} columns", tensor.shape[1])
        if overlaps_itself(tensor, rows, columns):
            reject(name, "strides without overlap", tensor.stride(), fix="do not pass an expanded tensor")
        if contiguous_rows and tensor.stride(1) != 1:
            reject(name, "rows of stride 1", f"strides {tensor.stride()}", fix="allocate it without gaps in a row")


Dimensions = Sequence[tuple[int, int]]
"""(stride in bytes, number of entries) of each dimension, from the widest stride to the narrowest."""


def overlaps_itself(table: torch.Tensor, rows: int, columns: int) -> bool:
    """Whether two entries of the first `rows` by `columns` of a table share memory."""
    if (rows > 1 and table.stride(0) == 0) or (columns > 1 and table.stride(1) == 0):
        return rows * columns > 1
    dimensions = _dimensions(table, (rows, columns))
    if not dimensions:
        return False
    (stride, size), inner = dimensions[0], dimensions[1:]
    return any(_meet(step * stride, inner, inner) for step in range(1, min(size - 1, _extent(inner) // stride) + 1))


def overlap(a: torch.Tensor, a_shape: Sequence[int], b: torch.Tensor, b_shape: Sequence[int]) -> bool:
    """Whether the leading part of `a`, of shape `a_shape`, shares memory with that of `b`."""
    if a.device != b.device or 0 in a_shape or 0 in b_shape:
        return False
    return _meet(b.data_ptr() - a.data_ptr(), _dimensions(a, a_shape), _dimensions(b, b_shape))


def _dimensions(tensor: torch.Tensor, shape: Sequence[int]) -> Dimensions:
    size = tensor.element_size()
    pairs = zip(tensor.stride(), shape, strict=True)
    return sorted(((stride * size, count) for stride, count in pairs if count > 1 and stride), reverse=True)


def _extent(dimensions: Dimensions) -> int:
    """Bytes from the first entry to the last."""
    return sum(stride * (size - 1) for stride, size in dimensions)


def _meet(distance: int, left: Dimensions, right: Dimensions) -> bool:
    """Whether an entry of `left` has the address of one of `right`, which starts `distance` bytes later."""
    if distance > _extent(left) or -distance > _extent(right):
        return False
    if not left and not right:
        return True
    if not left or (right and right[0][0] > left[0][0]):
        return _meet(-distance, right, left)
    (stride, size), inner = left[0], left[1:]
    if right and right[0][0] == stride:  # equal strides: only the difference of the two steps matters
        last, other = right[0][1] - 1, right[1:]
        first_step = max(-(size - 1), -((distance + _extent(other)) // stride))
        last_step = min(last, (_extent(inner) - distance) // stride)
        return any(_meet(distance + step * stride, inner, other) for step in range(first_step, last_step + 1))
    first = max(-((_extent(inner) - distance) // stride), 0)
    final = min((distance + _extent(right)) // stride, size - 1)
    return any(_meet(distance - step * stride, inner, right) for step in range(first, final + 1))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
