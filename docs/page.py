"""Creates the screenshots of the TensorBoard page: trains on the hypothyroid data and serves the runs.

Run it from anywhere with the project's Python. It needs playwright and Chromium, like the browser tests.
"""

import sys
import tempfile
from contextlib import chdir
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import hypothyroid  # noqa: E402 - found through the line above
from playwright.sync_api import Browser, expect, sync_playwright  # noqa: E402

import fitwatch as fw  # noqa: E402
from tests._server import serve  # noqa: E402
from tests.test_browser import CHROMIUM, FLAGS  # noqa: E402


def recall(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of ill patients that are found."""
    return (outputs.argmax(1) == 1)[targets == 1].double().mean()


def precision(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of ill patients among those predicted to be ill."""
    found = outputs.argmax(1) == 1
    return (targets[found] == 1).double().sum() / found.sum().clamp_min(1)


def train(folder: Path, name: str, *, lr: float = 3e-4, dropout: float = 0.0, width: int = 64) -> fw.TensorBoard:
    """Train a network that is too large for its data until early stopping ends it."""
    torch.manual_seed(0)
    train_set, val_set, _ = hypothyroid.load()
    layers = [nn.Linear(25, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width, 2))
    page = fw.TensorBoard(folder, name=name, show_link=False)
    callbacks = [
        fw.WeightedLoss("balanced"),
        fw.GradientNorm(),
        fw.OverfittingDetector(),
        fw.EarlyStopping("val/loss", patience=15),
        page,
    ]
    trainer = fw.Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr),
        callbacks=callbacks,
        metrics={"recall": recall, "precision": precision},
        log_every=10,
        seed=0,
    )
    trainer.fit(DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=1024), epochs=60)
    return page


def shoot(browser: Browser, address: str, wait_for: str, path: Path, height: int = 1000) -> None:
    """Take a screenshot of ``address`` once ``wait_for`` is attached."""
    page = browser.new_page(viewport={"width": 1600, "height": height})
    page.goto(address)
    expect(page.locator(wait_for).first).to_be_attached(timeout=20_000)
    page.wait_for_timeout(1500)  # the lines slide into place
    # The selected step is drawn over the bar at the end.
    page.evaluate("document.querySelectorAll('.fob button').forEach(button => button.click())")
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    page.close()


def main() -> None:
    """Train, serve, and write the screenshots."""
    IMAGES.mkdir(exist_ok=True)
    # The page shows the folder's name as given.
    with tempfile.TemporaryDirectory() as folder, chdir(folder), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        run = train(Path("runs"), "hypothyroid")
        with serve(Path("runs")) as address:
            link = run.link(int(address.rpartition(":")[2]))
            shoot(browser, link, "metrics-pinned-view svg circle", IMAGES / "tensorboard.png")
            custom = f"{address}/#custom_scalars&_smoothingWeight=0"
            gap = "tf-custom-scalar-margin-chart-card path.area[d]"
            shoot(browser, custom, gap, IMAGES / "custom-scalars.png", height=1500)
        train(Path("runs"), "large-lr", lr=3e-3)
        train(Path("runs"), "dropout", dropout=0.5)
        train(Path("runs"), "small", width=8)
        with serve(Path("runs")) as address:
            link = run.link(int(address.rpartition(":")[2]), compare=True)
            shoot(browser, link, "metrics-pinned-view svg circle", IMAGES / "compare.png")
        browser.close()


if __name__ == "__main__":
    main()
