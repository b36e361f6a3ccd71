"""Read what ptxas reports for the Mosaic GPU kernels of a compiled program."""

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VARIABLES = {"MOSAIC_GPU_DUMP_PTXAS": "1"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel.

    Attributes:
        registers: of a thread.
        spilled_bytes: of a thread, written to and read from memory for want of registers.
        serialised: whether ptxas makes `wgmma` instructions wait for each other (C7510, C7511).
        shared_bytes: shared memory of a block.
    """

    name: str
    registers: int
    spilled_bytes: int
    serialised: bool
    shared_bytes: int


@contextmanager
def recorded() -> Iterator[list[Kernel]]:
    """Collect the kernels that are compiled inside the block; the list is filled at its end.

    A kernel that was compiled before in this process is not compiled again, and not in the list.
    """
    found: list[Kernel] = []
    folder = Path(tempfile.mkdtemp(prefix="mosaic-"))
    variables = {**_VARIABLES, "MOSAIC_GPU_DUMP_TO": str(folder)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield found
        found.extend(_read_all(folder))
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)  # its logs take tens of megabytes a kernel


def _read_all(folder: Path) -> list[Kernel]:
    """Pair the two files of each kernel: their numbers count different things, their order agrees.

    A kernel that occurs twice has two files of resources and is compiled once.
    """
    found = []
    resources: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.resources.txt"), key=_number):
        texts = resources.setdefault(_base(path), [])
        if path.read_text() not in texts:
            texts.append(path.read_text())
    for path in sorted(folder.glob("*.ptxas"), key=_number):
        texts = resources[_base(path)]
        found.append(_read(_base(path), path.read_text(), texts.pop(0) if texts[1:] else texts[0]))
    return found


def _base(path: Path) -> str:
    return path.name.split(".")[0].rsplit("_", 1)[0]


def _number(path: Path) -> int:
    return int(path.name.split(".")[0].rsplit("_", 1)[1])


def _read(name: str, ptxas: str, resources: str) -> Kernel:
    registers = re.search(r"Used (\d+) registers", ptxas)
    if registers is None:
        raise ValueError(f"ptxas did not say how many registers {name} uses: {ptxas[:500]}")
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas)]
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
    return Kernel(
        name,
        int(registers[1]),
        max(spills, default=0),
        bool(re.search(r"C751[01]|wgmma.mma_async instructions are serialized", ptxas)),
        int(shared[1]) if shared else 0,
    )
