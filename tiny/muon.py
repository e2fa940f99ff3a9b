"""The Muon optimizer (Keller Jordan, 2024), which orthogonalizes the momentum of each matrix.

Updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), so similar learning rates
work. torch.optim.Muon (torch 2.9 and later) does the same in bfloat16, which many CPUs only
emulate, making the `tiny` model's updates 20 times slower.
"""
import math

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For matrices (rows, columns) only; other parameters need another optimizer."""

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]

            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                buffer.lerp_(matrix.grad, 1 - momentum)
                update = orthogonalize(matrix.grad.lerp(buffer, momentum))  # Nesterov momentum

                size = 0.2 * math.sqrt(max(matrix.shape))  # entries of about 0.2, like AdamW's
                matrix.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """(rows, columns) -> the same matrix with all singular values near 1.

    Each of five Newton-Schulz steps multiplies the matrix by a polynomial in its Gram matrix. Their
    product is built from `gram` alone, so a step's cost depends only on the smaller side.
    """
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
