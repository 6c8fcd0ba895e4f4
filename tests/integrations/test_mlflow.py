"""fitwatch's records in MLflow, read again with its own client."""

import pytest

import fitwatch as fw
from tests.test_summary import Late, fit

mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is in the extra mlflow")
pytest.importorskip("sqlalchemy", reason="a store on this machine needs SQLAlchemy: pip install mlflow")
from fitwatch.integrations.mlflow import MLflowLog  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_run_has_curves_settings_events_and_the_summary(tmp_path, monkeypatch):
    """Numbers, settings, the stop, the report and the confusion matrix come back; an infinite value is told, not altered."""
    monkeypatch.chdir(tmp_path)
    log = MLflowLog(name="mine", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    _, result, _ = fit(log, Late(), fw.EarlyStopping(patience=3))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(log.run_id)
    points = client.get_metric_history(log.run_id, "val/loss")
    assert [(p.step, p.value) for p in points] == [(e["step"], e["val/loss"]) for e in result.history]
    assert run.data.params["late"] == "set"
    assert run.data.metrics["best/val/loss"] == result.best.metrics["val/loss"]
    assert run.info.status == "FINISHED"
    assert result.stop_reason.partition(": ")[2] in run.data.tags["early stop"]
    assert run.data.tags["infinite train/odd"] == "inf at step 3"
    assert {p.value for p in client.get_metric_history(log.run_id, "train/odd")} == {1.0}
    files = {f.path for folder in ("best", "report") for f in client.list_artifacts(log.run_id, folder)}
    assert {path.rpartition("-")[0] for path in files} >= {"best/confusion", "report/end"}


def test_a_resumed_fit_continues_its_run(tmp_path, monkeypatch):
    """The run of the checkpoint goes on, and ends as finished."""
    monkeypatch.chdir(tmp_path)

    def parts():
        return (MLflowLog(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"), fw.Checkpoint(tmp_path / "saved"))

    first, saver = parts()
    fit(first, saver, epochs=2)
    second, saver = parts()
    fit(second, saver, epochs=4, resume="auto")
    assert second.run_id == first.run_id
    points = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(first.run_id, "val/loss")
    assert [point.step for point in points] == [3, 6, 9, 12]


def test_names_that_mlflow_refuses_and_many_values(tmp_path, monkeypatch, caplog):
    """Refused names are changed with one warning, and more values than a request may hold are all written."""
    monkeypatch.chdir(tmp_path)
    many = {f"layer/{i}": float(i) for i in range(1100)}

    class Odd(fw.Callback):
        def on_fit_start(self, state):
            state.settings.update({f"option [{i}]": i for i in range(120)})

        def on_epoch_end(self, state):
            for name, value in {"val/f1@0.5": 0.25, "n" * 300: 1.0, "größe": 2.0, **many}.items():
                state.log(name, value)

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log = MLflowLog(tracking_uri=uri)
    fit(log, Odd(), epochs=2)
    data = mlflow.MlflowClient(uri).get_run(log.run_id).data
    wanted = {"val/f1_0.5": 0.25, "n" * 250: 1.0, "größe": 2.0, **many}
    assert {name: data.metrics[name] for name in wanted} == wanted
    assert data.params["option _119_"] == "119"
    assert caplog.text.count("MLflow refuses the name val/f1@0.5: it stands there as val/f1_0.5") == 1
