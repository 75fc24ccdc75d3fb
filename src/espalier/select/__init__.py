"""One-shot selection of what stays."""

from espalier.select.cbs import cbs as cbs
from espalier.select.chita import chita as chita
from espalier.select.families import prune_structures as prune_structures
from espalier.select.magnitude import magnitude as magnitude
from espalier.select.masking import hold_masks as hold_masks
from espalier.select.masking import zero_masks as zero_masks
from espalier.select.mfac import mfac as mfac
from espalier.select.multistage import StageOptions as StageOptions
from espalier.select.multistage import chita_plus_plus as chita_plus_plus
from espalier.select.patterns import cardinality as cardinality
from espalier.select.patterns import n_of_m as n_of_m
from espalier.select.patterns import per_layer as per_layer
from espalier.select.problem import first_order_target as first_order_target
from espalier.select.problem import objective as objective
from espalier.select.result import Result as Result
from espalier.select.structured import block_groups as block_groups
from espalier.select.structured import structured_chita as structured_chita
from espalier.select.weights import WEIGHT_METHODS as WEIGHT_METHODS
from espalier.select.weights import prune_weights as prune_weights
from espalier.select.woodfisher import woodfisher as woodfisher
