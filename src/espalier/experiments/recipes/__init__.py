"""One module per table or figure; each has ``RECIPES``."""
