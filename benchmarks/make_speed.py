"""Make docs/speed.md from the raw timings.

python benchmarks/make_speed.py
"""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RAW = ROOT / "benchmarks" / "results"
TEXT = ROOT / "benchmarks" / "pages" / "speed.md"
PAGE = ROOT / "docs" / "speed.md"

CASES = {
    "lenet300100": "LeNet-300-100",
    "lenet5": "LeNet-5",
    "conv4": "Conv-4",
    "resnet": "ResNet-20",
}
PASSES = ("forward", "gradient", "step")
BY = {"reference": "pure JAX", "pallas_gpu": "Pallas"}
LAYERS = {  # inputs and outputs; of benchmarks/products.py
    "lenet_300": (784, 300),
    "lenet5_dense": (800, 500),
    "conv4_3200": (3200, 512),
    "conv4_8192": (8192, 512),
}
COMPILED = {"H100": "compiled_h100", "TPU v5e": "compiled_tpu-v5e"}
LARGE = {"vit_b": ("ViT-B/16", 86.6e6), "resnet_50": ("ResNet, width 152", 24.7e6)}  # parameters
BASELINE = "ntk_vector_products"

Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """The raw timings of one file."""
    return json.loads((RAW / f"{name}.json").read_text())


def find_all(rows: list[Row], **where: Any) -> list[Row]:
    """The rows that have all of `where`."""
    return [row for row in rows if all(row.get(name) == value for name, value in where.items())]


def find(rows: list[Row], **where: Any) -> Row | None:
    """The row that has all of `where`, if there is one."""
    found = find_all(rows, **where)
    assert len(found) <= 1, where
    return found[0] if found else None


def milliseconds(row: Row | None, *, tenths: bool = True) -> str:
    if row is None:
        return "–"
    value = 1000 * row["median_s"]
    return f"{value:.1f}" if tenths and value < 100 else f"{value:,.0f}"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main_table(rows: list[Row]) -> str:
    lines = [
        line(
            ["case", "kernel", "pass", "by factors (ms)", "Jacobian contraction (ms)"]
            + ["NTK-vector products (ms)", "speed-up", "GFLOP/s"]
        ),
        line(["---"] * 3 + ["---:"] * 5),
    ]
    for case, name in CASES.items():
        for kernel in ("active", "ambient"):
            for step in PASSES:
                where = {"case": case, "kernel": kernel, "pass": step}
                of = lambda what, where=where: find(rows, implementation=what, **where)
                ours, contraction, products = of("factors"), of("jacobian"), of(BASELINE)
                assert ours is not None, where
                ratio = f"{products['median_s'] / ours['median_s']:.0f}x" if products else "–"
                times = map(milliseconds, (ours, contraction, products))
                lines.append(
                    line([name, kernel, step, *times, ratio, f"{ours['gflops_per_s']:.0f}"])
                )
    return "\n".join(lines)


def runs_table(rows: list[Row]) -> str:
    """A step of a run, with the cores as one device and as two."""
    lines = [line(["network", "kernel", "one device (ms)", "two (ms)", "GFLOP/s"])]
    lines.append(line(["---"] * 2 + ["---:"] * 3))
    keys = ("case", "kernel", "outputs")
    for same in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        found = dict(zip(keys, same, strict=True))
        both = [find(rows, devices=devices, **found) for devices in (1, 2)]
        rates = [row["gflops_per_s"] for row in both if row]
        outputs = found["outputs"].replace("sketch:", ", R = ").replace("full", "")
        cells = [CASES[found["case"]], found["kernel"] + outputs, *map(milliseconds, both)]
        lines.append(line([*cells, f"{max(rates):.0f}"]))
    return "\n".join(lines)


def sketch_table(rows: list[Row]) -> str:
    names = {row["outputs"] for row in rows} - {"full"}  # "sketch:R"
    sizes = sorted(int(name.split(":")[1]) for name in names)
    first, *others = map(str, sizes)
    lines = [
        line(["K", "pass", "all outputs", f"R = {first}", *others]),
        line(["---:", "---"] + ["---:"] * (1 + len(sizes))),
    ]
    for count in sorted({row["num_outputs"] for row in rows}):
        for step in PASSES:
            where = {"num_outputs": count, "pass": step}
            found = [find(rows, outputs="full", **where)]
            found += [find(rows, outputs=f"sketch:{size}", **where) for size in sizes]
            cells = [milliseconds(row, tenths=False) for row in found]
            lines.append(line([f"{count:,}", step, *cells]))
    return "\n".join(lines)


def training_table(rows: list[Row]) -> str:
    """A supervised step beside PyTorch's: the fastest process of each."""
    lines = [line(["network", "ours (ms)", "PyTorch (ms)", "ours / PyTorch"])]
    lines.append(line(["---"] + ["---:"] * 3))
    for row in rows:
        ours, theirs = (min(row["median_s"][side]) for side in ("ntt_eqx", "torch"))
        cells = [f"{1000 * ours:.1f}", f"{1000 * theirs:.1f}", f"{ours / theirs:.2f}"]
        lines.append(line([CASES[row["case"]], *cells]))
    return "\n".join(lines)


def compiled_table() -> str:
    """Whole steps, compiled for chips that were not there."""
    names = ["chip", "network", "kernel", "launches", "temporary MiB", "peak MiB", "GFLOP", "GB"]
    lines = [line([*names, "roofline (ms)"]), line(["---"] * 3 + ["---:"] * 6)]
    for chip, file in COMPILED.items():
        for row in load(file)["rows"]:
            memory = [f"{row[name] / 2**20:,.0f}" for name in ("temporary_bytes", "peak_bytes")]
            work = [f"{row['flops'] / 1e9:,.1f}", f"{row['bytes'] / 1e9:,.2f}"]
            cells = [chip, CASES[row["case"]], row["kernel"], f"{row['launches']:,}"]
            lines.append(line([*cells, *memory, *work, f"{1e3 * row['roofline_s']:,.2f}"]))
    return "\n".join(lines)


def products_table() -> str:
    """One layer's product, and with all its gradients, as an H100's compiler makes it."""
    lines = [line(["mask", "by", "precision", "forward (ms)", "with gradients (ms)", "MiB"])]
    lines.append(line(["---"] * 3 + ["---:"] * 3))
    rows = load("compiled_products")["rows"]
    for row in find_all(rows, direction="forward"):
        same = {key: row[key] for key in ("mask", "implementation", "precision")}
        both = [row, find(rows, direction="gradient", **same)]
        assert all(both), same
        by = BY[row["implementation"]]
        times = [f"{1e3 * r['roofline_s']:.2f}" for r in both if r]
        memory = " / ".join(f"{r['temporary_bytes'] / 2**20:,.0f}" for r in both if r)
        lines.append(line([row["mask"], by, row["precision"], *times, memory]))
    return "\n".join(lines)


def h100_steps_table() -> str:
    """Whole steps as an H100 ran them."""
    names = ["network", "kernel", "precision", "by", "device (ms)", "wall (ms)", "launches"]
    lines = [line([*names, "error of the gradient"]), line(["---"] * 4 + ["---:"] * 4)]
    for row in find_all(load("h100")["rows"], what="step"):
        kernel = row["kernel"] + (f", R = {row['sketch']}" if row["sketch"] else "")
        by = BY[row["implementation"]] + ("" if row["autotuned"] else ", not tuned")
        cells = [CASES[row["case"]], kernel, row["precision"], by]
        cells += [f"{1e3 * row[name]:.2f}" for name in ("device_s", "wall_s")]
        cells += [str(row["launches"]), f"{row['errors']['gradient']:.0e}"]
        lines.append(line(cells))
    return "\n".join(lines)


def h100_products_table() -> str:
    """One layer's product, and with all its gradients, as an H100 ran it."""
    names = ["inputs x outputs", "mask", "kept", "by", "precision", "forward (ms)"]
    lines = [line([*names, "with gradients (ms)", "error"]), line(["---"] * 5 + ["---:"] * 3)]
    rows = load("h100")["rows"]
    keys = ("layer", "mask", "density", "implementation", "precision")
    kept = [r for r in find_all(rows, what="product") if r["autotuned"] in (True, None)]
    order = lambda row: (-LAYERS[row["layer"]][0], row["mask"], row["precision"], row["density"])
    kept.sort(key=order)
    for same in dict.fromkeys(tuple(row[key] for key in keys) for row in kept):
        found = dict(zip(keys, same, strict=True))
        both = [find(kept, direction=name, **found) for name in ("forward", "gradient")]
        inputs, outputs = LAYERS[found["layer"]]
        cells = [f"{inputs:,} x {outputs}", found["mask"], f"{found['density']:.0%}"]
        cells += [BY[found["implementation"]], found["precision"]]
        cells += [f"{1e3 * row['device_s']:.2f}" if row else "–" for row in both]
        worst = max(row["error"] for row in both if row)
        lines.append(line([*cells, f"{worst:.0e}"]))
    return "\n".join(lines)


def h200_products_table() -> str:
    """One layer's product, and with all its gradients, as an H200 ran it."""
    lines = [line(["mask", "by", "forward (ms)", "with gradients (ms)", "error"])]
    lines.append(line(["---"] * 2 + ["---:"] * 3))
    for row in load("h200")["products"]:
        times = [f"{1e3 * row[name]:.2f}" for name in ("forward_s", "gradient_s")]
        cells = [row["mask"], BY[row["implementation"]], *times]
        lines.append(line([*cells, f"{row['error']:.0e}"]))
    return "\n".join(lines)


def h100_convolutions_table() -> str:
    """What cuDNN took for the convolutions of two steps, by kind, and how exact it was."""
    names = ["cuDNN's", "algorithm", "of so many shapes", "smallest error", "largest"]
    lines = [line(names), line(["---"] * 2 + ["---:"] * 3)]
    rows = find_all(load("h100")["rows"], what="convolution")
    for call, algorithm in sorted({(row["call"], row["algorithm"]) for row in rows}):
        errors = [row["error"] for row in find_all(rows, call=call, algorithm=algorithm)]
        cells = [f"`{call}`", str(algorithm), str(len(errors))]
        lines.append(line([*cells, f"{min(errors):.0e}", f"{max(errors):.0e}"]))
    return "\n".join(lines)


def many_table() -> str:
    """Whole steps of large networks, for several chips: what each of them holds and sends."""
    sent = ["all-gather", "reduce-scatter", "all-reduce"]
    names = ["chips", "network", "parameters", "sketch", "peak GiB", *sent]
    names += ["8 P (D - 1) / D", "roofline (ms)"]
    lines = [line(names), line(["---"] * 2 + ["---:"] * 8)]
    for row in load("compiled_many")["rows"]:
        network = row["case"].rpartition(":")[2]
        (name, parameters), devices = LARGE[network], row["devices"]
        mib = [row["sent"].get(kind, [0, 0])[1] / 2**20 for kind in sent]
        mib.append(8 * parameters * (devices - 1) / devices / 2**20)
        cells = [f"{devices} x {row['chip']}", name, f"{parameters / 1e6:.0f} million"]
        cells += [str(row["sketch"]), f"{row['peak_bytes'] / 2**30:.1f}"]
        cells += [f"{size:,.0f} MiB" for size in mib]
        lines.append(line([*cells, f"{1e3 * row['roofline_s']:,.0f}"]))
    return "\n".join(lines)


def formats_table(case: dict[str, Any]) -> str:
    """The exports of one network, as `export_formats.py` measured them."""
    dense = case["rows"][0]["ms"]
    names = ["format", "bytes", "gzip", *(f"{n} (ms)" for n in dense)]
    names += [*(f"{n} (times)" for n in dense), "difference"]
    lines = [line(names), line(["---"] + ["---:"] * (len(names) - 1))]
    for row in case["rows"]:
        cells = [row["format"], f"{row['bytes']:,}", f"{row['gzip']:,}"]
        ms = row.get("ms", {})
        cells += [f"{ms[n]:.3g}" if ms else "" for n in dense]
        cells += [f"{dense[n] / ms[n]:.1f}" if ms else "" for n in dense]
        cells += [f"{row['difference']:.0e}" if ms else ""]
        lines.append(line(cells))
    counts = f"{case['parameters']:,} parameters, {case['compacted']:,} after `compact`"
    return "\n".join([f"{case['case']}: {counts}", "", *lines])


def sparse_layers_table(rows: list[Row]) -> str:
    """Training on kept weights beside the dense and the masked network."""
    names = ["network", "density", "dense (ms)", "masked (ms)", "kept (ms)", "dense / kept"]
    names += ["masked / kept", "state / dense weights"]
    lines = [line(names), line(["---"] + ["---:"] * (len(names) - 1))]
    for row in rows:
        dense, masked, kept = (row["step"][side]["cpu_s"] for side in ("dense", "masked", "sparse"))
        hidden = 3 if row["case"] == "1568" else 2
        case = CASES.get(row["case"], "-".join(["784", *[row["case"]] * hidden, "10"]))
        cells = [case, f"{row['density']:.0%}", *(f"{1000 * s:.1f}" for s in (dense, masked, kept))]
        cells += [f"{dense / kept:.2f}", f"{masked / kept:.2f}"]
        lines.append(line([*cells, f"{row['bytes']['sparse'] / row['weight_bytes']:.2f}"]))
    return "\n".join(lines)


def patterns_table(found: dict[str, Any]) -> str:
    """Accuracy and milliseconds of masks in several patterns."""
    names = ["pattern", "density", "parameters left", "test accuracy (%)", "runner"]
    names += ["64 (ms)", "1 (ms)", "64 (times)", "1 (times)"]
    lines = [line(names), line(["---", "---:", "---:", "---:", "---"] + ["---:"] * 4)]
    for series in dict.fromkeys(row["series"] for row in found["rows"]):
        rows = find_all(found["rows"], series=series)
        for row in sorted(rows, key=lambda row: row["density"]):
            # the dense network is in onnxruntime, the runner it is compared in
            runners = ["onnxruntime"] if series == "dense" else ["numpy", "onnxruntime"]
            runner = min(runners, key=lambda name, row=row: row[name]["64"])
            spread = row["standard_error"]
            accuracy = f"{row['accuracy']:.2f}" + (f" ± {spread:.2f}" if spread else "")
            cells = [
                row["label"],
                f"{row['density']:.0%}",
                f"{row['compacted']:,}",
                accuracy,
                runner,
            ]
            cells += [f"{row[runner][n]:.3g}" for n in ("64", "1")]
            cells += [f"{row['dense'][n] / row[runner][n]:.1f}" for n in ("64", "1")]
            lines.append(line(cells))
    return "\n".join(lines)


LIBRARIES = {
    "ntt_eqx": "ntt_eqx",
    "jax": "JAX by hand",
    "torch": "torch.func",
    "neural-tangents": "neural-tangents",
    "laplax": "laplax",
}
WORST = 1e-4  # a result that is further from ours is no time for the same work


def libraries_table(found: dict[str, Any]) -> str:
    """Kernels and products of each library; of the ways to the same kernel the fastest."""
    networks = sorted({row["network"] for row in found["rows"]}, key=len, reverse=True)
    sizes = {"kernel": found["few"], "product": found["many"], "GGN product": found["many"]}
    names = [f"{network}, {what}" for what in sizes for network in networks]
    lines = [line(["library", *names]), line(["---"] + ["---:"] * len(names))]
    for library, label in LIBRARIES.items():
        own = find_all(found["rows"], library=library)
        cells = []
        for what in sizes:
            for network in networks:
                rows = [row for row in own if row["what"].split(",")[0] == what]
                rows = find_all(rows, network=network)
                right = [row["cpu_seconds"] for row in rows if row["difference"] < WORST]
                spent = 1000 * min(right, default=0.0)
                shown = f"{spent:.1f}" if spent < 100 else f"{spent:,.0f}"
                cells.append(shown if right else "differs" if rows else "")
        version = own[0]["version"]
        lines.append(line([f"{label} {version}", *cells]))
    return "\n".join(lines)


def operator_products_table(found: dict[str, Any]) -> str:
    """A product with the kernel of some images beside one VJP and one JVP, and blocks of them."""
    lines = [line(["network", "by hand (ms)", "product (ms)", "ratio", "of 8 at once", "of 16"])]
    lines.append(line(["---"] + ["---:"] * 5))
    for row in found["rows"]:
        spent = row["cpu_seconds"]
        hand = min(seconds for name, seconds in spent.items() if name.startswith("by hand"))
        each = [spent[f"block of {width}"] / width for width in (8, 16)]
        times = [hand, spent["product"], *each]
        one, two, *rest = (f"{1000 * seconds:.0f}" for seconds in times)
        lines.append(line([row["network"], one, two, f"{spent['product'] / hand:.2f}", *rest]))
    return "\n".join(lines)


def large_table(found: dict[str, Any]) -> str:
    """The kernel of large images by the size of its tiles: what ran, and the whole by count."""
    names = ["tile", "images", "tiles", "CPU s a tile", "peak (GB)", "error"]
    names += ["tiles of the whole", "CPU hours"]
    lines = [line(names), line(["---:"] * len(names))]
    for row in sorted(found["rows"], key=lambda row: (row["tile"], row["images"])):
        cells = [f"{row['tile']} x {row['tile']}", str(row["images"]), str(row["tiles"])]
        cells += [f"{row['cpu_seconds'] / row['tiles']:.0f}", f"{row['peak_gigabytes']:.1f}"]
        cells += [f"{row['difference']:.0e}", f"{row['whole_tiles']:,}"]
        lines.append(line([*cells, f"{row['whole_cpu_hours']:.0f}"]))
    return "\n".join(lines)


def speedups() -> tuple[int, int]:
    """The smallest and the largest speed-up of all rows with the baseline, rounded."""
    rows = load("cpu")["rows"]
    found = [r["speedup"] for r in rows if r["implementation"] == "factors" and r["speedup"]]
    return round(min(found)), round(max(found))


def operator_facts() -> dict[str, str]:
    """Numbers of the kernel as an operator."""
    found = load("kernel_operator")
    pairs = found["eigenpairs"]
    values = pairs["values"]
    return {
        "operator_images": f"{found['products']['images']:,}",
        "operator_products_table": operator_products_table(found["products"]),
        "eigen_products": str(pairs["products"]),
        "eigen_wall": f"{pairs['wall_seconds'] / 60:.0f}",
        "eigen_minutes": f"{pairs['cpu_seconds'] / 60:.0f}",
        "eigen_gigabytes": f"{pairs['peak_gigabytes']:.2f}",
        "eigen_first": f"{values[0]:,.0f}",
        "eigen_last": f"{values[-1]:,.0f}",
        "eigen_residual": f"{max(pairs['residuals']):.0e}",
        "layers": ", ".join(
            f"{row['network']} {1000 * row['cpu_seconds']['by layer']:.0f} and "
            f"{1000 * row['cpu_seconds']['whole']:.0f} ms"
            for row in found["by-layer"]["rows"]
        ),
        "layers_images": str(found["by-layer"]["images"]),
        "large_table": large_table(found["large-kernel"]),
        "large_images": f"{found['large-kernel']['whole']:,}",
        "large_weights": f"{found['large-kernel']['weights'] / 1e6:.1f}",
    }


def facts() -> dict[str, str]:
    """What the page is filled with."""
    cpu, sketch = load("cpu"), load("cpu_sketch")
    training, runs = load("training"), load("cpu_runs")
    products = lambda found: " and ".join(f"{rate:.0f}" for rate in found.values())
    return {
        "jax": cpu["versions"]["jax"],
        "runs_table": runs_table(runs["rows"]),
        "runs_matmul": " to ".join(
            f"{pick(rate for run in runs['matmul_gflops_per_s'] for rate in run.values()):.0f}"
            for pick in (min, max)
        ),
        "main_table": main_table(cpu["rows"]),
        "matmul": products(cpu["matmul_gflops_per_s"]),
        "compiled_table": compiled_table(),
        "training_table": training_table(training["rows"]),
        "training_jax": training["versions"]["jax"],
        "torch": training["versions"]["torch"],
        "many_table": many_table(),
        "products_table": products_table(),
        "h100_driver": load("h100")["driver"],
        "h100_jax": load("h100")["jax"],
        "h100_steps_table": h100_steps_table(),
        "h100_convolutions_table": h100_convolutions_table(),
        "h100_products_table": h100_products_table(),
        "h200_products_table": h200_products_table(),
        "compiled_jax": load("compiled_h100")["jax"],
        "formats_tables": "\n\n".join(formats_table(case) for case in load("formats")["cases"]),
        "sparse_layers_table": sparse_layers_table(load("sparse_layers")["rows"]),
        "patterns_table": patterns_table(load("patterns")),
        "patterns_caption": load("patterns")["caption"].replace("\n", "; "),
        "libraries_table": libraries_table(load("other_libraries")),
        "libraries_few": str(load("other_libraries")["few"]),
        "libraries_many": str(load("other_libraries")["many"]),
        **operator_facts(),
        "sparse_jax": load("sparse_layers")["versions"]["jax"],
        "sketch_table": sketch_table(sketch["rows"]),
        "sketch_matmul": " and ".join(
            f"{run['1024']:.0f}" for run in sketch["matmul_gflops_per_s"]
        ),
    }


def page() -> str:
    """The text of docs/speed.md."""
    return TEXT.read_text().format(**facts())


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
