"""espalier: train any PyTorch network once and get back the smaller network worth keeping."""

__version__ = "0.1.0.dev0"
