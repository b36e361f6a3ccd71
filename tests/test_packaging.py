"""Every way to install the package brings every module, the kernels among them.

The kernels are a package of their own, in the folder `kernels/` of a checkout and beside `ntt_eqx`
in a wheel. Each install goes into an environment that sees this one's dependencies.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import types
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# Where each package lies in a checkout.
FOLDERS = {"ntt_eqx": ROOT, "ntt_eqx_kernels": ROOT / "kernels"}


def run(*command, cwd, env=None):
    done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def alone():
    """The environment without a path to this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def modules_of_checkout():
    """The path of every Python file in an install."""
    found = {
        package: {p.relative_to(folder).as_posix() for p in (folder / package).rglob("*.py")}
        for package, folder in FOLDERS.items()
    }
    assert all(found.values()), "a package without a file"
    return set().union(*found.values())


@pytest.fixture
def repository():
    """The checkout, if it is one of git's."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return ROOT


def test_no_symbolic_link_is_tracked(repository):
    # Git writes one as a text file where it cannot make links, as on Windows.
    modes = [line.split()[0] for line in run("git", "ls-files", "-s", cwd=repository).splitlines()]
    assert modes and "120000" not in modes


def test_the_kernels_have_every_name_under_the_public_one():
    import ntt_eqx.kernels
    import ntt_eqx_kernels

    def exported(module):
        return {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)
        }

    assert exported(ntt_eqx_kernels) == exported(ntt_eqx.kernels)


@pytest.mark.slow
def test_a_clone_without_symbolic_links_runs_the_kernels(repository, tmp_path):
    clone = tmp_path / "clone"
    run("git", "-c", "core.symlinks=false", "clone", "--quiet", repository, clone, cwd=tmp_path)
    origin = run(
        sys.executable, "-c",
        "import ntt_eqx.kernels, ntt_eqx_kernels as k; print(k.__file__)",
        cwd=clone, env=alone(),
    ).strip()  # fmt: skip
    assert pathlib.Path(origin) == clone / "kernels" / "ntt_eqx_kernels" / "__init__.py"
    said = run(
        sys.executable, "-m", "pytest", "-q", "-n", "0", "--no-header",
        "tests/kernels/test_reference.py::test_products_of_gathered_and_whole_masks[few]",
        cwd=clone, env=alone(),
    )  # fmt: skip
    assert " passed" in said


def test_core_dependencies_leave_out_what_only_the_command_line_needs():
    names = lambda requirements: {r.split(">")[0].split("[")[0] for r in requirements}
    core = names(PROJECT["dependencies"])
    assert core == {
        "jax", "jaxlib", "equinox", "optax", "jaxtyping", "beartype", "grain", "numpy"
    }  # fmt: skip
    assert not core & names(PROJECT["optional-dependencies"]["cli"])


def test_version_is_the_same_everywhere():
    import ntt_eqx

    assert ntt_eqx.__version__ == PROJECT["version"]
    assert f"\n## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """An sdist, a wheel from the checkout, and a wheel from that sdist."""
    pytest.importorskip("build", reason="needs the dev extra")
    out = tmp_path_factory.mktemp("builds")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out / "wheel", ROOT, cwd=out)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out / "sdist", ROOT, cwd=out)
    (sdist,) = (out / "sdist").iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "tree", filter="data")
    (tree,) = (out / "tree").iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out / "again", tree, cwd=out)
    (wheel,) = (out / "wheel").iterdir()
    (again,) = (out / "again").iterdir()
    return {"sdist": sdist, "wheel": wheel, "wheel from sdist": again}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "wheel from sdist"])
def test_a_wheel_has_every_file_once(builds, kind):
    with zipfile.ZipFile(builds[kind]) as wheel:
        names = wheel.namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if name.endswith(".py")} == modules_of_checkout()
    assert {"ntt_eqx/py.typed", "ntt_eqx_kernels/py.typed"} <= set(names)
    assert not [name for name in names if name.split("/")[0] in ("kernels", "tests", "benchmarks")]


@pytest.mark.slow
def test_both_wheels_hold_the_same(builds):
    def contents(kind):
        with zipfile.ZipFile(builds[kind]) as wheel:
            return {i.filename: i.CRC for i in wheel.infolist() if "dist-info" not in i.filename}

    assert contents("wheel") == contents("wheel from sdist")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["editable", "wheel", "wheel from sdist"])
def test_an_install_imports_the_kernels(builds, tmp_path, kind):
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    folder = "Scripts" if sys.platform == "win32" else "bin"
    python = tmp_path / "env" / folder / "python"
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    # A path from a .pth file comes after the environment's own packages, and the .pth files in it
    # are not read, so that this environment's editable install of the project is out of sight.
    (pathlib.Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    what = ["-e", ROOT] if kind == "editable" else [builds[kind]]
    run(python, "-m", "pip", "install", "--no-deps", *what, cwd=tmp_path)
    origins = run(
        python, "-c",
        "import ntt_eqx_kernels, ntt_eqx.kernels as k; k.masked_ntk_reference;"
        "print(ntt_eqx_kernels.__file__, k.__file__, sep='\\n')",
        cwd=tmp_path, env=alone(),
    ).splitlines()  # fmt: skip
    own, kernels = FOLDERS.values() if kind == "editable" else [pathlib.Path(site)] * 2
    assert [pathlib.Path(path) for path in origins] == [
        kernels / "ntt_eqx_kernels" / "__init__.py",
        own / "ntt_eqx" / "kernels" / "__init__.py",
    ]
