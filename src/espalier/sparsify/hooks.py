"""The hooks through which gates on layers multiply, and whose hooks a layer carries."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from espalier.errors import TrainingError

if TYPE_CHECKING:
    from espalier.sparsify.gates import Gates


class Hook:
    """Multiplies one side of the layer of the gates' ``index``-th site, and picks what arrives in full there.

    A copy of the model alone computes with these gates, as with functions among its hooks: it has the same ones.
    """

    def __init__(self, gates: "Gates", index: int, span: slice, weight: Tensor):
        self.gates, self.site, self._span = gates, gates.sites[index], span
        self._own = (self.site.scaled[0].parameter, self.site.scaled[0].dim or 0)
        self._features = 1 - weight.ndim  # from the end: linear layers take any number of dimensions before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return self

    def attach(self) -> Any:
        """Put it on its layer; returns its handle."""
        layer = self.gates.model.get_submodule(self.site.layer)
        if self.site.side == "input":
            return layer.register_forward_pre_hook(self, with_kwargs=True)
        return layer.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> Any:
        """``last``: keyword arguments before the layer, its output behind it."""
        if self.site.side == "output":
            return self._multiplied(last)
        if args:
            return (self._multiplied(self._picked(args[0])), *args[1:]), last
        if "input" in last:
            return args, last | {"input": self._multiplied(self._picked(last["input"]))}
        return None  # the layer itself says what is missing

    def _picked(self, x: Tensor) -> Tensor:
        gates = self.gates
        if gates._kept is None or self._own not in gates._kept or gates._is_open is None:
            return x
        chosen = gates.narrowing.selection(self._own[0], gates._is_open, gates._kept)
        return x if chosen is None else x.index_select(self._features, chosen)

    def _multiplied(self, x: Tensor) -> Tensor:
        gates = self.gates
        z = gates._z if gates._z is not None else gates.expected().detach()
        z = z[..., self._span]
        if gates._kept is not None and self._own in gates._kept:
            if gates.estimator != "hc":
                return x  # the gates of all units that are here are 1
            z = z[gates._kept[self._own]]
        shape = [1] * x.ndim
        if z.ndim > 1:
            self._check_batch(x, len(z))
            shape[0] = len(z)
        shape[self._features] = z.shape[-1]
        return x * z.to(x.dtype).view(shape)

    def _check_batch(self, x: Tensor, count: int) -> None:
        if len(x) != count or x.ndim + self._features < 1:
            raise TrainingError(
                f"per_sample=True draws gates for {count} examples, but the {self.site.side} of '{self.site.layer}' "
                f"is {list(x.shape)}, without {count} in front: give backward() the batch_size, and this layer the "
                "batch first; or take per_sample=False."
            )


def is_on(handle: Any) -> bool:
    """Whether a hook is still where its handle says."""
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def hooks_on(layer: nn.Module, side: str) -> list[Hook]:
    """The gates' hooks on this side of a layer."""
    hooks = layer._forward_pre_hooks if side == "input" else layer._forward_hooks
    return [h for h in hooks.values() if isinstance(h, Hook) and h.site.side == side]


def take_off(model: nn.Module, gates: "Gates") -> None:
    """Take the gates' hooks off all layers of a model; those on copies of it stay."""
    for module in model.modules():
        for hooks, with_keywords in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, h in hooks.items() if isinstance(h, Hook) and h.gates is gates]:
                del hooks[key]
                with_keywords.pop(key, None)
