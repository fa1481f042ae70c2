"""Pre-training from the command line's configuration: resumption to the last bit, interruption, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from brainfm.cli import main
from brainfm.curves import read_curves
from brainfm.data.patches import PretrainPatches
from brainfm.data.store import Store
from brainfm.errors import BrainfmError, TrainingError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.objectives.objective import build_objective
from brainfm.specs import Provenance
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.pretrain import pretrain, split_sessions, write_backbone
from brainfm.training.settings import PretrainSettings
from brainfm.verbs.compose import resolve

STEPS = 24


def words(store: Store, run: Path, *more: str) -> list[str]:
    default = [
        f"store={store.path}", f"run={run}", "backbone=unet_tiny", "trainer=cpu", f"trainer.max_steps={STEPS}",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.log_every=1", "trainer.checkpoint_every=4",
        "trainer.evaluate_every=12", "trainer.threads=1", "data.patch_vox=[16,16,16]", "data.validation=0.3",
        "data.validation_batches=1", "objective.latent_channels=16", "probe.every=8",
    ]  # fmt: skip
    given = dict(word.split("=", 1) for word in (*default, *more))
    return [f"{key}={value}" for key, value in given.items()]


def config(store: Store, run: Path, *more: str) -> PretrainSettings:
    return resolve("pretrain", words(store, run, *more))


@pytest.fixture(scope="module")
def whole(toy_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(config(toy_store, run)).step == STEPS
    return run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"backbone": {"name": "adapted", "network": "torch.nn:Identity", "maps": "model.0"}},
            "expected a list of texts",
        ),
        ({"backbone": {"name": "adapted", "network": "no.place:Net", "maps": ["a"]}}, "Class that is installed"),
        ({}, "nowhere: "),
        ({"optim.lr": "nan"}, "expected lr > 0"),
        ({"trainer.max_steps": "0"}, "expected at least one step"),
    ],
)
def test_what_is_refused_leaves_no_run(changes: dict[str, Any], said: str, toy_store: Store, tmp_path: Path) -> None:
    """A foreign network's names are looked at before the store."""
    more = [f"{key}={value}" for key, value in changes.items() if "." in key]
    settings = config(toy_store, tmp_path / "run", *more)
    if not more:
        settings = replace(settings, store=tmp_path / "nowhere", **changes)
    with pytest.raises(BrainfmError, match=said):
        pretrain(settings)
    assert not (tmp_path / "run").exists()


def same_weights(one: Path, other: Path) -> bool:
    """Of networks and their average, of the optimiser; and the step, from which the numbers of the samples follow."""
    a, b = (read_checkpoint(run / CHECKPOINT) for run in (one, other))
    assert any(name.startswith("average.") for name in a["module"])
    mine, theirs = (flat(content) for content in (a, b))
    same_step = json.loads(a["state"])["step"] == json.loads(b["state"])["step"]
    return same_step and list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def flat(content: dict) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    moments = content["optimizer"]["state"].items()
    return content["module"] | {f"{key} {number}": v for number, state in moments for key, v in state.items()}


def test_leaves_what_the_readme_promises(whole: Path, toy_store: Store) -> None:
    loaded = load_backbone(whole / "backbone.safetensors")
    assert loaded.preprocess == toy_store.spec and loaded.patch_vox == (16, 16, 16)
    assert loaded.provenance.steps == STEPS and loaded.provenance.samples == 2 * STEPS
    assert loaded.provenance.data == toy_store.fingerprint()
    assert loaded.provenance.config["objective"]["name"] == "cross_contrast"
    trained, held = split_sessions(toy_store.sessions, 0.3, 0)
    assert loaded.subjects is not None and loaded.subjects.among(s.subject_key for s in trained + held) == sorted(
        {s.subject_key for s in trained}
    )
    assert (loaded.decoder, loaded.heads, loaded.voxel_mm) == (None, {}, (2.0, 2.0))
    assert sorted(p.name for p in (whole / "pictures").iterdir()) == ["step_0000012.png", "step_0000024.png"]
    assert any((whole / "tensorboard").iterdir())
    names = {name for _, name, _ in read_curves(whole / "curves.csv")}
    assert {"total", "self", "cross", "agreement", "separation", "kl", "lr", "grad_norm", "val_total"} <= names
    asked = {f"probe_{part}_{what}" for part in ("anatomy", "contrast") for what in ("contrast", "subject", "split")}
    assert asked <= names
    assert {"probe_backbone_contrast", "probe_backbone_rank"} <= names and "probe_backbone_split" not in names
    probed = json.loads((whole / "probes.json").read_text())
    assert probed["step"] == STEPS and probed["subjects"] == 6 and not probed["held_out"]
    last = {name: value for step, name, value in read_curves(whole / "curves.csv") if step == STEPS}
    assert probed["parts"]["anatomy"]["subject"] == last["probe_anatomy_subject"]
    assert (whole / "good.ckpt").read_bytes() == (whole / CHECKPOINT).read_bytes()


def test_a_decoder_and_heads_travel_with_the_backbone(toy_store: Store, tmp_path: Path) -> None:
    objective = build_objective("mae", build_backbone("unet_tiny"), patch_vox=(16, 16, 16), seed=0)
    backbone = objective.backbone
    objective.dense = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 3, "pathology": 2})
    objective.heads = torch.nn.ModuleDict({"lesion": DenseHead("pathology", 2, ("lesion",))})
    path = tmp_path / "backbone.safetensors"
    trained = PretrainPatches(toy_store, toy_store.sessions[:2], objective.views, seed=0)
    write_backbone(path, objective, toy_store.spec, trained, 0, Provenance("0", "", ""))
    loaded = load_backbone(path, needs_decoder=True)
    assert loaded.decoder is not None
    for ours, theirs in ((objective.dense, loaded.decoder), (objective.heads["lesion"], loaded.heads["lesion"])):
        assert all(torch.equal(v, theirs.state_dict()[n]) for n, v in ours.state_dict().items())
    assert not [n for n in loaded.extra if n.startswith(("dense.", "heads.", "backbone."))]


def test_killed_and_resumed_equals_uninterrupted(whole: Path, toy_store: Store, tmp_path: Path) -> None:
    """SIGKILL right after some checkpoint; the resumed run's curves and weights are equal to the last bit."""
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "brainfm.cli", "pretrain", *words(toy_store, run)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run / CHECKPOINT).exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(read_checkpoint(run / CHECKPOINT)["state"])["step"] in range(4, STEPS, 4)
    assert pretrain(config(toy_store, run)).step == STEPS
    assert (run / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()
    assert same_weights(run, whole)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_interrupted_saves_and_exits_cleanly(
    number: int, workers: int, whole: Path, toy_store: Store, tmp_path: Path
) -> None:
    """The signal goes to the whole process group, as a terminal or a batch system sends it."""
    run, more = tmp_path / "stopped", ("trainer.checkpoint_every=0", f"trainer.workers={workers}")
    command = [sys.executable, "-m", "brainfm.cli", "pretrain", *words(toy_store, run, *more)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while len(read_curves(run / "curves.csv")) < 9 and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    step = json.loads(read_checkpoint(run / CHECKPOINT)["state"])["step"]
    assert step < STEPS and f"stopped after step {step} of {STEPS}" in said
    assert not (run / "backbone.safetensors").exists()
    assert pretrain(config(toy_store, run, *more)).step == STEPS
    assert (run / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()


def test_number_of_workers_changes_nothing(whole: Path, toy_store: Store, tmp_path: Path) -> None:
    pretrain(config(toy_store, tmp_path / "run", "trainer.workers=2"))
    assert same_weights(tmp_path / "run", whole)


def test_other_values_in_the_same_run_are_refused(
    whole: Path, toy_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / CHECKPOINT).stat().st_mtime_ns
    assert main(["pretrain", *words(toy_store, whole, "objective.mask_ratio=0.4")]) == 2
    said = capsys.readouterr().err
    assert "objective.mask_ratio=0.2" in said and "objective.mask_ratio=0.4" in said and "Traceback" not in said
    assert (whole / CHECKPOINT).stat().st_mtime_ns == before


def test_finished_run_is_left_alone(whole: Path, toy_store: Store) -> None:
    before = (whole / "curves.csv").read_bytes()
    assert pretrain(config(toy_store, whole)).step == STEPS
    assert (whole / "curves.csv").read_bytes() == before


def test_loss_that_is_not_finite_stops_the_run(toy_store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite after step"):
        pretrain(config(toy_store, tmp_path / "run", "optim.lr=1e30", "optim.warmup_fraction=0", "trainer.clip_norm=0"))


def test_clipping_is_applied(toy_store: Store, tmp_path: Path) -> None:
    """With a clip of 1e-9 Adam's epsilon outweighs the gradient: almost nothing may move."""
    run = tmp_path / "run"
    one_step = ("trainer.max_steps=1", "optim.warmup_fraction=0", "optim.weight_decay=0", "data.validation=0")
    moved = {}
    for clip in ("1e-9", "0"):
        pretrain(config(toy_store, run / clip, *one_step, f"trainer.clip_norm={clip}", "trainer.precision=32-true"))
        moved[clip] = read_checkpoint(run / clip / CHECKPOINT)["module"]["question.backbone.levels.0.0.0.weight"]
    torch.manual_seed(0)
    from brainfm.nets.backbone import build_backbone

    start = build_backbone("unet_tiny").state_dict()["levels.0.0.0.weight"]
    assert (moved["0"] - start).abs().max() > 20 * (moved["1e-9"] - start).abs().max()


def test_checkpoint_with_code_in_it_is_refused(
    toy_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": 1, "x": Evil()}, run / CHECKPOINT)
    assert main(["pretrain", *words(toy_store, run)]) == 2
    assert "no readable checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_loss_falls(toy_store: Store, tmp_path: Path) -> None:
    pretrain(config(toy_store, tmp_path / "run", "trainer.max_steps=60", "optim.lr=3e-3", "objective=mae",
                    "trainer.evaluate_every=0", "data.validation=0"))  # fmt: skip
    curve = [value for _, name, value in read_curves(tmp_path / "run" / "curves.csv") if name == "total"]
    assert sum(curve[-10:]) < 0.7 * sum(curve[:10])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("workers", [0, 1])
def test_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    toy_store: Store, tmp_path: Path, workers: int
) -> None:
    run = tmp_path / "run"
    full = """
import os, sys, torch
from brainfm.cli import main

save = torch.save


def to_a_full_disk(content, file):
    os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
    save(content, file)


torch.save = to_a_full_disk
sys.exit(main(sys.argv[1:]))
"""
    arguments = [sys.executable, "-c", full, "pretrain", *words(toy_store, run, f"trainer.workers={workers}")]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last == f"brainfm: no space left on the disk for {run / CHECKPOINT}: free some and run again"
    assert not (run / CHECKPOINT).exists() and not list(run.glob("*.tmp"))


def test_error_in_a_step_does_not_wait_for_the_loaders_workers(toy_store: Store, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom brainfm.verbs.compose import resolve\nfrom brainfm.training import loop\n"
        "from brainfm.training.pretrain import pretrain\n"
        "def broken(*_): raise RuntimeError('broken on purpose')\n"
        "loop._clip = broken\n"
        "pretrain(resolve('pretrain', sys.argv[1:]))\n"
    )
    arguments = [sys.executable, "-c", script, *words(toy_store, tmp_path / "run", "trainer.workers=2")]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and "broken on purpose" in ended.stderr
