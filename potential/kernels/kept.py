"""How is a Jacobian kept on a CPU? In blocks of 3 x 16, without those that are zero: an AEV of molecules has a part for
each pair of elements, and an atom moves only the parts of its own element."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WIDTH", "Blocks", "cut"]

WIDTH = 16  # columns of a block: a vector of AVX-512, a whole number of all others


@dataclass(frozen=True)
class Blocks:
    """A matrix of `shape` (3 R, C).

    values: (K, 3, 16), the last columns of some blocks being beyond C. at: (K,), int32, their first columns. row:
    (R + 1,), blocks of rows 3i .. 3i + 2 are row[i] .. row[i + 1].
    """

    shape: tuple[int, int]
    values: Tensor
    at: Tensor
    row: Tensor

    @functools.cached_property
    def facts(self) -> tuple[int, ...]:
        """Rows, columns, bytes of a number, and KeptJacobian of training.h; they take a while to ask for."""
        return *self.shape, self.values.itemsize, self.values.data_ptr(), self.at.data_ptr(), self.row.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.at.nbytes + self.row.nbytes


def cut(matrix: Tensor) -> Blocks:
    """The blocks of a matrix (3 R, C)."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % WIDTH))
    blocks = padded.view(len(matrix) // 3, 3, -1, WIDTH).transpose(1, 2)
    filled = (blocks != 0).flatten(2).any(2)
    row = torch.nn.functional.pad(filled.sum(1).cumsum(0), (1, 0))
    columns = (filled.nonzero()[:, 1] * WIDTH).int()
    return Blocks((matrix.shape[0], matrix.shape[1]), blocks[filled].contiguous(), columns, row)
