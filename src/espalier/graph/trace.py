"""A model as a graph over its own modules.

``torch.export`` records the model's operators; :mod:`espalier.graph.lift` puts them back onto the model's own
layers. The trace shares the model's parameters: training either trains both.
"""

import contextlib
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from espalier.errors import TraceError
from espalier.graph.functional import functionalize, is_in_place
from espalier.graph.lift import SIGNATURE_LAYERS, is_tensor, lift
from espalier.graph.modes import leaves_modal_layers, merge, watching_training
from espalier.graph.module import graph_module
from espalier.graph.source import where_raised
from espalier.modes import keeping_modes


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced model.

    ``graph_module`` calls like the model and returns what it returns. ``args`` and ``kwargs`` are the example
    inputs as the export saw them. ``notes`` lists in words all that could not be kept. ``scalars`` are the names
    of the parameters that :func:`espalier.graph.scaled.scaled` has put in.
    """

    model: nn.Module
    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    scalars: tuple[str, ...] = field(default=())

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def flat_inputs(self) -> list[Any]:
        """The example inputs in the order of the graph's placeholders."""
        return pytree.tree_leaves((self.args, self.kwargs))


def trace(model: nn.Module, args: tuple[Any, ...] | torch.Tensor, kwargs: Mapping[str, Any] | None = None) -> Trace:
    """Trace ``model`` on example inputs.

    >>> traced = trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), (torch.randn(3, 4),))
    >>> [node.target for node in traced.graph.nodes if node.op == "call_module"]
    ['0', '1']

    ``args`` is the tuple of positional inputs (a lone tensor is taken as the only one), ``kwargs`` the
    keyword ones; tensors may sit in tuples, lists and dicts. Their first dimension is taken as the batch and
    left free where the model allows it. The model's mode and its gradients stay as they are.

    Raises :class:`TraceError`, which names the module, the source line and what to do.
    """
    _check_model(model)
    given = (args,) if isinstance(args, torch.Tensor) else tuple(args), dict(kwargs or {})
    _check_inputs(model, *given)
    example_args, example_kwargs = _two_of_a_batch_of_one(given)
    notes: list[str] = []
    with _quiet(), _restored_modes(model):
        with watching_training() as readers:
            evaluated, codegen = _exported(model, example_args, example_kwargs, training=False, notes=notes)
        graph = evaluated
        if readers or leaves_modal_layers(model, evaluated):
            graph = _both_modes(model, example_args, example_kwargs, evaluated, notes)
    graph.set_codegen(codegen)
    _drop_unused(graph)
    traced = graph_module(root_for(model, graph), graph, type(model).__name__)
    own = {id(module) for module in model.modules()}
    for module in traced.modules():
        if id(module) not in own:
            module.training = model.training
    return Trace(model, traced, example_args, example_kwargs, tuple(notes))


def _both_modes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], evaluated: fx.Graph, notes: list[str]
) -> fx.Graph:
    try:
        trained, _ = _exported(model, args, kwargs, training=True, notes=[])
    except TraceError as error:
        notes.append(f"train mode could not be exported, so the trace behaves as in eval mode: {error}")
        return evaluated
    backup = fx.Graph()
    output = backup.graph_copy(evaluated, copied := {})
    backup.output(output)
    for node, copy in copied.items():
        copy.meta = dict(node.meta)
    reason = merge(evaluated, trained, model)
    if reason:
        notes.append(f"functional operators of the trace behave as in eval mode: {reason}")
        return backup
    return trained


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, notes: list[str]
) -> tuple[fx.Graph, Any]:
    model.train(training)
    program = _export(model, args, kwargs, notes)
    module = program.module(check_guards=False)
    graph = module.graph
    codegen = graph._codegen
    graph.owning_module = None
    _own_constants(model, module)
    signatures = {entry.fqn: entry for entry in program.module_call_graph}
    functionalize(graph)
    lift(graph, model, signatures)
    return graph, codegen


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: list[str]) -> ExportedProgram:
    composite = [name for name, m in model.named_modules() if name and isinstance(m, SIGNATURE_LAYERS)]
    inner = {name for name in composite if any(name.startswith(f"{outer}.") for outer in composite)}
    signed = tuple(name for name in composite if name not in inner)
    shapes = ShapesCollection()
    for tensor in _tensors((args, kwargs)):
        if tensor.ndim and tensor.shape[0] > 1:
            shapes[tensor] = {0: Dim.AUTO}

    def export(dynamic: Any, signed: tuple[str, ...]) -> ExportedProgram:
        return torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic, strict=False, preserve_module_call_signature=signed
        )

    try:
        program = export(shapes, signed)
        if any(t.ndim and t.shape[0] > 1 for t in _tensors((args, kwargs))) and not _batch_is_free(program):
            notes.append(
                "the first dimension of the inputs (batch) is fixed at the example's: the model's code depends on it"
            )
        return program
    except Exception as error:
        failure = free_batch = error
    for attempt_signed in (signed, ()) if signed else ((),):
        try:
            program = export(None, attempt_signed)
        except Exception as error:
            failure = error
            continue
        notes.append(f"the first dimension of the inputs (batch) is fixed at the example's: {_first_line(free_batch)}")
        return program
    raise _explained(model, failure) from failure


def _batch_is_free(program: ExportedProgram) -> bool:
    inputs = _tensors([node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"])
    sizes = [t.shape[0] for t in inputs if t.ndim]
    return any(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None for size in sizes)


def _explained(model: nn.Module, error: Exception) -> TraceError:
    path, line = where_raised(model, error)
    place = f"module '{path or '<root>'}'" + (f" ({line})" if line else "")
    kind = type(error).__name__
    if "GuardOnDataDependentSymNode" in kind or "data-dependent" in str(error).lower():
        advice = (
            "the forward code decides by the values of a tensor (if/while/int() on a tensor). "
            "Decide by shapes or flags instead, or use torch.where / torch.cond."
        )
    elif "not a known type" in str(error):
        advice = (
            "the model returns an object that is no tensor, tuple, list or dict of tensors. A model of transformers "
            "returns its cache: pass kwargs={'use_cache': False}. For a class of your own, register a pytree."
        )
    elif isinstance(error, (TypeError, RuntimeError, ValueError, IndexError)):
        advice = (
            "the model's own forward failed on the example inputs. Run model(*args, **kwargs) with the same "
            "inputs: if it fails there too, mend the inputs (number, shapes, dtypes); if not, the operation "
            "is one that torch.export cannot follow."
        )
    else:
        advice = "torch.export cannot follow this code; rewrite it with tensor operators."
    return TraceError(f"{place}: {advice}\n  {kind}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TraceError("the model is wrapped for parallel training: pass its .module, and wrap afterwards.")
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise TraceError(f"parameter '{lazy[0]}' is not initialised yet: run the model once on example inputs.")
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places.setdefault(tensor.device, name)
    if not any(True for _ in model.parameters()):
        raise TraceError(f"{type(model).__name__} has no parameters: there is nothing to make smaller.")
    if len(places) > 1:
        listed = ", ".join(f"'{name}' on {device}" for device, name in places.items())
        raise TraceError(f"the model lies on several devices ({listed}): move it to one with model.to(device).")


def _check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = signature_of(model)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        code = getattr(model.forward, "__code__", None)
        line = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        raise TraceError(
            f"the number or the names of the example inputs do not fit "
            f"{type(model).__name__}.forward{signature}{line}: {error}. "
            "Give args and kwargs as that forward takes them."
        ) from error
    own = next(model.parameters()).device
    devices = {str(tensor.device): None for tensor in _tensors((args, kwargs))}
    if devices and str(own) not in devices:
        raise TraceError(
            f"the example inputs lie on {', '.join(devices)}, the model on {own}: move them to one device."
        )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _two_of_a_batch_of_one(tree: Any) -> Any:
    """A batch of one would be taken as a constant by the export: give it two."""
    tensors = [t for t in _tensors(tree) if t.ndim]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]) if t.ndim else t, tree)


@contextlib.contextmanager
def _restored_modes(model: nn.Module) -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with keeping_modes(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the export's warnings, and the graph that it prints when it fails, from the user's terminal."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _own_constants(model: nn.Module, module: fx.GraphModule) -> None:
    """Keep the tensors that export made of constants where :func:`root_for` finds them."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(module)
            try:
                own = operator.attrgetter(node.target)(model)
            except AttributeError:
                own = None
            node.meta["constant"] = None if own is not None else value


def root_for(model: nn.Module, graph: fx.Graph) -> nn.Module:
    """What ``graph`` reads of ``model``, and the constants that the export added, under one roof."""
    root = nn.Module()
    reads = [n for n in graph.nodes if n.op in ("get_attr", "call_module") and n.target != "training"]
    # Called modules first, outer ones before inner ones: a parameter of theirs is then found in place.
    for node in sorted(reads, key=lambda n: (n.op != "call_module", n.target.count("."))):
        constant = node.meta.get("constant")
        value = operator.attrgetter(node.target)(model) if constant is None else constant
        _place(root, model, node.target, value)
    return root


def _place(root: nn.Module, model: nn.Module, target: str, value: Any) -> None:
    *parents, name = target.split(".")
    at = root
    for parent in parents:
        if not hasattr(at, parent):
            at.add_module(parent, nn.Module())
        at = getattr(at, parent)
    if hasattr(at, name):
        return
    if isinstance(value, nn.Parameter):
        at.register_parameter(name, value)
    elif isinstance(value, nn.Module):
        at.add_module(name, value)
    elif isinstance(value, torch.Tensor):
        at.register_buffer(name, value, persistent=_is_persistent(model, target))
    else:
        setattr(at, name, value)


def _is_persistent(model: nn.Module, target: str) -> bool:
    parent, _, name = target.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return False
    return name in owner._buffers and name not in owner._non_persistent_buffers_set


def _drop_unused(graph: fx.Graph) -> None:
    """Parameters of lifted layers, and sizes that only they needed."""
    for node in reversed(list(graph.nodes)):
        size = node.op == "call_function" and not is_tensor(node) and not is_in_place(node)
        if (size or node.op == "get_attr") and not node.users:
            graph.erase_node(node)


def signature_of(model: nn.Module) -> inspect.Signature:
    """The model's forward signature."""
    return inspect.signature(model.forward)
