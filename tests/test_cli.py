"""The command line: what a wrong word costs, and that it costs no more."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm import cli
from brainfm import verbs as verbs_folder
from brainfm.cli import main, verbs
from brainfm.errors import ConfigError
from brainfm.progress import say
from brainfm.settings import build, dotted, keys_of, plain
from brainfm.training.settings import PretrainSettings
from brainfm.verbs.compose import configs, options, recipes, resolve, settings_of
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
    "compare": ["models=[unet_s:mae]", "store=x", "out=y", "tasks=[age]", "steps=3"],
    "import": ["checkpoint=x", "out=y.safetensors"],
    "export": ["format=nnssl", "backbone=x", "out=y"],
    "convert": ["challenge=fomo26", "task=task2", "root=x"],
    "container": ["challenge=fomo26", "task=task2", "bundle=x", "out=y"],
    "validate": ["challenge=fomo26", "task=task2", "command=x", "out=y"],
    "medimeta": ["action=check", "root=x"],
    "weights": [],
}


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence of a run that must end with 2."""
    assert main(list(words)) == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said and said.startswith("brainfm: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_resolves_and_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = resolve(verb, NEEDED[verb])
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert {"debug"} < set(keys_of(type(settings)))
    for key in dotted(type(settings), plain(settings)):
        assert f"  {key}=" in text or f"  {key}: " in text or f"\n{key}=" in text, key


def test_every_group_option_composes() -> None:
    for group, verb in (("backbone", "pretrain"), ("objective", "pretrain"), ("optim", "pretrain"),
                        ("trainer", "pretrain"), ("experiment", "pretrain"), ("preprocess", "prepare"),
                        ("task", "finetune"), ("adapt", "finetune"), ("trainer", "finetune")):  # fmt: skip
        found = options(group, keys_of(settings_of(verb)).get(group))
        assert found
        for option in found:
            if group != "experiment" or option in recipes(settings_of(verb)):
                resolve(verb, [*NEEDED[verb], f"{group}={option}"])


def test_every_adaptation_of_the_configurations_is_legal() -> None:
    for option in options("adapt"):
        assert resolve("finetune", [*NEEDED["finetune"], f"adapt={option}"]).adapt.name == option


def test_every_objective_and_backbone_of_the_configurations_builds() -> None:
    import torch

    from brainfm.nets.backbone import build_backbone
    from brainfm.objectives.objective import make_objective

    for objective in options("objective", keys_of(PretrainSettings)["objective"]):
        question = resolve("pretrain", [*NEEDED["pretrain"], f"objective={objective}"]).objective
        made = make_objective(question, build_backbone("unet_tiny"), patch_vox=(32, 32, 32), seed=0)
        assert made.name == question.name == objective
    for backbone in options("backbone"):
        with torch.device("meta"):
            build_backbone(**resolve("pretrain", [*NEEDED["pretrain"], f"backbone={backbone}"]).backbone)


def test_every_experiment_builds() -> None:
    """At its own size, without memory: the patch fits the backbone and the hidden blocks."""
    import torch

    from brainfm.nets.backbone import build_backbone
    from brainfm.objectives.objective import make_objective

    for experiment in recipes(settings_of("pretrain")):
        settings = resolve("pretrain", [*NEEDED["pretrain"], f"experiment={experiment}"])
        sizes = {"groups": 4, "volumes": 101}
        known = {key: count for key, count in sizes.items() if getattr(settings.objective, key, 0) is None}
        with torch.device("meta"):
            backbone = build_backbone(**settings.backbone)
            question = replace(settings.objective, **known)
            make_objective(question, backbone, patch_vox=settings.data.patch_vox, seed=0)


def test_ssl3d_is_the_published_recipe() -> None:
    settings = resolve("pretrain", [*NEEDED["pretrain"], "experiment=ssl3d"])
    objective, trainer = settings.objective, settings.trainer
    assert settings.backbone["name"] == "resenc_l" and settings.data.patch_vox == (160, 160, 160)
    assert (objective.mask_unit_vox, objective.mask_ratio) == (16, 0.75)
    assert objective.parts == {"anatomy": 0.5, "pathology": 0.3, "free": 0.2}
    assert objective.weights == {"reconstruction": 0.7, "anatomy": 0.15, "pathology": 0.15, "agreement": 0.0}
    assert (trainer.max_steps, trainer.batch_size) == (250_000, 2)


def test_fomo25_is_the_published_recipe() -> None:
    """The figures of the winners' script, as facts; configuration drift would silently change the experiment."""
    settings = resolve("pretrain", [*NEEDED["pretrain"], "experiment=fomo25"])
    objective = plain(settings.objective)
    assert settings.backbone == {"name": "unet_b"} and settings.data.patch_vox == (64, 64, 64)
    assert (objective["mask_unit_vox"], objective["mask_ratio"], objective["beta"]) == (4, 0.2, 0.1)
    weights = {k: v for k, v in objective.items() if k.endswith("_weight")}
    assert weights == {"self_weight": 3.0, "cross_weight": 1.0, "agreement_weight": 0.5, "separation_weight": 0.5,
                       "kl_weight": 0.001}  # fmt: skip
    assert objective["kl_ramp"] == 0.1 and objective["swap"] == "standard"
    published = {"variational": True, "logvar_start": None, "terms_on": "samples", "centred": False}
    assert published == {key: objective[key] for key in published} and objective["separation_floor"] == -1
    mended = resolve("pretrain", [*NEEDED["pretrain"], "objective=cross_contrast"]).objective
    assert (mended.logvar_start, mended.terms_on, mended.centred) == (-6, "means", True)
    optim = {"lr": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.999], "warmup_fraction": 0.05}
    assert plain(settings.optim) == optim
    assert (settings.trainer.batch_size, settings.trainer.clip_norm) == (4, 1.0)
    assert settings.data.augment is None and settings.data.validation == 0.1


def test_wrong_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "predikt" in fails(capsys, "predikt")
    assert "key=value" in fails(capsys, "prepare", "manifest")
    assert "store must be given" in fails(capsys, "prepare", "manifest=x")
    for wrong, near in (
        ("trainer.max_step=3", "trainer.max_steps"),
        ("max_steps=3", "trainer.max_steps"),
        ("objectiv=mae", "objective"),
        ("data.windows.low=1", "data.windows.low_mm"),
        ("objective.kl=1", "objective.kl_ramp"),
    ):
        said = fails(capsys, "pretrain", *NEEDED["pretrain"], wrong)
        assert f"no key '{wrong.partition('=')[0]}'; did you mean {near}?" in said
    assert "unet_b, unet_l" in fails(capsys, "pretrain", *NEEDED["pretrain"], "backbone=vit_z")
    assert "fomo25" in fails(capsys, "pretrain", *NEEDED["pretrain"], "experiment=fomo99")
    assert "either input" in fails(capsys, "predict", f"bundle={tmp_path}", "out=x")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.max_steps=many", "trainer.max_steps=many: expected a whole number"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: expected a whole number"),
        ("trainer.clip_norm=true", "trainer.clip_norm=true: expected a number"),
        ("trainer.compile=fast", "expected auto, default, reduce-overhead, max-autotune-no-cudagraphs or null"),
        ("trainer.devices=some", "trainer.devices=some: expected a whole number or auto"),
        ("data.patch_vox=[64,64]", "data.patch_vox=[64, 64]: expected three whole numbers"),
        ("probe.levels=maybe", "probe.levels=maybe: expected true or false"),
        ("probe=3", "probe=3: expected a mapping or null"),
        ("optim.betas=[1]", "optim.betas=[1]: expected two numbers"),
        ("objective.parts=3", "objective.parts=3: expected a mapping"),
        ("trainer=gpu24", "trainer=gpu24 is no option any more, expected trainer=gpu trainer.memory_gb=24"),
        ("trainer=tpu", "trainer=tpu: expected one of auto, cpu, gpu"),
    ],
)
def test_a_value_of_another_type_is_refused_before_anything_is_read(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in fails(capsys, "pretrain", *NEEDED["pretrain"], word)


def test_numbers_stay_as_they_were_typed() -> None:
    """An identity compares them as text: 20 is not 20.0, and a run made with either goes on."""
    settings = resolve("pretrain", [*NEEDED["pretrain"], "data.windows.rotate_deg=20", "optim.lr=1", "average=0.5"])
    assert json.dumps(plain(settings.data.windows)["rotate_deg"]) == "20" and json.dumps(settings.optim.lr) == "1"
    assert plain(build(type(settings), plain(settings))) == plain(settings)


def test_help_shows_the_options_that_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "objective=mae", "optim=wsd", "--help"]) == 0
    text = capsys.readouterr().out
    assert "objective.mask_ratio=0.6 " in text and "objective.swap" not in text
    assert "optim.warmup_steps=1000" in text and "experiment=dense_split|" in text
    assert main(["finetune", "task=regression", "--help"]) == 0
    text = capsys.readouterr().out
    assert "trainer.max_steps=2000" in text and "task.unit=" in text and "task.loss" not in text


TOY_VERB = '''"""Say a number twice."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

PLACE = 99


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Say a number twice."""

    number: Annotated[int, "what is said"]
    out: Annotated[Path | None, "where to"] = None
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    print(2 * settings.number, settings.out)
    return 0
'''


def test_a_verb_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside its own test, nothing else is touched: the command finds it, lists it, explains it and runs it."""
    folder = tmp_path / "verbs"
    shutil.copytree(Path(verbs_folder.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "twice.py").write_text(TOY_VERB)
    monkeypatch.setattr(verbs_folder, "__path__", [str(folder)])
    monkeypatch.setattr(verbs_folder, "__file__", str(folder / "__init__.py"))
    assert verbs()["twice"] == "say a number twice" and list(verbs())[-1] == "twice"
    assert main(["twice", "number=4", "out=a b=c"]) == 0 and capsys.readouterr().out == "8 a b=c\n"
    assert main(["twice", "--help"]) == 0 and "number=???" in capsys.readouterr().out
    assert "no key 'numer'; did you mean number?" in fails(capsys, "twice", "numer=4")


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
    assert str(resolve("prepare", [f"manifest={odd}", "store=y"]).manifest) == odd
    masks = resolve("manifest", ["root=x", "out=y", "masks.lesion=*_{a,b}*|c d*"]).masks
    assert masks == {"lesion": "*_{a,b}*|c d*"}
    assert resolve("predict", ["bundle=b", f"input.t1={odd}", "out=o"]).input == {"t1": Path(odd)}


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        main(["predict", "bundle=b", "out=o", "debug=true"])


def test_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(settings: object) -> int:
        raise OSError(28, "No space left on device", "run/last.tmp")

    monkeypatch.setattr(import_module("brainfm.verbs.pretrain"), "run", full)
    assert "no space left on the disk for run/last.tmp" in fails(capsys, "pretrain", *NEEDED["pretrain"])


@pytest.mark.parametrize("verb", verbs())
def test_a_read_only_folder_is_one_sentence_in_every_verb(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(settings: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/out")

    monkeypatch.setattr(import_module(f"brainfm.verbs.{verb}"), "run", refuse)
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

    def talk(settings: object) -> int:
        for number in range(3):
            print(f"line {number} of Z\xfcrich", flush=True)
            done.append(number)
        return 1

    monkeypatch.setattr(import_module("brainfm.verbs.doctor"), "run", talk)
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
    doctor = import_module("brainfm.verbs.doctor")
    monkeypatch.setattr(doctor, "run", lambda settings: print("Z\xfcrich M\udcfcller") or 0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["doctor", "manifest=x"]) == 0
    assert shown.getvalue() == b"Z\\xfcrich M\\udcfcller\n"


def test_what_a_terminal_would_obey_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """In a sentence with names out of files or words: it stays one line, and no terminal is coloured or cleared."""
    assert "no such \\x1b[2J\\nverb" in fails(capsys, "no such \x1b[2J\nverb")
    say("left out: a\x1b]0;title\x07b\nM\xfcller")
    assert capsys.readouterr().err == "left out: a\\x1b]0;title\\x07b\nM\xfcller\n"


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
    assert (configs() / "experiment" / "fomo25.yaml").is_file()


def test_help_and_import_load_nothing_heavy() -> None:
    """The reason `brainfm --help` answers at once; the seconds are measured by scripts/benchmark/start.py."""
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
