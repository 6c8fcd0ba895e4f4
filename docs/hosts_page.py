"""Creates the screenshots of the pages on other libraries: trains in each, and photographs what it shows.

Needs lightning, transformers, accelerate, mlflow (with its server), playwright and Chromium.
"""

import re
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, suppress
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Browser, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path[:0] = [str(ROOT)]

import fitwatch as fw  # noqa: E402
from fitwatch.integrations.lightning import FitwatchCallback  # noqa: E402
from fitwatch.integrations.mlflow import MLflowLog  # noqa: E402
from tests._server import serve  # noqa: E402
from tests.integrations import test_lightning, test_transformers  # noqa: E402
from tests.integrations._contract import Problem  # noqa: E402
from tests.test_browser import CHROMIUM, FLAGS  # noqa: E402

EPOCHS = 30


def in_lightning(folder: Path) -> fw.TensorBoard:
    """Train in Lightning."""
    problem, board = Problem(patience=15), fw.TensorBoard(show_link=False)
    logger = test_lightning.pl.loggers.CSVLogger(folder)
    callback = FitwatchCallback([*problem.callbacks, board])
    trainer = test_lightning.trainer_of(problem, [callback], EPOCHS, folder, logger=logger)
    trainer.fit(test_lightning.Module(problem), problem.train_loader, problem.val_loader)
    return board


def in_transformers(folder: Path) -> fw.TensorBoard:
    """Train in transformers."""
    problem, board = Problem(patience=15), fw.TensorBoard(folder / "runs", show_link=False)
    trainer = test_transformers.trainer_of(problem, EPOCHS, folder)
    with test_transformers.attach(trainer, [*problem.callbacks, board], loss=fw.CrossEntropy()):
        trainer.train()
    return board


def shoot(browser: Browser, address: str, wait_for: str, path: Path) -> None:
    """Take a screenshot once ``wait_for`` is attached."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(address)
    expect(page.locator(wait_for).first).to_be_attached(timeout=60_000)
    page.wait_for_timeout(4000)
    page.screenshot(path=path)
    page.close()


def wait_for(address: str) -> None:
    """Wait until a server answers."""
    for _ in range(120):
        with suppress(OSError), urlopen(address):  # noqa: S310 - our own server
            return
        time.sleep(1)


def shoot_mlflow(browser: Browser, folder: Path) -> None:
    """Train with our Trainer and photograph the run in MLflow."""
    problem, log = Problem(patience=15), MLflowLog(name="breast-cancer", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    problem.callbacks.append(log)
    problem.by_trainer(EPOCHS)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", log.tracking_uri, "--port", "5917"]
    with subprocess.Popen([*command, "--workers", "1"], cwd=folder) as server:  # noqa: S603 - constant
        try:
            wait_for("http://127.0.0.1:5917/health")
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.goto(f"http://127.0.0.1:5917/#/experiments/1/runs/{log.run_id}/model-metrics")
            page.get_by_placeholder("Search metric charts").fill("^(train|val)/(loss|cost|overfit/(gap|rise))$")
            page.wait_for_timeout(8000)
            page.screenshot(path=IMAGES / "mlflow.png", clip={"x": 195, "y": 0, "width": 990, "height": 1000})
            page.close()
        finally:
            server.terminate()


def main() -> None:
    """Train, serve, and write the screenshots."""
    with tempfile.TemporaryDirectory() as name, chdir(name), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        folder = Path(name)
        for host, train in (("lightning", in_lightning), ("transformers", in_transformers)):
            board = train(folder / host)
            with serve(board.run_dir.parent) as address:
                link = board.link(int(re.findall(r"\d+", address)[-1]))
                shoot(browser, link, "metrics-pinned-view svg circle", IMAGES / f"{host}.png")
        shoot_mlflow(browser, folder)
        browser.close()


if __name__ == "__main__":
    main()
