"""fitwatch in Lightning, under both of its import names."""

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fitwatch import Callback, TensorBoard, Watch

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_installed = [name for name in _NAMES if find_spec(name.partition(".")[0]) is not None]
# The name that is in use; either works with the other's trainer. Without any, the error names the first.
_host: Any = import_module(min(_installed or _NAMES, key=lambda name: name not in sys.modules))


class FitwatchCallback(_host.Callback):
    """Runs fitwatch's callbacks in a Lightning training: `Trainer(callbacks=[FitwatchCallback([...])])`.

    The module computes its loss by one attribute, in ``training_step`` and in ``validation_step``::

        def __init__(self):
            self.loss = fw.CrossEntropy()

        def training_step(self, batch, index):
            input, target = batch
            return self.loss(self(input), target)

    While `Trainer.fit` runs, this attribute measures. Class weights, exact gradients under accumulation and ranks,
    gradient norms, the verdict and stops are those of `fitwatch.Trainer`. Clipping by norm is done by the watch, since
    it comes after the gradient is exact. A `TensorBoard` whose ``dir`` is the default writes to Lightning's log folder.
    Lightning's checkpoints hold the state of the callbacks.

    Args:
        callbacks: fitwatch's callbacks, called in this order.
        loss: Name of the attribute.
        options: More options of `Watch`, such as ``metrics``, ``skip_checks``, and ``validation_step`` for batches
            other than ``(input, target)``.

    Attributes:
        watch: The watch of the newest fit; ``watch.result`` has the best evaluation and the verdict.
    """

    def __init__(self, callbacks: Iterable[Callback] | Callback = (), *, loss: str = "loss", **options: Any) -> None:
        self._callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        self._name, self._options = loss, options
        self.watch: Watch | None = None
        self._restored: dict[str, Any] | None = None
        self._open = self._measures = self._stepping = False
        self._pass: Any = None  # the running validation

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the watch."""
        _check(trainer, pl_module, self._name)
        self._given = getattr(pl_module, self._name)
        self._hidden = self._name in vars(pl_module)
        self._clip = trainer.gradient_clip_val
        by_norm = trainer.gradient_clip_algorithm in (None, "norm")
        for callback in self._callbacks:
            if isinstance(callback, TensorBoard) and callback.dir == Path("runs") and trainer.log_dir:
                callback.dir = Path(trainer.log_dir)
        loaders = trainer.val_dataloaders
        before = self.watch.state if self.watch is not None and self._restored is None else None
        self.watch = Watch(
            trainer.model,
            trainer.optimizers[0],
            self._callbacks,
            loss=self._given,
            train_loader=trainer.train_dataloader,
            val_loader=loaders[0] if isinstance(loaders, list) and loaders else loaders or None,
            accumulate=trainer.accumulate_grad_batches,
            divided=True,
            clip_norm=(self._clip or None) if by_norm else None,
            log_every=max(trainer.log_every_n_steps, 1),
            progress=None if before is None else before.progress,
            history=None if before is None else before.history,
            **self._options,
        )
        if self._restored is not None:
            self.watch.load_state_dict(self._restored)
            self._restored = None
        self.watch.__enter__()
        self._open = True
        if by_norm:
            trainer.gradient_clip_val = None
        vars(pl_module)[self._name] = self._loss  # before a submodule of this name, which stays in its state_dict

    def _loss(self, output: Any, target: Any, *weight: Any) -> Any:
        if self._measures and self.watch is not None:
            return self.watch.loss(output, target, *weight)
        return self._given(output, target, *weight)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Start the epoch with its first batch: Lightning may resume within an epoch, or at its end."""
        if not self._measures and self.watch is not None:
            epochs = trainer.max_epochs
            self.watch.start_epoch(epochs if epochs and epochs > 0 else None, epoch=trainer.current_epoch)
            self._measures = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002
        """Make the gradients exact and clip them."""
        if self.watch is not None:
            self.watch.before_step()
            self._stepping = True

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """End the step, if this was its last batch."""
        if self._stepping and self.watch is not None:
            self._stepping = False
            self.watch.end_step()
            trainer.should_stop |= self.watch.stops

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Start an evaluation, except in the sanity check, and where Lightning resumes at the end of an epoch."""
        if self._measures and self.watch is not None:
            self._pass = self.watch.validating()
            self._pass.__enter__()

    def on_validation_batch_start(
        self,
        trainer: Any,  # noqa: ARG002
        pl_module: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the first of several loaders only."""
        self._measures = self._pass is not None and dataloader_idx == 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """End the evaluation: the callbacks decide."""
        if self._pass is not None and self.watch is not None:
            running, self._pass, self._measures = self._pass, None, True
            running.__exit__(None, None, None)
            trainer.should_stop |= self.watch.stops

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002, D102
        if self._measures and self.watch is not None:
            self._measures = False
            self.watch.end_epoch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the watch, which may restore the best weights."""
        self._close(trainer, pl_module, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the watch after an error."""
        self._close(trainer, pl_module, exception)

    def _close(self, trainer: Any, pl_module: Any, error: BaseException | None) -> None:
        if not self._open or self.watch is None:
            return
        self._open = self._measures = self._stepping = False
        trainer.gradient_clip_val = self._clip
        del vars(pl_module)[self._name]
        if self._hidden:
            setattr(pl_module, self._name, self._given)
        running, self._pass = self._pass, None
        how = (None, None, None) if error is None else (type(error), error, error.__traceback__)
        grad = torch.is_grad_enabled()
        if running is not None:
            running.__exit__(*how)
        torch.set_grad_enabled(grad)  # the validation of Lightning, in which ours began, has ended already
        self.watch.__exit__(*how)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the watch, for Lightning's checkpoints."""
        return self.watch.state_dict() if self.watch is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the next fit."""
        self._restored = state_dict or None


def _check(trainer: Any, module: Any, name: str) -> None:
    """Refuse what would give wrong figures."""
    strategy, precision = type(trainer.strategy).__name__, str(trainer.precision)
    if any(word in strategy for word in ("DeepSpeed", "FSDP", "ModelParallel")):
        raise ValueError(f"FitwatchCallback does not work under {strategy}: it splits the gradients. Use DDP")
    if precision.startswith("16"):
        raise ValueError(f"FitwatchCallback does not work with precision={precision!r}: use 'bf16-mixed' or '32-true'")
    if len(trainer.optimizers) != 1:
        raise ValueError(f"FitwatchCallback watches one optimizer, and this module has {len(trainer.optimizers)}")
    if not callable(getattr(module, name, None)):
        raise TypeError(
            f"{type(module).__name__}.{name} is not a loss: set self.{name} = fw.CrossEntropy(), or another function "
            "of (output, target), and call it in training_step and validation_step; or name it: "
            "FitwatchCallback(loss=...)"
        )
