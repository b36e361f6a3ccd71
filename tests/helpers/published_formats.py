"""Writes small files in the formats in which the datasets are published."""

import dataclasses
import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np

IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array):
    """Magic number, sizes, bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(folder, rng, *, num_train=24, num_test=12, zipped=False, side=28):
    """Four IDX files; returns their arrays in the order of `IDX_NAMES`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for size in (num_train, num_test):
        arrays.append(rng.integers(0, 256, (size, side, side), np.uint8))
        arrays.append((np.arange(size) % 10).astype(np.uint8))
    for name, array in zip(IDX_NAMES, arrays, strict=True):
        content = idx_bytes(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)
    return arrays


def cifar_arrays(rng, size, num_classes):
    """Pixels in the published order (channels, rows, columns) and labels."""
    return rng.integers(0, 256, (size, 3072), np.uint8), np.arange(size) % num_classes


def python2_pickle(items):
    """Protocol 2 as Python 2's cPickle writes it: byte strings, a memo, numpy by `_reconstruct`."""
    out, memo = io.BytesIO(), iter(range(1, 1 << 16))

    def put():
        number = next(memo)
        out.write(b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number))

    def string(text):
        short = len(text) < 256
        size = bytes([len(text)]) if short else struct.pack("<i", len(text))
        out.write((b"U" if short else b"T") + size + text)
        put()

    def integer(number):
        out.write(b"K" + bytes([number]) if number < 256 else b"M" + struct.pack("<H", number))

    def value(item):
        if isinstance(item, bytes):
            string(item)
        elif isinstance(item, int):
            integer(item)
        elif isinstance(item, list):
            out.write(b"]")
            put()
            out.write(b"(")
            for entry in item:
                value(entry)
            out.write(b"e")
        else:
            array(item)

    def array(item):
        out.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        put()
        out.write(b"cnumpy\nndarray\n")
        put()
        out.write(b"K\x00\x85U\x01b\x87R")
        put()
        out.write(b"(K\x01")
        for size in item.shape:
            integer(size)
        out.write(b"\x86cnumpy\ndtype\n")
        put()
        out.write(b"U\x02u1K\x00K\x01\x87R")
        put()
        out.write(b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        string(item.tobytes())
        out.write(b"tb")

    out.write(b"\x80\x02}")
    put()
    out.write(b"(")
    for key, item in items.items():
        string(key)
        value(item)
    out.write(b"u.")
    return out.getvalue()


def cifar10_python(pixels, labels, part=b"training batch 1 of 5"):
    names = [b"image_%04d.png" % i for i in range(len(pixels))]
    return python2_pickle(
        {
            b"batch_label": part,
            b"labels": [int(n) for n in labels],
            b"data": pixels,
            b"filenames": names,
        }
    )


def cifar100_python(pixels, labels):
    names = [b"image_%04d.png" % i for i in range(len(pixels))]
    return python2_pickle(
        {
            b"filenames": names,
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": [int(n) for n in labels],
            b"coarse_labels": [int(n) // 5 for n in labels],
            b"data": pixels,
        }
    )


def cifar10_binary(pixels, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1).tobytes()


def cifar100_binary(pixels, labels):
    both = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
    return np.concatenate([both, pixels], axis=1).tobytes()


def tar_gz(members):
    """A .tar.gz of `{name: bytes}`; a `TarInfo` in place of bytes goes in as it is."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def with_digests(spec, number, contents, *, num_train, num_test, url=None):
    """`spec` reduced to one format whose digests and sizes are those of the files in `contents`."""
    form = spec.formats[number]
    files = []
    for file in form.files:
        sha256 = hashlib.sha256(contents[file.name]).hexdigest()
        where = url and f"{url}/{file.name}"
        files.append(dataclasses.replace(file, digest=sha256, url=where, url_sha256=None))
    form = dataclasses.replace(form, files=tuple(files))
    return dataclasses.replace(
        spec, formats=(form,), num_train=num_train, num_test=num_test, system_folders=()
    )
