"""The progress bar, on a terminal and without one."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap

CODE = textwrap.dedent(
    """
    import logging, torch, fitwatch as fw
    class Speaks(fw.Callback):
        def on_epoch_end(self, state):
            logging.getLogger("mine").warning("a message")
    model = torch.nn.Linear(2, 2)
    batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))] * 20
    trainer = fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.ProgressBar(), Speaks()],
        log_every=5, accumulate=2, device="cpu", quiet=QUIET
    )
    trainer.fit(batches, [(x.clone(), y.clone()) for x, y in batches], epochs=2)
    """
)


def on_a_terminal(code):
    """Run Python code on a terminal of 120 columns, and return what it shows."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a terminal of no width shows nothing
    with subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child) as process:
        os.close(child)
        text = b""
        while True:
            try:
                block = os.read(parent, 4096)
            except OSError:  # how Linux ends a terminal whose other side is closed
                break
            if not block:
                break
            text += block
        assert process.wait() == 0
    return text.decode()


def test_on_a_terminal_it_shows_epochs_steps_and_losses():
    """The bar counts the optimizer steps of the whole fit, and names the epoch and the losses."""
    shown = on_a_terminal(f"QUIET = True{CODE}")
    assert "epoch 1/2:  50%" in shown
    assert "epoch 2/2: 100%" in shown
    assert "20/20" in shown
    assert "val=" in shown


def test_messages_do_not_break_the_bar():
    """A message stands alone on its line, above the bar; the result comes after it."""
    lines = [line.strip() for line in on_a_terminal(f"QUIET = False{CODE}").replace("\r", "\n").split("\n")]
    assert lines.count("a message") == 2
    assert not any("a message" in line and line != "a message" for line in lines)
    bar = max(i for i, line in enumerate(lines) if line.startswith("epoch 2/2"))
    assert next(line for line in lines[bar + 1 :] if line).startswith("ended:")


def test_it_is_silent_without_a_terminal():
    """Nothing is written if standard error is a pipe, but messages and, unless quiet, the result."""
    run = subprocess.run([sys.executable, "-c", f"QUIET = True{CODE}"], capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"", b"a message\n" * 2)
    run = subprocess.run([sys.executable, "-c", f"QUIET = False{CODE}"], capture_output=True, check=True, text=True)
    assert run.stdout == ""
    names = [line.split(":")[0] for line in run.stderr.splitlines() if line != "a message"]
    assert names == ["ended", "best epoch", "weights"]
