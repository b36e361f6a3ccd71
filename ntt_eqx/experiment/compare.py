"""`ntt-eqx compare`: check, plan, run, report."""

from ._files import check_folder, locked
from .cells import plan
from .estimate import estimate, show_plan
from .images import ImageShelf
from .options import Compare
from .phase import StopRequest
from .progress import make_display
from .run_cell import Surroundings
from .settings import check
from .sweep import check_cells, check_names, finish, record_command, run_sweep


def compare(options: Compare) -> int:
    """Run a comparison; returns the exit status."""
    settings = check(options.settings)
    check_names(settings)
    cells = plan(settings)
    shelf = ImageShelf(options.data_dir)
    check_cells(cells, shelf)
    with make_display() as display, StopRequest() as stop:
        if options.plan_only:
            check_folder(options.out)
            show_plan(cells, options.out, shelf, display, None)
            return 0
        with locked(options.out):
            record_command(options.out, "compare", settings)
            around = Surroundings(shelf, display, stop, options.checkpoint_every)
            costs = estimate(cells, options.out, around)
            show_plan(cells, options.out, shelf, display, costs)
            failures = run_sweep(cells, options.out, around)
            finish(cells, options.out, display)
    return 1 if failures else 0
