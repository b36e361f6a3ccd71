"""The IDX reader on whole, broken and arbitrary files."""

import gzip
import hashlib

import numpy as np
import pytest
from helpers.published_formats import idx_bytes
from hypothesis import given, settings, strategies as st

from ntt_eqx.data import DatasetError
from ntt_eqx.data._idx import read_idx


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (5, 3, 4), np.uint8)


@pytest.mark.parametrize("zipped", [False, True])
def test_whole_files(tmp_path, images, zipped):
    content = idx_bytes(images)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(content) if zipped else content)
    sha256 = hashlib.sha256(content).hexdigest()
    np.testing.assert_array_equal(read_idx(path, 3, sha256=sha256), images)
    labels = tmp_path / "labels"
    labels.write_bytes(idx_bytes(images[:, 0, 0]))
    np.testing.assert_array_equal(read_idx(labels, 1), images[:, 0, 0])


@pytest.mark.parametrize("zipped", [False, True])
def test_every_truncation_is_noticed(tmp_path, images, zipped):
    content = idx_bytes(images)
    content = gzip.compress(content) if zipped else content
    path = tmp_path / "images"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError, match=f"^{path}: (truncated|wrong magic number)"):
            read_idx(path, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b"\x00\x00\x08\x01" + b[4:], "wrong magic number 0x00000801, expected 0x000008"),
        (lambda b: b"\x00\x00\x0d\x03" + b[4:], "wrong magic number 0x00000d03"),
        (lambda b: b"PK\x03\x04" + b[4:], "wrong magic number 0x504b0304"),
        (lambda b: b + b"\x00", "longer than the 60 bytes"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "the header announces an impossible shape"),
        (lambda b: b[:7] + b"\x06" + b[8:], "truncated, 60 of 72 bytes"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "wrong checksum; the SHA-256"),
        (lambda b: gzip.compress(b)[:-8] + b"\x00" * 8, "truncated or damaged gzip file"),
        (lambda b: b"\x1f\x8b" + b[2:], "truncated or damaged gzip file"),
    ],
)
def test_broken_files_are_named_with_the_reason(tmp_path, images, change, message):
    content = idx_bytes(images)
    path = tmp_path / "images"
    path.write_bytes(change(content))
    with pytest.raises(DatasetError, match=f"^{path}: {message}"):
        read_idx(path, 3, sha256=hashlib.sha256(content).hexdigest())


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DatasetError, match=f"{tmp_path}.*cannot be read"):
        read_idx(tmp_path / "absent", 3)
    with pytest.raises(DatasetError, match=f"{tmp_path}: cannot be read"):
        read_idx(tmp_path, 3)


@given(
    content=st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=60).map(lambda b: b"\x00\x00\x08\x03" + b),
        st.binary(max_size=60).map(gzip.compress),
        st.binary(max_size=60).map(lambda b: gzip.compress(b"\x00\x00\x08\x03" + b)[:-3]),
    )
)
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_give_an_array_or_the_documented_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz-idx"
    path.write_bytes(content)
    try:
        assert read_idx(path, 3).ndim == 3
    except DatasetError as error:
        assert str(path) in str(error)
