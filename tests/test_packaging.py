"""Every way to install the package brings every module, the kernels among them.

`ntt_eqx/kernels` is a symlink in a checkout and an ordinary folder in a wheel: builds are where
that can go wrong. Each install goes into an environment that sees this one's dependencies.
"""

import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules_of_checkout():
    """Paths inside the installed package of every Python file, from the two source folders."""
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ntt_eqx").rglob("*.py")}
    kernels = {
        f"ntt_eqx/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")
    }
    assert kernels, "the folder of the kernels is empty"
    return {name for name in own if not name.startswith("ntt_eqx/kernels/")} | kernels


def test_the_symlink_to_the_kernels_is_relative():
    link = ROOT / "ntt_eqx" / "kernels"
    assert link.is_symlink() and link.readlink() == pathlib.Path("../kernels")


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
    assert "ntt_eqx/py.typed" in names
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
    origin = run(
        python, "-c",
        "import ntt_eqx.kernels as k; k.masked_ntk_reference; print(k.__file__)",
        cwd=tmp_path,
    ).strip()  # fmt: skip
    home = ROOT if kind == "editable" else pathlib.Path(site)
    assert pathlib.Path(origin) == home / "ntt_eqx" / "kernels" / "__init__.py"
