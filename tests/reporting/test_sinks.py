"""What loggers hold after a training is read back from their files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning_runs import Classifier, trainer
from wandb_files import records

from lightning_flatness import FlatnessMonitor, Rule
from lightning_flatness.keys import HEADLINE, KEYS, LOGGER_GROUPS, logger_key
from lightning_flatness.reporting.sinks import sink_of

STEPS = [5, 11]  # of the two validations


def monitor(**options: Any) -> FlatnessMonitor:
    rule = Rule("flatness/trace", above=-1.0, name="always", cooldown=5)
    return FlatnessMonitor(rules=[rule], figure_every_n_validations=1, **options)


def test_tensorboard_opens_with_the_headline(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.custom_scalar import layout_pb2

    watching = monitor()
    run = trainer(tmp_path, watching, logger=TensorBoardLogger(tmp_path, name="", version=""))
    run.fit(Classifier())
    kinds = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    events = accumulator.EventAccumulator(str(tmp_path), kinds).Reload()
    scalars = events.Tags()["scalars"]
    assert sorted(tag for tag in scalars if tag.startswith(("flatness/", "margin/"))) == sorted(HEADLINE)
    assert {tag.split("/")[0] for tag in scalars if "/" in tag} == {"flatness", "margin", "monitor", *LOGGER_GROUPS}
    marks = [tag for tag in scalars if "alert" in tag]
    assert marks == [f"monitor/alerts/{alert.key}" for alert in watching.alerts[:1]]
    series = dict(zip(STEPS, watching.history.values[watching.alerts[0].key], strict=True))
    assert all(each.value == pytest.approx(series[each.step], rel=1e-6) for each in events.Scalars(marks[0]))
    for key, series in watching.history.values.items():
        shown = {each.step: each.value for each in events.Scalars(logger_key(key) if "/" in key else key)}
        expected = {step: value for step, value in zip(STEPS, series, strict=True) if value == value}
        assert shown == pytest.approx(expected, rel=1e-6)

    for name in ("per_sample/margin", "per_sample/log10_relative_flatness"):
        assert [(each.step, each.histogram_value.num) for each in events.Histograms(name)] == [(s, 10) for s in STEPS]
    mean = events.Histograms("per_sample/margin")[-1].histogram_value.sum / 10
    assert mean == pytest.approx(watching.history.values["margin/mean"][-1], rel=1e-9)
    assert [each.step for each in events.Images("monitor/dashboard")] == STEPS
    assert (events.Images("monitor/dashboard")[0].width, events.Images("monitor/dashboard")[0].height) == (1000, 660)

    def text(tag: str) -> list[tuple[int, str]]:
        tensors = events.Tensors(f"{tag}/text_summary")
        return [(each.step, each.tensor_proto.string_val[0].decode()) for each in tensors]

    ((step, table),) = text("monitor/alerts")
    assert step == STEPS[0]
    assert "| step | epoch | rule | what happened | action |" in table
    assert "always" in table
    (_, configuration), *_ = text("monitor/configuration")
    assert "| layer | net.conv2 |" in configuration
    assert "| loss | logged by validation_step as val_loss |" in configuration

    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart for chart in layout.category[0].chart}
    (fan,) = charts["margins: median and quartiles"].margin.series
    assert (fan.value, fan.lower, fan.upper) == tuple(f"margin_quantiles/{q}" for q in ("q50", "q25", "q75"))
    tags = {tag for chart in charts.values() for tag in chart.multiline.tag}
    assert tags <= set(scalars)


def test_wandb_has_everything(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # of an earlier test, with another working directory
    watching = monitor()
    trainer(tmp_path, watching, logger=WandbLogger(offline=True, save_dir=tmp_path)).fit(Classifier())
    wandb.finish()
    wandb.teardown()  # its process has written the file only when it has ended
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    held = list(records(path))
    history: dict[str, list[Any]] = {}
    for record in held:
        if record.HasField("history"):
            for item in record.history.item:
                path_to = item.key or ".".join(item.nested_key)
                history.setdefault(path_to, []).append(json.loads(item.value_json))
    for key, series in watching.history.values.items():
        shown = [value for value in history[logger_key(key) if "/" in key else key] if value != "NaN"]
        assert shown == pytest.approx([value for value in series if value == value], rel=1e-12)
    assert history["flatness/alert"] == [1, 0]
    assert history["per_sample/margin._type"] == ["histogram"] * 2
    assert sum(history["per_sample/margin.values"][0]) == 10
    assert history["monitor/dashboard._type"] == ["image-file"] * 2
    for name in history["monitor/dashboard.path"]:
        assert (path.parent / "files" / name).read_bytes().startswith(b"\x89PNG")
    assert history["monitor/alerts._type"] == ["table-file"]
    (table,) = path.parent.rglob("alerts*.table.json")
    assert json.loads(table.read_text())["data"][0][2] == "always"
    (alert,) = [record.alert for record in held if record.HasField("alert")]
    assert (alert.title, alert.level) == (f"flatness/trace at step {STEPS[0]}", "WARN")
    defined = {each.metric.name: each.metric.summary for each in held if each.HasField("metric")}
    for key in KEYS:
        summary = defined[logger_key(key)]
        assert (summary.min, summary.max, summary.last) == (True, True, True)
    summaries = {
        tuple(item.nested_key) or (item.key,): json.loads(item.value_json)
        for record in held
        if record.HasField("summary")
        for item in record.summary.update
    }
    relative = history["flatness/relative"]
    found = summaries.get(("flatness/relative",)) or {
        kind: summaries["flatness/relative", kind] for kind in ("min", "max", "last")
    }
    assert found == {"min": min(relative), "max": max(relative), "last": relative[-1]}
    configured: dict[str, Any] = {}
    for record in held:
        if record.HasField("config"):
            configured |= {
                (each.key or each.nested_key[0]): json.loads(each.value_json) for each in record.config.update
            }
    assert configured["flatness/layer"] == configured["flatness_monitor"]["layer"] == "net.conv2"
    assert configured["flatness_monitor"]["method"] == "pooled"
    assert "val_loss" in configured["flatness_monitor"]["loss"]
    assert (path.parent / "files" / "alerts.jsonl").exists()


def test_mlflow_has_everything(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    for package in ("sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"a local store of MLflow needs {package}")
    address, watching = f"sqlite:///{tmp_path}/runs.db", monitor()
    logger = MLFlowLogger(tracking_uri=address, artifact_location=str(tmp_path / "artifacts"))
    trainer(tmp_path, watching, logger=logger).fit(Classifier())
    client = mlflow.tracking.MlflowClient(address)
    run = client.get_run(logger.run_id)
    assert run.data.params["flatness/layer"] == "net.conv2"
    told = {name: value for name, value in run.data.tags.items() if name.startswith("flatness")}
    (alert,) = watching.alerts
    assert told == {
        "flatness_monitor/layer": "net.conv2",
        "flatness_monitor/method": "pooled",
        "flatness_monitor/loss": "logged by validation_step as val_loss",
        f"flatness_alert/step_{STEPS[0]}": f"always: {alert.reason}",
    }
    for key, series in watching.history.values.items():
        shown = client.get_metric_history(logger.run_id, logger_key(key) if "/" in key else key)
        expected = {step: value for step, value in zip(STEPS, series, strict=True) if value == value}
        assert {each.step: each.value for each in shown} == pytest.approx(expected, rel=1e-12)
    (picture,) = (tmp_path / "artifacts").rglob("dashboard.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line)["rule"] for line in (tmp_path / "alerts.jsonl").read_text().splitlines()] == ["always"]


def test_csv_has_everything(tmp_path: Path) -> None:
    watching = monitor()
    trainer(tmp_path, watching, logger=CSVLogger(tmp_path, name="", version="")).fit(Classifier())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for key, series in watching.history.values.items():
        name = logger_key(key) if "/" in key else key
        shown = {int(row["step"]): float(row[name]) for row in rows if row[name] not in ("", "nan")}
        expected = {step: value for step, value in zip(STEPS, series, strict=True) if value == value}
        assert shown == expected
    assert load_hparams_from_yaml(str(tmp_path / "hparams.yaml")) == {"flatness/layer": "net.conv2"}
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == watching.alerts[0].reason


def test_mlflow_is_known_by_its_methods() -> None:
    calls: list[tuple[Any, ...]] = []
    experiment = SimpleNamespace(set_tag=lambda *args: calls.append(args), log_image=lambda *args: calls.append(args))
    sink = sink_of(SimpleNamespace(experiment=experiment, run_id="7"))
    sink.describe("/train", {"not measured": "x" * 6000}, 3)
    sink.figure("/train", np.zeros((1, 1, 3), np.uint8), 3)
    assert [(call[0], call[1]) for call in calls] == [("7", "flatness_monitor/train/not_measured"), ("7", calls[1][1])]
    assert len(calls[0][2]) == 4999
    assert calls[1][2] == "dashboard-train.png"
    assert sink_of(SimpleNamespace(experiment=None)) is None
