"""Output evolution in the plane, and the spectra of tangent kernels."""

from collections.abc import Mapping
from typing import Any

from ..diagnostics import KernelComparison
from ..trajectories import Trajectories, principal_axes
from ._style import (
    COLUMN,
    legend_below,
    method_order,
    method_style,
    new_figure,
    plain_decades,
    thousands,
)


def evolution_figure(found: Trajectories) -> Any:
    """Above: output trajectories in their principal plane; below: distance to the dense one."""
    plane, shares = principal_axes(found)
    names = sorted(plane, key=method_order)
    with new_figure(COLUMN, 4.4, rows=2, height_ratios=(1.9, 1.0)) as (figure, (above, below)):
        for name in names:
            style, points = method_style(name), plane[name]
            order = 3 if name == "dense" else 2
            above.plot(*points.T, color=style.colour, label=style.label, zorder=order, lw=1.4)
            above.plot(*points[0], "o", color=style.colour, mfc="white", ms=4.5, zorder=order + 2)
            above.plot(*points[-1], "o", color=style.colour, ms=4.5, zorder=order + 2)
            if name != "dense":
                below.plot(found.steps, found.distances(name), color=style.colour)
        above.set_xlabel(f"1st principal axis of the outputs ({100 * shares[0]:.0f} %)")
        above.set_ylabel(f"2nd principal axis ({100 * shares[1]:.0f} %)")
        above.set_aspect("equal", adjustable="datalim")
        above.margins(0.08)
        above.plot([], [], "o", color="#555555", mfc="white", ms=4.5, label="start")
        above.plot([], [], "o", color="#555555", ms=4.5, label="end")
        below.set_xlabel("Training steps")
        below.set_ylabel("Distance to dense")
        below.set_ylim(bottom=0)
        below.set_xlim(0, int(found.steps[-1]))
        thousands(below.xaxis)
        legend_below(figure, above)
    return figure


def spectrum_figure(kernels: Mapping[str, KernelComparison]) -> Any:
    """Eigenvalues of each network's tangent kernel before training, largest first."""
    spectra = {"dense": next(iter(kernels.values())).dense_spectrum}
    spectra.update({name: kernel.spectrum for name, kernel in kernels.items()})
    with new_figure(COLUMN, 2.4) as (figure, (axes,)):
        low = min(float(values[0]) for values in spectra.values()) * 1e-4
        for name in sorted(spectra, key=method_order):
            values = spectra[name][spectra[name] > low]
            style = method_style(name)
            axes.plot(range(1, len(values) + 1), values, color=style.colour, label=style.label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("Eigenvalue number")
        axes.set_ylabel("Kernel eigenvalue")
        plain_decades(axes.xaxis)
        legend_below(figure, axes)
    return figure
