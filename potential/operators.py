"""What do autograd, torch.compile and torch.export see of the AEV? Operators `smelt::aev` and its two products.

They run the kernels, and are once differentiable by the vectors and any number of times by everything else: a loss on
forces reaches the parameters of networks through them. Second derivatives by the vectors are not made; where autograd
asks for them it gets "not a number", never a wrong one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from potential import kernels
from potential.aev import AEVParameters

__all__ = ["aev"]

# The fields of AEVParameters in their order: a schema knows no dataclasses.
CONSTANTS = (
    "float radial_cutoff_A, float angular_cutoff_A, float eta_radial, float eta_angular, float zeta,"
    " float[] radial_shifts, float[] angular_shifts, float[] angle_shifts, int n_species"
)


def aev(vec: Tensor, row: Tensor, species_other: Tensor, p: AEVParameters) -> Tensor:
    """AEVs of all atoms, (N, L), as kernels.aev_forward gives them, differentiable by `vec`.

    vec: (E, 3), A, sorted by centre. row: (N + 1,). species_other: (E,).
    """
    found: Tensor = torch.ops.smelt.aev(vec, row, species_other, *dataclasses.astuple(p))
    return found


def _parameters(constants: tuple[Any, ...]) -> AEVParameters:
    # A list in a schema arrives as one.
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in constants]
    return AEVParameters(*values)


def _forward(vec: Tensor, row: Tensor, species_other: Tensor, *constants: Any) -> Tensor:
    return kernels.aev_forward(vec, row, species_other, _parameters(constants))


def _vjp(vec: Tensor, row: Tensor, species_other: Tensor, cotangent: Tensor, *constants: Any) -> Tensor:
    return kernels.aev_vjp(vec, row, species_other, cotangent.contiguous(), _parameters(constants))


def _jvp(vec: Tensor, row: Tensor, species_other: Tensor, tangent: Tensor, *constants: Any) -> Tensor:
    return kernels.aev_jvp(vec, row, species_other, tangent.contiguous(), _parameters(constants))


def _like_forward(vec: Tensor, row: Tensor, species_other: Tensor, *constants: Any) -> Tensor:
    return vec.new_empty(row.shape[0] - 1, _parameters(constants).length)


def _like_vjp(vec: Tensor, row: Tensor, species_other: Tensor, cotangent: Tensor, *constants: Any) -> Tensor:
    return vec.new_empty(cotangent.shape[0], *vec.shape)


def _like_jvp(vec: Tensor, row: Tensor, species_other: Tensor, tangent: Tensor, *constants: Any) -> Tensor:
    return vec.new_empty(tangent.shape[0], row.shape[0] - 1, _parameters(constants).length)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    n_tensors = sum(isinstance(value, Tensor) for value in inputs)
    ctx.save_for_backward(*inputs[:n_tensors])
    ctx.constants = inputs[n_tensors:]


def _forward_back(ctx: Any, by_aev: Tensor) -> tuple[Tensor | None, ...]:
    by_vec = torch.ops.smelt.aev_vjp(*ctx.saved_tensors, by_aev[None], *ctx.constants)[0]
    return (by_vec, None, None, *[None] * len(ctx.constants))


def _vjp_back(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
    vec, row, species_other, _ = ctx.saved_tensors
    by_cotangent = torch.ops.smelt.aev_jvp(vec, row, species_other, tangent, *ctx.constants)
    return (torch.full_like(vec, torch.nan), None, None, by_cotangent, *[None] * len(ctx.constants))


def _jvp_back(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    vec, row, species_other, _ = ctx.saved_tensors
    by_tangent = torch.ops.smelt.aev_vjp(vec, row, species_other, cotangent, *ctx.constants)
    return (torch.full_like(vec, torch.nan), None, None, by_tangent, *[None] * len(ctx.constants))


def _register() -> None:
    pairs = "Tensor vec, Tensor row, Tensor species_other"
    for name, arguments, function, shape, back in (
        ("aev", pairs, _forward, _like_forward, _forward_back),
        ("aev_vjp", f"{pairs}, Tensor cotangent", _vjp, _like_vjp, _vjp_back),
        ("aev_jvp", f"{pairs}, Tensor tangent", _jvp, _like_jvp, _jvp_back),
    ):
        schema = f"({arguments}, {CONSTANTS}) -> Tensor"
        operator = torch.library.custom_op(f"smelt::{name}", function, mutates_args=(), schema=schema)
        operator.register_fake(shape)
        operator.register_autograd(back, setup_context=_keep)


_register()
