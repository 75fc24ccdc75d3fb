"""One search, by any method: run it, write down what it found."""

from dataclasses import replace

from espalier.errors import SpaceError
from espalier.nas.baselines import darts, h2spg, pc_darts, random_search
from espalier.nas.gs_nas import Searcher, gs_nas
from espalier.nas.loop import Folder
from espalier.nas.recipe import SearchRecipe
from espalier.nas.result import Found

METHODS: dict[str, Searcher] = {
    "gs-nas": gs_nas,
    "h2spg": h2spg,
    "darts": darts,
    "pc-darts": pc_darts,
    "random": random_search,
}


def search(recipe: SearchRecipe, folder: Folder) -> Found:
    """Run a search, or go on with the one that lies in ``folder``, to its end.

    Writes settings.json, log.jsonl, result.json and genotype.json there, and for GS-NAS and H2SPG the discretised
    supernet with its weights, discretised.espalier. A run that has ended is read, not
    repeated. Raises :class:`FormatError` where the folder holds a run of other settings.
    """
    if recipe.method not in METHODS:
        raise SpaceError(f"no method is called '{recipe.method}'; there are {', '.join(METHODS)}.")
    folder.settings(recipe.settings())
    ended = folder.read_json("result.json")
    if ended is not None:
        return replace(Found.from_json(ended), lines=tuple(folder.read_lines("norms.jsonl")))
    found = METHODS[recipe.method](recipe, folder)
    folder.write_lines("norms.jsonl", found.lines)
    found.genotype.save(folder.path / "genotype.json")
    folder.write_json("result.json", found.to_json())
    return found
