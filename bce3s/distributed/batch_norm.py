"""Batch-norm over the batch of all ranks, and its running statistics as one vector."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bce3s.distributed.world import World
from pipelines.config import require

_SPATIAL = (0, 2, 3)
_BEHIND = ("drop", "act")  # what timm's BatchNormAct2d, a batch-norm by its class, does after it has normalised


class _NormalizeAcrossRanks(torch.autograd.Function):
    """Normalises with the statistics of all ranks and differentiates through them: the gradient of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x_VCHW, weight_C, bias_C, mean_C, variance_C, count, ctx.eps, ctx.world = inputs
        ctx.save_for_backward(x_VCHW, weight_C, mean_C, variance_C, count)
        return F.batch_norm(x_VCHW, mean_C, variance_C, weight_C, bias_C, training=False, eps=ctx.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_VCHW, weight_C, mean_C, variance_C, count = ctx.saved_tensors
        # With the statistics held fixed; what flows through them needs the same two sums, over all ranks.
        gradient_VCHW, weight_gradient_C, bias_gradient_C = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x_VCHW, weight_C, mean_C, variance_C, None, None, False, ctx.eps, [True, True, True]
        )
        means_2C = ctx.world.sum(torch.stack([weight_gradient_C, bias_gradient_C])) / count
        inverse_std_C = torch.rsqrt(variance_C + ctx.eps)
        normalized_VCHW = (x_VCHW - mean_C[:, None, None]) * inverse_std_C[:, None, None]
        through_statistics = normalized_VCHW * means_2C[0, :, None, None] + means_2C[1, :, None, None]
        gradient_VCHW = gradient_VCHW - through_statistics * (weight_C * inverse_std_C)[:, None, None]
        return gradient_VCHW.to(x_VCHW.dtype), weight_gradient_C, bias_gradient_C, None, None, None, None, None


class _BatchNormAcrossRanks(nn.BatchNorm2d):
    """For CPUs: torch's SyncBatchNorm takes GPU tensors only. Gradients of weight and bias stay those of this rank, as with torch's."""

    world: World

    @classmethod
    def replacing(cls, module: nn.BatchNorm2d, world: World) -> _BatchNormAcrossRanks:
        """With the very parameters and buffers of `module`, so that an optimizer's references hold."""
        usual = module.affine and module.track_running_stats and module.momentum is not None
        require(usual, "sync_batch_norm on a CPU needs batch-norms with weights, running statistics and a momentum: leave it out")
        replaced = cls(module.num_features, module.eps, module.momentum, device="meta")
        replaced.weight, replaced.bias = module.weight, module.bias
        for name, buffer in module.named_buffers(recurse=False):
            setattr(replaced, name, buffer)
        replaced.training, replaced.world = module.training, world
        for name in _BEHIND:
            if isinstance(behind := getattr(module, name, None), nn.Module):
                replaced.add_module(name, behind)
        return replaced

    def forward(self, input: Tensor) -> Tensor:
        """[V, C, H, W] of float32, float64 or bfloat16 to the same; V, H and W may differ between ranks."""
        normalized = self._normalized(input) if self.training else super().forward(input)
        for name in _BEHIND:
            if name in self._modules:
                normalized = getattr(self, name)(normalized)
        return normalized

    def _normalized(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        mean_C, variance_C, count = self._statistics(input.detach())
        with torch.no_grad():
            unbiased_C = variance_C * (count / (count - 1))
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(unbiased_C, self.momentum)
            self.num_batches_tracked += 1
        inputs = (input, self.weight, self.bias, mean_C, variance_C, count, self.eps, self.world)
        normalized: Tensor = _NormalizeAcrossRanks.apply(*inputs)  # type: ignore[no-untyped-call]
        return normalized

    def _statistics(self, x_VCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [C] and biased variance [C] of all ranks' values, in the parameters' dtype, and how many values a channel has, []."""
        dtype = self.weight.dtype
        variance_C, mean_C = torch.var_mean(x_VCHW.to(dtype), _SPATIAL, correction=0)
        count = mean_C.new_full((1,), x_VCHW.numel() // x_VCHW.shape[1])
        # Merged by means and variances (Chan et al. 1979), not by sums of squares, whose difference would lose the small variances.
        shares_WR = self.world.gather_rows(torch.cat([count, mean_C, variance_C])[None].double())
        counts_W1, means_WC, variances_WC = shares_WR.split([1, len(mean_C), len(mean_C)], 1)
        total = counts_W1.sum()
        mean_C = (counts_W1 * means_WC).sum(0) / total
        variance_C = (counts_W1 * (variances_WC + (means_WC - mean_C) ** 2)).sum(0) / total
        return mean_C.to(dtype), variance_C.to(dtype), total.to(dtype)


def synced_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """`model` with batch statistics over all ranks: values, gradients and running statistics of one process with the whole batch.

    Parameters, buffers and their names stay the very same. Call it where the model has reached its device: a CUDA model gets
    torch.nn.SyncBatchNorm. Alone, the model is returned as it is.

    Args:
        model: float32 or float64, changed in place (and returned; a lone BatchNorm2d is replaced).
        world: of the run.
    """
    if world.size == 1:
        return model
    if next(model.parameters()).is_cuda:
        converted: nn.Module = _cuda_converter(model)(model)
        return converted
    if type(model) is nn.BatchNorm2d:
        return _BatchNormAcrossRanks.replacing(model, world)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d or _has_more_behind(child):
                setattr(parent, name, _BatchNormAcrossRanks.replacing(child, world))
    return model


def _cuda_converter(model: nn.Module) -> Any:
    """torch's, which would lose what timm's kind of batch-norm has behind it; for those, timm's own."""
    if any(_has_more_behind(module) for module in model.modules()):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm
    return nn.SyncBatchNorm.convert_sync_batchnorm


def _has_more_behind(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d)


def running_statistics(model: nn.Module) -> Tensor:
    """A copy of all batch-norms' running means and variances, float32 [R]; R is 0 where there are none."""
    statistics = _statistics_of(model)
    return torch.cat([values.float() for values in statistics]) if statistics else torch.zeros(0)


def load_running_statistics(model: nn.Module, flat_R: Tensor) -> None:
    """Writes what `running_statistics` of such a model returned, such as the ranks' mean, into the running means and variances."""
    statistics = _statistics_of(model)
    assert sum(map(len, statistics)) == len(flat_R), "the statistics are of another network"
    for values, loaded in zip(statistics, flat_R.split([len(values) for values in statistics]), strict=True):
        values.copy_(loaded)


def _statistics_of(model: nn.Module) -> list[Tensor]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [values for norm in norms for values in (norm.running_mean, norm.running_var) if values is not None]
