"""What many tests need: real scans where they are at hand, a small prepared store, one thread."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.specs import PreprocessSpec


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # bit-equality between runs does not depend on it, the machine's other tests do


@pytest.fixture(scope="session")
def data3d() -> Path:
    """The folder of real scans; the test is skipped where there is none."""
    named = os.environ.get("BRAINFM_DATA3D")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data3d"
    if not folder.is_dir():
        pytest.skip("no real scans here (BRAINFM_DATA3D)")
    return folder


def write_subjects(root: Path, count: int, contrasts: tuple[str, ...] = ("t1", "flair"), edge: int = 36) -> Path:
    """Small bright heads with a lesion on the left; subject 0 has only the first contrast. Returns the manifest."""
    import nibabel as nib

    scans = []
    for number in range(count):
        rng = np.random.default_rng(number)
        x, y, z = np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij")
        head = (x**2 + y**2 + z**2) < 0.8
        lesion = ((x + 0.35) ** 2 + y**2 + (z - rng.uniform(-0.2, 0.2)) ** 2) < 0.05
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[:3, 3] = -edge
        folder = root / f"sub-{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        mask = folder / "lesion_mask.nii.gz"
        nib.save(nib.Nifti1Image(lesion.astype(np.uint8), affine), mask)
        for place, contrast in enumerate(contrasts if number else contrasts[:1]):
            voxels = head * (100 + 20 * np.sin(4 * x + place) + rng.normal(0, 3, head.shape)) + lesion * 60 * (
                place + 1
            )
            path = folder / f"{contrast}.nii.gz"
            nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), path)
            columns = {"lesion_mask": str(mask.relative_to(root))}
            scans.append(Scan("toy", f"{number:02d}", "1", contrast, str(path.relative_to(root)), columns))
    manifest = root / "manifest.csv"
    write_manifest(manifest, scans)
    return manifest


@pytest.fixture(scope="session")
def toy_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_subjects(tmp_path_factory.mktemp("toy"), 6)


@pytest.fixture(scope="session")
def toy_store(toy_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six subjects on a 2 mm grid; never written to."""
    path = tmp_path_factory.mktemp("store") / "store"
    prepare(read_manifest(toy_manifest), path, PreprocessSpec(spacing_mm=(2, 2, 2)), 1, lambda done, total: None)
    return Store.open(path)


def _save(path: Path, voxels: np.ndarray) -> str:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return str(path.relative_to(path.parents[1]))


@pytest.fixture(scope="session")
def people_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six people with a t1 and a t2; 0-3 with tissue maps, 0 twice; 1 with a lesion mask; 2 ill, 3 healthy."""
    root, edge = tmp_path_factory.mktemp("people"), 24
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij"))
    head = (grid**2).sum(0) < 0.8
    tissue = (head * (1 + (grid[0] > -0.3) + (grid[0] > 0.3))).astype(np.uint8)  # 1, 2, 3 from left to right
    scans = []
    for number in range(6):
        rng = np.random.default_rng(number)
        for visit in ("1", "2") if number == 0 else ("1",):
            folder = root / f"s{number}v{visit}"
            columns = {"age": str(40 + number + 2.5 * (visit == "2")), "healthy": {2: "0", 3: "1"}.get(number, "")}
            if number < 4:
                columns["tissue_labels"] = _save(folder / "tissue.nii.gz", tissue)
            if number == 1:
                lesion = (((grid - np.array([0.7, 0, 0])[:, None, None, None]) ** 2).sum(0) < 0.03).astype(np.uint8)
                columns["lesion_mask"] = _save(folder / "lesion.nii.gz", lesion)
                columns["brain_mask"] = _save(folder / "brain.nii.gz", head.astype(np.uint8))
            for contrast, order in (("t1", (0, 1, 2, 3)), ("t2", (0, 3, 2, 1))):
                voxels = 100.0 * np.choose(tissue, order) + rng.normal(0, 4, head.shape) * head
                path = _save(folder / f"{contrast}.nii.gz", voxels.astype(np.float32))
                scans.append(Scan("d", f"p{number}", visit, contrast, path, columns))
    write_manifest(root / "m.csv", scans)
    report = prepare(
        read_manifest(root / "m.csv"), root / "store", PreprocessSpec(spacing_mm=(2, 2, 2), labels="nearest"), workers=1
    )
    assert not report.failed
    return Store.open(root / "store")
