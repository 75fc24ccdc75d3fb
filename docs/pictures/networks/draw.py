"""The drawings of this folder, and the table of docs/networks.md.

python docs/pictures/networks/draw.py            # writes the SVG files
python docs/pictures/networks/draw.py --table    # prints the table only
"""

import argparse
from pathlib import Path

import torch

from espalier import search_space
from espalier.experiments.networks import build
from espalier.models import DARTS
from espalier.report.overview import draw_space

# name, side of the images, classes, the paper's parameters (M) and FLOPs (M)
PAPER = (
    ("demonet", 32, 10, "0.82", "209 (2 × MACs)"),
    ("stacked-unets", 32, 10, "0.80", "184 (2 × MACs)"),
    ("super-resnet", 32, 10, "", ""),
    ("darts8", 32, 10, "4.05", "614 (MACs)"),
    ("darts14", 224, 1000, "", ""),
    ("regnet-200m", 32, 10, "", ""),
    ("regnet-400m", 32, 10, "", ""),
    ("regnet-600m", 32, 10, "", ""),
    ("regnet-800m", 32, 10, "", ""),
    ("mobile", 224, 1000, "9.1", "511 (MACs)"),
)


def table() -> None:
    """Print one row per network."""
    print(
        "| network | input | parameters | paper (M) | MACs | paper, FLOPs (M) | segments | structures | most together |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, size, classes, params, flops in PAPER:
        space = search_space(build(name, 1.0, 3, classes, size), (torch.zeros(1, 3, size, size),))
        cost = space.cost()
        sizes = f"{cost.params:,} | {params} | {cost.macs:,} | {flops}"
        print(
            f"| {name} | 3×{size}×{size} | {sizes} | {len(space.graph)} | {len(space)} | {len(space.most_removable())} |"
        )


def pictures(folder: Path) -> None:
    """Write one SVG per network (the four RegNets look alike), and one of a single cell of DARTS."""
    for name, size, classes, *_ in PAPER:
        if name not in ("regnet-200m", "regnet-400m", "regnet-600m"):
            space = search_space(build(name, 1.0, 3, classes, size), (torch.zeros(1, 3, size, size),))
            (folder / f"{name}.svg").write_text(draw_space(space, title=name))
    space = search_space(DARTS(16, 1, affine=True), (torch.zeros(1, 3, 32, 32),))
    (folder / "darts-cell.svg").write_text(draw_space(space, title="A reduction cell of DARTS"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if parser.parse_args().table:
        table()
    else:
        pictures(Path(__file__).parent)
