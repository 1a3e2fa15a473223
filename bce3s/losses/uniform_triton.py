"""One block of the uniform term on a CUDA device: tiles of W_I·W_Jᵀ, from which come their softplus sum and slopes, in one kernel.

The tiles themselves are never stored. A tile's sum has a place of its own and torch adds them up, so the same bits come every time.
`TRITON_INTERPRET=1`, set before Triton is imported, runs the same kernel on a CPU; the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 128
BLOCK_COLUMNS = 128
# Elements of D a step: 128 bytes a row of a tile in half precision and in float32.
BLOCK_DEPTHS = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
NUM_WARPS = 8
NUM_STAGES = 3


@triton.jit  # type: ignore[untyped-decorator]
def _block_kernel(
    rows: tl.tensor,
    columns: tl.tensor,
    sums: tl.tensor,
    slopes: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    depth: tl.tensor,
    same_ratio: tl.tensor,
    ON_DIAGONAL: tl.constexpr,
    WITH_SLOPES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # Program (row tile, column tile).
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < num_rows, column < num_columns
    # 64 bits: K·D passes 2³¹ at a million classes.
    row_start = row.to(tl.int64)[:, None] * depth
    column_start = column.to(tl.int64)[None, :] * depth
    cosines = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        element = start + tl.arange(0, DEPTH)
        element_inside = element < depth
        left = tl.load(rows + row_start + element[None, :], mask=row_inside[:, None] & element_inside[None, :], other=0.0)
        right = tl.load(columns + column_start + element[:, None], mask=column_inside[None, :] & element_inside[:, None], other=0.0)
        cosines = tl.dot(left, right, cosines, input_precision=PRECISION)
    inside = row_inside[:, None] & column_inside[None, :]
    # log(1 + e) as it stands: cosines lie in −1…1, where e is no less than 0.36.
    fade = tl.exp(-tl.abs(cosines))
    softplus = tl.maximum(cosines, 0.0) + tl.log(1.0 + fade)
    slope = tl.where(cosines >= 0, 1.0, fade) / (1.0 + fade)
    if ON_DIAGONAL:
        same = row[:, None] == column[None, :]
        softplus = tl.where(same, same_ratio * (softplus - cosines), softplus)
        slope = tl.where(same, same_ratio * (slope - 1.0), slope)
    # One reduction over both axes: Triton 3.7.1 cannot compile two in half precision for sm_100 and its kin.
    total = tl.sum(tl.where(inside, softplus, 0.0))
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)
    if WITH_SLOPES:
        place = slopes + row.to(tl.int64)[:, None] * num_columns + column[None, :]
        tl.store(place, slope.to(slopes.dtype.element_ty), mask=inside)


def block_terms(rows_ID: Tensor, columns_JD: Tensor, same_ratio: float | None, wants_slopes: bool) -> tuple[Tensor, Tensor | None]:
    """The softplus sum of rows·columnsᵀ and its slopes; see `uniform.BlockTerms`.

    Waits for nothing, so a CUDA graph can hold it after one call outside.

    Args:
        rows_ID: float16, bfloat16 or float32 [I, D], contiguous; float32 is multiplied as such, or as TF32 where torch's own
            products are (`TrainConfig.tf32`).
        columns_JD: the same dtype and device, [J, D]; the rows themselves in a block on the diagonal.
        same_ratio: weight of softplus(−c_kk) in a block on the diagonal; None elsewhere.
        wants_slopes: whether to return the derivative of the sum by each product.

    Returns:
        float32 [], and [I, J] in the dtype of the rows or None.
    """
    (num_rows, depth), num_columns = rows_ID.shape, len(columns_JD)
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(num_columns, BLOCK_COLUMNS))
    sums = torch.empty(grid, dtype=torch.float32, device=rows_ID.device)
    slopes_IJ = torch.empty((num_rows, num_columns), dtype=rows_ID.dtype, device=rows_ID.device) if wants_slopes else None
    # Triton launches on the current device, which need not be that of the rows.
    with torch.cuda.device_of(rows_ID):
        _block_kernel[grid](
            rows_ID,
            columns_JD,
            sums,
            sums if slopes_IJ is None else slopes_IJ,
            num_rows,
            num_columns,
            depth,
            0.0 if same_ratio is None else same_ratio,
            ON_DIAGONAL=same_ratio is not None,
            WITH_SLOPES=wants_slopes,
            ROWS=BLOCK_ROWS,
            COLUMNS=BLOCK_COLUMNS,
            DEPTH=BLOCK_DEPTHS[rows_ID.dtype],
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return sums.sum(), slopes_IJ
