"""Per-sample gradients, the empirical Fisher matrix they give, and its inverses as linear operators."""

from espalier.curvature.dual import DualInverse as DualInverse
from espalier.curvature.fisher import DenseInverse as DenseInverse
from espalier.curvature.fisher import Fisher as Fisher
from espalier.curvature.gradients import GradientOptions as GradientOptions
from espalier.curvature.gradients import Gradients as Gradients
from espalier.curvature.gradients import gradients as gradients
from espalier.curvature.layout import WeightLayout as WeightLayout
from espalier.curvature.layout import convolution_and_linear as convolution_and_linear
from espalier.curvature.matrix_free import MatrixFreeInverse as MatrixFreeInverse
from espalier.curvature.woodbury import BlockWoodburyInverse as BlockWoodburyInverse
