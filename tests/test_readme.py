"""The README's quickstart runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, in_one_call = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    espalier, small, model = (names[n] for n in ("espalier", "small", "model"))
    assert (tmp_path / "small.espalier").exists()
    count = sum(p.numel() for p in small.parameters())  # type: ignore[attr-defined]
    assert count <= 0.6 * sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]
    loaded = espalier.load("small.espalier")  # type: ignore[attr-defined]
    assert sum(p.numel() for p in loaded.parameters()) == count
    exec(compile(in_one_call, "README.md", "exec"), names)
    small = names["small"]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]


def test_pictures_are_there() -> None:
    for picture in re.findall(r"\]\((docs/[^)]+)\)", README.read_text()):
        assert (README.parent / picture).exists()
