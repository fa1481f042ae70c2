"""Synthetic subjects: reproducible, plausible, not trivial, and written so that they are read back where they lay."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import ConfigError
from brainfm.imaging import atlas, nifti
from brainfm.imaging.atlas import tissue_maps
from brainfm.synthesis import lesions, phantom, template
from brainfm.synthesis.deform import jacobian
from brainfm.synthesis.phantom import SyntheticSubject, subject, write_cohort

pytest.importorskip("nilearn")
SPACING_MM = 3.0
OTHERS = ((1, 2), (0, 2), (0, 1))


@pytest.fixture(scope="module")
def people() -> list[SyntheticSubject]:
    return [subject(0, index, SPACING_MM) for index in range(8)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    write_cohort(root, 6, 0, SPACING_MM)
    return root


def test_tissue_maps_are_probabilities_of_a_head_of_human_size() -> None:
    maps, affine = tissue_maps(2.0)
    total = maps.sum(0)
    assert maps.min() >= 0 and np.all((np.abs(total - 1) < 1e-4) | (total == 0))
    csf, grey, white = maps.sum((1, 2, 3)) * 8 / 1000
    assert 600 < white < 1000 and 800 < grey < 1200 and 150 < csf < 500
    centre = affine[:3, :3] @ ((np.array(total.shape) - 1) / 2) + affine[:3, 3]
    assert np.abs(centre - [0, -17, 7]).max() < 6  # MNI coordinates of the middle of the head


def test_the_template_lies_at_the_same_place_at_every_spacing() -> None:
    middles = []
    for spacing_mm in (1.0, 2.0, 3.0):
        maps, affine = tissue_maps(spacing_mm)
        index = np.array([np.average(np.arange(n), weights=maps[2].sum(o)) for n, o in zip(maps.shape[1:], OTHERS)])
        middles.append(affine[:3, :3] @ index + affine[:3, 3])
    assert np.ptp(middles, axis=0).max() < 0.1


def test_without_nilearn_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'brainfm-mri\[anatomy\]'"):
        atlas._template_file("gm")


@pytest.mark.parametrize("spacing_mm", [0.1, 9.0])
def test_a_spacing_out_of_range_is_refused(spacing_mm: float) -> None:
    with pytest.raises(ConfigError, match="spacing_mm"):
        subject(0, 0, spacing_mm)


def test_a_subject_is_the_same_again_and_another_seed_gives_another(people: list[SyntheticSubject]) -> None:
    again, other = subject(0, 3, SPACING_MM), subject(1, 3, SPACING_MM)
    for contrast, volume in people[3].scans.items():
        assert np.array_equal(volume.voxels, again.scans[contrast].voxels)
        assert np.array_equal(volume.affine_mm, again.scans[contrast].affine_mm)
    assert np.array_equal(people[3].lesion.voxels, again.lesion.voxels)
    assert people[3].age_years == again.age_years != other.age_years


@pytest.mark.parametrize("index", [1, 5, 7])
def test_the_map_to_the_template_does_not_fold(index: int) -> None:
    shape, _ = phantom._grid(0, index, SPACING_MM)
    points = phantom.map_to_template(0, index, shape, SPACING_MM)
    moved, affine = template.widening(phantom._draw_person(0, index).widening_mm)
    through = points + np.stack([template._sample(component, affine, points) for component in moved])
    assert jacobian(points, SPACING_MM).min() > 0 and jacobian(through, SPACING_MM).min() > 0


def test_scans_are_float32_with_a_background_of_zero_and_heads_inside_the_field_of_view(
    people: list[SyntheticSubject],
) -> None:
    for person in people:
        for volume in person.scans.values():
            assert volume.voxels.dtype == np.float32 and volume.voxels.min() == 0
            assert 0.15 < (volume.voxels > 0).mean() < 0.7
            for axis in range(3):
                assert not volume.voxels.take([0, -1], axis=axis).any()


def test_tissues_have_the_order_of_their_contrast(people: list[SyntheticSubject]) -> None:
    for person in people:
        for contrast, order in (("t1", (1, 2, 3)), ("t2", (3, 2, 1)), ("flair", (1, 3, 2))):
            voxels = person.scans[contrast].voxels
            if voxels.shape != person.tissue.shape:
                continue
            healthy = person.lesion.voxels == 0
            means = [np.median(voxels[(person.tissue.voxels == tissue) & healthy]) for tissue in order]
            assert means[0] < means[1] < means[2], contrast


def test_lesions_are_bright_on_flair_dark_on_t1_and_in_white_matter(people: list[SyntheticSubject]) -> None:
    for person in people:
        lesion = person.lesion.voxels == 1
        if lesion.sum() < 20 or person.scans["flair"].shape != lesion.shape:
            continue
        white = (person.tissue.voxels == 3) & ~lesion
        assert np.mean(person.tissue.voxels[lesion] == 3) > 0.6 and not (person.tissue.voxels[lesion] == 0).any()
        flair, t1 = person.scans["flair"].voxels, person.scans["t1"].voxels
        assert np.median(flair[lesion]) > 1.15 * np.median(flair[white])
        assert np.median(t1[lesion]) < 0.95 * np.median(t1[white])


def test_some_have_no_lesion_and_most_have_some(people: list[SyntheticSubject]) -> None:
    loads = [int(person.lesion.voxels.sum()) for person in people]
    assert loads[6] == 0 and sum(load > 0 for load in loads) >= 6


def test_a_threshold_on_flair_does_not_solve_the_task(people: list[SyntheticSubject]) -> None:
    best = []
    for person in people:
        flair, lesion = person.scans["flair"].voxels, person.lesion.voxels == 1
        if flair.shape == lesion.shape and lesion.any():
            cuts = np.percentile(flair[flair > 0], np.linspace(80, 99.9, 40))
            best.append(max(2 * ((flair > c) & lesion).sum() / ((flair > c).sum() + lesion.sum()) for c in cuts))
    assert 0.2 < np.mean(best) < 0.65


def test_ventricles_grow_with_their_widening() -> None:
    maps, affine = tissue_maps(SPACING_MM)
    grid = np.moveaxis(np.indices(maps.shape[1:], dtype=np.float32), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    points = np.moveaxis(grid, -1, 0).astype(np.float32)
    sizes = [(template.bent(points, SPACING_MM, amount).ventricle_mm < 0).sum() for amount in (-1.0, 0.0, 2.0, 4.0)]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] and sizes[3] > 2 * sizes[1]


def test_age_leaves_its_mark() -> None:
    people = [phantom._draw_person(0, index) for index in range(200)]
    ages = [person.age_years for person in people]
    assert np.corrcoef(ages, [person.widening_mm for person in people])[0, 1] > 0.7
    assert np.corrcoef(ages, [person.lesion_count for person in people])[0, 1] > 0.3
    assert min(ages) >= 20 and max(ages) <= 85


def test_a_thick_flair_lies_where_the_t1_lies(people: list[SyntheticSubject]) -> None:
    person = people[5]
    thick, t1 = person.scans["flair"], person.scans["t1"]
    assert thick.spacing_mm == pytest.approx((SPACING_MM, SPACING_MM, 2 * SPACING_MM))
    middles = []
    for volume in (thick, t1):
        places = np.argwhere(volume.voxels > 0)
        middles.append(volume.affine_mm[:3, :3] @ places.mean(0) + volume.affine_mm[:3, 3])
    assert np.abs(middles[0] - middles[1]).max() < 1.5
    assert np.array_equal(person.lesion.affine_mm, t1.affine_mm)


def test_lesions_without_white_matter_are_none() -> None:
    nothing = np.zeros((8, 8, 8), dtype=np.float32)
    assert lesions.draw(np.random.default_rng(0), 5, nothing, nothing, 2.0) == []


def test_files_are_read_back_where_they_lay(cohort: Path, people: list[SyntheticSubject]) -> None:
    codes = set()
    for index, person in enumerate(people[:6]):
        folder = cohort / f"sub-{index + 1:03d}" / "anat"
        wanted = {ending: person.scans[contrast] for contrast, ending in phantom.CONTRASTS.items()}
        for ending, volume in {**wanted, "lesion_mask": person.lesion}.items():
            path = folder / f"sub-{index + 1:03d}_{ending}.nii.gz"
            found, _ = nifti.read(path)
            assert np.allclose(found.affine_mm, volume.affine_mm, atol=1e-3)
            assert np.abs(found.voxels - volume.voxels).max() <= 0.5
            image = nib.load(path)  # and an independent reader agrees
            codes.add("".join(nib.aff2axcodes(image.affine)))
            canonical = nib.as_closest_canonical(image)
            assert np.allclose(canonical.affine, volume.affine_mm, atol=1e-3)
            assert np.array_equal(np.asarray(canonical.dataobj), np.rint(volume.voxels))
    assert codes == {"RAS", "LPS", "PIR"}


def test_the_folder_names_its_participants(cohort: Path) -> None:
    with open(cohort / "participants.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["participant_id"] for row in rows] == [f"sub-{number:03d}" for number in range(1, 7)]
    assert all(20 <= float(row["age"]) <= 85 and row["sex"] in "FM" and row["healthy"] in "01" for row in rows)
    assert json.loads((cohort / "dataset_description.json").read_text(encoding="utf-8"))["BIDSVersion"]


def test_a_smaller_cohort_holds_the_same_files_and_reports_progress(cohort: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_cohort(tmp_path, 2, 0, SPACING_MM, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    for path in sorted(tmp_path.glob("sub-*/anat/*.nii.gz")):
        assert path.read_bytes() == (cohort / path.relative_to(tmp_path)).read_bytes()
