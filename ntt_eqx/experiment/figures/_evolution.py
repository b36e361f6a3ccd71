"""Output evolution in the plane, and the spectra of tangent kernels."""

from collections.abc import Mapping
from typing import Any

from ... import KernelComparison
from ..methods import method, method_order
from ..trajectories import Trajectories, principal_axes
from ._style import minor_ticks, new_figure, plain_decades, thousands


def evolution_figure(found: Trajectories, what: str) -> Any:
    """Above: output trajectories in their principal plane; below: distance to the dense one."""
    plane, shares = principal_axes(found)
    names = sorted(plane, key=method_order)
    labels = [*(method(name).label for name in names), "start", "end"]
    inputs = found.outputs["dense"].shape[1]
    caption = f"{what}\noutputs on {inputs} test images, one training each"
    options: Any = {"gridspec_kw": {"height_ratios": (1.9, 1.0)}}
    with new_figure(caption, 4.2, labels, rows=2, **options) as (figure, axes):
        above, below = axes[0][0], axes[1][0]
        for name in names:
            style, points = method(name), plane[name]
            look = {"color": style.colour, "zorder": 3 if name == "dense" else 2}
            above.plot(*points.T, label=style.label, ls=style.dashes, lw=1.4, **look)
            # A ring around the start and a dot at the end: both are seen where they fall together.
            above.plot(*points[0], "o", color=style.colour, mfc="none", ms=7.0, zorder=5)
            above.plot(*points[-1], "o", color=style.colour, ms=3.2, zorder=6)
            if name != "dense":
                below.plot(found.steps, found.distances(name), ls=style.dashes, **look)
        above.set(
            xlabel=f"1st principal axis of the outputs ({100 * shares[0]:.0f} %)",
            ylabel=f"2nd principal axis ({100 * shares[1]:.0f} %)",
        )
        above.set_aspect("equal", adjustable="datalim")
        above.margins(0.08)
        above.plot([], [], "o", color="#555555", mfc="none", ms=7.0, label="start")
        above.plot([], [], "o", color="#555555", ms=3.2, label="end")
        below.set(xlabel="Training steps", ylabel="Distance to dense")
        below.set(xlim=(0, int(found.steps[-1])), ylim=(0, None))
        thousands(below.xaxis)
    return figure


def spectrum_figure(kernels: Mapping[str, KernelComparison], what: str) -> Any:
    """Eigenvalues of each network's tangent kernel before training, largest first."""
    spectra = {"dense": next(iter(kernels.values())).dense_spectrum}
    spectra.update({name: kernel.spectrum for name, kernel in kernels.items()})
    names = sorted(spectra, key=method_order)
    caption = f"{what}\nkernel of all outputs before training, {len(spectra['dense'])} eigenvalues"
    with new_figure(caption, 2.2, [method(name).label for name in names]) as (figure, axes):
        one = axes[0][0]
        low = min(float(values[0]) for values in spectra.values()) * 1e-4
        for name in names:
            style, values = method(name), spectra[name][spectra[name] > low]
            look = {"color": style.colour, "label": style.label, "ls": style.dashes}
            one.plot(range(1, len(values) + 1), values, **look)
        one.set(xscale="log", yscale="log", xlabel="Eigenvalue number", ylabel="Kernel eigenvalue")
        plain_decades(one.xaxis)
        minor_ticks(one.yaxis)
    return figure
