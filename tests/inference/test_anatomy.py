"""Regions of scans by a backbone's own head: on the right grid, on the right side, measured, resumable, refused."""

from __future__ import annotations

import csv
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.data.doctor import examine
from brainfm.data.layouts import find
from brainfm.data.manifest import Manifest, Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.regions import REGIONS
from brainfm.data.schemes import guess_scheme
from brainfm.data.settings import TargetSpec
from brainfm.data.store import Store
from brainfm.data.targets import find_targets
from brainfm.data.volumes import read_volumes
from brainfm.errors import BrainfmWarning, ConfigError, FileError, ScanError, WeightsError
from brainfm.imaging.preprocess import prepare_session
from brainfm.inference import anatomy as module
from brainfm.inference.anatomy import Labeller, RegionNetwork, keep_one_head, label_files, label_regions
from brainfm.nets import shipped
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.nets.unet import ConvNormAct
from brainfm.specs import PreprocessSpec, Provenance
from tests import phantoms

LEVELS = {"background": 0, "head": 60, "frontal_white": 120, "superior_frontal": 180, "thalamus": 300}  # grey values
RADII_MM, SPACING_MM = np.array([62.0, 72.0, 58.0]), 3.0
LEFT_MM, LEFT_RADIUS_MM = np.array([-30.0, 10.0, 5.0]), 15.0
GRIDS = {
    "RAS": phantoms.centred(np.eye(3), (3, 3, 3), (48, 56, 46)),
    "LPS": phantoms.centred(phantoms.axes("LPS"), (2.5, 2.5, 2.5), (58, 66, 54)),
    "oblique": phantoms.centred(phantoms.rotation(12, 20) @ phantoms.axes("LPS"), (3, 3, 3), (58, 62, 52)),
}
SHAPES = {"RAS": (48, 56, 46), "LPS": (58, 66, 54), "oblique": (58, 62, 52)}


def truth(shape: tuple[int, ...], affine_mm: np.ndarray) -> np.ndarray:
    """Names of LEVELS by number: a shell, white matter, a block of cortex at the front, a thalamus on the left."""
    place = phantoms.world_mm(shape, affine_mm)
    radius = np.square(place / RADII_MM).sum(axis=-1)
    found = np.where(radius < 1, 1, 0)
    found[radius < 0.81] = 2
    found[(np.abs(place - (10, 40, 10)) < 14).all(axis=-1)] = 3
    found[np.linalg.norm(place - LEFT_MM, axis=-1) < LEFT_RADIUS_MM] = 4
    return found


def write_scan(path: Path, grid: str, gain: float = 1.0) -> Path:
    grey = np.array(list(LEVELS.values()), np.float32)[truth(SHAPES[grid], GRIDS[grid])]
    noise = np.random.default_rng(0).standard_normal(grey.shape)
    phantoms.write(path, gain * np.clip(grey + noise * (grey > 0), 0, None), GRIDS[grid])
    return path


def save(
    path: Path, *, names: tuple[str, ...] = tuple(REGIONS), head: bool = True, bias: float = 0, **options: object
) -> Path:
    """A file with fresh weights."""
    backbone = build_backbone("unet_tiny")
    decoder = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 4, "free": 2})
    heads = {"regions": DenseHead("anatomy", 4, names)} if head else {"lesion": DenseHead("free", 2, ("lesion",))}
    with torch.no_grad():
        next(iter(heads.values())).bias += bias
    return _write(path, backbone, decoder, heads, **options)


def _write(path: Path, backbone, decoder, heads, *, voxel_mm=(0.8, 5.0), **options: object) -> Path:
    save_backbone(
        path, backbone, objective={"name": "dense_split", "config": {}}, objective_state={},
        preprocess=PreprocessSpec(), patch_vox=(16, 16, 16), decoder=decoder, heads=heads, voxel_mm=voxel_mm,
        provenance=Provenance(version="0", commit="abc", data="d", config={}, parents=()), **options,
    )  # fmt: skip
    return path


@torch.no_grad()
def by_hand(path: Path, scan: Path) -> Path:
    """A file that tells the LEVELS by their intensity: identities up to the first channel of the anatomy, then the
    upper envelope of straight lines, with thresholds half-way between what the levels of a scan come to."""
    backbone = build_backbone("unet_tiny")
    decoder = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 2, "pathology": 1})
    for weight in [*backbone.parameters(), *decoder.parameters()]:
        weight.zero_()
    convs = [*backbone.levels[0], decoder.merges[-1]]
    for place, block in zip((0, 0, backbone.widths[0]), convs, strict=True):  # the skip comes after what is climbed
        assert isinstance(block, ConvNormAct)
        block[0].weight[0, place, 1, 1, 1] = 1
        block[1].weight[0], block[1].bias[0] = 1, 10  # all positive: the leaky ReLU changes nothing
    decoder.out.weight[0, 0] = 1
    head = DenseHead("anatomy", 2, tuple(REGIONS))
    head.weight.zero_()
    head.bias.fill_(-1e4)

    spec = PreprocessSpec(spacing_mm=(SPACING_MM,) * 3)
    prepared = prepare_session({"t1": scan}, {}, spec)
    image = torch.from_numpy(prepared.scans["t1"])[None]
    labeller = Labeller(
        RegionNetwork(backbone, decoder, head), tuple(REGIONS), spec, torch.device("cpu"), None, None, 0.5, ""
    )
    x, y, z = labeller._whole(image.shape[1:])
    padded = torch.full((1, 1, x, y, z), float(image.min()))
    before = [(size - n) // 2 for size, n in zip((x, y, z), image.shape[1:])]
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:]))
    padded[(0, 0, *inner)] = image[0]
    value = decoder.split(decoder(backbone.features(padded)))["anatomy"][(0, 0, *inner)].numpy()
    levels = truth(image.shape[1:], prepared.affine_mm)
    middles = [float(np.median(value[levels == k])) for k in range(len(LEVELS))]
    assert middles == sorted(middles)
    thresholds = [(a + b) / 2 for a, b in pairwise(middles)]
    for k, name in enumerate(LEVELS):
        head.weight[list(REGIONS).index(name), 0] = 60.0 * k
        head.bias[list(REGIONS).index(name)] = -60.0 * sum(thresholds[:k])
    return _write(path, backbone, decoder, {"regions": head})


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("known")
    return by_hand(folder / "backbone.safetensors", write_scan(folder / "scan.nii.gz", "RAS"))


def labeller_of(backbone: Path, **options: object) -> Labeller:
    return Labeller.load(backbone, **{"spacing_mm": SPACING_MM, "device": "cpu", **options})


# ---- one scan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_regions_lie_on_the_scan_and_left_stays_left(grid: str, known: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan.nii.gz", grid, gain=7.0)
    written = label_files(labeller_of(known), {"flair": scan}, tmp_path / "out")
    made, mask = nib.load(written.labels), nib.load(written.mask)
    assert written.labels.name == "flair_dseg.nii.gz" and written.mask.name == "flair_brain_mask.nii.gz"
    for image in (made, mask):
        assert image.shape == SHAPES[grid] and np.allclose(image.affine, GRIDS[grid], atol=1e-4)
    ids, levels = np.asarray(made.dataobj), truth(SHAPES[grid], GRIDS[grid])
    for k, name in enumerate(LEVELS):
        a, b = ids == REGIONS[name], levels == k
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85, name
    middle = phantoms.world_mm(ids.shape, made.affine)[ids == REGIONS["thalamus"]].mean(axis=0)
    assert np.allclose(middle, LEFT_MM, atol=2)
    brain = np.asarray(mask.dataobj)
    assert set(np.unique(brain)) == {0, 1} and np.array_equal(brain > 0, ~np.isin(ids, (0, REGIONS["head"])))
    assert guess_scheme(np.unique(ids)) == "brainfm"


def test_volumes_are_those_of_the_head_and_readable(known: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "who.nii.gz", "RAS")  # its voxels are the network's: nothing is between two levels
    written = label_files(labeller_of(known), {"t2": scan}, tmp_path)
    table = read_volumes(written.volumes)
    assert table.kind == "brainfm" and list(table.rows) == ["/who/"] and table.problems == []
    counts = np.bincount(truth(SHAPES["RAS"], GRIDS["RAS"]).ravel()) * SPACING_MM**3 / 1000
    assert table.icv_ml["/who/"] == pytest.approx(counts[2:].sum(), rel=0.01)
    for k, name in list(enumerate(LEVELS))[2:]:
        assert table.rows["/who/"][name] == pytest.approx(counts[k], rel=0.02), name
    assert not {"background", "head", "icv"} & set(table.regions) and len(table.regions) == len(REGIONS) - 2
    with open(written.legend, newline="") as file:
        legend = list(csv.DictReader(file, delimiter="\t"))
    assert {row["name"]: int(row["index"]) for row in legend} == REGIONS
    assert [int(row["index"]) for row in legend] == sorted(REGIONS.values())


def test_a_label_map_may_be_named(known: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan.nii.gz", "RAS")
    label_files(labeller_of(known), {"t1": scan}, tmp_path / "new" / "sub-1_dseg.nii.gz")
    made = {"sub-1_dseg.nii.gz", "sub-1_brain_mask.nii.gz", "sub-1_volumes.csv", "sub-1_dseg.tsv"}
    made |= {"sub-1_tissues.nii.gz"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == made
    with pytest.raises(ConfigError, match="would replace one of the inputs"):
        label_files(labeller_of(known), {"t1": scan}, scan)


def test_several_scans_are_averaged_on_the_grid_of_the_first_by_rank(known: Path, tmp_path: Path) -> None:
    files = {"flair": write_scan(tmp_path / "f.nii.gz", "LPS"), "t1": write_scan(tmp_path / "t.nii.gz", "oblique")}
    with pytest.raises(ConfigError, match=r"inputs flair, t1; expected one of them, or fuse=true"):
        label_files(labeller_of(known), files, tmp_path / "out")
    written = label_files(labeller_of(known), files, tmp_path / "out", fuse=True)
    assert written.labels.name == "t1_dseg.nii.gz" and nib.load(written.labels).shape == SHAPES["oblique"]
    ids = np.asarray(nib.load(written.labels).dataobj)
    thalamus = truth(SHAPES["oblique"], GRIDS["oblique"]) == 4
    assert (ids[thalamus] == REGIONS["thalamus"]).mean() > 0.8
    flair_first = label_files(labeller_of(known), files, tmp_path / "out", ["flair", "t1"], fuse=True)
    assert flair_first.labels.name == "flair_dseg.nii.gz"


@torch.no_grad()
def test_the_mean_of_scans_is_that_of_probabilities() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("unet_tiny").eval()
    decoder = DenseDecoder(backbone.widths, backbone.strides, {"free": 2, "anatomy": 4})
    network = RegionNetwork(backbone, decoder, DenseHead("anatomy", 4, ("background", "head", "thalamus"))).eval()
    image = torch.randn(2, 3, 16, 16, 16)
    apart = [network(image[:, m : m + 1], torch.ones(2, 1)).softmax(dim=1) for m in range(3)]
    both = network(image, torch.ones(2, 3)).softmax(dim=1)
    torch.testing.assert_close(both, torch.stack(apart).mean(dim=0))
    features = decoder(backbone.features(image[:, :1]))
    torch.testing.assert_close(apart[0], network.head(features[:, 2:]).softmax(dim=1))


def test_what_is_not_connected_with_the_head_goes_outside() -> None:
    rng = np.random.default_rng(1)
    share = rng.random((4, 20, 18, 16)).astype(np.float32)
    inside = np.zeros((20, 18, 16), bool)
    inside[3:12, 3:14, 3:13] = True
    inside[17:19, 14:16, 12:14] = True  # apart
    share[:2] *= np.where(inside, 0.05, 20)
    share[0, 18, 15, 13] = share[1, 18, 15, 13] = 0  # nothing outside to hand over to
    share /= share.sum(axis=0)
    before = share.copy()
    keep_one_head(share, [0, 1], 3.0)
    assert np.allclose(share.sum(axis=0), 1, atol=1e-5) and share.min() >= 0
    assert np.array_equal(share[:, 3:12, 3:14, 3:13], before[:, 3:12, 3:14, 3:13])
    assert np.array_equal(share[:, 2, 6, 6], before[:, 2, 6, 6]) and (share[2:, 15:] == 0).all()  # 1 voxel around
    kept = before[:2, 16] / before[:2, 16].sum(axis=0)
    assert np.allclose(share[:2, 16], kept, atol=1e-5)
    assert share[:, 18, 15, 13].tolist() == [1, 0, 0, 0]
    nothing = np.ones((2, 3, 3, 3), np.float32) / 2
    keep_one_head(nothing, [0, 1], 3.0)
    assert (nothing == 0.5).all()


def test_labels_that_cannot_be_right_are_written_with_a_warning_and_a_flag(known: Path, tmp_path: Path) -> None:
    grey = np.array(list(LEVELS.values()), np.float32)[truth(SHAPES["RAS"], GRIDS["RAS"])]
    phantoms.write(tmp_path / "doll.nii.gz", grey, np.diag([0.6, 0.6, 0.6, 1]) @ GRIDS["RAS"])
    reason = "intracranial volume of 1[0-9][0-9] ml, expected 500 to 3000 ml"
    with pytest.warns(BrainfmWarning, match=f"doll.nii.gz: its labels are not to be trusted: {reason}"):
        written = label_files(labeller_of(known, spacing_mm=1.8), {"t1": tmp_path / "doll.nii.gz"}, tmp_path / "out")
    assert written.labels.exists() and "intracranial" in written.volumes.read_text()
    write_manifest(tmp_path / "m.csv", [Scan("d", "doll", "", "t1", "doll.nii.gz")])
    report = label_regions(labeller_of(known, spacing_mm=1.8), read_manifest(tmp_path / "m.csv"), tmp_path / "many")
    assert "intracranial" in report.flagged[0].reason and not list((tmp_path / "many").rglob("*.nii.gz"))


# ---- a manifest ------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """a: an LPS T1 and a FLAIR; b: an oblique T2, with a lesion mask; c: cut short; d: a DWI alone."""
    root = tmp_path / "in"
    root.mkdir()
    scans = [
        Scan("toy", subject, "1", contrast, write_scan(root / f"{subject}_{contrast}.nii.gz", grid).name)
        for subject, contrast, grid in (
            ("a", "t1", "LPS"), ("a", "flair", "RAS"), ("b", "t2", "oblique"), ("c", "t1", "RAS"), ("d", "dwi", "RAS"),
        )
    ]  # fmt: skip
    phantoms.write(root / "lesions.nii.gz", truth(SHAPES["oblique"], GRIDS["oblique"]) == 4, GRIDS["oblique"])
    scans[2].columns["lesion_mask"] = "lesions.nii.gz"
    whole = (root / "c_t1.nii.gz").read_bytes()
    (root / "c_t1.nii.gz").write_bytes(whole[: len(whole) // 2])
    write_manifest(root / "manifest.csv", scans)
    return read_manifest(root / "manifest.csv")


def test_a_damaged_scan_is_a_row_and_nothing_is_made_twice(known: Path, manifest: Manifest, tmp_path: Path) -> None:
    out, steps = tmp_path / "out", []
    report = label_regions(
        labeller_of(known), manifest, out, ["t1", "t2"], progress=lambda done, total: steps.append((done, total))
    )
    assert (report.done, report.skipped, report.without) == (3, 0, 1) and steps[-1] == (3, 3)
    assert [Path(flagged.path).name for flagged in report.flagged] == ["c_t1.nii.gz"]
    with open(out / "volumes.csv", newline="") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert rows["a"]["flag"] == "" and rows["c"]["flag"] and rows["c"]["icv_ml"] == ""
    assert sorted(read_volumes(out / "volumes.csv").rows) == ["toy/a/1", "toy/b/1"]
    folder = out / "labels" / "toy" / "a" / "1"
    assert sorted(p.name for p in folder.iterdir()) == ["t1_brain_mask.nii.gz", "t1_dseg.json", "t1_dseg.nii.gz"]
    before = (folder / "t1_dseg.nii.gz").read_bytes()
    again = label_regions(labeller_of(known), manifest, out, ["t1", "t2"])
    assert (again.done, again.skipped, again.flagged) == (0, 3, report.flagged)
    (folder / "t1_brain_mask.nii.gz").write_bytes(b"cut short")
    (out / "dseg.tsv").unlink()
    assert label_regions(labeller_of(known), manifest, out, ["t1", "t2"]).done == 1
    assert (folder / "t1_dseg.nii.gz").read_bytes() == before and (out / "dseg.tsv").exists()
    assert label_regions(labeller_of(known, spacing_mm=4), manifest, out, ["t1", "t2"]).done == 3
    other = save(tmp_path / "other.safetensors")
    assert label_regions(labeller_of(other, spacing_mm=4), manifest, out, ["t1"]).done == 2


def test_an_interrupted_run_goes_on(known: Path, manifest: Manifest, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_regions(labeller_of(known), manifest, tmp_path / "out", ["t1", "t2"], progress=stop)
    report = label_regions(labeller_of(known), manifest, tmp_path / "out", ["t1", "t2"])
    assert (report.done, report.skipped) == (2, 1)


def test_fused_sessions_are_made_again_when_a_scan_of_them_changes(
    known: Path, manifest: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = label_regions(labeller_of(known), manifest, out, ["t1", "flair"], fuse=True)
    assert (first.done, len(first.flagged)) == (2, 1)
    assert nib.load(out / "labels" / "toy" / "a" / "1" / "t1_dseg.nii.gz").shape == SHAPES["LPS"]
    write_scan(manifest.path.parent / "a_flair.nii.gz", "oblique")
    assert label_regions(labeller_of(known), manifest, out, ["t1", "flair"], fuse=True).done == 1
    assert label_regions(labeller_of(known), manifest, out, ["t1", "flair"]).done == 2


def test_our_own_pretrain_reads_the_labels_and_takes_no_brain_for_a_lesion(
    known: Path, manifest: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    label_regions(labeller_of(known), manifest, out, ["t1", "t2"])
    made = read_manifest(out / "manifest.csv")
    columns = {scan.subject: scan.columns for scan in made.scans}
    assert columns["a"]["regions_labels"].endswith("t1_dseg.nii.gz") and not columns["c"]["regions_labels"]
    assert columns["a"]["brain_mask"].endswith("t1_brain_mask.nii.gz")
    assert not any(Path(c["regions_labels"]).is_absolute() for c in columns.values())
    faults = examine(made, 0).faults
    assert {Path(fault.path).name for fault in faults if "t1_" in fault.path or "t2_" in fault.path} <= {"c_t1.nii.gz"}
    assert all("labels" not in fault.path.split("/") for fault in faults)
    usable = [scan for scan in made.scans if scan.subject in "ab"]
    write_manifest(out / "usable.csv", usable)
    prepare(read_manifest(out / "usable.csv"), tmp_path / "store", PreprocessSpec(spacing_mm=(3, 3, 3)), 0)
    targets = find_targets(
        Store.open(tmp_path / "store"), TargetSpec(level="regions", synthesise=0), ["toy/a", "toy/b"]
    )
    assert {chosen.scheme for chosen in targets.maps.values()} == {"brainfm"} and len(targets.maps) == 2
    assert targets.lesions == {("toy", "b", "1"): ("lesion_mask",)}
    assert any("not taken for pathology: brain_mask" in note for note in targets.notes)


def test_a_folder_of_label_maps_holds_no_scan(known: Path, manifest: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    label_regions(labeller_of(known), manifest, out, ["t1", "t2"])
    write_scan(out / "sub-01_T1w.nii.gz", "RAS")
    label_files(labeller_of(known), {"t1": out / "sub-01_T1w.nii.gz"}, out)
    assert [Path(scan.path).name for scan in find(out).scans] == ["sub-01_T1w.nii.gz"]


def test_brain_masks_that_are_there_stay(known: Path, manifest: Manifest, tmp_path: Path) -> None:
    for scan in manifest.scans:
        scan.columns["brain_mask"] = "lesions.nii.gz" if scan.subject == "b" else ""
    write_manifest(manifest.path, manifest.scans)
    label_regions(labeller_of(known), read_manifest(manifest.path), tmp_path / "out", ["t1", "t2"])
    columns = {scan.subject: scan.columns for scan in read_manifest(tmp_path / "out" / "manifest.csv").scans}
    assert columns["a"]["brain_mask"] == "" and columns["a"]["regions_labels"]
    assert columns["b"]["brain_mask"].endswith("in/lesions.nii.gz")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_files_that_tell_no_regions(tmp_path: Path) -> None:
    encoder = save_backbone(
        tmp_path / "encoder.safetensors", build_backbone("unet_tiny"), objective={"name": "mae", "config": {}},
        objective_state={}, preprocess=PreprocessSpec(), patch_vox=(16, 16, 16),
        provenance=Provenance(version="0", commit="abc", data="d", config={}, parents=()),
    )  # fmt: skip
    assert encoder
    with pytest.raises(WeightsError, match="holds no decoder"):
        Labeller.load(tmp_path / "encoder.safetensors")
    with pytest.raises(WeightsError, match="no head that tells regions, found lesion; expected a file of objective="):
        Labeller.load(save(tmp_path / "lesion.safetensors", head=False))
    with pytest.raises(WeightsError, match="a class 'spleen', expected regions of brainfm"):
        Labeller.load(save(tmp_path / "spleen.safetensors", names=("background", "spleen")))
    with pytest.raises(WeightsError, match="'head' as its first class"):
        Labeller.load(save(tmp_path / "order.safetensors", names=("head", "background")))
    with pytest.raises(ConfigError, match="method=network needs backbone=FILE"):
        Labeller.load(None)


def test_other_voxels_than_were_seen_are_said(tmp_path: Path) -> None:
    wide, old = save(tmp_path / "wide.safetensors"), save(tmp_path / "old.safetensors", voxel_mm=None)
    with pytest.warns(BrainfmWarning, match=r"spacing_mm=6: .* trained on voxels of 0.8 to 5 mm"):
        Labeller.load(wide, spacing_mm=6, device="cpu")
    with pytest.warns(BrainfmWarning, match="voxels of 1 to 1 mm"):
        Labeller.load(old, spacing_mm=1.5, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Labeller.load(wide, spacing_mm=0.8, device="cpu")
        Labeller.load(old, spacing_mm=1.0, device="cpu")


@pytest.mark.parametrize("patch_vox", [50, 4, [16, 16], [16, 16, 18], "big"])
def test_windows_that_the_backbone_cannot_take(patch_vox: object, known: Path) -> None:
    with pytest.raises(ConfigError, match=r"patch_vox=.* multiples of 4 from 8 on, or null"):
        Labeller.load(known, patch_vox=patch_vox)
    assert Labeller.load(known, patch_vox=[16, 16, 32]).patch_vox == (16, 16, 32)


def test_windows_see_the_same_head(known: Path, tmp_path: Path) -> None:
    """One window as large as the head is the whole head."""
    scan = write_scan(tmp_path / "scan.nii.gz", "RAS")
    whole = labeller_of(known).find({"t1": scan})
    window = labeller_of(known, patch_vox=[44, 52, 40]).find({"t1": scan})
    assert np.array_equal(whole.labels, window.labels)
    assert labeller_of(known)._whole((41, 52, 39)) == (44, 52, 40)
    assert labeller_of(known)._whole((150, 190, 170)) == (128, 128, 128)


def test_inputs_that_cannot_be(known: Path, tmp_path: Path) -> None:
    scan, labeller = write_scan(tmp_path / "scan.nii.gz", "RAS"), labeller_of(known)
    with pytest.raises(ConfigError, match=r"input.t9: unknown contrast"):
        label_files(labeller, {"t9": scan}, tmp_path / "out")
    with pytest.raises(ScanError, match=r"none.nii.gz: no such file, given as input.t1"):
        label_files(labeller, {"t1": tmp_path / "none.nii.gz"}, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"input.t1: none of contrasts=flair"):
        label_files(labeller, {"t1": scan}, tmp_path / "out", ["flair"])
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(ConfigError, match="is a folder with the name of a file"):
        label_files(labeller, {"t1": scan}, tmp_path / "folder.nii")
    with pytest.raises(FileError, match="nothing can be written there"):
        label_files(labeller, {"t1": scan}, scan / "below")
    scan.write_bytes(scan.read_bytes()[:2000])
    with pytest.raises(ScanError, match=r"scan.nii.gz"):
        label_files(labeller, {"t1": scan}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(
    known: Path, manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "nothing ships")
    given = [f"manifest={manifest.path}", f"out={tmp_path / 'out'}"]
    network = [f"backbone={known}", f"spacing_mm={SPACING_MM}", "device=cpu"]
    for words, said in (
        ([*given, "method=magic"], "method=magic: expected network, atlas or null"),
        ([*given, "method=network"], "method=network needs backbone=FILE"),
        ([*given, *network, "method=atlas"], "method=atlas takes a manifest and no network, found backbone="),
        ([*given, "fuse=true"], "found fuse="),
        ([*given, *network, "input.t1=x"], "expected either input.CONTRAST=FILE or manifest=FILE"),
        ([given[1]], "expected either input.CONTRAST=FILE or manifest=FILE"),
        ([given[1], "input.t1=x"], "found input.CONTRAST="),
        ([*given, "backbone=none.safetensors"], "none.safetensors: no such file"),
    ):
        assert main(["anatomy", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["anatomy", *given, *network]) == 0
    said = capsys.readouterr().out
    assert "4 scans segmented, 0 were there, 1 of them not trusted" in said and "c_t1.nii.gz" in said
    scan = manifest.path.parent / "a_t1.nii.gz"
    assert main(["anatomy", f"input.t1={scan}", f"out={tmp_path / 'one'}", *network]) == 0
    assert "t1_dseg.nii.gz: 5 labels" in capsys.readouterr().out
    assert (tmp_path / "one" / "t1_dseg.nii.gz").read_bytes() == next(
        (tmp_path / "out").rglob("a/1/t1_dseg.nii.gz")
    ).read_bytes()


def test_tissues_are_merged_regions() -> None:
    labels = np.array([0, *(REGIONS[n] for n in ("head", "fourth_ventricle", "insula", "brainstem", "temporal_white"))])
    assert module.tissues_of(labels).tolist() == [0, 0, 1, 2, 3, 3]


def test_voxels_are_the_scans_own_where_none_are_asked_for(known: Path, tmp_path: Path) -> None:
    for mm, seen in ((1.0, 1.5), (1.75, 1.75), (3.0, 2.0)):
        affine = phantoms.centred(np.eye(3), (mm, mm, mm), (8, 8, 8))
        phantoms.write(tmp_path / "scan.nii.gz", np.ones((8, 8, 8)), affine)
        spec = Labeller.load(known, device="cpu").spec_for(tmp_path / "scan.nii.gz")
        assert spec.spacing_mm == pytest.approx((seen,) * 3)
        assert labeller_of(known).spec_for(tmp_path / "scan.nii.gz").spacing_mm == (SPACING_MM,) * 3
    narrow = _write(tmp_path / "n.safetensors", *_parts_of(known), voxel_mm=(0.9, 1.2))
    assert Labeller.load(narrow, device="cpu").own_mm == (1.2, 1.2)  # never beyond what it was trained on


def _parts_of(path: Path) -> tuple[object, object, object]:
    loaded = load_backbone(path)
    return loaded.backbone, loaded.decoder, loaded.heads


def test_what_ships_labels_unasked_and_a_picture_lies_beside(
    known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "ships")
    scan, out = write_scan(tmp_path / "scan.nii.gz", "LPS"), tmp_path / "out"
    words = ["anatomy", f"input.t2={scan}", f"out={out}", f"spacing_mm={SPACING_MM}", "device=cpu"]
    assert main(words) == 2 and "found input.CONTRAST=" in capsys.readouterr().err  # nothing ships: the atlas
    (tmp_path / "ships").mkdir()
    (tmp_path / "ships" / "brainfm_s.safetensors").write_bytes(known.read_bytes())
    assert main(words) == 0
    assert "t2_tissues.nii.gz" in capsys.readouterr().out
    tissues, labels = (nib.load(out / f"t2_{what}.nii.gz") for what in ("tissues", "dseg"))
    assert np.array_equal(tissues.affine, labels.affine)
    assert np.array_equal(tissues.dataobj, module.tissues_of(np.asarray(labels.dataobj)))
    assert set(np.unique(tissues.dataobj)) == {0, 2, 3}
    assert (out / "t2_dseg.png").read_bytes()[:4] == b"\x89PNG"


def test_it_starts_without_the_training_stack() -> None:
    code = f"import sys, {module.__name__}; print(*sys.modules)"
    loaded = {m.split(".")[0] for m in subprocess.check_output([sys.executable, "-c", code], text=True).split()}
    assert not loaded & {"lightning", "hydra", "omegaconf", "torchio", "monai", "matplotlib", "pandas", "tensorboard"}
