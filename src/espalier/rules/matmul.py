"""Matrix products between any two tensors: activations, or parameters that a model multiplies by itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from espalier.graph.axes import Coupling, Labels, couples
from espalier.graph.constants import Constant
from espalier.graph.lift import is_tensor
from espalier.rules.reduction import zero_at
from espalier.rules.value import ZERO, Build, Kept, Narrowed, Value, full_shape, rule, tensors_of

aten = torch.ops.aten
PRODUCTS = (
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.linear.default, aten.einsum.default,
    aten.addmm.default,
)  # fmt: skip
# Tokens sorted by expert times a stack of matrices; operators of other libraries go by name.
BY_EXPERT = (aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
ATTENTION = aten.scaled_dot_product_attention.default


def letters(node: fx.Node, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """A letter per axis of each operand and of the result, equal where axes are one; None if it cannot be told."""
    if node.target is aten.einsum.default:
        equation = str(node.args[0]).replace(" ", "")
        if "." in equation or "->" not in equation:
            return None
        left, right = equation.split("->")
        terms = left.split(",")
        return (terms, right) if all(len(set(t)) == len(t) for t in terms) else None
    if _by_expert(node):
        return (["tk", "ekn", "o"][: len(ranks)], "tn") if list(ranks[:2]) == [2, 3] else None
    if node.target is aten.linear.default:
        lead = "abcdefgh"[: ranks[0] - 1]
        return [lead + "k", "nk", *(["n"] if len(ranks) > 2 else [])], lead + "n"
    if node.target is aten.addmm.default:
        return (["n", "mk", "kn"], "mn") if list(ranks) == [1, 2, 2] else None
    a, b = ranks[0], ranks[1]
    if a < 2 or b < 2:
        return None
    lead = "abcdefgh"[: max(a, b) - 2]
    return [lead[len(lead) - (a - 2) :] + "mk", lead[len(lead) - (b - 2) :] + "kn"], lead + "mn"


def _by_expert(node: fx.Node) -> bool:
    return node.target in BY_EXPERT or str(node.target) in BY_EXPERT


def _from_data(coupling: Coupling, node: fx.Node) -> bool:
    """Whether the tensor depends on the model's inputs."""
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at.op == "placeholder" and is_tensor(at):
            return True
        if at not in seen and is_tensor(at):
            seen.add(at)
            pending += at.all_input_nodes
    return False


@couples(*PRODUCTS, *BY_EXPERT)
def product_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """Axes of one letter are one. Two activations contract over an axis that stays; their batch axes are heads."""
    sources = [n for n in tensors_of(node) if is_tensor(n)]
    named = letters(node, [len(labels) for labels in inputs])
    if named is None:
        return None
    terms, result = named
    data = [_from_data(coupling, n) for n in sources]
    axes: dict[str, Any] = {}
    where: dict[str, list[int]] = {}
    for i, (term, labels, source) in enumerate(zip(terms, inputs, sources, strict=True)):
        for letter, axis, size in zip(term, labels, coupling.shape(source), strict=True):
            if size == 1:
                continue
            where.setdefault(letter, []).append(i)
            known = letter in axes
            if known and (axes[letter] is not None or axis is not None):
                axes[letter] = coupling.join(axes[letter], axis, node)
            elif not known:
                axes[letter] = axis
    if _by_expert(node):
        coupling.fix([axes.pop("e", None), axes.pop("t", None)], f"{coupling.at(node)} picks along it")
        data = [True, *[False] * (len(data) - 1)]
    dynamic = sum(data) > 1
    for i, (term, labels) in enumerate(zip(terms, inputs, strict=True)):
        for letter, axis in zip(term, labels, strict=True):
            if letter not in result:
                if dynamic and len(where.get(letter, ())) > 1:
                    coupling.fix([axis], f"{coupling.at(node)} contracts two activations over it")
                elif not data[i]:
                    coupling.contracted(axis)
            elif not data[i]:
                coupling.written(axis)
    if dynamic:
        for letter in result:
            if len(set(where.get(letter, ()))) > 1:
                coupling.heads(axes.get(letter))
    return [axes.get(letter) for letter in result]


@couples(ATTENTION)
def attention_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """[..., heads, tokens, width]: heads go together; queries in groups share one key and value head."""
    query, key, value, *masks = (list(labels) for labels in inputs)
    sources = [n for n in tensors_of(node) if is_tensor(n)]
    if len(query) < 3:
        return None
    why = f"{coupling.at(node)} contracts two activations over it"
    coupling.fix([query[-1], key[-1], key[-2], value[-2]], why)
    for dim in range(len(query) - 2):
        sizes = [coupling.shape(n)[dim] for n in sources[:3]]
        if sizes[0] != sizes[1]:
            grouped = coupling.split(
                query[dim], (sizes[1], sizes[0] // sizes[1]), f"query heads of {coupling.at(node)}"
            )
            coupling.heads(query[dim])
            coupling.heads(key[dim])
            _meet(coupling, node, grouped[0], key[dim])
            coupling.fix([grouped[1]], f"query heads of {coupling.at(node)} share a key and value head")
        else:
            _meet(coupling, node, query[dim], key[dim])
            if dim:
                coupling.heads(query[dim])
        _meet(coupling, node, key[dim], value[dim])
        for mask, source in zip(masks, sources[3:], strict=True):
            at = dim - (len(query) - len(mask))
            if at >= 0 and coupling.shape(source)[at] > 1:
                _meet(coupling, node, query[dim], mask[at])
    return [*query[:-1], value[-1]]


def _meet(coupling: Coupling, node: fx.Node, a: Any, b: Any) -> None:
    if a is not None or b is not None:
        coupling.join(a, b, node)


@rule(*PRODUCTS, *BY_EXPERT)
def product(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """On the boxes, where what is gone of either factor is zero."""
    sources = [n for n in tensors_of(node) if is_tensor(n)]
    named = letters(node, [len(full_shape(n)) for n in sources])
    if named is None or len(values) != len(sources) or any(isinstance(v, Constant) for v in values):
        return None
    terms, result = named
    boxes: dict[str, torch.Tensor] = {}
    for term, value in zip(terms, values, strict=True):
        if isinstance(value, Narrowed):
            for dim, index in value.kept.items():
                if term[dim] in boxes and not torch.equal(boxes[term[dim]], index):
                    return None
                boxes[term[dim]] = index
    for letter in boxes:
        holders = [
            (value, term.index(letter), full_shape(source)[term.index(letter)])
            for term, value, source in zip(terms, values, sources, strict=True)
            if letter in term
        ]
        if any(size > 1 and not (isinstance(v, Narrowed) and d in v.kept) for v, d, size in holders):
            return None
        if not any(zero_at(v, d) for v, d, _ in holders):
            return None
    new = build.copy(node, [v.node if isinstance(v, Narrowed) else v for v in values])  # type: ignore[union-attr,misc]
    kept: Kept = {result.index(letter): index for letter, index in boxes.items() if letter in result}
    if node.target is aten.linear.default and len(terms) > 2 and any(d < len(result) - 1 for d in kept):
        return _with_bias_elsewhere(new, kept, values, node)
    return Narrowed(new, kept, full_shape(node), ZERO) if kept else new


def _with_bias_elsewhere(new: fx.Node, kept: Kept, values: list[Value], node: fx.Node) -> Value | None:
    """Rows that are gone hold the bias; it must be known."""
    return None if isinstance(values[2], fx.Node) else Narrowed(new, kept, full_shape(node), values[2].background)  # type: ignore[union-attr]


@rule(ATTENTION)
def attention(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """The heads that are left; a removed head's values are zero."""
    sources = [n for n in tensors_of(node) if is_tensor(n)]
    if any(isinstance(v, Constant) for v in values) or len(values) != len(sources):
        return None
    query, key, value, *masks = values
    if not (isinstance(query, Narrowed) and isinstance(key, Narrowed) and isinstance(value, Narrowed)):
        return None
    last = len(query.shape) - 1
    if any(d >= last - 1 for d in (*query.kept, *key.kept)) or last - 1 in value.kept or not value.background.is_zero:
        return None
    heads = {d: k for d, k in value.kept.items() if d < last}
    if key.kept.keys() != heads.keys() or query.kept.keys() != heads.keys():
        return None
    for dim, index in heads.items():
        rep = query.shape[dim] // key.shape[dim]
        spread = (index[:, None] * rep + torch.arange(rep)).flatten()
        if not torch.equal(key.kept[dim], index) or not torch.equal(query.kept[dim], spread):
            return None
        for mask, source in zip(masks, sources[3:], strict=True):
            at = dim - (len(query.shape) - source.meta["val"].ndim)
            narrow = isinstance(mask, Narrowed) and at in mask.kept and torch.equal(mask.kept[at], query.kept[dim])
            if at >= 0 and full_shape(source)[at] > 1 and not narrow:
                return None
    new = build.copy(node, [v.node if isinstance(v, Narrowed) else v for v in values])  # type: ignore[union-attr,misc]
    kept = dict(query.kept) | ({last: value.kept[last]} if last in value.kept else {})
    return Narrowed(new, kept, full_shape(node), ZERO)
