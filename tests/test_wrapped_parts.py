"""Compiled and wrapped parts of a model: names and files as if nothing were wrapped."""

import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import fitwatch as fw
from fitwatch import saving
from fitwatch.helpers import health, modules

# Torch's compiler looks at the gradient of its input, which in the middle of a model is not a leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


class Net(nn.Module):
    """A user's names may be those of the wrappers."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.module = nn.Sequential(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.module(self.enc(x)))


def compiled(module):
    return torch.compile(module, backend="eager")


def whole(net):
    return compiled(net)


def part(net):
    net.enc = compiled(net.enc)
    return net


def nested(net):
    net.enc[0] = DataParallel(compiled(net.enc[0]))
    net.enc, net.module = DataParallel(net.enc), compiled(net.module)
    return DataParallel(net)


def in_place(net):
    net.compile(backend="eager")
    return net


def plain(net):
    return net


WAYS = [whole, part, nested, in_place, plain]


def fit(folder, data, wrap, epochs, resume=None):
    torch.manual_seed(0)
    model = wrap(Net().double())
    callbacks = [fw.GradientNorm(), fw.EarlyStopping("val/loss"), fw.Checkpoint(folder)]
    trainer = fw.Trainer(
        model, torch.optim.Adam(model.parameters(), 0.05), callbacks=callbacks, device="cpu", log_every=2
    )
    x, y = data.tensors
    trainer.fit([(x[::2], y[::2])] * 4, [(x, y)], epochs=epochs, resume=resume)
    return trainer


@pytest.mark.parametrize("wrap", WAYS)
def test_files_and_reports_have_the_plain_names(tmp_path, data, wrap):
    """The names in best.pt, in the best weights, in the groups and in the curves of layers are those of the plain model."""
    names = list(Net().state_dict())
    logged = set()

    class See(fw.Callback):
        def on_log(self, state):
            logged.update(record.name for record in state.records)

    trainer = fit(tmp_path, data, wrap, 2)
    for file in tmp_path.iterdir():
        content = saving.read(file)
        assert list(content["model"]) == names
        assert list(content["callbacks"]["EarlyStopping"]["best"]) == names
        assert content["groups"] == [[name for name, _ in Net().named_parameters()]]
        Net().load_state_dict(content["model"])
        assert content["model"]._metadata["enc.1"] == {"version": 2}
    callbacks = [fw.GradientNorm(), See()]
    fw.Trainer(trainer.model, trainer.optimizer, callbacks=callbacks, device="cpu").fit([data.tensors], epochs=1)
    layers = {m[1] for name in logged if (m := re.fullmatch("train/params/grad_norm/(.*)", name))}
    assert layers == {"enc.0", "enc.1", "module.0", "head"}


@pytest.mark.parametrize("before", WAYS)
@pytest.mark.parametrize("after", [plain, part, nested])
def test_a_fit_goes_on_with_other_wrappers(tmp_path, data, before, after):
    """A fit resumed with other wrappers, or none, has the weights of one in one go, and restores the same best weights."""
    expected = fit(tmp_path / "a", data, plain, 4)
    fit(tmp_path / "b", data, before, 2)
    trainer = fit(tmp_path / "b", data, after, 4, "auto")
    assert trainer.state.history[-1] == pytest.approx(expected.state.history[-1], rel=1e-9)
    for a, b in zip(expected.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


def test_a_file_with_the_names_of_wrappers_still_loads(tmp_path, data):
    """A file from before, with the names of the wrappers in it, resumes into the model that is wrapped like this."""
    fit(tmp_path, data, part, 1)
    path = tmp_path / "epoch-1.pt"
    content = saving.read(path)
    model = part(Net().double())
    content["model"] = dict(zip(model.state_dict(), content["model"].values(), strict=True))
    assert "enc._orig_mod.0.weight" in content["model"]
    saving.write(path, content)
    fit(tmp_path, data, part, 2, "auto")


def test_a_non_finite_weight_is_named_plainly():
    """The report of a NaN names the layer as the user wrote it."""
    model = nested(Net())
    with torch.no_grad():
        modules.unwrap(model).enc.module[0].module._orig_mod.weight[0] = torch.nan
    assert health.not_finite(model) == "enc.0.weight"


def test_a_part_used_twice_has_both_names():
    """A wrapped module in two places keeps both, and an attribute called module is no wrapper."""
    model = nn.ModuleDict({"a": compiled(nn.Linear(2, 2))})
    model["b"] = model["a"]
    model["module"] = nn.ModuleDict({"module": nn.Linear(2, 2)})
    names = ["a.weight", "a.bias", "b.weight", "b.bias", "module.module.weight", "module.module.bias"]
    assert list(modules.weights(model)) == names
    assert [name for name, _ in modules.named_parameters(model)] == [n for n in names if n[0] != "b"]
    modules.load_weights(model, {name: value + 1 for name, value in modules.weights(model).items()})
