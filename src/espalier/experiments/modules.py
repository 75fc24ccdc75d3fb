"""The other papers' experiments under ``espalier reproduce``: each is a module with a command line of its own."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from espalier.errors import EspalierError

__all__ = ["EXPERIMENTS", "Experiment", "run"]


@dataclass(frozen=True)
class Experiment:
    """One table or figure: a module and its arguments at each scale, in which ``{out}`` is the run's folder.

    ``cut`` says what "short" has less of than the paper. Results are appended as JSON lines in that folder: a killed
    run goes on where it was.
    """

    title: str
    module: str
    scales: Mapping[str, str]
    cut: str = ""

    def command(self, scale: str, out: Path) -> list[str]:
        """The command line of a scale.

        >>> EXPERIMENTS["ispasp-figure3"].command("smoke", Path("runs"))[1:]
        ['-m', 'espalier.experiments.ispasp', 'figure3', '--seeds', '0', '--out', 'runs/figure3.jsonl']
        """
        if scale not in self.scales:
            raise EspalierError(f"this experiment has no scale '{scale}': there are {', '.join(self.scales)}.")
        arguments = [part.replace("{out}", str(out)) for part in shlex.split(self.scales[scale])]
        return [sys.executable, "-m", self.module, *arguments]


_I, _C = "espalier.experiments.ispasp", "espalier.experiments.chita"
_TWO_LAYERS = "mnist --hidden {hidden} --out {{out}}/mnist.jsonl --cache {{out}}/dense {more}"

EXPERIMENTS: Mapping[str, Experiment] = {
    "ispasp-figure3": Experiment(
        "i-SpaSP: residual against size on compressible activations (Figure 3)",
        _I,
        {
            "smoke": "figure3 --seeds 0 --out {out}/figure3.jsonl",
            "short": "figure3 --out {out}/figure3.jsonl",
            "paper": "figure3 --out {out}/figure3.jsonl",
        },
    ),
    "ispasp-mnist": Experiment(
        "i-SpaSP: two-layer network on MNIST, before and after fine-tuning (Figures 1 and 2)",
        _I,
        {
            "smoke": _TWO_LAYERS.format(hidden=100, more="--epochs 1 --seeds 0 --sizes 10 --methods random omp"),
            "short": _TWO_LAYERS.format(hidden=1000, more=""),
            "paper": _TWO_LAYERS.format(hidden=10_000, more=""),
        },
        cut="1,000 hidden neurons instead of 10,000",
    ),
    "ispasp-resnet20": Experiment(
        "i-SpaSP and OMP: ResNet-20 on CIFAR-10, 10 to 60 % fewer MACs, then equal fine-tuning",
        "espalier.experiments.ispasp_resnet",
        {
            "smoke": "--out {out}/resnet20.jsonl --images 16 --fractions 0.8 --methods magnitude",
            "short": "--out {out}/resnet20.jsonl --images 500 --finetune 5000",
            "paper": "--out {out}/resnet20.jsonl --images 1000 --finetune 50000 --seeds 0 1 2",
        },
        cut="500 calibration images, 5,000 for fine-tuning, one seed",
    ),
    "ispasp-vit": Experiment(
        "i-SpaSP and OMP: a small vision transformer on Fashion-MNIST, heads and neurons",
        "espalier.experiments.ispasp_vit",
        {
            "smoke": "--out {out}/vit.jsonl --cache {out} --epochs 1 --methods magnitude",
            "short": "--out {out}/vit.jsonl --cache {out} --epochs 3 --finetune 5000",
            "paper": "--out {out}/vit.jsonl --cache {out} --epochs 6 --finetune 60000",
        },
        cut="3 epochs of dense training, 5,000 images for fine-tuning",
    ),
    "chita-mlpnet": Experiment(
        "CHITA: MLPNet on MNIST, all methods and sparsities (Table 1)",
        _C,
        {
            "smoke": "run --network mlpnet --methods magnitude --seeds 0 --out {out}/mlpnet.jsonl",
            "short": "run --network mlpnet --seeds 0 1 --out {out}/mlpnet.jsonl",
            "paper": "run --network mlpnet --out {out}/mlpnet.jsonl",
        },
        cut="two seeds instead of five",
    ),
    "chita-resnet20": Experiment(
        "CHITA: ResNet-20 on CIFAR-10, all methods and sparsities (Table 1)",
        _C,
        {
            "smoke": "run --network resnet20 --methods magnitude --seeds 0 --out {out}/resnet20.jsonl",
            "short": "run --network resnet20 --seeds 0 --out {out}/resnet20.jsonl",
            "paper": "run --network resnet20 --out {out}/resnet20.jsonl",
        },
        cut="one seed instead of five",
    ),
    "gsparsity-darts-v2": Experiment(
        "GSparsity: operation pruning of DARTS-V2 on CIFAR-10 (Table 1, Figure 1)",
        "espalier.experiments.gsparsity",
        {
            "smoke": "--network darts-v2 --mu 0.1 --steps 1 --images 500 --out {out}",
            "short": "--network darts-v2 --out {out}",
            "paper": "--network darts-v2 --steps 234000 --out {out}",
        },
        cut="500 steps",
    ),
    "gsparsity-resnet20": Experiment(
        "GSparsity: filter pruning of ResNet-20 on CIFAR-10",
        "espalier.experiments.gsparsity",
        {
            "smoke": "--network resnet20 --mu 0.1 --steps 1 --images 500 --out {out}",
            "short": "--network resnet20 --out {out}",
            "paper": "--network resnet20 --steps 117000 --out {out}",
        },
        cut="500 steps",
    ),
    "sparse-methods": Experiment(
        "One recipe for H2SPG, ProxSGD, RMDA, RAMDA and the gates: accuracy against MACs",
        "espalier.experiments.sparse_methods",
        {
            "smoke": "--method magnitude --epochs 1 --finetune 0 --images 500 --seed 0 --out {out}",
            "short": "--out {out}",
            "paper": "--epochs 60 --finetune 20 --out {out}",
        },
        cut="5 epochs and one of fine-tuning",
    ),
    "nas-proof": Experiment(
        "GS-NAS, H2SPG, DARTS and random search on the DARTS, S2 and S4 spaces",
        "espalier.nas.proof",
        {
            "smoke": "--scale smoke --spaces s2 --methods random --out {out}",
            "short": "--out {out}",
            "paper": "--scale paper --seeds 0 1 2 --out {out}",
        },
        cut="a supernet of 4 cells and 8 channels on a part of CIFAR-10, one seed",
    ),
    **{
        f"l0-{network}-{method}": Experiment(
            f"L0-{method.upper()}: {network} on MNIST (Table 2)",
            "espalier.experiments.l0",
            {
                "smoke": f"--network {network} --method {method} --epochs 1 --out {{out}}",
                "short": f"--network {network} --method {method} --epochs {epochs} --out {{out}}",
                "paper": f"--network {network} --method {method} --out {{out}}",
            },
            cut=cut,
        )
        for network, epochs, cut in (("mlp", 200, ""), ("lenet5", 60, "60 epochs instead of 200"))
        for method in ("hc", "ar", "arm", "disarm")
    },
}
"""By the name that ``espalier reproduce`` calls them."""


def run(name: str, scale: str, root: Path, console: Console) -> bool:
    """Run an experiment in a process of its own, with its output as it comes; whether it ended well."""
    experiment = EXPERIMENTS[name]
    out = root / f"{name}-{scale}"
    command = experiment.command(scale, out)
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{name}[/], {scale}: {experiment.title}", soft_wrap=True)
    if scale == "short" and experiment.cut:
        console.print(f"  [yellow]cut[/] {experiment.cut}")
    console.print(f"  {shlex.join(['python', *command[1:]])}", soft_wrap=True, highlight=False)
    return subprocess.run(command, check=False).returncode == 0
