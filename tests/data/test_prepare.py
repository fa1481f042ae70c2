import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.data import prepare as prepare_module
from brainfm.data import store as store_module
from brainfm.data.manifest import Manifest, Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.imaging.preprocess import Recipe
from brainfm.specs import ConfigError, ManifestError, PreprocessSpec, StoreError

SPEC = PreprocessSpec()
RUN = """
import sys
from brainfm.data.manifest import read_manifest
from brainfm.data.prepare import prepare
from brainfm.specs import PreprocessSpec
if __name__ == "__main__":
    prepare(read_manifest(sys.argv[1]), sys.argv[2], PreprocessSpec(), workers=2)
"""


def head(path: Path, seed: int, spacing_mm=(1.0, 1.0, 1.5), shape=(34, 32, 22)) -> np.ndarray:
    """Writes a ball with noise in it, and returns its mask."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    ball = (grid**2).sum(0) < 0.7
    voxels = np.where(ball, 100 + 50 * grid[0] + 10 * rng.standard_normal(shape), 0).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([*spacing_mm, 1])), path)
    return ball


def cohort(folder: Path, subjects: int = 3) -> Manifest:
    scans = []
    for i in range(subjects):
        here = folder / f"sub-{i:02}"
        for seed, contrast in enumerate(("t1", "flair")):
            ball = head(here / f"{contrast}.nii.gz", 10 * i + seed)
            columns = {"lesion_mask": str(here / "lesion.nii.gz"), "age": str(30 + i)}
            scans.append(Scan("ds", f"sub-{i:02}", "", contrast, str(here / f"{contrast}.nii.gz"), columns))
        lesion = (ball & (np.arange(34)[:, None, None] < 12)).astype(np.uint8)
        nib.save(nib.Nifti1Image(lesion, np.diag([1, 1, 1.5, 1])), here / "lesion.nii.gz")
    write_manifest(folder / "manifest.csv", scans)
    return read_manifest(folder / "manifest.csv")


def tree(path: Path) -> dict[str, str]:
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()
    }


def test_prepare(tmp_path):
    manifest = cohort(tmp_path / "data")
    seen = []
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1, progress=lambda n, total: seen.append((n, total)))
    assert (report.done, report.skipped, report.failed) == (3, 0, ())
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    store = Store.open(tmp_path / "store")
    assert [s.subject for s in store.sessions] == ["sub-00", "sub-01", "sub-02"]
    for entry in store.sessions:
        store.verify(entry)
        assert [s.name for s in entry.scans] == ["flair", "t1"] and [s.name for s in entry.labels] == ["lesion_mask"]
        for name in ("t1", "flair", "lesion_mask"):
            assert store.volume(entry, name).shape == entry.shape
            recipe = store.recipe(entry, name)
            assert isinstance(recipe, Recipe) and recipe.spec == SPEC.fingerprint() and recipe.shape == entry.shape
        labelled = store.volume(entry, "lesion_mask")[tuple(store.label_points(entry, "lesion_mask").T.astype(int))]
        assert len(labelled) and (labelled == 1).all()
        points = store.foreground(entry)
        assert len(points) and (points >= 0).all() and (points < entry.shape).all()
        assert entry.columns["age"] == str(30 + int(entry.subject[-2:]))


def test_prepare__again_does_only_what_is_missing(tmp_path, monkeypatch):
    manifest = cohort(tmp_path / "data")
    prepare(manifest, tmp_path / "store", SPEC, workers=1)
    before = tree(tmp_path / "store")
    worked = []
    work = prepare_module._work
    monkeypatch.setattr(prepare_module, "_work", lambda store, s: worked.append(s[0].key[1]) or work(store, s))
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (0, 3) and worked == []
    assert tree(tmp_path / "store") == before

    head(tmp_path / "data" / "sub-01" / "t1.nii.gz", 77)  # a source changes
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (1, 2) and worked == ["sub-01"]
    after = tree(tmp_path / "store")
    changed = {name for name in after if after[name] != before[name]}
    assert all("sub-01" in name or name == "index.csv" for name in changed) and len(changed) > 2

    rows = [s for s in manifest.scans if (s.subject, s.contrast) != ("sub-02", "flair")]  # a row goes
    write_manifest(tmp_path / "data" / "manifest.csv", rows)
    report = prepare(read_manifest(tmp_path / "data" / "manifest.csv"), tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (1, 2)
    assert [len(s.scans) for s in Store.open(tmp_path / "store").sessions] == [2, 2, 1]


def test_prepare__same_store_for_any_number_of_workers_and_after_kill(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=8)
    prepare(manifest, tmp_path / "one", SPEC, workers=1)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(manifest.path), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    sessions = tmp_path / "two" / "sessions"
    while not (sessions.is_dir() and len(list(sessions.iterdir())) >= 2):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(500):  # the workers end with their parent
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("a worker outlived its parent")
    there = len(list(sessions.iterdir()))
    assert 2 <= there < 8
    with pytest.raises(StoreError, match="prepare was interrupted; run prepare again"):
        Store.open(tmp_path / "two")
    report = prepare(manifest, tmp_path / "two", SPEC, workers=2)
    assert (report.done, report.skipped) == (8 - there, there)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert (tmp_path / "two").joinpath("index.csv").exists()


def test_prepare__failures_are_reported_and_skipped(tmp_path):
    manifest = cohort(tmp_path / "data")
    (tmp_path / "data" / "sub-00" / "t1.nii.gz").write_bytes(b"not an image")
    for name in ("t1", "flair"):
        (tmp_path / "data" / "sub-02" / f"{name}.nii.gz").write_bytes(b"")
    head(tmp_path / "data" / "sub-01" / "lesion.nii.gz", 1, shape=(10, 10, 10))
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert [(f.subject, f.contrast, Path(f.path).name) for f in report.failed] == [
        ("sub-00", "t1", "t1.nii.gz"),
        ("sub-01", "", "lesion.nii.gz"),
        ("sub-02", "flair", "flair.nii.gz"),
        ("sub-02", "t1", "t1.nii.gz"),
    ]
    assert all(f.reason and "\n" not in f.reason for f in report.failed)
    assert [(s.subject, len(s.scans), len(s.labels)) for s in Store.open(tmp_path / "store").sessions] == [
        ("sub-00", 1, 1),
        ("sub-01", 2, 0),
    ]
    again = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (again.done, again.skipped, again.failed) == (0, 3, report.failed)
    head(tmp_path / "data" / "sub-02" / "t1.nii.gz", 5)  # mended
    mended = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (mended.done, mended.skipped, len(mended.failed)) == (1, 2, 3)


def test_prepare__refusals_write_nothing(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=1)
    with pytest.raises(ConfigError, match="workers=-1"):
        prepare(manifest, tmp_path / "store", SPEC, workers=-1)
    (tmp_path / "data" / "sub-00" / "t1.nii.gz").rename(tmp_path / "elsewhere.nii.gz")
    with pytest.raises(ManifestError, match="missing"):
        prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert not (tmp_path / "store").exists()
    (tmp_path / "elsewhere.nii.gz").rename(tmp_path / "data" / "sub-00" / "t1.nii.gz")
    prepare(manifest, tmp_path / "store", SPEC, workers=1)
    before = tree(tmp_path / "store")
    with pytest.raises(StoreError, match=r"made with preprocess\.margin_mm=2\.0, now preprocess\.margin_mm=3\.0"):
        prepare(manifest, tmp_path / "store", PreprocessSpec(margin_mm=3), workers=1)
    with Store.open(tmp_path / "store").locked(), pytest.raises(StoreError, match="another prepare"):
        prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert tree(tmp_path / "store") == before


def test_prepare__disk_full_keeps_what_was_done(tmp_path, monkeypatch):
    manifest = cohort(tmp_path / "data")
    write, count = store_module._write_file, []

    def full(file, content):
        count.append(file)
        if sum(f.name == "session.json" for f in count) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    monkeypatch.setattr(store_module, "_write_file", full)
    with pytest.raises(StoreError, match="no space is left on the disk"):
        prepare(manifest, tmp_path / "store", SPEC, workers=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "store" / "sessions").iterdir())) == 1
    assert not list((tmp_path / "store").glob("tmp-*"))
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (2, 1)


def test_prepare__killed_worker(tmp_path):
    """What the system does when memory runs out: one worker is gone, the run says so and can be taken up again."""
    manifest = cohort(tmp_path / "data", subjects=6)

    def kill_a_worker(done: int, total: int) -> None:
        if done == 1:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(StoreError, match=r"a worker was killed.*fewer than workers=2"):
        prepare(manifest, tmp_path / "store", SPEC, workers=2, progress=kill_a_worker)
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert report.skipped >= 1 and report.done + report.skipped == 6


def test_prepare__interrupted_by_the_user(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=5)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(manifest, tmp_path / "store", SPEC, workers=2, progress=stop)
    left = {p.name for p in (tmp_path / "store").iterdir()}
    assert left == {"spec.json", ".lock", "sessions"}  # no temporary folder, no index
    assert prepare(manifest, tmp_path / "store", SPEC, workers=1).skipped >= 1


def test_prepare__real_scans(tmp_path, data3d):
    here = data3d / "openms_cross" / "patient07"
    columns = {"lesion_mask": str(here / "patient07_lesion_mask.nii.gz")}
    scans = [Scan("openms", "07", "", "flair", str(here / "patient07_FLAIR.nii.gz"), columns)]
    write_manifest(tmp_path / "manifest.csv", scans)
    report = prepare(read_manifest(tmp_path / "manifest.csv"), tmp_path / "store", SPEC, workers=1)
    assert report.failed == ()
    store = Store.open(tmp_path / "store")
    (entry,) = store.sessions
    file = tmp_path / "store" / "sessions" / entry.folder / "flair.b2nd"
    assert file.stat().st_size < 0.25 * 4 * np.prod(entry.shape)
    lesion = nib.load(columns["lesion_mask"]).get_fdata() > 0
    assert abs(store.volume(entry, "lesion_mask").sum() - lesion.sum()) < 0.02 * lesion.sum()
