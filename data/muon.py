"""
Muon (Jordan et al. 2024): momentum, made orthogonal. With dtype=torch.bfloat16 it is torch.optim.Muon, bit for bit,
which always makes it orthogonal in bf16. On a CPU without bf16 instructions, as in most laptops, that took longer than
the model itself (0.60 of the 1.03 s of a step of the tiny preset), so runs in fp32 use fp32 there too.
"""
import math

import torch

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315               # a quintic; applied five times it brings singular values near 1


class Muon(torch.optim.Optimizer):
    """
    For matrices. Steps are scaled to the root mean square of AdamW's, so that learning rates and weight decay are
    comparable (Liu et al. 2025, sec. 2.2). Only orthogonal() works in `dtype`; momentum and weights keep their own.
    """

    def __init__(self, matrices, lr, weight_decay, dtype):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state['momentum_buffer'] = torch.zeros_like(p.grad)
                average = state['momentum_buffer'].lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonal(p.grad.lerp(average, MOMENTUM), self.dtype)          # Nesterov's momentum
                lr = group['lr'] * 0.2 * math.sqrt(max(p.shape))
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update, alpha=-lr)


def orthogonal(matrix, dtype):
    """The matrix with all its singular values near 1 (.7 to 1.2), by five Newton-Schulz iterations in this dtype."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
