"""Pictures show left where they say left, cut where they are told, and outline what they are given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from brainfm.reports import pictures


def _pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return imread(io.BytesIO(png))


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    """[X, Y, Z] an ellipsoid of 10 with noise, 0 outside."""
    x, y, z = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in (24, 30, 26)), indexing="ij")
    noise = np.random.default_rng(0).normal(10, 1, x.shape)
    return np.where(x**2 + y**2 + z**2 < 1, noise, 0).astype(np.float32)


@pytest.fixture(scope="module")
def lesion(head: np.ndarray) -> np.ndarray:
    mask = np.zeros(head.shape, dtype=np.uint8)
    mask[6:10, 12:17, 11:15] = 1
    return mask


@pytest.mark.parametrize("plane", pictures.PLANES)
def test_sides_are_where_the_marks_say(plane: str) -> None:
    volume = np.zeros((5, 6, 7))
    volume[-1, -1, -1] = 1  # right, anterior, superior
    index = volume.shape[pictures._AXES[plane][2]] - 1
    picture = pictures._section_of(volume, plane, index)
    assert picture[0, -1] == 1 and picture.sum() == 1  # at the left, on top
    assert pictures._MARKS[plane][0] == ("A" if plane == "sagittal" else "R")


def test_the_picture_itself_shows_the_right_on_the_left(head: np.ndarray) -> None:
    bright = head.copy()
    bright[bright > 0] = 1
    bright[12:][bright[12:] > 0] = 10  # the patient's right half
    seen = _pixels(pictures.slices_figure([("", bright)], planes=("axial",)))[..., 0]
    middle = seen.shape[1] // 2
    inner = slice(seen.shape[0] // 3, 2 * seen.shape[0] // 3)
    assert seen[inner, : middle - 5].mean() > seen[inner, middle + 5 :].mean() + 0.3


def test_an_overlay_shows_both_outlines_where_the_lesion_is(head: np.ndarray, lesion: np.ndarray) -> None:
    assert pictures._largest(lesion, "axial") in range(11, 15) and pictures._largest(lesion, "sagittal") in range(6, 10)
    pixels = _pixels(pictures.overlay_figure(head, lesion, np.roll(lesion, 2, axis=1), spacing_mm=(2, 2, 3)))
    upper = pixels[: int(0.85 * pixels.shape[0])]
    for colour in (pictures.TRUTH_COLOUR, pictures.PREDICTION_COLOUR):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(upper[..., :3] - wanted).max(-1) < 0.05).sum() > 50


@pytest.mark.parametrize("empty", ["truth", "prediction", "both"])
def test_an_overlay_without_a_lesion_is_drawn_too(head: np.ndarray, lesion: np.ndarray, empty: str) -> None:
    nothing = np.zeros_like(lesion)
    truth = lesion if empty == "prediction" else nothing
    prediction = lesion if empty == "truth" else nothing
    assert _pixels(pictures.overlay_figure(head, truth, prediction)).size


def test_every_label_of_a_map_is_outlined(head: np.ndarray) -> None:
    labels = np.zeros(head.shape, np.uint8)
    labels[6:18, 8:22, 8:18] = 1
    labels[12:18, 8:22, 8:18] = 7
    nothing = np.zeros_like(labels)

    def drawn(truth: np.ndarray) -> int:
        pixels = _pixels(pictures.overlay_figure(head, truth, nothing))
        wanted = [int(pictures.TRUTH_COLOUR[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return int((np.abs(pixels[: int(0.85 * len(pixels)), :, :3] - wanted).max(-1) < 0.1).sum())

    border = drawn(labels) - drawn(labels > 0)
    assert border > 200  # the line between the two


def test_a_map_is_cut_where_it_is_strongest_or_where_one_says(
    head: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[int] = []
    tile = pictures._tile
    monkeypatch.setattr(pictures, "_tile", lambda v, plane, index, *a: cuts.append(index) or tile(v, plane, index, *a))
    heat = np.zeros_like(head)
    heat[7, 14, 12] = 1
    pictures.heat_figure(head, heat)
    corner = [side.start for side in pictures._box(head)]
    assert [c + corner[a] for c, a in zip(cuts, (2, 1, 0))] == [12, 14, 7]
    cuts.clear()
    pictures.heat_figure(head, heat, at_vox=(10, 11, 13))
    assert [c + corner[a] for c, a in zip(cuts, (2, 1, 0))] == [13, 11, 10]
    cuts.clear()
    pictures.heat_figure(head, heat, at_vox=(-5, 99, 0))  # within the picture all the same
    assert cuts == [0, pictures._box(head)[1].stop - 1 - corner[1], 0]


def test_slices_cut_where_they_are_told(head: np.ndarray, lesion: np.ndarray) -> None:
    named = pictures.slices_figure([("t1", head), ("flair", head)], contours=[None, lesion], at_vox=(7, 14, 12))
    assert _pixels(named).shape[1] > 300
    assert pictures.slices_figure([("a", head)], at_vox=(7, 14, 12)) != pictures.slices_figure([("a", head)])
    assert _pixels(pictures.slices_figure([("constant", np.zeros((9, 9, 9)))])).size


def test_a_cohort_may_lack_a_contrast(head: np.ndarray, lesion: np.ndarray) -> None:
    subjects = [("sub-1", {"t1": head, "flair": head}, lesion), ("sub-2", {"t1": head}, None)]
    assert _pixels(pictures.cohort_figure(subjects, (2.0, 2.0, 2.0))).size


def test_hidden_voxels_are_shown_as_hidden(head: np.ndarray) -> None:
    whole = head[:, :, 13]
    hidden = whole.copy()
    hidden[4:14, 6:20] = np.nan
    pixels = _pixels(pictures.reconstruction_figure({"input": [whole], "masked": [hidden]}, ["t1"]))
    blue = np.abs(pixels[..., :3] - np.array(pictures._HIDDEN)).max(-1) < 0.02
    assert blue[:, pixels.shape[1] // 2 :].sum() > 500 and blue[:, : pixels.shape[1] // 2].sum() == 0
    with pytest.raises(ValueError):
        pictures.reconstruction_figure({"input": [whole], "masked": []})
