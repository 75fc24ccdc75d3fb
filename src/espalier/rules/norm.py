"""Batch norms: each channel stands alone, so a constant channel stays a constant."""

import torch
from torch import fx, nn

from espalier.graph.constants import Constant
from espalier.graph.module import shallow
from espalier.rules.value import Build, Narrowed, Value, rule


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``gamma (x - mean) / std + beta``; in train mode a constant channel is its own mean, which leaves beta."""
    (value,) = values
    layer = build.module(node)
    if not isinstance(value, Narrowed) or value.dim != 1 or not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return None
    kept, gone = value.kept, value.gone
    narrow = shallow(layer)
    narrow.num_features = len(kept)
    for name, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        if tensor is not None:
            setattr(narrow, name, nn.Parameter(tensor[kept].detach().clone(), requires_grad=tensor.requires_grad))
    for name in ("running_mean", "running_var"):
        if getattr(layer, name) is not None:
            setattr(narrow, name, getattr(layer, name)[kept].clone())
    new = build.narrow_module(node, narrow, value.node)
    if new is None:
        return None
    like = layer.running_mean if layer.running_mean is not None else layer.weight
    reference = torch.zeros(1) if like is None else like.detach()
    zeros = torch.zeros(len(gone), dtype=reference.dtype, device=reference.device)
    beta = zeros if layer.bias is None else layer.bias.detach()[gone]
    evaluated = beta
    if layer.running_mean is not None and layer.running_var is not None:
        scale = torch.rsqrt(layer.running_var[gone] + layer.eps)
        if layer.weight is not None:
            scale = scale * layer.weight.detach()[gone]
        evaluated = (value.fill.evaluated.to(zeros) - layer.running_mean[gone]) * scale + beta
    return Narrowed(new, 1, kept, value.total, Constant(evaluated.clone(), beta.clone()))
