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
    import torch, fitwatch as fw
    model = torch.nn.Linear(2, 2)
    batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))] * 20
    trainer = fw.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), callbacks=[fw.ProgressBar()], log_every=5, accumulate=2, device="cpu"
    )
    trainer.fit(batches, [(x.clone(), y.clone()) for x, y in batches], epochs=2)
    """
)


def test_on_a_terminal_it_shows_epochs_steps_and_losses():
    """Each epoch ends with a full bar of optimizer steps and the losses."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a terminal of no width shows nothing
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=child, stderr=child) as process:
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
    shown = text.decode()
    assert "epoch 1/2: 100%" in shown
    assert "epoch 2/2: 100%" in shown
    assert "10/10" in shown
    assert "val=" in shown


def test_it_is_silent_without_a_terminal():
    """Nothing is written if standard error is a pipe."""
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"", b"")
