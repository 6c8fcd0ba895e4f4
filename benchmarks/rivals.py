"""The overfitting verdict beside those of runmedic, runwise and trainproof, which are run as published.

Each sees the curves alone: flat ones with noise, and ones that fall and then rise. A share of curves called overfitting
is printed for each. Their versions are those of the packages that are installed (`make bench-rivals`).

    python benchmarks/rivals.py [--seeds 200]
"""

import argparse
from importlib.metadata import version

import numpy as np
import runmedic.checks
import runmedic.model
import runwise.anomalies
import trainproof.epoch

import fitwatch as fw

EPOCHS = 100


def ours(train, val):
    return fw.diagnose(train, val).overfitting


def by_runmedic(train, val):
    run = runmedic.model.Run("run", source="curves", path="")
    for name, curve in (("train_loss", train), ("val_loss", val)):
        series = run.series[name] = runmedic.model.Series(name)
        for step, loss in enumerate(curve):
            series.add(step, float(loss))
    roles = {"train_loss": ["train_loss"], "val_loss": ["val_loss"]}
    return bool(runmedic.checks.check_overfitting(runmedic.checks.Ctx(run, roles)))


def by_runwise(train, val):
    history = [
        {"step": step, "loss": float(t), "val_loss": float(v)}
        for step, (t, v) in enumerate(zip(train, val, strict=True))
    ]
    return any(found.type == "overfit" for found in runwise.anomalies.detect_anomalies(history))


def by_trainproof(train, val):
    records = [
        {"step": step, "loss": float(t), "eval_loss": float(v)}
        for step, (t, v) in enumerate(zip(train, val, strict=True))
    ]
    return any(found["id"] == "TP-OVERFIT" for found in trainproof.epoch.check_records(records)["findings"])


RULES = {
    "fitwatch": ours,
    **{
        f"{name} {version(name)}": rule
        for name, rule in (("runmedic", by_runmedic), ("runwise", by_runwise), ("trainproof", by_trainproof))
    },
}


def flat(level, draw):
    return 0.7 * (1 + level * draw.standard_normal(EPOCHS))


def rising(share, draw):
    """Falls until epoch 40, then rises by ``share`` until the end, with noise of a tenth of the rise."""
    epochs = np.arange(EPOCHS)
    trend = 0.5 + 0.5 * np.maximum(0, 1 - epochs / 40) ** 3 + 0.5 * share * np.clip((epochs - 40) / 59, 0, 1)
    return trend + 0.05 * share * draw.standard_normal(EPOCHS)


CURVES = [
    *((f"flat, noise {level:.0%}", flat, level) for level in (0.01, 0.05, 0.1)),
    *((f"rise of {share:.0%}", rising, share) for share in (0.05, 0.1, 0.3)),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    seeds = parser.parse_args().seeds
    train = 0.3 + 0.5 * np.exp(-np.arange(EPOCHS) / 20)
    print("| rule | " + " | ".join(title for title, *_ in CURVES) + " |")
    print("|---" * (len(CURVES) + 1) + "|")
    for name, rule in RULES.items():
        shares = []
        for _, make, size in CURVES:
            found = sum(rule(train, make(size, np.random.default_rng(700_000 + seed))) for seed in range(seeds))
            shares.append(f"{found / seeds:.0%}")
        print(f"| {name} | " + " | ".join(shares) + " |", flush=True)


if __name__ == "__main__":
    main()
