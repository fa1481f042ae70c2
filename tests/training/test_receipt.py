"""The receipt counts what was done, once, over all sessions of a run."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric

from brainfm.batch import Batch
from brainfm.data.store import Store
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.specs import PreprocessSpec, Provenance
from brainfm.training import receipt
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.pretrain import pretrain
from brainfm.training.receipt import Meter
from tests.training.test_pretrain import config

CPU = torch.device("cpu")
SHORT = ("trainer.max_steps=6", "trainer.checkpoint_every=2", "trainer.evaluate_every=0", "probe.every=3")


def batch(count: int, **fields: torch.Tensor) -> Batch:
    return Batch(image=torch.zeros(count, 1, 4, 5, 6), sample=torch.arange(count), **fields)


def test_patches_are_counted_as_often_as_they_were_read() -> None:
    meter = Meter(CPU, {})
    meter.saw(batch(3))
    meter.saw(batch(2, partner=torch.zeros(2, 1, 4, 5, 6), paired=torch.tensor([True, False])))
    present = torch.tensor([[True, False, True], [False, True, False]])
    meter.saw(Batch(image=torch.zeros(2, 3, 4, 5, 6), sample=torch.arange(2), present=present))
    found = meter.read(Fabric(accelerator="cpu", devices=1))
    assert (found["samples"], found["patches"], found["voxels"]) == (7, 3 + 3 + 3, 9 * 120)
    assert found["gpu_hours"] == 0 and found["gpu_energy_kwh"] is None and found["peak_gpu_memory_gib"] == 0
    assert found["device"] == "cpu" and found["torch"] == torch.__version__ and found["processes"] == 1
    assert json.loads(json.dumps(found)) == found


def test_sessions_add_up_and_peaks_do_not() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    before = {
        "samples": 100, "patches": 200, "voxels": 24_000, "cpu_hours": 3.0, "wall_hours": 2.0, "probe_hours": 0.5,
        "gpu_hours": 2.0, "gpu_energy_kwh": 1.5, "peak_memory_gib": 1e6, "peak_gpu_memory_gib": 0.25, "sessions": 4,
    }  # fmt: skip
    meter = Meter(CPU, before)
    meter.saw(batch(3))
    with meter.probing():
        time.sleep(0.02)
    for found in (meter.read(fabric), meter.read(fabric)):  # reading counts nothing twice
        assert (found["samples"], found["patches"], found["voxels"], found["sessions"]) == (103, 203, 24_360, 5)
        assert found["wall_hours"] > 2 and 0.5 + 0.02 / 3600 <= found["probe_hours"] + 1e-6 < 0.51
        assert found["peak_memory_gib"] == 1e6 and found["peak_gpu_memory_gib"] == 0.25 and found["gpu_hours"] == 2
        assert found["gpu_energy_kwh"] is None  # this session's is not known, so neither is the whole


def _burn(seconds: float, done) -> None:  # a fresh process's clock begins at 0
    while time.process_time() < seconds:
        pass
    done.set()
    time.sleep(30)


def test_processor_time_includes_workers_that_still_run() -> None:
    context = multiprocessing.get_context("fork")
    done = context.Event()
    began = receipt.cpu_seconds()
    worker = context.Process(target=_burn, args=(0.4, done), daemon=True)
    worker.start()
    assert done.wait(60)
    own = time.process_time()
    running = receipt.cpu_seconds() - began
    worker.kill()
    worker.join()
    ended = receipt.cpu_seconds() - began
    if not os.path.exists("/proc"):
        pytest.skip("no /proc")
    assert running >= 0.35
    assert ended == pytest.approx(running, abs=0.1 + time.process_time() - own)  # counted once, running or ended


def test_peak_memory_is_of_this_process_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = receipt.peak_memory_bytes()
    block = torch.ones(2**29, dtype=torch.uint8)  # the peak so far may have been higher than what is held now
    found = receipt.peak_memory_bytes()
    assert len(block) < found < 2**40 and before <= found <= before + 1.2 * len(block)
    monkeypatch.setattr(Path, "read_text", lambda path: "nothing of the kind")
    assert receipt.peak_memory_bytes() == pytest.approx(found, rel=0.5)  # what getrusage says


def test_energy_is_what_nvml_counts_and_nothing_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    asked: list[str] = []
    millijoules = iter([5_000, 6_000, 3_606_000])

    def handle(uuid: str) -> str:
        asked.append(uuid)
        return "handle"

    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda device: next(millijoules),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
    counter = receipt.energy_counter(cuda)
    assert counter is not None and asked == ["GPU-ab-cd"]
    assert [counter(), counter()] == [6.0, 3606.0]
    assert receipt.energy_counter(CPU) is None

    def refuse(uuid: str) -> str:
        raise RuntimeError("a slice of a GPU")

    fake.nvmlDeviceGetHandleByUUID = refuse
    assert receipt.energy_counter(cuda) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert receipt.energy_counter(cuda) is None


def test_interrupted_run_has_one_receipt_in_its_backbone_file(
    toy_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("brainfm.training.pretrain.OnlineProbe.__call__", stop)
        pretrain(config(toy_store, run, *SHORT))
    first = json.loads(read_checkpoint(run / CHECKPOINT)["state"])["receipt"]
    assert first["samples"] == 4 and first["sessions"] == 1  # two steps of two; the third was not saved
    pretrain(config(toy_store, run, *SHORT))
    found = json.loads((run / "receipt.json").read_text())
    assert found == load_backbone(run / "backbone.safetensors").provenance.receipt
    assert found["samples"] == 12 and found["sessions"] == 2 and 12 < found["patches"] <= 24
    assert found["voxels"] == found["patches"] * 16**3
    assert found["wall_hours"] > first["wall_hours"] > 0 and 0 < found["probe_hours"] < found["wall_hours"]
    assert found["cpu_hours"] > first["cpu_hours"] > 0
    line = receipt.describe(found)
    assert line in capsys.readouterr().err and line.startswith(f"cost: 12 samples ({found['patches']} patches, ")
    assert "in 2 sessions" in line and "GPU" not in line
    on_gpu = receipt.describe(found | {"gpu_hours": 1.5, "gpu_energy_kwh": 0.75, "peak_gpu_memory_gib": 9.0})
    assert "1.50 GPU hours, peak 9.0 GiB on the GPU, 0.750 kWh" in on_gpu
    assert "energy unknown" in receipt.describe(found | {"gpu_hours": 1.5, "gpu_energy_kwh": None})


def test_files_without_a_receipt_still_load(tmp_path: Path) -> None:
    from brainfm.nets.backbone import build_backbone

    old = Provenance("0.1.0", "", "").to_dict()
    del old["receipt"]
    assert Provenance.from_dict(old).receipt == {}

    class Old(Provenance):
        def to_dict(self):
            return old

    values = {f.name: getattr(Provenance("0.1.0", "", ""), f.name) for f in dataclasses.fields(Provenance)}
    save_backbone(
        tmp_path / "old.safetensors", build_backbone("unet_tiny"), objective={"name": "mae", "config": {}},
        objective_state={}, preprocess=PreprocessSpec(), patch_vox=(16, 16, 16), provenance=Old(**values),
    )  # fmt: skip
    assert load_backbone(tmp_path / "old.safetensors").provenance.receipt == {}


def test_energy_of_packages_is_what_rapl_counts(tmp_path: Path) -> None:
    def write(joule: dict[str, float]) -> None:
        for name, value in joule.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "energy_uj").write_text(f"{round(value * 1e6)}\n")
            (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")

    write({"intel-rapl:0": 900, "intel-rapl:1": 10, "intel-rapl:0:0": 5})  # the last lies in the first
    packages = receipt.Packages(tmp_path)
    write({"intel-rapl:0": 100, "intel-rapl:1": 30, "intel-rapl:0:0": 500})  # the first has begun anew at 1000
    assert packages.joule() == pytest.approx(200 + 20) and packages.joule() == pytest.approx(220)
    assert packages.total_kwh({}) == pytest.approx(220 / 3.6e6, abs=1e-6)
    assert packages.total_kwh({"samples": 3}) is None  # of an earlier session nothing is known
    assert packages.total_kwh({"cpu_energy_kwh": 2.0}) == pytest.approx(2.000061, abs=1e-6)
    assert receipt.Packages(tmp_path / "nowhere").total_kwh({}) is None
