"""Operations on spatial positions inside each channel."""

from __future__ import annotations

from typing import Any

from weightspace.wiring.rules.base import (
    norm_axes,
    outputs_of,
    rule,
)
from weightspace.wiring.trace import Tracer


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "avg_pool1d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "max_pool2d", "max_pool1d", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "_upsample_nearest_exact1d",
    "_adaptive_avg_pool2d_backward", "fractional_max_pool2d", "adaptive_avg_pool2d", "mkldnn_max_pool2d",
)  # fmt: skip
def _pool(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Works inside each channel on spatial positions: the trailing dims whose number the name tells."""
    x = args[0]
    dims = t.dims(x)
    rank = next(r for r in (1, 2, 3) if f"{r}d" in t.op)
    t.pin(dims[-rank:], "spatial positions")
    return [[*dims[:-rank], *t.fresh(o.shape[-rank:], "spatial positions", pinned=True)] for o in outputs_of(out)]


@rule("grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "grid_sampler")
def _grid_sample(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, grid = t.dims(args[0]), t.dims(args[1])
    t.pin(x[2:], "spatial positions")
    t.pin(grid[-1], "coordinates")
    if args[0].shape[0] == args[1].shape[0]:
        t.unify(x[0], grid[0])
    return [x[0], x[1], *grid[1:-1]]


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _fft(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = t.dims(args[0])
    for d in norm_axes(args[0].dim(), args[1]):
        t.pin(dims[d], "frequencies")
        dims[d] = t.ledger.dim(out.shape[d], pinned=True, reason="frequencies")
    return dims
