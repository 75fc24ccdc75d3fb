"""How wide a text is, without a font at hand."""

_NARROW = {c: w for w, chars in ((0.28, "ijl.,:;'|!"), (0.35, "ftI()[] ·-"), (0.4, "r/"), (0.9, "mwMW")) for c in chars}


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Pixels of ``text`` in a sans-serif font, on the wide side."""
    em = sum(_NARROW.get(c, 0.69 if c.isupper() else 0.6) for c in text)
    return em * size * (1.06 if bold else 1.0)


def shorten(text: str, limit: int = 34) -> str:
    """The text, with its least telling parts left out where it is long.

    >>> shorten("block1.layer2.norm1-relu1-conv1-norm2-conv2", 30)
    'block1.layer2.norm1…conv2'
    >>> shorten("features.denseblock3.denselayer12.conv1", 20)
    '…denselayer12.conv1'
    """
    if len(text) <= limit:
        return text
    first, *others = text.split("-")
    text = f"{first}…{others[-1]}" if others else text
    while len(text) > limit:
        parent, dot, rest = text.removeprefix("…").partition(".")
        text = f"…{rest}" if dot and parent else f"{text[: limit - 1]}…"
    return text
