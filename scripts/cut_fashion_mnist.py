"""Cut the bundled part of Fashion-MNIST out of Debian's package `dataset-fashion-mnist`.

    apt-get install dataset-fashion-mnist
    python scripts/cut_fashion_mnist.py

Keeps the first `PER_CLASS` images of every class, in the official order: train from the official train file,
val from the official test file. Writes them as the IDX files they came as, compressed with xz (smaller here
than PNG, lossless WebP, JPEG 2000, AVIF and bzip2), with the licence and a README beside them. The same input
gives the same bytes.
"""

import gzip
import lzma
import struct
import textwrap
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
COPYRIGHT = Path("/usr/share/doc/dataset-fashion-mnist/copyright")
TARGET = Path(__file__).parents[1] / "src/slicevit/data/fashion"
PER_CLASS = {"train": 2000, "val": 500}
OFFICIAL_NAME = {"train": "train", "val": "t10k"}
IDX_UINT8 = 0x0800  # the IDX magic of unsigned bytes; its lowest byte is the number of axes

README = """\
# Fashion-MNIST, a balanced part

{train:,} training and {val:,} validation images (28 x 28, gray, 10 classes of equal size) of Fashion-MNIST,
by Zalando SE, under the MIT licence (see LICENSE): https://github.com/zalandoresearch/fashion-mnist

The training images are the first {train_per_class:,} of each class of the official training file, the
validation images the first {val_per_class:,} of each class of the official test file, both in the official
order, their pixels unchanged. Accuracies measured here are **not** comparable with those on the whole set.

Cut by `scripts/cut_fashion_mnist.py` from Debian's package `dataset-fashion-mnist`. The files are IDX
(http://yann.lecun.com/exdb/mnist/ describes the format) compressed with xz.
"""


def read_idx(path: Path) -> np.ndarray:
    """The array of uint8 in a gzipped IDX file: (N, 28, 28) images or (N,) labels."""
    content = gzip.decompress(path.read_bytes())
    (magic,) = struct.unpack(">I", content[:4])
    axes = magic - IDX_UINT8
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> int:
    """Writes `array` of uint8 as an IDX file compressed with xz, and returns its size in bytes."""
    header = struct.pack(f">{1 + array.ndim}I", IDX_UINT8 + array.ndim, *array.shape)
    return path.write_bytes(lzma.compress(header + array.tobytes(), preset=9 | lzma.PRESET_EXTREME))


def licence_text() -> str:
    """The MIT ("Expat") licence with Zalando's copyright line, from Debian's copyright file."""
    terms = COPYRIGHT.read_text().rpartition("License: Expat\n")[2]
    terms = "\n".join("" if line == " ." else line.strip() for line in terms.splitlines())
    return (
        "The MIT License (MIT)\n\nCopyright (c) 2017 Zalando SE, https://tech.zalando.com\n\n"
        f"{textwrap.dedent(terms).strip()}\n"
    )


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    total = 0
    for split, per_class in PER_CLASS.items():
        name = OFFICIAL_NAME[split]
        images = read_idx(SOURCE / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(SOURCE / f"{name}-labels-idx1-ubyte.gz")
        kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        total += write_idx(TARGET / f"{split}-images.idx.xz", images[kept])
        total += write_idx(TARGET / f"{split}-labels.idx.xz", labels[kept])
    (TARGET / "LICENSE").write_text(licence_text())
    sizes = {split: 10 * per_class for split, per_class in PER_CLASS.items()}
    readme = README.format(**sizes, train_per_class=PER_CLASS["train"], val_per_class=PER_CLASS["val"])
    (TARGET / "README.md").write_text(readme)
    print(f"{total:,} bytes in {TARGET}")


if __name__ == "__main__":
    main()
