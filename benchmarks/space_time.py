"""ResNet-50's whole search space against its ``torch.export`` alone, in turn.

python benchmarks/space_time.py
"""

import statistics
import time

import torch

import espalier
from espalier.data import import_torchvision


def main(runs: int = 9) -> None:
    import_torchvision()
    import torchvision

    torch.set_num_threads(1)
    model, x = torchvision.models.resnet50().eval(), torch.randn(2, 3, 224, 224)
    dynamic = ({0: torch.export.Dim.AUTO},)

    def export() -> None:
        torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=False)

    def space() -> None:
        espalier.search_space(model, (x,))

    export()
    space()
    ratios, exports, spaces = [], [], []
    for _ in range(runs):
        times = []
        for function in (export, space):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        exports.append(times[0])
        spaces.append(times[1])
        ratios.append(times[1] / times[0])
    print(f"torch.export   {statistics.median(exports):.3f} s (median of {runs})")
    print(f"search_space   {statistics.median(spaces):.3f} s")
    print(f"ratio          {statistics.median(ratios):.2f} (median of ratios; goal 1.5)")


if __name__ == "__main__":
    main()
