"""A real bundle with random weights: the plumbing, the refusals, and a manifest that is taken up again."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.data.manifest import Scan, write_manifest
from brainfm.errors import BrainfmWarning, BundleError, ConfigError, FileError, ManifestError, ScanError
from brainfm.inference.predict import predict, predict_manifest
from brainfm.nets.backbone import build_backbone
from brainfm.specs import PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.answers import check_volume, mask_name
from brainfm.tasks.bundle import read_bundle, write_bundle
from brainfm.tasks.engine import settle_device, settle_precision
from brainfm.tasks.segmentation import answer as predict_module
from brainfm.tasks.segmentation.network import SegmentationTask
from tests.inference.test_predict_geometry import write

TASK = TaskSpec("segmentation", "lesion", ("t1", "flair"), (0, 7), (16, 16, 16))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = SegmentationTask(TASK, build_backbone("unet_tiny"))
        torch.nn.init.zeros_(network.decoder.out.bias)  # else a fresh network says background everywhere
        members.append(network.state_dict())
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(
        path,
        task=TASK,
        backbone_config={"name": "unet_tiny"},
        members=members,
        preprocess=PreprocessSpec(spacing_mm=(6.0, 6.0, 6.0)),
        provenance=Provenance("0", "", ""),
    )
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    write(folder / "t1.nii.gz", "oblique")
    write(folder / "flair.nii.gz", "thick_slices")
    return {"t1": folder / "t1.nii.gz", "flair": folder / "flair.nii.gz"}


def test_one_session(bundle, scans, tmp_path):
    labels = predict(bundle, scans, tmp_path / "mask.nii.gz", on="flair")
    assert (
        labels.shape == nib.load(scans["flair"]).shape and labels.dtype == np.uint8 and set(np.unique(labels)) <= {0, 7}
    )
    assert np.array_equal(nib.load(tmp_path / "mask.nii.gz").affine, nib.load(scans["flair"]).affine)


REAL = {
    "isles22/sub-strokecase0009": {"t1": "sub-strokecase0009_DWI.nii.gz", "flair": "sub-strokecase0009_FLAIR.nii.gz"},
    "openms_long/patient01/study1": {
        "t1": "patient01_study1_T1w.nii.gz",
        "flair": "patient01_study1_FLAIR.nii.gz",
    },
}


@pytest.mark.parametrize("folder", REAL)
def test_real_scans(bundle, data3d, tmp_path, folder):
    files = {contrast: data3d / folder / name for contrast, name in REAL[folder].items()}
    for on, file in files.items():
        predict(bundle, files, tmp_path / "mask.nii.gz", on=on)
        mask, source = nib.load(tmp_path / "mask.nii.gz"), nib.load(file)
        assert mask.shape == source.shape and np.array_equal(mask.affine, source.affine)
        assert mask.get_data_dtype() == np.uint8 and np.asarray(mask.dataobj).any()


def test_any_contrast_may_be_missing_and_order_does_not_matter(bundle, scans):
    both = predict(bundle, scans, on="t1")
    assert np.array_equal(both, predict(bundle, dict(reversed(scans.items())), on="t1"))
    assert not np.array_equal(both, predict(bundle, {"t1": scans["t1"]}))
    assert predict(bundle, {"flair": scans["flair"]}).shape == nib.load(scans["flair"]).shape


def test_a_contrast_never_seen_is_used_with_a_warning(bundle, scans):
    """The weights know no contrast by name, so any scan can be read; whether the answer is good is another matter."""
    said = r"input\.pd: the bundle was trained on t1, flair, never on pd; its answer may be worse"
    with pytest.warns(BrainfmWarning, match=said):
        alone = predict(bundle, {"pd": scans["t1"]})
    assert np.array_equal(alone, predict(bundle, {"t1": scans["t1"]}))
    with pytest.warns(BrainfmWarning):
        beside = predict(bundle, {"flair": scans["flair"], "pd": scans["t1"]}, on="flair")
    assert np.array_equal(beside, predict(bundle, scans, on="flair"))


def test_the_answer_repeats(bundle, scans):
    assert np.array_equal(predict(bundle, scans), predict(read_bundle(bundle), scans))


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ({}, ConfigError, "no input was given, expected one or more of t1, flair"),
        ({"t1w": "t1"}, ConfigError, r"input\.t1w: unknown contrast, expected perhaps 't1'; one of t1, t1c"),
        ({"t1": "nowhere"}, ScanError, r"nowhere.*: no such file, given as input\.t1"),
        ({"t1": "t1", "flair": "t1"}, ConfigError, r"input\.t1 and input\.flair are one file"),
        ({"t1": "truncated"}, ScanError, "truncated.*cut short"),
        ({"flair": "flair", "t1": "truncated"}, ScanError, "truncated.*cut short"),
    ],
)
def test_refused_inputs(bundle, scans, tmp_path, inputs, error, text):
    whole = scans["t1"].read_bytes()
    (tmp_path / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    places = scans | {name: tmp_path / f"{name}.nii.gz" for name in ("truncated", "nowhere")}
    with pytest.raises(error, match=text) as caught:
        predict(bundle, {contrast: places[name] for contrast, name in inputs.items()}, tmp_path / "mask.nii.gz")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["truncated.nii.gz"]


def test_on_must_be_an_input(bundle, scans):
    with pytest.raises(ConfigError, match=r"no input flair to answer on, expected one of the inputs t1"):
        predict(bundle, {"t1": scans["t1"]}, on="flair")


def test_refused_outputs(bundle, scans, tmp_path):
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "file").write_text("")
    os.symlink(scans["t1"], tmp_path / "link.nii.gz")
    for name, text in (
        ("mask.mgz", "ends in .nii or .nii.gz"),
        (".nii", "ends in .nii or .nii.gz"),
        ("folder.nii", "is a folder"),
        ("link.nii.gz", "is one of the inputs"),
    ):
        with pytest.raises(ConfigError, match=text):
            check_volume(tmp_path / name, scans.values())
    with pytest.raises(FileError, match="nothing can be written there"):
        check_volume(tmp_path / "file" / "mask.nii", scans.values())
    before = scans["t1"].read_bytes()
    with pytest.raises(ConfigError, match="is one of the inputs"):
        predict(bundle, scans, scans["t1"])
    assert scans["t1"].read_bytes() == before


def test_a_failing_disk_leaves_nothing(bundle, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FileError, match=r"no space left on the disk for .*mask\.nii\.gz"):
        predict(bundle, scans, tmp_path / "mask.nii.gz")
    assert not list(tmp_path.iterdir())


def test_a_tampered_bundle(bundle, scans, tmp_path):
    import shutil

    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "task.json").write_text("{}")
    with pytest.raises(BundleError, match=r"task\.json was changed"):
        predict(tmp_path / "copy", scans)


def test_devices_and_precisions():
    assert settle_device("cpu").type == "cpu" and settle_precision("auto", torch.device("cpu")) is None
    assert settle_precision("bf16-mixed", torch.device("cpu")) is torch.bfloat16
    for name in ("gpu", "mps", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device={name}"):
            settle_device(name)
    with pytest.raises(ConfigError, match="precision=half"):
        settle_precision("half", torch.device("cpu"))


def test_prediction_starts_without_the_training_stack():
    code = "import sys, brainfm.inference.predict, brainfm.inference.evaluate; print(*sys.modules)"
    loaded = {m.split(".")[0] for m in subprocess.check_output([sys.executable, "-c", code], text=True).split()}
    assert not loaded & {"lightning", "hydra", "omegaconf", "torchio", "monai", "matplotlib", "pandas", "tensorboard"}


# ---- a manifest ------------------------------------------------------------------------------------------------------


def empty_label(path, like):
    image = nib.load(like)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)


@pytest.fixture
def cohort(tmp_path):
    """Four sessions: label on the flair grid, label on a grid that no input has, no label, nothing usable."""
    root = tmp_path / "cohort"
    root.mkdir()
    for name, grid in (("t1", "oblique"), ("flair", "thick_slices"), ("pd", "anisotropic")):
        write(root / f"{name}.nii.gz", grid)
    for name in ("flair", "pd"):
        empty_label(root / f"{name}_lesion.nii.gz", root / f"{name}.nii.gz")

    def rows(subject, contrasts, label):
        return [Scan("d", subject, "", c, f"{c}.nii.gz", {"lesion_mask": label}) for c in contrasts]

    write_manifest(
        root / "manifest.csv",
        rows("a", ("t1", "flair"), "flair_lesion.nii.gz")
        + rows("b", ("t1", "pd"), "pd_lesion.nii.gz")
        + rows("c", ("t1",), "")
        + [Scan("d", "e", "", "unknown", "pd.nii.gz", {"lesion_mask": ""})],
    )
    return root / "manifest.csv"


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_manifest(bundle, cohort, tmp_path):
    steps = []
    report = predict_manifest(
        bundle, cohort, tmp_path / "out", progress=lambda done, total: steps.append((done, total))
    )
    assert (report.done, report.kept) == (3, 0) and steps[0] == (0, 4) and steps[-1] == (4, 4)
    shapes = {p.name: nib.load(p).shape for p in (tmp_path / "out").glob("*.nii.gz")}
    assert shapes == {
        f"d__{subject}_lesion.nii.gz": nib.load(cohort.parent / f"{like}.nii.gz").shape
        for subject, like in (("a", "flair"), ("b", "pd"), ("c", "t1"))
    }
    assert [row["file"] for row in table(tmp_path / "out" / "predictions.csv")] == sorted(shapes)
    failures = table(tmp_path / "out" / "failures.csv")
    assert failures == [{"dataset": "d", "subject": "e", "session": "", "reason": report.failures["d", "e", ""]}]
    assert "none of the contrasts t1, flair" in failures[0]["reason"]
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["task"]["target"] == "lesion"


def test_a_session_with_other_contrasts_only_is_answered_with_a_warning(bundle, cohort, tmp_path):
    manifest = cohort.parent / "others.csv"
    write_manifest(manifest, [Scan("d", "f", "", "pd", "pd.nii.gz", {})])
    with pytest.warns(BrainfmWarning, match=r"d/f/: has only pd, the bundle was trained on t1, flair"):
        assert predict_manifest(bundle, manifest, tmp_path / "out").done == 1


def test_a_manifest_is_taken_up_again(bundle, cohort, tmp_path, monkeypatch):
    real, calls = predict_module.answer, []

    def interrupted(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(predict_module, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_manifest(bundle, cohort, tmp_path / "out")
    monkeypatch.setattr(predict_module, "answer", real)
    first = (tmp_path / "out" / "d__a_lesion.nii.gz").stat().st_mtime_ns
    report = predict_manifest(bundle, cohort, tmp_path / "out")
    assert (report.done, report.kept) == (2, 1)
    assert (tmp_path / "out" / "d__a_lesion.nii.gz").stat().st_mtime_ns == first
    assert len(table(tmp_path / "out" / "predictions.csv")) == 3


def test_a_damaged_scan_stops_its_session_only(bundle, cohort, tmp_path):
    whole = (cohort.parent / "flair.nii.gz").read_bytes()
    (cohort.parent / "flair.nii.gz").write_bytes(whole[: len(whole) // 2])
    report = predict_manifest(bundle, cohort, tmp_path / "out")
    assert report.done == 2 and "cut short" in report.failures["d", "a", ""]
    (cohort.parent / "flair.nii.gz").write_bytes(whole)  # mended: the next call does the rest
    assert predict_manifest(bundle, cohort, tmp_path / "out").done == 1


def test_a_label_on_a_strange_grid(bundle, cohort, tmp_path):
    empty_label(cohort.parent / "pd_lesion.nii.gz", write(tmp_path / "other.nii.gz", "ras"))
    report = predict_manifest(bundle, cohort, tmp_path / "out")
    assert "pd_lesion.nii.gz: lies on another grid than every scan" in report.failures["d", "b", ""]


def test_masks_of_another_bundle_are_not_mixed_in(bundle, cohort, tmp_path):
    predict_manifest(bundle, cohort, tmp_path / "out", sessions=[("d", "c", "")])
    claim = tmp_path / "out" / "predictions.json"
    claim.write_text(claim.read_text().replace(read_bundle(bundle).fingerprint, "0" * 16))
    with pytest.raises(ConfigError, match="holds masks of bundle 0000000000000000"):
        predict_manifest(bundle, cohort, tmp_path / "out")


def test_a_manifest_that_is_missing(bundle, tmp_path):
    with pytest.raises(ManifestError, match="no manifest"):
        predict_manifest(bundle, tmp_path / "nowhere.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mask_names_are_plain_and_unique():
    keys = [
        ("d", "s", "1"), ("d", "s", ""), ("d__s", "1", ""), ("d", "s__1", ""), ("d", "s/1", ""), ("d", "s 1", ""),
        ("d", "_s", "1"), ("d", "s_", "1"), ("d_", "s", "1"), ("../..", "s", ""), ("d", "ü", ""), (".d", "s", ""),
    ]  # fmt: skip
    names = [mask_name(key, "lesion") for key in keys]
    assert names[:2] == ["d__s__1_lesion.nii.gz", "d__s_lesion.nii.gz"]
    assert len(set(names)) == len(keys)
    assert all("/" not in name and not name.startswith((".", "-")) and name.isascii() for name in names)


# ---- input as people have it -----------------------------------------------------------------------------------------


def other_units(path, out, factor):
    image = nib.load(path)
    nib.save(nib.Nifti1Image((np.asarray(image.dataobj) * factor).astype(np.float32), image.affine), out)
    return out


def test_a_scan_in_other_units_gets_the_same_mask_and_outliers_a_sentence(bundle, scans, tmp_path):
    want = predict(bundle, {"t1": scans["t1"]})
    assert want.any()
    for factor in (1e17, 1e34, 1e-25):
        got = predict(bundle, {"t1": other_units(scans["t1"], tmp_path / "other.nii.gz", factor)})
        assert (got != want).mean() < 1e-3
    image = nib.load(scans["t1"])
    voxels = np.asarray(image.dataobj).astype(np.float32)
    inside = np.argwhere(voxels > np.median(voxels))
    voxels[tuple(inside[::30].T)] = 3e38
    nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / "spiked.nii.gz")
    with pytest.raises(ScanError, match=r"spiked\.nii\.gz: outliers"):
        predict(bundle, {"t1": tmp_path / "spiked.nii.gz"}, out=tmp_path / "mask.nii.gz")
    assert not (tmp_path / "mask.nii.gz").exists()


def test_other_formats_are_answered_on_their_grid(bundle, scans, tmp_path):
    image = nib.load(scans["t1"])
    want = predict(bundle, {"t1": scans["t1"]})
    nib.save(nib.MGHImage(np.asarray(image.dataobj).astype(np.float32), image.affine), tmp_path / "t1.mgz")
    nib.save(nib.Nifti1Pair(np.asarray(image.dataobj), image.affine), tmp_path / "t1.img")
    for name in ("t1.mgz", "t1.img", "t1.hdr"):
        got = predict(bundle, {"t1": tmp_path / name}, out=tmp_path / "mask.nii.gz")
        assert (got != want).mean() < 1e-3
        np.testing.assert_allclose(nib.load(tmp_path / "mask.nii.gz").affine, image.affine, atol=1e-3)


def test_the_plain_name_is_read_and_not_the_first_by_path(bundle, scans, tmp_path):
    image = nib.load(scans["t1"])
    for name in ("sub-01_T1w", "c1sub-01_T1w", "sub-01_T1w_synthseg"):
        voxels = np.asarray(image.dataobj) if name == "sub-01_T1w" else np.asarray(image.dataobj)[::-1]
        nib.save(nib.Nifti1Image(voxels.copy(), image.affine), tmp_path / f"{name}.nii.gz")
    rows = [Scan("d", "sub-01", "", "t1", path.name, {}) for path in tmp_path.glob("*.nii.gz")]
    write_manifest(tmp_path / "m.csv", rows)
    assert len(rows) == 3 and predict_manifest(bundle, tmp_path / "m.csv", tmp_path / "out").done == 1
    found = np.asarray(nib.load(tmp_path / "out" / "d__sub-01_lesion.nii.gz").dataobj)
    np.testing.assert_array_equal(found, predict(bundle, {"t1": tmp_path / "sub-01_T1w.nii.gz"}))


def test_a_scan_corrected_in_place_is_answered_again(bundle, scans, tmp_path):
    image = nib.load(scans["t1"])
    voxels = np.asarray(image.dataobj)
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / f"{name}.nii")
    write_manifest(tmp_path / "m.csv", [Scan("d", name, "", "t1", f"{name}.nii", {}) for name in ("a", "b")])
    predict_manifest(bundle, tmp_path / "m.csv", tmp_path / "out")
    before = (tmp_path / "a.nii").stat()
    nib.save(nib.Nifti1Image(voxels[::-1].copy(), image.affine), tmp_path / "a.nii")
    os.utime(tmp_path / "a.nii", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tmp_path / "a.nii").stat().st_size == before.st_size
    report = predict_manifest(bundle, tmp_path / "m.csv", tmp_path / "out")
    assert (report.done, report.kept, report.again) == (1, 1, (("d", "a", ""),))
    found = np.asarray(nib.load(tmp_path / "out" / "d__a_lesion.nii.gz").dataobj)
    np.testing.assert_array_equal(found, predict(bundle, {"t1": tmp_path / "a.nii"}))
    (tmp_path / "out" / "sources.jsonl").unlink()  # masks of before nothing was noted: kept, as ever
    assert predict_manifest(bundle, tmp_path / "m.csv", tmp_path / "out").kept == 2


def test_long_ids_are_shortened_and_stay_apart(bundle, scans, tmp_path):
    long = ["A" * 240, "A" * 239 + "B", "ä" * 120, "C"]
    write_manifest(tmp_path / "m.csv", [Scan("d", name, "", "t1", str(scans["t1"]), {}) for name in long])
    report = predict_manifest(bundle, tmp_path / "m.csv", tmp_path / "out")
    assert (report.done, report.failures) == (4, {})
    assert len(list((tmp_path / "out").glob("*_lesion.nii.gz"))) == 4
    assert len(mask_name(("d", "s" * 500, "v" * 500), "t" * 300)) < 255
    longest = tmp_path / f"{'m' * (os.pathconf(tmp_path, 'PC_NAME_MAX') - len('.nii.gz'))}.nii.gz"
    predict(bundle, {"t1": scans["t1"]}, out=longest)
    assert longest.is_file()


def test_no_session_ends_the_batch(bundle, cohort, tmp_path, monkeypatch):
    real = predict_module.answer

    def unforeseen(engine, files, *arguments):
        if "flair" in files:
            raise RuntimeError("nobody thought of this")
        return real(engine, files, *arguments)

    monkeypatch.setattr(predict_module, "answer", unforeseen)
    report = predict_manifest(bundle, cohort, tmp_path / "out")
    assert report.done == 2
    assert report.failures["d", "a", ""] == "cannot be answered (RuntimeError: nobody thought of this)"
    assert "nobody thought" in (tmp_path / "out" / "failures.csv").read_text()
