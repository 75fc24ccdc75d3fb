"""What a node of a trace is, in the few words and the colour that a drawing has room for."""

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from espalier.graph.constants import hint

KINDS: Mapping[str, str] = {
    "weight": "convolution, linear",
    "norm": "norm",
    "activation": "activation",
    "pool": "pooling, resize",
    "attention": "attention",
    "joint": "joint vertex",
    "shape": "shape",
    "other": "other",
}

# Last part of the module in which torch.nn defines a layer → kind.
_LAYERS = {
    "conv": "weight", "linear": "weight", "sparse": "weight", "rnn": "weight",
    "batchnorm": "norm", "normalization": "norm", "instancenorm": "norm",
    "activation": "activation", "dropout": "other", "pooling": "pool", "upsampling": "pool",
    "flatten": "shape", "pixelshuffle": "shape", "padding": "shape", "fold": "shape",
    "channelshuffle": "shape",
}  # fmt: skip

# Name of an ATen operator → kind.
_OPERATORS = {
    "weight": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear mm bmm matmul "
    "addmm baddbmm einsum embedding",
    "norm": "batch_norm layer_norm group_norm instance_norm rms_norm normalize linalg_vector_norm",
    "activation": "relu relu6 gelu silu sigmoid tanh softmax log_softmax leaky_relu elu selu celu mish "
    "hardtanh hardswish hardsigmoid softplus prelu glu threshold",
    "pool": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d mean amax "
    "sum max adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d interpolate",
    "attention": "scaled_dot_product_attention",
    "shape": "view reshape permute transpose t flatten unflatten squeeze unsqueeze expand slice select chunk "
    "split split_with_sizes getitem contiguous clone pad roll unfold pixel_shuffle index movedim "
    "repeat unbind narrow",
}
_KIND_OF = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}

GLYPHS = {"add": "+", "mul": "×", "cat": "‖", "concat": "‖", "concatenate": "‖", "stack": "≡"}
JOINTS = {"cat": "concat", "concatenate": "concat"}


def operator_name(node: fx.Node) -> str:
    """``relu`` of ``aten.relu_.default``; the layer's path for a layer."""
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2].rstrip("_")
    if target is operator.getitem:
        return "getitem"
    return getattr(target, "__name__", str(target))


def kind_of(node: fx.Node, root: nn.Module) -> str:
    """A key of :data:`KINDS`."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention):
            return "attention"
        for base in type(module).__mro__:
            place, _, name = base.__module__.rpartition(".")
            if place == "torch.nn.modules" and name in _LAYERS:
                return _LAYERS[name]
        return "other"
    name = operator_name(node)
    return "joint" if name in GLYPHS else _KIND_OF.get(name.removeprefix("_"), "other")


def layer_text(module: nn.Module) -> str:
    """``Conv2d 3→128 3×3 /2``."""
    name = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = "×".join(map(str, module.kernel_size))
        stride = f" /{module.stride[0]}" if max(module.stride) > 1 else ""
        groups = f" ÷{module.groups}" if module.groups > 1 else ""
        return f"{name} {module.in_channels}→{module.out_channels} {kernel}{stride}{groups}"
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}→{module.out_features}"
    if isinstance(module, nn.Embedding):
        return f"{name} {module.num_embeddings}→{module.embedding_dim}"
    kernel = getattr(module, "kernel_size", None)
    if isinstance(kernel, int):
        return f"{name} {kernel}×{kernel}" if name.endswith("2d") else f"{name} {kernel}"
    return name


def shape_text(node: fx.Node) -> str:
    """``128×32×32``: the example's shape without the batch; of the first tensor where there are several."""
    tensors = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)]
    if not tensors:
        return ""
    sizes = [str(hint(s)) for s in tensors[0].shape[1:]]
    return ("×".join(sizes) or "scalar") + (f" (of {len(tensors)})" if len(tensors) > 1 else "")


def user_line(node: fx.Node) -> str:
    """``net.py:12``: the innermost line of the node's stack that is not of torch itself."""
    line = ""
    for entry in (node.meta.get("stack_trace") or "").splitlines():
        if entry.lstrip().startswith('File "'):
            path, _, rest = entry.strip()[6:].partition('", line ')
            if "/torch/" not in path and not path.startswith("<"):
                line = f"{path.rpartition('/')[2]}:{rest.partition(',')[0]}"
    return line


def quantity(number: float) -> str:
    """``818 k``, ``105 M``: three digits and a unit."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{max(0, 2 - (value >= 9.995) - (value >= 99.95))}f}{unit}"
    return f"{number:g}"
