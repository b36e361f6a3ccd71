"""Workers of a comparison as jobs of a cluster, by submitit."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._errors import require
from ._errors import ExperimentError


@dataclasses.dataclass(frozen=True)
class Worker:
    """A job: it is queued again where the cluster stops it early, and goes on."""

    run: Callable[[], int]

    def __call__(self) -> int:
        """Do the work; returns the exit status."""
        return self.run()

    def checkpoint(self) -> Any:
        """What submitit queues when the job is preempted or its time is up."""
        helpers = require("ntt-eqx compare --launch", "submitit.helpers", "slurm")
        return helpers.DelayedSubmission(self)


def launch(
    run: Callable[[], int],
    workers: int,
    cluster: str,
    options: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
) -> int:
    """Start so many workers that all do `run`; of `"local"` ones, wait for the end.

    `options` are parameters of submitit as NAME=VALUE, such as `slurm_partition=gpu`. Returns the
    highest exit status, 0 for jobs that are only queued. Raises `ExperimentError` for options that
    submitit does not take.
    """
    submitit = require("ntt-eqx compare --launch", "submitit", "slurm")
    wrong = [option for option in options if "=" not in option]
    if wrong or workers < 1:
        raise ExperimentError(
            f"launch: {wrong[0]!r} is not NAME=VALUE, such as slurm_partition=gpu."
            if wrong
            else f"launch: workers must be at least 1, got {workers}."
        )
    given = dict(option.split("=", 1) for option in options)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        known = {name: int(v) if v.isdigit() else v for name, v in given.items()}
        executor.update_parameters(**{"name": "ntt-eqx", "timeout_min": 24 * 60, **known})
    except Exception as error:  # submitit raises several kinds
        raise ExperimentError(f"launch: {error}") from error
    with executor.batch():
        jobs = [executor.submit(Worker(run)) for _ in range(workers)]
    say(f"{workers} workers: jobs {', '.join(job.job_id for job in jobs)}; logs in {folder}")
    return max(job.result() for job in jobs) if cluster == "local" else 0
