"""How class_probabilities.csv came about: top-class counts under Gaussian noise of small nets trained with that noise.

    python -m benchmarks.class_probabilities DATA_FOLDER

For each line of NETS one net is trained by cross-entropy on noisy images; then every k-th test image is classified under DRAWS
draws of noise. The draws are shared by the images of a net: the file is a list of realistic class probabilities, not of
certificates. One line per net and image: how many of the draws fell on the most frequent class. DATA_FOLDER holds MNIST.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.data import Dataset, batches, load
from bench.models import build_model

FILE = Path(__file__).with_suffix(".csv")
DRAWS = 20_000
NETS = (  # data, architecture, sigma, epochs, every k-th test image
    ("digits", "mlp", 0.25, 60, 1), ("digits", "mlp", 0.5, 60, 1),
    ("mnist", "mlp", 0.25, 3, 20), ("mnist", "mlp", 0.5, 3, 20),
    ("mnist", "cnn_small", 0.25, 2, 40), ("mnist", "cnn_small", 0.5, 2, 40),
)  # fmt: skip


def trained(arch: str, found: Dataset, sigma: float, epochs: int) -> nn.Module:
    """A net in eval mode after training on noisy images."""
    torch.manual_seed(0)
    model, generator = build_model(arch, found.shape, found.classes), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for x, y in batches(found.train, 128, generator):
            loss = F.cross_entropy(model(x + sigma * torch.randn(x.shape, generator=generator)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def top_hits(model: nn.Module, x: Tensor, sigma: float) -> list[int]:
    """For each image, how often its most frequent class came up."""
    noise = sigma * torch.randn(DRAWS, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    counts = [sum(torch.bincount(model(image + part).argmax(1), minlength=10) for part in noise.split(500)) for image in x]
    return [int(torch.as_tensor(one).max()) for one in counts]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    with FILE.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("data", "arch", "sigma", "image", "hits", "draws"))
        for data, arch, sigma, epochs, step in NETS:
            found = load(data, folder)
            model, images = trained(arch, found, sigma, epochs), found.test.every(step)
            for index, hits in zip(images.index.tolist(), top_hits(model, images.pixels(), sigma), strict=True):
                table.writerow((data, arch, sigma, index, hits, DRAWS))
            print(f"{arch} on {data} at sigma {sigma}: {len(images)} images", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
