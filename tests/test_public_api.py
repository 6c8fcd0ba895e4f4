"""What users import, and how the parts depend on each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fitwatch as fw

ROOT = Path(fw.__file__).parent
DOCUMENTED = [
    "Trainer",
    "Callback",
    "Callbacks",
    "State",
    "Watch",
    "WeightedLoss",
    "GradientNorm",
    "OverfittingDetector",
    "EarlyStopping",
    "TensorBoard",
    "Checkpoint",
    "ProgressBar",
    "CrossEntropy",
    "BinaryCrossEntropy",
    "RealWorldCrossEntropy",
    "LossSum",
    "class_weights",
    "diagnose",
    "Verdict",
]


def test_public_names_are_sorted_and_exist():
    """__all__ is sorted, every name in it exists and has a docstring, and the documented names are there."""
    assert sorted(fw.__all__) == fw.__all__
    assert set(DOCUMENTED) <= set(fw.__all__)
    assert all(getattr(fw, name).__doc__ for name in fw.__all__)


MODULES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in ROOT.rglob("*.py")}


def room(module):
    """The folder that a module lies in, or the module itself where it lies in none."""
    return module.split("/")[0]


def imports(path):
    """The modules of the package that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fitwatch":
            inside = node.module.split(".")[1:]
            for alias in node.names:
                found = [c for c in ("/".join([*inside, alias.name]), "/".join(inside)) if c in MODULES]
                yield found[0] if found else "/".join([*inside, "__init__"])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("fitwatch") for alias in node.names)


def test_imports_run_one_way():
    """No folder or top-level module imports one that imports it in turn, over however many others."""
    needs = {}
    for name, path in MODULES.items():
        needs.setdefault(room(name), set()).update(room(other) for other in imports(path))
    assert needs["trainer"] - needs.keys() == set()
    layers = []
    while needs:
        lowest = {name for name, others in needs.items() if not (others - {name}) & needs.keys()}
        assert lowest, f"these import each other: {sorted(needs)}"
        layers.append(lowest)
        needs = {name: others for name, others in needs.items() if name not in lowest}
    assert layers[-1] <= {"__init__", "__main__", "integrations"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("integrations/")])
def test_guests_use_public_names_only(module):
    """A guest imports fitwatch's public names, from fitwatch or its public sub-packages, and no other guest."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fitwatch":
            assert node.module in ("fitwatch", "fitwatch.records"), node.module
            assert all(hasattr(fw, name.name) or hasattr(fw.records, name.name) for name in node.names)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert isinstance(node.value, ast.Name), f"{ast.unparse(node)} is private"
            assert node.value.id == "self", f"{ast.unparse(node)} is private"


@pytest.mark.parametrize(
    ("name", "allowed"), [("rules", {"helpers"}), ("losses", {"helpers"}), ("logs", {"rules", "helpers"})]
)
def test_rules_losses_and_logs_know_no_training(name, allowed):
    """The rules, the losses and the reading of logs can be used, and tested, without a model or a loop."""
    inside = {m: set(map(room, imports(path))) for m, path in MODULES.items() if room(m) == name}
    assert {m: others - {name} - allowed for m, others in inside.items() if others - {name} - allowed} == {}


def test_no_module_is_named_twice():
    """The name of a module says which one is meant, without its folder."""
    names = [m.rpartition("/")[2] for m in MODULES if not m.endswith("__init__")] + [
        p.name for p in ROOT.iterdir() if p.is_dir()
    ]
    assert sorted(set(names)) == sorted(n for n in names if n != "__pycache__")


def test_import_is_light():
    """Importing fitwatch imports neither TensorBoard nor TensorFlow."""
    code = "import sys, fitwatch; print([m for m in ('tensorboard', 'tensorflow', 'torch.utils.tensorboard') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_misspelt_hook_is_refused_when_the_class_is_defined():
    """A method on_* that is no hook is an error at class definition, with a suggestion; also from a mixin."""
    with pytest.raises(TypeError, match="Mine.on_epoch_ends is no hook; did you mean 'on_epoch_end'"):
        type("Mine", (fw.Callback,), {"on_epoch_ends": lambda self, state: None})
    mixin = type("Mixin", (), {"on_train_start": lambda self: None})
    with pytest.raises(TypeError, match="Both.on_train_start is no hook"):
        type("Both", (fw.Callback, mixin), {})


def test_callbacks_compose_and_keep_state_by_name():
    """A composite of composites is flat, and two callbacks of one class keep their states apart."""
    first, second = fw.EarlyStopping("a"), fw.EarlyStopping("b")
    first.rule.update(1.0)
    second.rule.update(2.0)
    callbacks = fw.Callbacks([fw.Callbacks([first]), second])
    saved = callbacks.state_dict()
    assert list(saved) == ["EarlyStopping", "EarlyStopping#2"]
    fresh = fw.Callbacks([fw.EarlyStopping("a"), fw.EarlyStopping("b")])
    fresh.load_state_dict(saved)
    assert [c.rule.best for c in fresh.callbacks] == [1.0, 2.0]


def test_all_on_fit_end_run_even_if_some_raise():
    """Every on_fit_end runs, last first; the first error is raised, with the others as notes."""
    order = []

    class End(fw.Callback):
        def __init__(self, name, *, fails):
            self.name, self.fails = name, fails

        def on_fit_end(self, state):
            order.append(self.name)
            if self.fails:
                raise ValueError(self.name)

    with pytest.raises(ValueError, match="c") as caught:
        fw.Callbacks([End("a", fails=True), End("b", fails=False), End("c", fails=True)]).on_fit_end(None)
    assert order == ["c", "b", "a"]
    assert any("End.on_fit_end raised ValueError('a')" in note for note in caught.value.__notes__)


@pytest.mark.slow
def test_user_code_type_checks(tmp_path):
    """A user's subclass and callback pass mypy strict against the package's own types, and a wrong one does not."""
    good = """
import torch
import fitwatch as fw


class Mine(fw.Callback):
    def on_step_end(self, state: fw.State) -> None:
        state.log("train/step", float(state.progress.step))


class MyTrainer(fw.Trainer):
    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> fw.LossSum | torch.Tensor:
        return self.compute_loss(self.model(batch[0]), batch[1])


def train(model: torch.nn.Module) -> float:
    trainer = MyTrainer(model, torch.optim.SGD(model.parameters()), callbacks=[Mine(), fw.EarlyStopping(patience=3)], device="cpu")
    result = trainer.fit([(torch.zeros(1), torch.zeros(1))], epochs=1)
    return result.best.metrics["train/loss"] if result.best else 0.0
"""
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "bad.py").write_text(
        good.replace("callbacks=[Mine()", "callbacks=[Mine").replace("epochs=1", "epochs='1'")
    )
    pytest.importorskip("mypy", reason="mypy is in the lint extra")
    for name, code in (("good", 0), ("bad", 1)):
        run = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", f"{name}.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert code == run.returncode, run.stdout


def test_every_public_name_is_imported_when_it_is_used():
    """Importing the package imports no torch; each public name does exist then, and a wrong one is an AttributeError."""
    code = (
        "import sys, fitwatch; assert 'torch' not in sys.modules; assert set(fitwatch.__all__) <= set(dir(fitwatch)); "
        "assert all(hasattr(fitwatch, name) for name in fitwatch.__all__); assert not hasattr(fitwatch, 'nonsense'); "
        "from fitwatch import *; print(Trainer is fitwatch.trainer.Trainer)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


def test_the_rules_need_no_torch():
    """The rules on plain numbers import and judge curves without torch."""
    code = (
        "import sys; from fitwatch.rules import OverfittingRule, Patience, diagnose; "
        "diagnose([1, .5] * 10, [1, .9] * 10); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
