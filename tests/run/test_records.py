"""util/run/run_log.py: what a run tells TensorBoard about itself, read back from the event file."""

import sys
from argparse import Namespace

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from util.run.run_log import log_run, make_log_writer, run_text

ARGS = Namespace(lr=1e-3, epochs=3, norm_pix_loss=True, model="mae|tiny", mean=(0.5, 0.25), clip_grad=None,
                 start_epoch=0, rank=0, gpu=0)  # fmt: skip
METRICS = ("train_loss", "val_loss")
SETTINGS = {"lr": 1e-3, "epochs": 3.0, "norm_pix_loss": True, "model": "mae|tiny", "mean": "(0.5, 0.25)",
            "clip_grad": "None", "start_epoch": 0.0}  # fmt: skip


def read(folder):
    (file,) = folder.iterdir()  # no folder of another run, no second file
    assert file.name.startswith("events.out.tfevents")
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def texts(events):
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors("run/text_summary")
    ]


def hparams(events):
    """(settings, names of the metrics) that TensorBoard's plugin finds in the event file."""
    content = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    values = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in start.session_start_info.hparams.items()
    }
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {info.name for info in experiment.hparam_infos} == set(values)
    return values, tuple(info.name.tag for info in experiment.metric_infos)


def test_text_and_hyper_parameters_in_the_run_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/main_pretrain.py", "--data_path", "my pictures"])
    writer = make_log_writer(tmp_path)
    log_run(writer, ARGS, "data: 12 images", "model: a|b", metrics=METRICS)
    writer.add_scalar("train_loss", 0.5, 10)
    writer.close()
    assert capsys.readouterr().out == "data: 12 images\nmodel: a|b\n"
    events = read(tmp_path)
    ((step, text),) = texts(events)
    assert step == 0
    assert text.splitlines() == [
        "    main_pretrain.py --data_path 'my pictures'", "", r"- data: 12 images", r"- model: a\|b", "",
        "| setting | value |", "| --- | --- |", "| clip_grad | None |", "| epochs | 3 |", "| lr | 0.001 |",
        "| mean | (0.5, 0.25) |", r"| model | mae\|tiny |", "| norm_pix_loss | True |", "| start_epoch | 0 |",
    ]  # fmt: skip
    assert hparams(events) == (SETTINGS, METRICS)
    assert [event.value for event in events.Scalars("train_loss")] == [0.5]


def test_resumed_run_writes_again_where_it_goes_on(tmp_path, monkeypatch):
    # Files are read in the order of their names, which end in the second and a number: 10 comes before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for start_epoch in (0, 2):
        writer = make_log_writer(tmp_path, purge_step=1000 * start_epoch if start_epoch else None)
        log_run(
            writer, Namespace(**{**vars(ARGS), "start_epoch": start_epoch}), "model: tiny", metrics=METRICS
        )
        writer.add_scalar("train_loss", 0.5, 1000 * start_epoch + 10)
        writer.add_scalar("train_loss", 0.4, 1000 * start_epoch + 2500)
        writer.close()
    assert all(path.is_file() for path in tmp_path.iterdir())
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [step for step, _ in texts(events)] == [0, 2000]
    assert [event.step for event in events.Scalars("train_loss")] == [10, 2010, 4500]  # 2500 was purged
    assert hparams(events)[0].keys() == SETTINGS.keys()


def test_without_a_writer_the_facts_are_printed(capsys):
    log_run(None, ARGS, "data: 12 images")
    assert capsys.readouterr().out == "data: 12 images\n"


def test_full_disk_ends_the_curves_only(tmp_path, capsys):
    writer = make_log_writer(tmp_path)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    writer.writer.file_writer.add_summary = disk_full
    log_run(writer, ARGS, "model: tiny", metrics=METRICS)
    writer.add_scalar("train_loss", 0.5, 10)
    writer.flush()
    writer.close()
    out, err = capsys.readouterr()
    assert out == "model: tiny\n"
    assert err.count("no more TensorBoard curves: No space left on device") == 1


def test_text_keeps_its_table_together(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    text = run_text({"a": "two\nlines", "b": "back\\slash"}, [])
    assert text.splitlines()[-2:] == ["| a | two lines |", r"| b | back\\slash |"]


def test_a3_c7_any_setting_and_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--data_path", "caf\udce9\n\x1b[2J|"])
    folder = tmp_path / "caf\udce9"
    writer = make_log_writer(folder)
    log_run(writer, Namespace(data_path="caf\udce9\n\x1b[2J|"), "data: 猫\r\ud800", metrics=METRICS)
    writer.close()
    (file,) = folder.iterdir()
    file.rename(tmp_path / file.name)
    events = EventAccumulator(str(tmp_path / file.name), size_guidance={"tensors": 0}).Reload()
    ((_, text),) = texts(events)
    assert text.splitlines() == [
        r"    main.py --data_path 'caf\xe9\n\x1b[2J|'", "", r"- data: 猫\r\ud800", "",
        "| setting | value |", "| --- | --- |", r"| data_path | caf\xe9 \x1b[2J\| |",
    ]  # fmt: skip
    assert hparams(events)[0] == {"data_path": r"caf\xe9\n\x1b[2J|"}
