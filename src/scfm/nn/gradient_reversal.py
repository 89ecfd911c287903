"""Gradient reversal (Ganin and Lempitsky, ICML 2015): what helps a classifier hurts what it looks at."""

from __future__ import annotations

import torch
from torch import Tensor


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


def reverse_gradient(x: Tensor) -> Tensor:
    """The same numbers, through which gradients pass with the sign reversed."""
    return _Reverse.apply(x)
