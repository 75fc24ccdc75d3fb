"""How wide a text is, without a font at hand."""

_NARROW = {
    c: w
    for w, chars in ((0.28, "ijl.,:;'|!"), (0.35, "ftI()[] ·-"), (0.4, "r/"), (0.9, "mwMW"))
    for c in chars
}


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Pixels of ``text`` in a sans-serif font, on the wide side."""
    em = sum(_NARROW.get(c, 0.69 if c.isupper() else 0.6) for c in text)
    return em * size * (1.06 if bold else 1.0)


def shorten(text: str, limit: int = 34) -> str:
    """The text, its middle left out where it is long.

    >>> shorten("features.denseblock3.denselayer12.conv1", 20)
    'features.d…r12.conv1'
    """
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[: limit - 1 - half]}…{text[-half:]}"
