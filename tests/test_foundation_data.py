"""The split and the list of sources in foundation/, and the script that makes them."""

from __future__ import annotations

import csv
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainfm.data.manifest import Scan
from brainfm.data.schemes import SCHEMES
from brainfm.errors import ManifestError
from brainfm.imaging import nifti
from brainfm.seeds import unit_hash
from brainfm.volume import Volume

ROOT = Path(__file__).parents[1]


def _script() -> Any:
    spec = util.spec_from_file_location("foundation_data", ROOT / "scripts" / "foundation_data.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["foundation_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = _script()


def _sources() -> list[dict[str, str]]:
    with (ROOT / "foundation" / "sources.csv").open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


# ---- the split -------------------------------------------------------------------------------------------------------


def test_the_split_that_is_committed_is_the_one_the_hashes_give() -> None:
    committed = script.read_split(ROOT / "foundation" / "split.csv")
    assert script.split_people(committed) == committed
    for dataset in ("ixi2mm", "soop_lesions", "synthseg_labels"):  # again, by hand
        people = [subject for name, subject in committed if name == dataset]
        ranked = sorted(people, key=lambda s: unit_hash(f"{dataset}/{s}", "foundation 1"))
        held = {s for s in people if committed[dataset, s] == "held"}
        assert held == set(ranked[: round(len(people) / 3)])


def test_a_third_of_each_set_and_at_least_one_person_is_held() -> None:
    committed = script.read_split(ROOT / "foundation" / "split.csv")
    for dataset in {name for name, _ in committed}:
        sides = [side for (name, _), side in committed.items() if name == dataset]
        held = sides.count("held")
        if len(sides) == 1 or dataset == "openms_long":
            assert held == len(sides)
        else:
            assert held == max(1, round(len(sides) / 3)) < len(sides)
    assert sum(side == "held" for (name, _), side in committed.items() if name == "ixi2mm") >= 36


def test_the_order_of_the_people_moves_nobody_and_a_person_of_two_sets_is_on_one_side() -> None:
    people = [("ds002748", f"sub-{n}") for n in range(4)] + [("ds002748_2mm", f"sub-{n}") for n in range(30)]
    sides = script.split_people(people)
    assert script.split_people(reversed(people)) == sides
    for n in range(4):
        assert sides["ds002748", f"sub-{n}"] == sides["ds002748_2mm", f"sub-{n}"]


def test_a_person_who_would_change_sides_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "split.csv"
    script.write_split(file, {("a", "1"): "held", ("a", "2"): "train"})
    script.write_split(file, {("a", "3"): "train"})  # others stay
    assert script.read_split(file)["a", "1"] == "held" and len(script.read_split(file)) == 3
    with pytest.raises(ManifestError, match="has a/1 on the side held, now train is found"):
        script.write_split(file, {("a", "1"): "train"})


# ---- the sources -----------------------------------------------------------------------------------------------------


def test_nothing_of_a_held_person_is_used_for_training() -> None:
    rows = _sources()
    held = [row for row in rows if row["side"] == "held"]
    assert len(held) > 100
    assert {row["used_for"] for row in held} <= {"test only", "not used"}
    assert {row["variant"] for row in held} == {"none"}
    asked = {"msd_hippocampus", "isles22", "upenn_gbm", "tcga_lgg", "openms_long"}
    assert {row["variant"] for row in rows if row["dataset"] in asked} == {"none"}


def test_the_permissive_variant_has_no_share_alike_source() -> None:
    permissive = [row for row in _sources() if row["variant"] == "permissive+everything"]
    assert {"synthseg_labels", "soop_lesions", "openms_cross"} <= {row["dataset"] for row in permissive}
    for row in permissive:
        assert row["share_alike"] == "no" and "SA" not in row["licence"] and "SBIA" not in row["licence"]
    assert {row["share_alike"] for row in _sources() if row["dataset"] in ("ixi2mm", "isles22")} == {"yes"}


@pytest.mark.parametrize(
    ("licence", "variant"),
    [
        ("CC0", "permissive+everything"),
        ("PDDL 1.0 (OpenfMRI ds000011)", "permissive+everything"),
        ("CC BY 4.0 (TCIA)", "permissive+everything"),
        ("Apache-2.0", "permissive+everything"),
        ("CC BY-SA 3.0 (IXI); repo SBIA licence", "everything"),
        ("CC BY-NC 4.0", "everything"),
        ("SBIA 1.1", "everything"),
    ],
)
def test_which_licences_are_permissive(licence: str, variant: str) -> None:
    assert script.variant_of(licence) == variant


def test_the_lists_know_every_file_of_the_index(data3d: Path, tmp_path: Path) -> None:
    script.write_lists(data3d, tmp_path)
    for name in ("split.csv", "sources.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "foundation" / name).read_bytes()
    assert {file.path for file in script.read_index(data3d)} <= {row["file"] for row in _sources()}


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no INDEX\.tsv"):
        script.read_index(tmp_path)


# ---- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "subject"),
    [
        ("ixi2mm/IXI012-HH-1211/IXI012-HH-1211_T1w.nii.gz", "IXI012-HH-1211"),
        ("ds002748/sub-52/anat/sub-52_T1w.nii.gz", "sub-52"),
        ("upenn_gbm/UPENN-GBM-00006_11/UPENN-GBM-00006_11_T1c.nii.gz", "UPENN-GBM-00006"),
        ("msd_hippocampus/labelsTr/hippocampus_004.nii.gz", "hippocampus_004"),
        ("soop_lesions/sub-2_lesion_mask.nii.gz", "sub-2"),
        ("synthseg_labels/training_seg_07.nii.gz", "training_seg_07"),
    ],
)
def test_whose_a_file_is(path: str, subject: str) -> None:
    assert script.subject_of(path) == subject


def test_a_picture_of_a_label_map_has_one_grey_value_a_label() -> None:
    labels = np.repeat(np.array([0, 2, 3, 4, 507], np.uint16), 4000).reshape(20, 20, 50)
    means = np.arange(25) * 10.0
    picture = script.paint(labels, means, 3)
    assert picture.dtype == np.int16 and (picture[labels == 0] == 0).all()
    for label, place in ((2, 2), (3, 3), (4, 1), (507, 16)):
        grey = picture[labels == label]
        assert abs(grey.mean() - means[place]) < 0.01 * means[place]
        assert abs(grey.std() - 0.1 * means[place]) < 0.01 * means[place] + 0.5
    assert (picture == script.paint(labels, means, 3)).all()
    with pytest.raises(ManifestError, match=r"labels \[99\] have no grey value"):
        script.paint(np.array([2, 99]), means, 0)
    assert {label for ids in script.GREY_CLASSES.values() for label in ids} | {0} <= set(SCHEMES["synthseg_head"])


def test_a_head_that_is_only_a_map_gets_a_picture_on_its_own_grid(tmp_path: Path) -> None:
    labels = np.zeros((20, 22, 24), np.uint16)
    labels[5:15, 5:15, 5:15] = 3
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = (-3, 5, 7)
    (tmp_path / "maps").mkdir()
    nifti.write(tmp_path / "maps" / "training_seg_01.nii.gz", Volume(labels, affine), "LIA")
    np.save(tmp_path / "maps" / "prior_means_t1.npy", np.full((2, 25), 80.0))
    (scan,) = script.rendered_heads(tmp_path / "maps", tmp_path / "out")
    assert (scan.subject, scan.contrast) == ("training_seg_01", "rendered")
    picture, _ = nifti.read(Path(scan.path))
    assert (picture.affine_mm == affine).all()
    assert ((picture.voxels > 0) == (labels > 0)).all()
    written = Path(scan.path).stat().st_mtime_ns
    script.rendered_heads(tmp_path / "maps", tmp_path / "out")
    assert Path(scan.path).stat().st_mtime_ns == written  # what is there is not painted again


def test_a_scan_is_described_by_the_split_and_its_licence() -> None:
    scan = Scan("openms_cross", "patient07", "", "t1", "a.nii", {"lesion_mask": "m.nii", "edss": "1"})
    sides, licences = {("openms_cross", "patient07"): "train"}, {"openms_cross": "CC BY"}
    assert script.described(scan, sides, licences).columns == {
        "age": "", "sex": "", "dlmuse_labels": "", "head_labels": "", "lesion_mask": "m.nii",
        "side": "train", "variant": "permissive+everything", "healthy": "0",
    }  # fmt: skip
    with pytest.raises(ManifestError, match="openms_cross/patient07 is not in the split"):
        script.described(scan, {}, licences)


def test_lesion_shapes_of_held_people_are_not_kept(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "soop_lesions").mkdir(parents=True)
    (out / "lesion_shapes").mkdir(parents=True)
    for name in ("sub-1", "sub-2"):
        (data / "soop_lesions" / f"{name}_lesion_mask.nii.gz").write_bytes(b"x")
    (out / "lesion_shapes" / "soop_lesions-sub-2_lesion_mask.nii.gz").write_bytes(b"left from an older split")
    sides = {("soop_lesions", "sub-1"): "train", ("soop_lesions", "sub-2"): "held"}
    files = [script.File(f"{name}/{who}_lesion_mask.nii.gz", name, who, "CC0") for name, who in sides]
    assert script.gather_shapes(data, out, script.source_rows(files, sides)) == 1
    assert [f.name for f in (out / "lesion_shapes").iterdir()] == ["soop_lesions-sub-1_lesion_mask.nii.gz"]
