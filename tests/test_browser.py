"""TensorBoard in a real browser, with the event files of real fits."""

import os
import re
import shutil
from types import SimpleNamespace

import pytest

from tests._server import noisy_data, overfitting_trainer, serve

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
HOW = (
    "pip install playwright, and a Chromium at /usr/bin/chromium or on the PATH "
    "(Debian: apt-get install -y --no-install-recommends chromium)"
)
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    pytest.skip(f"the browser tests need playwright: {HOW}", allow_module_level=True)
if not os.access(CHROMIUM, os.X_OK):
    pytest.skip(f"the browser tests need Chromium: {HOW}", allow_module_level=True)

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-3d-apis"]  # without WebGL the charts are SVG, which can be counted
PINNED = "metrics-pinned-view scalar-card"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Serve two finished runs to a browser."""
    folder = tmp_path_factory.mktemp("runs")
    overfitting_trainer(folder, name="other", patience=2).fit(*noisy_data(), epochs=3)
    trainer = overfitting_trainer(folder)
    result = trainer.fit(*noisy_data(), epochs=60)
    with serve(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        port = int(address.rpartition(":")[2])
        board = trainer.callbacks[-1]
        links = {"link": board.link(port), "compare": board.link(port, compare=True)}
        yield SimpleNamespace(page=page, result=result, address=address, **links)
        browser.close()


@pytest.fixture
def page(shown):
    """Return the empty page: a new fragment alone would not load anything."""
    shown.page.goto("about:blank")
    return shown.page


def pinned(page, tag):
    """Return the pinned card of a tag."""
    return page.locator(PINNED).filter(has=page.locator(f'.tag[title="{tag}"]'))


def lines(card):
    """Return the curves and bars of a card."""
    return card.locator("line-chart .series-view > svg path")


def dots(card):
    """Return the single points of a card."""
    return card.locator("line-chart .series-view > svg circle")


def test_the_loss_card_shows_both_curves_the_dot_and_the_bars(page, shown):
    """The loss card is pinned on the first screen, with train, val and baseline, two bars and the dot."""
    page.goto(shown.link)
    card = pinned(page, "loss")
    expect(dots(card)).to_have_count(1)
    expect(lines(card)).to_have_count(5)
    box = card.bounding_box()
    assert box["y"] + box["height"] < 1000
    assert box["x"] + box["width"] < 1600
    bars = [line.bounding_box() for line in lines(card).all()]
    upright = [bar for bar in bars if bar["height"] > 5 * bar["width"]]
    assert len(upright) == 2
    curves = [bar for bar in bars if bar not in upright]
    left, right = min(c["x"] for c in curves), max(c["x"] + c["width"] for c in curves)
    dot = dots(card).bounding_box()
    assert left < dot["x"] < right - 0.5 * (right - left)  # the best epoch is early: after it the model overfits
    assert max(bar["x"] for bar in upright) > right - 0.05 * (right - left)  # it stopped at the end


def test_the_pinned_cards_have_lines(page, shown):
    """The link pins four cards in order, each with lines; the accuracy has the dot too."""
    page.goto(shown.link)
    expect(page.locator(PINNED)).to_have_count(4)
    tags = [tag.get_attribute("title") for tag in page.locator(f"{PINNED} .tag").all()]
    assert tags == ["loss", "metrics/accuracy", "overfit/gap", "optim/grad_norm_max"]
    for tag, count in zip(tags[1:], (2, 1, 1), strict=True):  # the accuracy on the probe beside that of validation
        expect(lines(pinned(page, tag))).to_have_count(count)
    expect(dots(pinned(page, "metrics/accuracy"))).to_have_count(1)


def test_the_first_group_of_charts_is_the_loss(page, shown):
    """Below the pinned cards the first group is the loss alone, followed by its variants, the metrics and the rest."""
    page.goto(shown.link)
    groups = page.locator("metrics-card-groups metrics-card-group-toolbar")
    expect(groups).to_contain_text(["loss", "loss_unweighted", "loss_vs_baseline", "metrics", "optim", "overfit"])
    expect(page.locator("metrics-card-groups .tag").first).to_have_attribute("title", "loss")


def test_the_link_lists_this_run_alone(page, shown):
    """The run selector lists only the six sub-runs of the linked run."""
    page.goto(shown.link)
    rows = page.locator("runs-data-table tb-data-table-content-row")
    expect(rows).to_have_count(6)
    names = [row.get_attribute("data-id").partition("/")[2] for row in rows.all()]
    assert names == [f"run/{part}" for part in ("baseline", "best", "early stop", "overfitting", "train", "val")]


def test_a_pin_without_data_shows_no_empty_card(page, shown):
    """A pin without data shows no card, so that the link can be printed before anything is logged."""
    page.goto(shown.link.replace("overfit/gap", "overfit/nonesuch"))
    expect(lines(pinned(page, "optim/grad_norm_max"))).to_have_count(1)
    expect(page.locator(PINNED)).to_have_count(3)


def test_every_chart_of_the_custom_page_has_lines(page, shown):
    """The custom page has three categories, nine charts with lines, and the shaded gap."""
    page.goto(f"{shown.address}/#custom_scalars&_smoothingWeight=0&regexInput=%5Erun%2F")
    titles = page.locator("tf-custom-scalar-dashboard tf-category-paginated-view .heading")
    expect(titles).to_contain_text(["1 Overfitting", "2 Gradients", "3 Optimizer"])
    charts = page.locator("tf-custom-scalar-multi-line-chart-card")
    expect(charts).to_have_count(9)
    for chart, count in zip(charts.all(), (7, 2, 2, 2, 2, 2, 1, 1, 1), strict=True):  # the dot, and the refined loss
        expect(chart.locator("path.line[d]")).to_have_count(count)
    expect(page.locator("tf-custom-scalar-margin-chart-card path.area[d]")).to_have_count(1)


def test_the_hparams_table_has_a_row_a_run(page, shown):
    """The table has a row per run, with settings and the best loss."""
    page.set_viewport_size({"width": 6000, "height": 1000})  # the table draws only the columns that are in sight
    page.goto(f"{shown.address}/#hparams")
    cells = page.locator("vaadin-grid-cell-content")
    for text in ("run", "other", "class_weights", "balanced"):
        expect(cells.get_by_text(text, exact=True).first).to_be_visible()
    loss = shown.result.best.metrics["val/loss"]
    expect(cells.get_by_text(f"{loss:.5g}", exact=True).first).to_be_visible()
    page.set_viewport_size({"width": 1600, "height": 1000})


def test_the_text_page_shows_the_tables(page, shown):
    """The start report and the class weights are rendered as tables, the warning as text."""
    page.goto(f"{shown.address}/#text&regexInput=%5Erun%2F")
    report = page.locator("tf-text-loader").filter(has_text="report/start")
    expect(report.get_by_role("cell", name="Adam", exact=True)).to_be_visible()
    weights = page.locator("tf-text-loader").filter(has_text="report/class_weights")
    expect(weights.get_by_role("columnheader", name="weight", exact=True)).to_be_visible()
    verdict = page.locator("tf-text-loader").filter(has_text="overfit/verdict")
    expect(verdict).to_contain_text(re.compile("overfitting since epoch", re.IGNORECASE))


def test_the_end_report_is_a_table(page, shown):
    """The Text page shows the best epoch's train and validation loss side by side, under the name of the run."""
    page.goto(f"{shown.address}/#text&regexInput=%5Erun%2F")
    report = page.locator("tf-text-loader").filter(has_text="report/end")
    best = shown.result.best
    head = f"run, best epoch {best.epoch + 1} (by val/loss), step {best.step}"
    expect(report.get_by_role("columnheader", name=head, exact=True)).to_be_visible()
    for name in ("train/loss", "val/loss"):
        expect(report.get_by_role("cell", name=f"{best.metrics[name]:.6g}", exact=True)).to_be_visible()


def test_the_precision_recall_curve_has_a_line(page, shown):
    """The PR curves page has one chart for this run, of class 1, whose line spans it."""
    page.goto(f"{shown.address}/#pr_curves&regexInput=%5Erun%2F")
    lines = page.locator("tf-pr-curve-card path.line[d]")
    expect(page.locator("tf-pr-curve-card").filter(has_text="pr_curve/1")).to_have_count(1)
    expect(lines).to_have_count(1)
    assert lines.bounding_box()["width"] > 50


def test_the_confusion_matrix_is_a_picture(page, shown):
    """The Images page shows the matrix of the best epoch at full width."""
    page.goto(f"{shown.address}/#images&regexInput=%5Erun%2F")
    loader = page.locator("tf-image-loader").filter(has_text=re.compile("report/confusion(?!_)"))
    expect(loader).to_have_count(1)
    expect(loader.locator("img")).to_be_visible()
    assert loader.locator("img").evaluate("image => image.naturalWidth") >= 330


def test_the_link_that_compares_shows_all_runs(page, shown):
    """The comparison shows only validation curves and dots, one color per run.

    The first card is the share of the baseline, whose scale does not depend on weights.
    """
    page.goto(shown.compare)
    expect(page.locator(PINNED)).to_have_count(4)
    tags = [tag.get_attribute("title") for tag in page.locator(f"{PINNED} .tag").all()]
    assert tags == ["loss_vs_baseline", "loss", "metrics/accuracy", "overfit/gap"]
    for card in (pinned(page, "loss_vs_baseline"), pinned(page, "loss")):
        expect(lines(card)).to_have_count(2)
        expect(dots(card)).to_have_count(2)
    rows = page.locator("runs-data-table tb-data-table-content-row")
    expect(rows).to_have_count(4)
    names = [row.get_attribute("data-id").partition("/")[2] for row in rows.all()]
    assert names == ["other/best", "other/val", "run/best", "run/val"]
    strokes = [line.evaluate("line => getComputedStyle(line).stroke") for line in lines(card).all()]
    fills = [dot.evaluate("dot => getComputedStyle(dot).fill") for dot in dots(card).all()]
    assert len(set(strokes)) == 2
    assert sorted(strokes) == sorted(fills)
