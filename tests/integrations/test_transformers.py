"""fitwatch in the Trainer of transformers, against our own Trainer."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fitwatch as fw
from tests.integrations._contract import Problem, same_as_trainer

hf = pytest.importorskip("transformers", reason="transformers is in the extra of this name")
pytest.importorskip("accelerate", reason="transformers trains with accelerate")
from fitwatch.integrations.transformers import attach  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
hf.logging.set_verbosity_error()


class Wrapped(nn.Module):
    """Takes and returns what models of transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels=None):
        logits = self.model(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class Rows(Dataset):
    """The examples as dicts."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {"x": x, "labels": y}


class SameOrder(hf.Trainer):
    """Draws the training batches as the other side does."""

    problem: Problem

    def get_train_dataloader(self):
        loader = self.problem.train_loader
        return DataLoader(self.train_dataset, loader.batch_size, sampler=loader.sampler)


def trainer_of(problem, epochs, folder, kind=SameOrder, **options):
    settings = {
        "num_train_epochs": epochs,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "gradient_accumulation_steps": problem.accumulate,
        "max_grad_norm": problem.clip_norm or 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    args = hf.TrainingArguments(str(folder), **{**settings, **options})
    data = {"train_dataset": Rows(problem.train_set), "eval_dataset": Rows(problem.val_set)}
    trainer = kind(Wrapped(problem.model), args, **data, optimizers=(problem.optimizer, None))
    trainer.problem = problem
    trainer.remove_callback(hf.PrinterCallback)
    return trainer


def in_transformers(folder, loss=None, **options):
    """A function that trains in transformers."""

    def run(problem, epochs):
        trainer = trainer_of(problem, epochs, folder, **options)
        with attach(trainer, problem.callbacks, loss=loss) as guest:
            trainer.train()
        assert trainer.args.max_grad_norm == (problem.clip_norm or 0.0)
        assert trainer.compute_loss_func is None
        assert "evaluate" not in vars(trainer)
        return guest.watch.result

    return run


@pytest.mark.parametrize("accumulate", [1, 4])
def test_transformers_meets_the_contract(tmp_path, accumulate):
    """Norms, losses, costs, verdict, stop and restored weights are those of our Trainer, also under accumulation."""
    run = in_transformers(tmp_path, fw.CrossEntropy())
    same_as_trainer(run, accumulate=accumulate, tolerance=0.0 if accumulate == 1 else 1e-6)


@pytest.mark.parametrize(("accumulate", "tolerance"), [(1, 0.0), (4, 1e-6)])
def test_the_models_own_loss_meets_the_contract(tmp_path, accumulate, tolerance):
    """With the loss that the model computes, the figures are those of our Trainer without class weights."""

    class Plain(Problem):
        loss = staticmethod(nn.functional.cross_entropy)

        def __init__(self, **options):
            super().__init__(**options)
            self.callbacks = [c for c in self.callbacks if not isinstance(c, fw.WeightedLoss)]

    same_as_trainer(in_transformers(tmp_path), accumulate=accumulate, problem=Plain, tolerance=tolerance)


def test_a_resumed_training_meets_the_contract(tmp_path):
    """A training that was interrupted, and resumed from the checkpoint of transformers, gives the figures of a whole one."""

    class Stop(hf.TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.epoch >= 5

    def halves(problem, epochs):
        options = {"save_strategy": "epoch", "save_total_limit": 1}
        first = trainer_of(problem, epochs, tmp_path, **options)
        first.add_callback(Stop())
        with attach(first, problem.callbacks, loss=fw.CrossEntropy()):
            first.train()
        fresh = Problem()
        second = trainer_of(fresh, epochs, tmp_path, **options)
        with attach(second, fresh.callbacks, loss=fw.CrossEntropy()) as guest:
            second.train(resume_from_checkpoint=True)
        problem.model.load_state_dict(fresh.model.state_dict())
        problem.recorder.numbers |= fresh.recorder.numbers
        return guest.watch.result

    same_as_trainer(halves)


def test_an_error_gives_everything_back(tmp_path):
    """After an exception the callbacks have closed, and clipping, loss and evaluation are the trainer's again."""
    problem, seen = Problem(), []

    class Ends(fw.Callback):
        def on_fit_end(self, state):
            seen.append(state.error)

    class Broken(hf.TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            raise ZeroDivisionError("oops")

    trainer = trainer_of(problem, 3, tmp_path)
    trainer.add_callback(Broken())
    with pytest.raises(ZeroDivisionError), attach(trainer, [Ends()], loss=fw.CrossEntropy()):
        trainer.train()
    assert type(seen[0]) is ZeroDivisionError
    assert (trainer.args.max_grad_norm, trainer.compute_loss_func) == (1.0, None)
    assert torch.is_grad_enabled()
    assert "evaluate" not in vars(trainer)


def test_the_first_of_several_data_sets_decides(tmp_path):
    """With several evaluation sets, val/loss is that of the first."""
    problem, same = Problem(), Problem()
    same.callbacks = []
    one = in_transformers(tmp_path)(same, 2)
    trainer = trainer_of(problem, 2, tmp_path)
    trainer.eval_dataset = {"a": Rows(problem.val_set), "b": Rows(problem.train_set)}
    with attach(trainer) as guest:
        trainer.train()
    assert [entry["val/loss"] for entry in guest.watch.result.history] == [e["val/loss"] for e in one.history]


def test_a_language_model_keeps_its_gradient(tmp_path):
    """A small GPT-2 with its own loss is trained to the same weights with and without the guest."""
    tokens = torch.randint(20, (64, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]

    def trained(*, watched):
        torch.manual_seed(0)
        config = hf.GPT2Config(
            vocab_size=20, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = hf.GPT2LMHeadModel(config)
        args = hf.TrainingArguments(
            str(tmp_path), num_train_epochs=2, eval_strategy="epoch", save_strategy="no", max_grad_norm=0.0,
            use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = hf.Trainer(model, args, train_dataset=rows[:48], eval_dataset=rows[48:])
        if watched:
            with attach(trainer, [fw.GradientNorm(), fw.OverfittingDetector()]) as guest:
                trainer.train()
            losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            found = [entry["val/loss"] for entry in guest.watch.result.history]
            assert found == pytest.approx(losses, rel=1e-6)
        else:
            trainer.train()
        return model.state_dict()

    plain, watched = trained(watched=False), trained(watched=True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_what_does_not_work_is_refused(tmp_path):
    """A loss that nobody told the guest of, and fp16, are refused with a sentence."""
    problem = Problem()
    trainer = trainer_of(problem, 1, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs["loss"]
    with pytest.raises(ValueError, match="pass it to attach as loss="):
        attach(trainer)
    trainer = trainer_of(problem, 1, tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="use bf16=True"):
        attach(trainer)
