"""Matrix products with constant weights: plain, or packed once for MKL, which saves packing in every small product.

MKL's packed products are an undocumented part of torch. They are used only where they exist, for float32 on the CPU,
and only after a check on the very weight that they replace; everything else is `torch.nn.functional.linear`. A packed
copy takes the memory of its weight a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Product = Callable[[Tensor], Tensor]  # [token, in] -> [token, out]

# Largest difference to F.linear that a packed product may have, relative to the largest element of the result.
PACKED_BOUND = 1e-5
_CHECKED_ROWS = (1, 3, 16, 70)


def product(linears: Sequence[nn.Linear], *, pack: bool) -> Product:
    """Return one function for several linear layers of the same input; outputs are concatenated in their order.

    With `pack` the function holds a packed copy if `packed` grants it. Otherwise nothing is held twice: on the CPU each
    layer has its own product, as fast as a fused one, because what a file maps into memory stays there beside a fused
    copy; elsewhere, where a launch costs more, the layers' own parameters become views of one fused weight.

    Raises:
        ValueError: if some of the layers have a bias and others have none.
    """
    if len({linear.bias is None for linear in linears}) > 1:
        raise ValueError("either all of the layers have a bias or none has")
    weights = [linear.weight.detach() for linear in linears]
    biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
    if pack and (found := packed(torch.cat(weights), None if biases[0] is None else torch.cat(biases))) is not None:
        return found
    if len(linears) == 1:
        return lambda x: functional.linear(x, weights[0], biases[0])
    if weights[0].device.type == "cpu":
        both = list(zip(weights, biases, strict=True))
        return lambda x: torch.cat([functional.linear(x, weight, bias) for weight, bias in both], dim=-1)
    return fused(linears)


def fused(linears: Sequence[nn.Linear]) -> Product:
    """Return one product for several linear layers, whose weights become views of its own: their values stay."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    start = 0
    for linear in linears:
        linear.weight.data = weight[start : start + linear.out_features]
        start += linear.out_features
    return lambda x: functional.linear(x, weight, bias)


def packed(weight: Tensor, bias: Tensor | None = None) -> Product | None:
    """Return `x -> x @ weight.T + bias` with a weight [out, in] packed for MKL.

    None where torch has no such product, for other dtypes and devices, and where a check against F.linear fails.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    try:
        reorder, multiply = torch.ops.mkl._mkl_reorder_linear_weight, torch.ops.mkl._mkl_linear
        held = reorder(weight.contiguous(), 1)
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return None
    # Only the shape of the plain weight is read as long as the number of rows is stated rightly.
    shape = torch.empty(1).expand(weight.shape)

    def run(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, held, shape, bias, len(x))
        return out

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        x = torch.randn(max(_CHECKED_ROWS), weight.shape[1], generator=generator)
        for rows in _CHECKED_ROWS:
            expected = functional.linear(x[:rows], weight, bias)
            try:
                off = (run(x[:rows]) - expected).abs().max()
            except RuntimeError:
                return None
            if not bool(off <= PACKED_BOUND * expected.abs().max()):  # not >, which NaN would pass
                return None
    return run
