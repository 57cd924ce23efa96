"""x · (s·(B·A)⊙M)ᵀ for few entries M: what has to be taken off a LoRA layer's output to hold those entries still.

The product is evaluated at the entries alone (a sampled product), so the cost grows with their number and not with
the matrix. Gradients are exact: with G_M = s·(gᵀx)⊙M they are G_M·Aᵀ, Bᵀ·G_M and g·(s·(B·A)⊙M).
"""

import functools
import warnings
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable


class Pattern(NamedTuple):
    """Entries of a matrix by rows and by columns (compressed), as sparse products want them.

    starts, columns: of each row; starts_t, rows_t: of each column; order: entries by column among those by row.
    """

    shape: tuple[int, int]
    starts: Int64[Tensor, " rows_and_1"]
    columns: Int64[Tensor, " k"]
    starts_t: Int64[Tensor, " columns_and_1"]
    rows_t: Int64[Tensor, " k"]
    order: Int64[Tensor, " k"]

    def matrix(self, values: Float[Tensor, " k"]) -> Tensor:
        """Sparse [d_out, d_in] with these values at the entries, by rows."""
        return torch.sparse_csr_tensor(self.starts, self.columns, values, self.shape, check_invariants=False)

    def transposed(self, values: Float[Tensor, " k"]) -> Tensor:
        """Its transpose, by rows."""
        shape = (self.shape[1], self.shape[0])
        return torch.sparse_csr_tensor(self.starts_t, self.rows_t, values[self.order], shape, check_invariants=False)

    def sampled(self, left: Float[Tensor, "d_out n"], right: Float[Tensor, "n d_in"]) -> Float[Tensor, " k"]:
        """left @ right at the entries."""
        empty = self.matrix(left.new_zeros(len(self.columns)))
        return cast(Tensor, torch.sparse.sampled_addmm(empty, left, right, beta=0.0).values())


def pattern_of(index: Int64[Tensor, " k"], d_out: int, d_in: int) -> Pattern:
    """The pattern of sorted flat entries of [d_out, d_in]."""
    _announce_once()
    rows, columns = index // d_in, index % d_in
    order = torch.argsort(columns * d_out + rows)
    return Pattern((d_out, d_in), _starts(rows, d_out), columns, _starts(columns, d_in), rows[order], order)


def _starts(of: Int64[Tensor, " k"], n: int) -> Int64[Tensor, " n_and_1"]:
    return torch.cat([of.new_zeros(1), torch.bincount(of, minlength=n).cumsum(0)])


@functools.cache
def _announce_once() -> None:
    """torch says once per process that compressed sparse tensors are young; every value here is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse ", category=UserWarning)
        one = torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
        torch.sparse.sampled_addmm(one, torch.ones(1, 1), torch.ones(1, 1))


def held_back(
    x: Float[Tensor, "*batch d_in"],
    down: Float[Tensor, "r d_in"],
    up: Float[Tensor, "d_out r"],
    scale: float,
    pattern: Pattern,
) -> Float[Tensor, "*batch d_out"]:
    """x · (s·(B·A)⊙M)ᵀ, in the factors' dtype (float32 or float64)."""
    flat = x.reshape(-1, x.shape[-1]).to(down.dtype)
    out: Tensor = _HeldBack.apply(flat, down, up, scale, pattern)
    return out.view(*x.shape[:-1], up.shape[0])


class _HeldBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, scale: float, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, down, up)
        ctx.scale, ctx.pattern = scale, pattern
        with torch.autocast(x.device.type, enabled=False):
            held = pattern.matrix(scale * pattern.sampled(up, down))
            return (held @ x.T).T.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up = ctx.saved_tensors
        pattern, scale = ctx.pattern, ctx.scale
        with torch.autocast(x.device.type, enabled=False):
            held = scale * pattern.sampled(up, down)
            at_x = (pattern.transposed(held) @ grad.T).T if ctx.needs_input_grad[0] else None
            at_entries = scale * pattern.sampled(grad.T, x)
            at_down = (pattern.transposed(at_entries) @ up).T
            return at_x, at_down, pattern.matrix(at_entries) @ down.T, None, None
