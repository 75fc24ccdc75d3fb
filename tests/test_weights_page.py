"""The page on single weights runs as printed."""

import re
from pathlib import Path

import pytest
import torch

from espalier import load

PAGE = Path(__file__).parents[1] / "docs" / "weights.md"


def test_examples_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, "weights.md", "exec"), names)
    small = load("small.espalier")
    assert sum(int((p != 0).sum()) for p in small.parameters() if p.ndim == 2) == int(0.1 * (20 * 64 + 64 * 4))
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert sum(int((p != 0).sum()) for p in model.parameters() if p.ndim == 2) <= int(0.1 * (20 * 64 + 64 * 4)) + 1
