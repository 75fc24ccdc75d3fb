"""Tables, charts, drawings of networks, and the HTML report."""

from espalier.report.draw import draw_network as draw_network
from espalier.report.draw import draw_segments as draw_segments
from espalier.report.draw import draw_trace as draw_trace
from espalier.report.html import Report as Report
from espalier.report.results import Check as Check
from espalier.report.results import History as History
from espalier.report.results import Measurement as Measurement
from espalier.report.results import Step as Step
