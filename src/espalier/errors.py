"""What espalier raises. Every message says where (module path, operator, source line) and what to do."""


class EspalierError(Exception):
    """Base class of all errors that espalier raises on purpose."""


class TraceError(EspalierError):
    """The model cannot be traced with these example inputs."""


class SpaceError(EspalierError):
    """The search space is empty, or was asked about a structure that it does not have."""


class InvalidSolution(EspalierError):
    """A set of removals that does not leave a working network; the message says why."""


class BudgetError(EspalierError):
    """No valid solution meets the budget; the message names the nearest that can be met."""


class TrainingError(EspalierError):
    """A sparsifier was given gradients or parameters that it cannot work with."""


class FormatError(EspalierError):
    """A saved file is truncated, tampered with, or of another kind."""
