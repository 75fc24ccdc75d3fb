"""Search spaces of cells for networks: from a supernet, by group sparsity, to a trained network."""

from espalier.nas.any_model import search_model as search_model
from espalier.nas.draw import draw_genotype as draw_genotype
from espalier.nas.draw import save_drawing as save_drawing
from espalier.nas.genotype import GENOTYPES as GENOTYPES
from espalier.nas.genotype import Genotype as Genotype
from espalier.nas.genotype import genotype as genotype
from espalier.nas.group_search import GroupSearch as GroupSearch
from espalier.nas.group_search import GroupSettings as GroupSettings
from espalier.nas.loop import Folder as Folder
from espalier.nas.recipe import search_recipe as search_recipe
from espalier.nas.recipe import train_recipe as train_recipe
from espalier.nas.result import Found as Found
from espalier.nas.search import search as search
from espalier.nas.space import CellSpace as CellSpace
from espalier.nas.space import uniform as uniform
from espalier.nas.spaces import SPACES as SPACES
from espalier.nas.spaces import space as space
from espalier.nas.supernet import supernet_space as supernet_space
from espalier.nas.supernet import tie as tie
from espalier.nas.train import train as train
