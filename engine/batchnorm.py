"""BatchNorm over the images of all processes: `--batchnorm global`."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import distributed


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training mode are those of the global batch, on every process.

    Ioffe & Szegedy, "Batch normalization", ICML 2015, Algorithm 1, with sums over all processes. torch's SyncBatchNorm runs
    on a GPU only and has no second derivative, which GradAlign and GradSum need: here autograd derives it from the sums.
    Every process must pass its part of the same batch, and take the same gradients, in the same order.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same; B may differ between processes, and be 0 on some."""
        if not self.training:
            return super().forward(x)
        values = x.to(self.running_mean.dtype)  # bf16 is too coarse for sums
        count = values.new_full((1,), values.numel() // values.shape[1])  # a tensor of a list would make a GPU wait
        share = torch.empty_like(count)  # only gradients need it: it is filled in when the first sum has told how many values there are
        sums = distributed.summed(torch.cat([values.sum((0, 2, 3)), count]), share)
        total = sums[-1:].detach()
        share.copy_(count / total).clamp_(min=distributed.NO_SHARE)
        mean = sums[:-1] / total
        centred = values - mean[:, None, None]
        variance = distributed.summed(centred.square().sum((0, 2, 3)), share) / total
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * total / (total - 1).clamp(min=1), self.momentum)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            return (centred * (self.weight * scale)[:, None, None] + self.bias[:, None, None]).to(x.dtype)
        return (centred * scale[:, None, None]).to(x.dtype)


def make_global(network: nn.Module) -> None:
    """Every BatchNorm of the network becomes a `GlobalBatchNorm2d`, in place: an optimizer may hold its parameters already."""
    for layer in network.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = GlobalBatchNorm2d
