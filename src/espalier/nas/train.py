"""The training of a derived network, and its test accuracy, taken once at the end."""

import time
from typing import Any

import torch

from espalier.data import Batches
from espalier.errors import TrainingError
from espalier.nas.genotype import Genotype
from espalier.nas.loop import Folder, advance, own_device, rank, world
from espalier.nas.recipe import TrainRecipe
from espalier.nas.score import score
from espalier.nas.training import Training


def train(genotype: Genotype, recipe: TrainRecipe, folder: Folder) -> dict[str, Any]:
    """Train the stacked cells, or go on where ``folder``'s run stopped; returns what result.json says.

    The network is written to network.espalier. Raises :class:`FormatError` where the folder holds a run of
    other settings, and :class:`TrainingError` for an auxiliary head on images that are too small for it.
    """
    folder.settings({**recipe.settings(), "genotype": genotype.to_json()})
    ended = folder.read_json("result.json")
    if ended is not None:
        return ended
    device, start = own_device(recipe.device), time.perf_counter()
    data = recipe.images.load("train")
    torch.manual_seed(recipe.seed)
    options: dict[str, Any] = {"in_channels": data.shape[0]}
    if genotype.space != "nas-bench-201":
        if recipe.auxiliary and recipe.stem == "cifar" and data.shape[1] < 32:
            raise TrainingError(
                f"the auxiliary head needs images of 32×32, these have {data.shape[1]}×{data.shape[2]}: auxiliary=0."
            )
        options |= {"auxiliary": recipe.auxiliary > 0, "stem": recipe.stem}
    model = genotype.network(recipe.channels, recipe.cells, data.classes, **options).to(device)
    opt = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    batches = Batches(
        data,
        recipe.batch_size,
        recipe.seed,
        recipe.images.augment(data.shape[1]),
        drop_last=True,
        device=device,
        rank=rank(),
        world=world(),
    )
    steps = max(1, round(len(batches) * recipe.epochs))
    training = Training(
        model,
        opt,
        batches,
        steps,
        recipe.lr,
        recipe.seed,
        recipe.clip,
        recipe.drop_path,
        recipe.auxiliary,
        amp=recipe.amp,
        compiled=recipe.compile,
        by_epoch=recipe.epochs >= 50,
    )
    advance(training, folder)
    tested = score(model, recipe.images.load("test"))
    result = {
        "genotype": genotype.to_json(),
        "params": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("auxiliary")),
        "test accuracy": round(tested["accuracy"], 3),
        "test loss": round(tested["loss"], 5),
        "steps": steps,
        "wall_s": round(time.perf_counter() - start, 1),
    }
    if rank() == 0:
        from espalier.export import save

        save(model.cpu(), folder.path / "network.espalier")
    folder.write_json("result.json", result)
    return result
