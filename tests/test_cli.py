"""The command line: what a wrong word costs, and that it costs no more."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm import cli
from brainfm.cli import VERBS, configs, main, options, resolve
from brainfm.specs import ConfigError
from tests.conftest import write_subjects

NEEDED = {
    "demo": ["out=x"],
    "manifest": ["root=x", "out=y"],
    "doctor": ["manifest=x"],
    "anatomy": ["manifest=x", "out=y"],
    "prepare": ["manifest=x", "store=y"],
    "pretrain": ["store=x", "run=y"],
    "finetune": ["store=x", "run=y", "backbone_from=none", "task.target=lesion"],
    "predict": ["bundle=x", "input.t1=y", "out=z"],
    "embed": ["backbone=x", "store=y", "out=z"],
    "probe": ["features=x", "store=y", "target=age", "out=z"],
    "evaluate": ["predictions=x", "manifest=y", "out=z"],
    "explain": ["bundle=x", "input.t1=y", "out=z"],
    "report": ["run=x"],
}


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence of a run that must end with 2."""
    assert main(list(words)) == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said and said.startswith("brainfm: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_resolves_and_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = resolve(verb, NEEDED[verb])
    assert values and "debug" in values
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    for key in values:
        assert key == "debug" or key in text


def test_every_group_option_composes() -> None:
    for group, verb in (("backbone", "pretrain"), ("objective", "pretrain"), ("optim", "pretrain"),
                        ("trainer", "pretrain"), ("experiment", "pretrain"), ("preprocess", "prepare"),
                        ("task", "finetune"), ("adapt", "finetune"), ("trainer", "finetune")):  # fmt: skip
        assert options(group)
        for option in options(group):
            resolve(verb, [*NEEDED[verb], f"{group}={option}"])


def test_every_adaptation_of_the_configurations_is_legal() -> None:
    from dataclasses import fields

    from brainfm.training.adapt import AdaptSpec, adapt_spec

    for option in options("adapt"):
        values = resolve("finetune", [*NEEDED["finetune"], f"adapt={option}"])["adapt"]
        assert set(values) == {f.name for f in fields(AdaptSpec)}, "the YAML lists every key, with no stale one"
        assert adapt_spec(values).name == option


def test_every_objective_and_backbone_of_the_configurations_builds() -> None:
    import torch

    from brainfm.nets.backbone import build_backbone
    from brainfm.objectives.objective import build_objective, settings

    for objective in options("objective"):
        values = resolve("pretrain", [*NEEDED["pretrain"], f"objective={objective}", "backbone=unet_tiny"])["objective"]
        assert set(values) - {"name"} == set(settings(objective)), "the YAML lists every key, with no stale one"
        build_objective(**values, backbone=build_backbone("unet_tiny"), patch_vox=(32, 32, 32), seed=0)
    for backbone in options("backbone"):
        with torch.device("meta"):
            build_backbone(**resolve("pretrain", [*NEEDED["pretrain"], f"backbone={backbone}"])["backbone"])


def test_every_experiment_builds() -> None:
    """At its own size, without memory: the patch fits the backbone and the hidden blocks."""
    import torch

    from brainfm.nets.backbone import build_backbone
    from brainfm.objectives.objective import build_objective

    for experiment in options("experiment"):
        values = resolve("pretrain", [*NEEDED["pretrain"], f"experiment={experiment}"])
        question = values["objective"]
        for from_data, count in (("groups", 4), ("volumes", 101)):
            if question.get(from_data, 0) is None:
                question[from_data] = count
        with torch.device("meta"):
            backbone = build_backbone(**values["backbone"])
            build_objective(**question, backbone=backbone, patch_vox=tuple(values["data"]["patch_vox"]), seed=0)


def test_ssl3d_is_the_published_recipe() -> None:
    values = resolve("pretrain", [*NEEDED["pretrain"], "experiment=ssl3d"])
    objective, trainer = values["objective"], values["trainer"]
    assert values["backbone"]["name"] == "resenc_l" and values["data"]["patch_vox"] == [160, 160, 160]
    assert (objective["mask_unit_vox"], objective["mask_ratio"]) == (16, 0.75)
    assert objective["parts"] == {"anatomy": 0.5, "pathology": 0.3, "free": 0.2}
    weights = [objective[f"{name}_weight"] for name in ("reconstruction", "anatomy", "pathology", "agreement")]
    assert weights == [0.7, 0.15, 0.15, 0.0]
    assert (trainer["max_steps"], trainer["batch_size"]) == (250_000, 2)


def test_fomo25_is_the_published_recipe() -> None:
    """The figures of the winners' script, as facts; configuration drift would silently change the experiment."""
    values = resolve("pretrain", [*NEEDED["pretrain"], "experiment=fomo25"])
    objective = values["objective"]
    assert values["backbone"] == {"name": "unet_b"} and values["data"]["patch_vox"] == [64, 64, 64]
    assert (objective["mask_unit_vox"], objective["mask_ratio"], objective["beta"]) == (4, 0.2, 0.1)
    weights = {k: v for k, v in objective.items() if k.endswith("_weight")}
    assert weights == {"self_weight": 3.0, "cross_weight": 1.0, "agreement_weight": 0.5, "separation_weight": 0.5,
                       "kl_weight": 0.001}  # fmt: skip
    assert objective["kl_ramp"] == 0.1 and objective["swap"] == "standard"
    published = {"variational": True, "logvar_start": None, "terms_on": "samples", "centred": False}
    assert published == {key: objective[key] for key in published} and objective["separation_floor"] == -1
    plain = resolve("pretrain", [*NEEDED["pretrain"], "objective=cross_contrast"])["objective"]
    assert (plain["logvar_start"], plain["terms_on"], plain["centred"]) == (-6, "means", True)
    assert values["optim"] == {"lr": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.999], "warmup_fraction": 0.05}
    assert (values["trainer"]["batch_size"], values["trainer"]["clip_norm"]) == (4, 1.0)
    assert values["data"]["augment"] is None and values["data"]["validation"] == 0.1


def test_wrong_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "predikt" in fails(capsys, "predikt")
    assert "key=value" in fails(capsys, "prepare", "manifest")
    assert "store must be given" in fails(capsys, "prepare", "manifest=x")
    assert "no key 'trainer.max_step'" in fails(capsys, "pretrain", *NEEDED["pretrain"], "trainer.max_step=3")
    assert "unet_b, unet_l" in fails(capsys, "pretrain", *NEEDED["pretrain"], "backbone=vit_z")
    assert "fomo25" in fails(capsys, "pretrain", *NEEDED["pretrain"], "experiment=fomo99")
    assert "either input" in fails(capsys, "predict", f"bundle={tmp_path}", "out=x")


def test_input_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "predict", "bundle=b", "input.t1=a.nii.gz", "input.t1=b.nii.gz", "out=o.nii.gz")
    assert "input.t1 is given twice (a.nii.gz and b.nii.gz)" in said


def test_missing_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in fails(capsys, "manifest", f"root={nowhere}", f"out={tmp_path / 'm.csv'}")
    assert str(nowhere) in fails(capsys, "doctor", f"manifest={nowhere}")
    assert str(nowhere) in fails(capsys, "prepare", f"manifest={nowhere}", f"store={tmp_path / 's'}")
    assert str(nowhere) in fails(capsys, "pretrain", f"store={nowhere}", f"run={tmp_path / 'r'}")
    assert str(nowhere) in fails(capsys, "predict", f"bundle={nowhere}", "input.t1=x.nii", f"out={tmp_path / 'o.nii'}")
    assert not list(tmp_path.iterdir()), "nothing half-written remains"


def test_manifest_with_a_wrong_column_or_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    store = tmp_path / "store"
    manifest.write_text("dataset,subject,session,modality,path\na,1,1,t1,x.nii.gz\n")
    assert "contrast" in fails(capsys, "prepare", f"manifest={manifest}", f"store={store}")
    manifest.write_text("dataset,subject,session,contrast,path\na,1,1,t1,x.nii.gz\n")
    assert "x.nii.gz" in fails(capsys, "prepare", f"manifest={manifest}", f"store={store}")
    manifest.write_text("dataset,subject,session,contrast,path\na,1,1,nonsense,x.nii.gz\n")
    assert "nonsense" in fails(capsys, "prepare", f"manifest={manifest}", f"store={store}")
    assert not store.exists()


def test_other_spec_in_the_same_store(capsys: pytest.CaptureFixture[str], toy_manifest: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert main(["prepare", f"manifest={toy_manifest}", f"store={store}", "preprocess=iso2mm", "workers=1"]) == 0
    capsys.readouterr()
    said = fails(
        capsys, "prepare", f"manifest={toy_manifest}", f"store={store}", "preprocess.spacing_mm=3", "workers=1"
    )
    assert "spacing_mm" in said


def test_text_keys_need_no_quoting(tmp_path: Path) -> None:
    odd = "a b/(1)=x,[2]{3}'s $HOME"
    assert resolve("prepare", [f"manifest={odd}", "store=y"])["manifest"] == odd
    assert resolve("manifest", ["root=x", "out=y", "masks.lesion=*_{a,b}*|c d*"])["masks"] == {
        "lesion": "*_{a,b}*|c d*"
    }
    assert resolve("predict", ["bundle=b", f"input.t1={odd}", "out=o"])["input"] == {"t1": odd}


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        main(["predict", "bundle=b", "out=o", "debug=true"])


def test_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: dict) -> int:
        raise OSError(28, "No space left on device", "run/last.tmp")

    monkeypatch.setitem(cli._RUN, "pretrain", full)
    assert "no space left on the disk for run/last.tmp" in fails(capsys, "pretrain", *NEEDED["pretrain"])


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_folder_is_one_sentence_in_every_verb(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: dict) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/out")

    monkeypatch.setitem(cli._RUN, verb, refuse)
    assert fails(capsys, verb, *NEEDED[verb]) == "brainfm: /data/out: read-only file system"
    with pytest.raises(OSError):
        main([verb, *NEEDED[verb], "debug=true"])


def without_writing() -> list[str]:
    """The command that runs another with ``ro`` mounted read-only; the test is skipped where that is not allowed."""
    try:
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            pytest.skip("no name spaces for mounts here")
    except FileNotFoundError:
        pytest.skip("no unshare here")
    return ["unshare", "-rm", "bash", "-c", 'mount --bind ro ro && mount -o remount,bind,ro ro && exec "$0" "$@"']


def test_a_read_only_mount(tmp_path: Path, toy_manifest: Path) -> None:
    """The real thing, of verbs that write their first file early, late, and in a library."""
    (tmp_path / "ro").mkdir()
    program = [sys.executable, "-m", "brainfm.cli"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    for words in (
        ["manifest", f"root={toy_manifest.parent}", "out=ro/m.csv"],
        ["doctor", f"manifest={toy_manifest}", "out=ro/d.csv", "workers=1"],
        ["prepare", f"manifest={toy_manifest}", "store=ro/st", "workers=1"],
    ):
        run = subprocess.run([*without_writing(), *program, *words], cwd=tmp_path, capture_output=True, text=True,
                             env=environment)  # fmt: skip
        assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
        assert "read-only file system" in run.stderr.lower()


@pytest.mark.parametrize("reader", ["true", "head -1"])
def test_a_closed_pipe_ends_quietly_and_the_work_is_done(reader: str, tmp_path: Path, toy_manifest: Path) -> None:
    out = tmp_path / "m.csv"
    words = f"{sys.executable} -m brainfm.cli manifest root={toy_manifest.parent} out={out}"
    shell = f"{words} 2>{tmp_path / 'err'} | {reader}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    assert subprocess.run(["bash", "-c", shell], env=environment, capture_output=True).returncode == 0
    assert (tmp_path / "err").read_text() == "" and out.is_file()


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_verb_works_where_the_caller_has_closed_the_streams(closed: str, tmp_path: Path, toy_manifest: Path) -> None:
    out = tmp_path / "d.csv"
    words = f"{sys.executable} -m brainfm.cli doctor manifest={toy_manifest} out={out} workers=1 {closed}"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    run = subprocess.run(["bash", "-c", words], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert out.read_text().splitlines() == ["dataset,subject,session,contrast,path,fault"]


class Pipe(io.TextIOWrapper):
    """A standard output whose reader has gone away."""

    def __init__(self) -> None:
        read, write = os.pipe()
        os.close(read)
        super().__init__(io.FileIO(write, "w"), encoding="ascii", line_buffering=True)  # type: ignore[arg-type]


def test_a_verb_goes_on_after_the_pipe_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def talk(config: dict) -> int:
        for number in range(3):
            print(f"line {number} of Z\xfcrich", flush=True)
            done.append(number)
        return 1

    monkeypatch.setitem(cli._RUN, "doctor", talk)
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert main(["doctor", "manifest=x"]) == 1 and done == [0, 1, 2]
    with open(os.devnull) as unwritable:  # as a terminal that was hung up refuses what is written
        gone = io.TextIOWrapper(io.FileIO(os.dup(unwritable.fileno()), "w"), line_buffering=True)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stderr", gone)
    assert main(["no such verb"]) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_standard_output_is_one_sentence() -> None:
    words = f"{sys.executable} -m brainfm.cli --version > /dev/full"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    run = subprocess.run(["bash", "-c", words], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "brainfm: no space left on the disk for the output: free some and run again\n"


def test_names_that_the_terminal_cannot_show_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setitem(cli._RUN, "doctor", lambda config: print("Z\xfcrich M\udcfcller") or 0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["doctor", "manifest=x"]) == 0
    assert shown.getvalue() == b"Z\\xfcrich M\\udcfcller\n"


def test_manifest_and_doctor_say_what_was_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_subjects(tmp_path / "data", 2)
    for name in ("00/c1t1.nii.gz", "01/T1.nrrd"):
        (tmp_path / "data" / f"sub-{name}").touch()
    manifest = tmp_path / "m.csv"
    assert main(["manifest", f"root={tmp_path / 'data'}", f"out={manifest}", "masks.lesion=*lesion_mask*"]) == 0
    assert "left out 1 files (map of probabilities" in capsys.readouterr().out
    assert main(["doctor", f"manifest={manifest}", "workers=1"]) == 0
    said = capsys.readouterr().out
    for why, name in (
        ("map of probabilities, tissue, thickness or the like, by name", "sub-00/c1t1.nii.gz"),
        ("format that is not read; convert it to .nii.gz", "sub-01/T1.nrrd"),
    ):
        assert f"note: manifest left out 1 files ({why}): {name}" in said


def test_prepare_says_what_it_prepared_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    manifest = write_subjects(tmp_path / "data", 2)
    words = ["prepare", f"manifest={manifest}", f"store={tmp_path / 's'}", "preprocess.spacing_mm=4", "workers=1"]
    assert main(words) == 0
    path = tmp_path / "data" / "sub-01" / "lesion_mask.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "prepared again: toy/01/1, for sub-01/lesion_mask.nii.gz has changed" in said
    assert "lesion_mask: 1 of 2 are empty" in said and "1 sessions prepared, 1 were there" in said


def test_configs_are_found() -> None:
    assert (configs() / "pretrain.yaml").is_file()


def test_help_and_import_load_nothing_heavy() -> None:
    """The reason `brainfm --help` answers at once; the seconds are measured by scripts/benchmark_start.py."""
    code = (
        "import sys, brainfm.cli as c; c.main(['--help']); c.main(['pretrain', '--help']); print(sorted(sys.modules))"
    )
    began = time.perf_counter()
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - began < 60
    for heavy in ("torch", "numpy", "hydra", "lightning", "nibabel", "scipy"):
        assert f"'{heavy}'" not in listed


def test_inference_starts_without_the_training_stack() -> None:
    code = "import sys, brainfm; brainfm.predict; brainfm.load; print(sorted(sys.modules))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("lightning", "hydra", "torchio", "monai", "SimpleITK", "matplotlib", "tensorboard"):
        assert f"'{heavy}'" not in listed
