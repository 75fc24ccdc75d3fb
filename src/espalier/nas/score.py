"""What a network scores: accuracy, after the batch norms have seen the data once more."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from espalier import batchnorm
from espalier.data import Batches, Dataset
from espalier.modes import evaluating


def recalibrate(model: nn.Module, data: Dataset, batches: int = 20, batch_size: int = 128, seed: int = 0) -> None:
    """Take the batch norms' running statistics anew over some batches; noise is drawn from ``seed``.

    While a supernet changes, its running statistics lag behind; without this a score jumps about.
    """
    torch.manual_seed(seed)
    size = min(batch_size, len(data))
    device = next(model.parameters()).device
    images = (x for x, _ in Batches(data, size, seed, device=device))
    batchnorm.recalibrate(model, images, samples=batches * size, batch=size)


@torch.no_grad()
def score(model: nn.Module, data: Dataset, batch_size: int = 250, seed: int = 0) -> dict[str, float]:
    """Accuracy in per cent and mean cross entropy, in eval mode; noise is drawn from ``seed``.

    >>> from espalier.data import load
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> sorted(score(net, load("digits", "test")))
    ['accuracy', 'loss']
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    right, loss = torch.zeros((), device=device), torch.zeros((), device=device)
    with evaluating(model):
        for x, y in Batches(data, batch_size, shuffle=False, device=device):
            logits = model(x)
            right += (logits.argmax(1) == y).sum()
            loss += cross_entropy(logits, y, reduction="sum")
    return {"accuracy": 100.0 * float(right) / len(data), "loss": float(loss) / len(data)}
