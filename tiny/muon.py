"""Muon (Keller Jordan, 2024): momentum, orthogonalized matrix by matrix.

Its updates are as large as AdamW's (Liu et al., arXiv 2502.16982), so that their learning
rates are alike. torch.optim.Muon, from torch 2.9 on, computes the same in bfloat16, which many CPUs
only emulate: for the `tiny` model it is 20 times as slow there.
"""
import math

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For matrices (rows, columns) alone; other parameters need another optimizer."""

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state, momentum = self.state[matrix], group["momentum"]
                average = state.setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - momentum)
                update = orthogonalize(matrix.grad.lerp(average, momentum))  # Nesterov's momentum
                size = 0.2 * math.sqrt(max(matrix.shape))  # entries are then about 0.2, as AdamW's
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=group["lr"] * size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """(rows, columns) -> the same, with singular values of about 1: five steps of Newton and
    Schulz, each an odd polynomial of the singular values. It is a product with a polynomial of the
    square `gram`, so only the smaller side counts."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    x = matrix / matrix.norm().clamp(min=1e-7)
    gram, product = x @ x.T, torch.eye(len(x), device=x.device)
    for _ in range(5):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x
