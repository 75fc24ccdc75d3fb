"""Trainable scalars out of a finished sub-network: exactly, wherever a linear layer can take them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from espalier.graph.constants import shape_of
from espalier.graph.functional import drop_dead_code
from espalier.graph.segments import aten

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = (*_CONVS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)

# f(s x) = s f(x) for every s, and for every s > 0; these keep channels apart.
_ANY = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Identity, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
_POSITIVE = (nn.ReLU, nn.LeakyReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_ANY_CALLS = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.clone.default, aten.contiguous.default}
_POSITIVE_CALLS = {aten.relu.default, aten.leaky_relu.default, aten.max_pool2d.default}
# The same for every s, but channels move.
_MOVES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.mean.dim, aten.sum.dim_IntList, aten.unsqueeze.default, aten.squeeze.dim,
}  # fmt: skip


def fold_scalars(module: fx.GraphModule, scalars: Iterable[str]) -> None:
    """Take the scalars (names of parameters) out of the network, in place; its output stays the same.

    A scalar of exactly 1 vanishes. Any other goes into the weights of a layer before or after it that is linear,
    called once and read by (or reading) nothing else, across what commutes with it (pools; rectifiers where it
    is positive). Where there is none it stays, as one parameter.
    """
    folder = _Folder(module)
    wanted = set(scalars)
    for node in list(module.graph.nodes):
        if node.target is aten.mul.Tensor and _scalar(node, wanted):
            folder.fold(node)
    drop_dead_code(module.graph)
    _forget(module, wanted)
    module.recompile()


def _scalar(node: fx.Node, wanted: set[str]) -> bool:
    factor = node.args[1]
    return isinstance(factor, fx.Node) and factor.op == "get_attr" and factor.target in wanted


class _Folder:
    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.calls: dict[str, int] = {}
        self.uses: dict[int, int] = {}
        for node in module.graph.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1
            if node.op == "get_attr" and node.target != "training":
                value = _attribute(module, str(node.target))
                self.uses[id(value)] = self.uses.get(id(value), 0) + 1
        for _, p in module.named_parameters(remove_duplicate=False):
            self.uses[id(p)] = self.uses.get(id(p), 0) + 1

    @torch.no_grad()
    def fold(self, product: fx.Node) -> None:
        source, factor = product.args
        assert isinstance(source, fx.Node)
        assert isinstance(factor, fx.Node)
        value = _attribute(self.module, str(factor.target)).detach()
        s = float(value)
        if s == 1.0 or self._into_source(source, value, s) or self._into_readers(product, value, s):
            product.replace_all_uses_with(source)
            self.module.graph.erase_node(product)

    def _into_source(self, source: fx.Node, value: torch.Tensor, s: float) -> bool:
        while len(source.users) == 1:
            layer: Any = self._layer(source)
            if isinstance(layer, (*_LINEAR, *_NORMS)) and layer.weight is not None and self._own(source, layer):
                for p in layer.parameters(recurse=False):
                    p.mul_(value)
                return True
            if not (_commutes(source, layer, s) or source.target in _MOVES):
                return False
            following = source.args[0]
            if not isinstance(following, fx.Node):
                return False
            source = following
        return False

    def _into_readers(self, product: fx.Node, value: torch.Tensor, s: float) -> bool:
        columns: slice | None = None
        at = product
        while len(at.users) == 1:
            (reader,) = at.users
            layer: Any = self._layer(reader)
            if isinstance(layer, _LINEAR) and self._own(reader, layer):
                if columns is not None and not (isinstance(layer, _CONVS) and layer.groups == 1):
                    return False
                part = layer.weight if columns is None else layer.weight[:, columns]
                part.mul_(value)
                return True
            if reader.target is aten.cat.default and columns is None:
                columns = _place(reader, at)
                if columns is None:
                    return False
            elif not (_commutes(reader, layer, s) or (columns is None and reader.target in _MOVES)):
                return False
            at = reader
        return False

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _own(self, node: fx.Node, layer: nn.Module) -> bool:
        """Whether the layer, of torch's own forward code, and its parameters serve here alone."""
        plain = (type(layer).forward.__module__ or "").startswith("torch.nn.modules")
        alone = all(self.uses[id(p)] == 1 for p in layer.parameters())
        return plain and alone and self.calls[str(node.target)] == 1 and not _hooked(layer)


def _commutes(node: fx.Node, layer: nn.Module | None, s: float) -> bool:
    if layer is not None:
        return type(layer) in _ANY or (type(layer) in _POSITIVE and s > 0.0)
    return node.target in _ANY_CALLS or (node.target in _POSITIVE_CALLS and s > 0.0)


def _place(joint: fx.Node, piece: fx.Node) -> slice | None:
    """The channels of ``piece`` in a concatenation along dimension 1; None if it is not one."""
    args: Any = joint.args
    pieces = list(args[0])
    dim = args[1] if len(args) > 1 else joint.kwargs.get("dim", 0)
    shapes = [shape_of(p.meta["val"]) if "val" in p.meta else None for p in pieces]
    if pieces.count(piece) != 1 or any(s is None or len(s) < 2 or dim not in (1, 1 - len(s)) for s in shapes):
        return None
    sizes = [s[1] for s in shapes if s is not None]
    start = sum(sizes[: pieces.index(piece)])
    return slice(start, start + sizes[pieces.index(piece)])


def _hooked(layer: nn.Module) -> bool:
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _forget(module: fx.GraphModule, scalars: set[str]) -> None:
    """Parameters that the graph no longer reads."""
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for path in scalars - read:
        for _ in _holders(module, path):
            parent, _, name = path.rpartition(".")
            delattr(module.get_submodule(parent), name)
            if not any(True for _ in module.get_submodule(parent).parameters()):
                module.delete_submodule(parent)


def _holders(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module that holds the parameter, if there is one."""
    parent, _, name = path.rpartition(".")
    try:
        owner = module.get_submodule(parent)
    except AttributeError:
        return
    if hasattr(owner, name):
        yield owner
