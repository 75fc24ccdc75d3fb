"""What a network costs: parameters, and multiply-accumulates per example."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from espalier.graph.constants import shape_of
from espalier.graph.trace import Trace
from espalier.modes import evaluating


@dataclass(frozen=True)
class Cost:
    """``params``: number of parameter elements, shared ones once. ``macs``: per example of the batch."""

    params: int
    macs: int

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.params - other.params, self.macs - other.macs)


def count_params(model: nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> int:
    """Multiply-accumulates per example, on shapes alone: nothing is computed.

    >>> count_macs(nn.Linear(4, 3), (torch.randn(2, 4),))
    12

    Counts convolutions, matrix products and attention, as ``torch.utils.flop_counter`` does (which counts each
    twice: a FLOP is half a MAC).
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, every_product() as counter:
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, dict(kwargs or {})))
        state: dict[str, torch.Tensor] = {
            name: mode.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())
        }
        with evaluating(model):
            torch.func.functional_call(model, state, fake_args, fake_kwargs, tie_weights=True)
    batch = next((t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim), 1)
    return counter.get_total_flops() // 2 // max(int(batch), 1)


@contextmanager
def every_product() -> Iterator[FlopCounterMode]:
    """A FLOP counter that sees the products inside attention.

    Fused kernels (attention's own on a CPU, the fast path of ``nn.MultiheadAttention``) are one operator that the
    counter may not know: they are run as the products that they stand for.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def macs_per_node(trace: Trace) -> dict[fx.Node, int]:
    """Multiply-accumulates of every node, per example of the batch, from shapes alone."""
    found: dict[fx.Node, int] = {}
    batch = next((shape_of(n.meta["val"])[0] for n in trace.graph.nodes if _is_batched(n)), 1)

    class Counter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            before = counter.get_total_flops()
            result = super().run_node(n)
            found[n] = (counter.get_total_flops() - before) // 2 // batch
            return result

    network = trace.graph_module
    with evaluating(network), FakeTensorMode(allow_non_fake_inputs=True) as mode, every_product() as counter:
        inputs = [mode.from_tensor(v) if hasattr(v, "untyped_storage") else v for v in trace.flat_inputs()]
        Counter(network).run(*inputs, enable_io_processing=False)
    return found


def _is_batched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and getattr(value, "ndim", 0) > 0


def measure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Parameters and MACs of ``model``."""
    return Cost(count_params(model), count_macs(model, args, kwargs))
