"""CIFAR-10 in grey, of the size of MNIST's images, as a folder that `npy:FOLDER` names.

    python benchmarks/grey_images.py runs/grey

The luma of ITU-R BT.601, the 28 x 28 pixels in the middle. So the same network can be trained on
them as on MNIST and Fashion-MNIST.
"""

import argparse
from pathlib import Path

import numpy as np

import ntt_eqx as ntt

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue
MIDDLE = slice(2, 30)


def main() -> None:
    """Write the four arrays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    images = ntt.data.load_dataset("cifar-10", options.data_dir)
    for name, split in (("train", images.train), ("test", images.test)):
        grey = np.einsum("nchw,c->nhw", split.x, LUMA, dtype=np.float32)
        grey = np.rint(grey)[:, None, MIDDLE, MIDDLE].astype(np.uint8)
        np.save(options.folder / f"{name}_x.npy", grey)
        np.save(options.folder / f"{name}_y.npy", split.y)


if __name__ == "__main__":
    main()
