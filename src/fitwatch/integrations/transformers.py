"""fitwatch in the `Trainer` of transformers."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import Trainer, TrainerCallback

from fitwatch import Callback, LossSum, Watch

logger = logging.getLogger("fitwatch")

_FILE = "fitwatch.pt"


def attach(trainer: Trainer, callbacks: Iterable[Callback] | Callback = (), **options: Any) -> "Guest":
    """Run fitwatch's callbacks in the trainings of a `transformers.Trainer`.

    ::

        with attach(trainer, [fw.OverfittingDetector(), fw.EarlyStopping()]) as guest:
            trainer.train()
        print(guest.watch.result)

    Without ``with`` it works too, except that after an exception the trainer is not as before.

    Args:
        trainer: The trainer, with its optimizer, loaders and limits.
        callbacks: fitwatch's callbacks, called in this order.
        options: Options of `Guest`: ``loss``, ``resume``, and those of `Watch`.
    """
    guest = Guest(trainer, callbacks, **options)
    trainer.add_callback(guest)
    return guest


class Guest(TrainerCallback):
    """What `attach` returns.

    Args:
        trainer: The trainer.
        callbacks: fitwatch's callbacks.
        loss: A loss of (logits, labels), such as ``fw.CrossEntropy()``: class weights reach it, and it is exact under
            accumulation. None: the model's own loss, whose gradient stays as it is.
        resume: Folder of the checkpoint that training resumes from. Default: the one in ``output_dir`` of this step.
        options: More options of `Watch`, such as ``metrics`` and ``skip_checks``.

    Attributes:
        watch: The watch of the newest training.
    """

    def __init__(
        self,
        trainer: Trainer,
        callbacks: Iterable[Callback] | Callback = (),
        *,
        loss: Any = None,
        resume: str | Path | None = None,
        **options: Any,
    ) -> None:
        _check(trainer, loss)
        self._trainer, self._callbacks, self._loss, self._resume = trainer, callbacks, loss, resume
        self._options = options
        self.watch: Watch | None = None
        self._undo: list[Any] = []  # gives back what was taken over
        self._measures = self._ends = False
        self._own_loss = self._items = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._trainer.remove_callback(self)
        self._close(kind, error, traceback)

    # -- the hooks of transformers -----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Open the watch; take over the loss, clipping and evaluation."""
        trainer, inner = self._trainer, kwargs["optimizer"]
        accumulate = args.gradient_accumulation_steps
        self.watch = Watch(
            trainer.model_wrapped,
            getattr(inner, "optimizer", inner),  # that of torch, which accelerate wraps
            self._callbacks,
            loss=self._sums if self._loss is None else self._loss,
            train_loader=kwargs["train_dataloader"],
            val_loader=_val_loader(trainer),
            accumulate=accumulate,
            divided=True,
            clip_norm=args.max_grad_norm or None,
            log_every=max(int(args.logging_steps), 1),
            validation_step=lambda batch: trainer.compute_loss(trainer.model, dict(batch)),
            **self._options,
        )
        self._exact = self._loss is not None or accumulate > 1 or args.world_size > 1
        if state.global_step:
            self._restore(Path(self._resume or Path(args.output_dir) / f"checkpoint-{state.global_step}") / _FILE)
        self.watch.__enter__()
        self._measures = True
        self._take(args, "max_grad_norm", 0.0)
        self._take(args, "average_tokens_across_devices", False)  # else the loss is multiplied
        self._evaluate = trainer.evaluate
        self._take(trainer, "evaluate", self.evaluate)
        if self._loss is None:
            handle = trainer.model.register_forward_hook(self._after_forward, with_kwargs=True)
            self._undo.append(handle.remove)
        else:
            self._take(trainer, "compute_loss_func", self._compute_loss)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002, D102
        if self.watch is not None:
            self.watch.start_epoch(math.ceil(args.num_train_epochs) or None, epoch=int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002, D102
        if self.watch is not None:
            self.watch.end_step()
            control.should_training_stop |= self.watch.stops

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """End the epoch, after its evaluation, which is still to come."""
        self._ends = bool(control.should_evaluate)
        if self.watch is not None and not self._ends:
            self.watch.end_epoch()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the trainer does, and measure it; of several data sets, the first."""
        watch = self.watch
        several = isinstance(self._trainer.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if watch is None or several or watch.evaluated:
            self._measures = several  # the others are only the trainer's
            metrics = self._evaluate(eval_dataset, *args, **kwargs)
        else:
            with watch.validating():
                metrics = self._evaluate(eval_dataset, *args, **kwargs)
            self._trainer.control.should_training_stop |= watch.stops
            if self._ends:
                self._ends = False
                watch.end_epoch()
        self._measures = True
        return metrics

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Save the state of the callbacks beside the trainer's."""
        if self.watch is not None:
            content = self.watch.state_dict()
            if state.is_world_process_zero:
                torch.save(content, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Close the watch, which may restore the best weights."""
        self._close(None, None, None)

    # -- the sensors -------------------------------------------------------------------------------------------------

    def _compute_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:  # noqa: ARG002
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self.watch is None or not self._measures:
            return self._loss(logits, labels)
        return self.watch.loss(logits, labels)

    def _after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG002
        labels = kwargs.get("labels")
        if self.watch is not None and self._measures and labels is not None and "loss" in output:
            self._own_loss, self._items = output["loss"], kwargs.get("num_items_in_batch")
            output["loss"] = self.watch.loss(output["logits"], labels)
        return output

    def _sums(self, output: Any, target: Any) -> Any:  # noqa: ARG002 - the signature of a loss
        loss: Any = self._own_loss
        if not self._exact or not loss.requires_grad:
            return loss
        weight = (target != -100).sum()  # as the trainer counts num_items_in_batch
        return LossSum(loss * (weight if self._items is None else self._items), weight)

    # -- taking over and giving back -----------------------------------------------------------------------------------

    def _take(self, owner: Any, name: str, value: object) -> None:
        before, own = getattr(owner, name), name in vars(owner)
        setattr(owner, name, value)
        self._undo.append((lambda: setattr(owner, name, before)) if own else (lambda: delattr(owner, name)))

    def _restore(self, path: Path) -> None:
        if self.watch is not None and path.is_file():
            self.watch.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            logger.warning("training resumes, and there is no %s: the history of fitwatch starts here", path)

    def _close(self, *how: Any) -> None:
        undo, self._undo, self._measures = self._undo, [], False
        for give_back in reversed(undo):
            give_back()
        if undo and self.watch is not None:
            self.watch.__exit__(*how)


def _val_loader(trainer: Any) -> Any:
    if str(trainer.args.eval_strategy.value) == "no":
        return None
    several = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else None
    return trainer.get_eval_dataloader() if several is None else trainer.get_eval_dataloader(next(iter(several)))


def _check(trainer: Any, loss: Any) -> None:
    """Refuse what would give wrong figures."""
    args = trainer.args
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("fitwatch does not work under DeepSpeed or FSDP, which split the gradients: use DDP")
    if args.fp16:
        raise ValueError("fitwatch does not work with fp16=True in transformers: use bf16=True")
    if args.n_gpu > 1:
        raise ValueError(f"fitwatch does not work with DataParallel on {args.n_gpu} GPUs: start with torchrun")
    if loss is None and trainer.compute_loss_func is not None:
        raise ValueError("the trainer has a compute_loss_func: pass it to attach as loss=, a function (logits, labels)")
    if loss is None and trainer.label_smoother is not None:
        raise ValueError("label_smoothing_factor: pass loss=fw.CrossEntropy(label_smoothing=...) to attach instead")
