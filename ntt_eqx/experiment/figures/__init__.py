"""Figures of a comparison, drawn from what is on disk; PNG and SVG."""

from ._curves import (
    accuracy_figure as accuracy_figure,
    distances_figure as distances_figure,
    kernel_figure as kernel_figure,
)
from ._evolution import evolution_figure as evolution_figure, spectrum_figure as spectrum_figure
from ._masks import densities_figure as densities_figure, masks_figure as masks_figure
from ._sparsity import sparsity_figure as sparsity_figure
from ._style import (
    line_of as line_of,
    new_figure as new_figure,
    plain_decades as plain_decades,
    render_figure as render_figure,
)
