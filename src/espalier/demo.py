"""The main job on real data: DemoNet, trained once with H2SPG on scikit-learn's handwritten digits."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import espalier
from espalier.data import Batches, digits
from espalier.errors import EspalierError
from espalier.graph.trace import trace
from espalier.models.demonet import DemoNet
from espalier.report.console import LiveTraining, checks_table, results_table, space_table
from espalier.report.draw import draw_beside
from espalier.report.figures import folded_figure, trace_figure
from espalier.report.html import Report, write_text
from espalier.report.results import Check, History, Measurement, Step, difference, measure_all
from espalier.report.segment_figures import segment_figure

_CAPTIONS = (
    "every operator of the full network",
    "what lives or goes as one",
    "what the training drove to zero",
    "what is left",
)


@dataclass(frozen=True)
class Demo:
    """Train DemoNet on handwritten digits with H2SPG, and write the sub-network and a report."""

    out: Path = Path("demo")
    """Folder for report.html, networks.svg, small.espalier and small.onnx."""
    epochs: int = 24
    """Epochs of the one training."""
    budget: float = 0.4
    """Fraction of the removable structures that may stay."""
    width: float = 0.5
    """Factor on DemoNet's channels; 1 is the paper's size."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 0.1
    """Peak learning rate."""
    threads: int = 1
    """Threads of torch: more gain little on images this small, and much is lost where cores are shared."""
    seed: int = 0
    """Of the weights and of the order of the images."""
    reference: bool = True
    """Also train the full network plainly, with the same steps, for the accuracy to compare with."""


@dataclass
class _Data:
    """The three splits, ready for the network."""

    train: Batches
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def run(demo: Demo, console: Console) -> bool:
    """Do the whole job; whether all checks hold."""
    started = time.perf_counter()
    for name in ("epochs", "width", "batch_size", "lr", "threads"):
        if getattr(demo, name) <= 0:
            raise EspalierError(f"--{name.replace('_', '-')} is above 0.")
    torch.set_num_threads(demo.threads)
    data = _load(demo)
    example = data.test[0][:64]
    torch.manual_seed(demo.seed)
    model = DemoNet(width=demo.width, in_channels=1)
    plain = copy.deepcopy(model)
    space = espalier.search_space(model, (example,))
    console.print(space_table(space.summary()), "")
    figures = [trace_figure(space.trace), segment_figure(space)]

    steps = demo.epochs * len(data.train)
    opt = espalier.H2SPG(
        space,
        base=torch.optim.SGD,
        budget=espalier.Budget(structures=demo.budget),
        lr=demo.lr,
        momentum=0.9,
        weight_decay=1e-4,
        warmup_steps=max(1, round(0.3 * steps)),
        projection_steps=max(1, round(0.3 * steps)),
    )
    history = History(len(space), espalier.Budget(structures=demo.budget).structures_to_remove(len(space)))
    console.print(f"[bold]Training once with H2SPG[/]: {demo.epochs} epochs, {steps} steps")
    _train(model, opt, data, demo, history, console, _watch(opt))
    solution = opt.solution()
    small = espalier.construct(space, solution)
    full = model
    if demo.reference:
        console.print("[bold]The full network, trained plainly[/], for its accuracy")
        base = torch.optim.SGD(plain.parameters(), lr=demo.lr, momentum=0.9, weight_decay=1e-4)
        _train(plain, base, data, demo, History(len(space), 0), console, lambda: ("done", 0, None))
        full = plain

    demo.out.mkdir(parents=True, exist_ok=True)
    checks = _check(space.masked(solution), small, model, data.test[0])
    checks += _save_and_check(small, example, demo.out)
    networks = measure_all({"full network": full, "sub-network": small}, (example,), lambda n: accuracy(n, data.test))
    traced = trace(small, (example,))
    figures += [
        segment_figure(space, solution.removed, "Redundant structures"),
        trace_figure(traced, "Constructed sub-network"),
    ]
    note = "The full network is that of the same training, its removed structures at zero."
    if demo.reference:
        note = "The full network was trained plainly, from the same weights with the same steps."
    report = Report(
        title="DemoNet on handwritten digits",
        lead=_lead(demo, networks, len(solution.removed), len(space)),
        figures=figures,
        captions=_CAPTIONS,
        summary=space.summary(),
        networks=networks,
        networks_note=note,
        checks=checks,
        saliency=opt.saliency_scores(),
        removed=solution.removed,
        history=history,
    )
    report.write(demo.out / "report.html")
    panels = [
        replace(figures[1], title="1. Its search space"),
        replace(figures[2], title="2. What the training drove to zero"),
        folded_figure(traced, "3. The sub-network"),
    ]
    write_text(demo.out / "networks.svg", draw_beside(panels, "DemoNet: segments, redundant structures, sub-network"))
    console.print("", results_table(networks), note, "", checks_table(checks), "")
    console.print(f"Removed: {', '.join(solution.removed)}")
    names = ("report.html", "networks.svg", "small.espalier", "small.onnx")
    console.print(f"Wrote {', '.join(str(demo.out / name) for name in names)} in {time.perf_counter() - started:.0f} s")
    return all(check.passed for check in checks)


def _load(demo: Demo) -> _Data:
    try:
        train = Batches(digits("train"), demo.batch_size, seed=demo.seed, drop_last=True)
        return _Data(train, digits("validation").tensors(), digits("test").tensors())
    except (ImportError, ValueError) as error:
        raise EspalierError(str(error)) from error


def _train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    data: _Data,
    demo: Demo,
    history: History,
    console: Console,
    state: Callable[[], tuple[str, int, float | None]],
) -> None:
    """One training with a cosine schedule; every step is noted in ``history`` and shown."""
    data.train.load_state_dict({"seed": demo.seed, "epoch": 0, "batch": 0})
    per_epoch = len(data.train)
    total = demo.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min((step + 1) / per_epoch, 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0))))
    )
    step = 0
    with LiveTraining(history, total, console) as live:
        for _ in range(demo.epochs):
            for images, labels in data.train:
                phase, _, _ = state()
                model.train()
                opt.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                rate = float(opt.param_groups[0]["lr"])
                opt.step()
                schedule.step()
                step += 1
                measured = accuracy(model, data.validation) if step % per_epoch == 0 else None
                _, zero, norm = state()
                live.update(Step(step, phase, loss.item(), rate, zero, measured, norm))


def _watch(opt: espalier.H2SPG) -> Callable[[], tuple[str, int, float | None]]:
    """What the display tells of the optimizer: phase, structures at zero, norm of the redundant ones."""
    parameters = dict(opt.space.model.named_parameters())
    first: list[float] = []

    def state() -> tuple[str, int, float | None]:
        marked = [parameters[p].detach() for name in opt.redundant for p in opt.space[name].parameters]
        if not marked:
            return opt.phase, opt.zero_structures(), None
        norm = float(torch.nn.utils.get_total_norm(marked))
        first.append(norm)
        return opt.phase, opt.zero_structures(), norm / first[0] if first[0] else 0.0

    return state


@torch.inference_mode()
def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The fraction of ``data`` that the network, in eval mode, classifies rightly."""
    images, labels = data
    network.eval()
    return float((network(images).argmax(1) == labels).double().mean())


@torch.no_grad()
def _check(masked: nn.Module, small: nn.Module, trained: nn.Module, images: Tensor) -> list[Check]:
    """The sub-network against the zeroed full network, and that against the trained network as it is."""
    checks = [
        Check(
            "trained network = zeroed network",
            difference(trained.eval()(images), masked.eval()(images)),
            detail="the training itself has brought the structures to zero",
        )
    ]
    for kind, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        inputs = images.to(kind)
        for mode in ("eval", "train"):
            one, other = (copy.deepcopy(network).to(kind).train(mode == "train") for network in (masked, small))
            expected, found = one(inputs), other(inputs)
            name = f"sub-network = zeroed network, {mode}, {str(kind).removeprefix('torch.')}"
            words = f"{len(images)} images, outputs up to {float(expected.abs().max()):.3g}"
            checks.append(Check(name, difference(found, expected), bound, words))
    return checks


@torch.no_grad()
def _save_and_check(small: nn.Module, example: Tensor, out: Path) -> list[Check]:
    """Save both ways, read both back, compare."""
    small.eval()
    expected = small(example)
    espalier.save(small, out / "small.espalier")
    loaded = espalier.load(out / "small.espalier").eval()
    checks = [
        Check(
            "small.espalier, reloaded",
            difference(loaded(example), expected),
            detail="safetensors + architecture",
        )
    ]
    espalier.export_onnx(small, (example,), out / "small.onnx")
    checks.append(
        Check("small.onnx, by onnxruntime", _onnx_gap(out / "small.onnx", example, expected), 1e-4, "float32")
    )
    return checks


def _onnx_gap(path: Path, example: Tensor, expected: Tensor) -> float:
    try:
        import onnxruntime
    except ImportError as error:
        raise EspalierError("the ONNX file is checked by onnxruntime: pip install 'espalier[demo]'") from error
    running = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = running.run(None, {running.get_inputs()[0].name: example.numpy()})
    return difference(torch.from_numpy(found), expected)


def _lead(demo: Demo, networks: dict[str, Measurement], removed: int, total: int) -> str:
    full, small = networks.values()
    return (
        f"Trained once with H2SPG for {demo.epochs} epochs, {removed} of {total} removable structures are "
        f"exactly zero and gone. The sub-network keeps {100 * small.params / full.params:.0f} % of the "
        f"parameters and {100 * small.macs / full.macs:.0f} % of the MACs "
        "and gives the outputs of the zeroed full network."
    )
