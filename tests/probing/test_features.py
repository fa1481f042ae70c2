"""Features of whole heads: pooled as a loop would, the same every time, and back from every kind of file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import brainfm
from brainfm.cli import main
from brainfm.data.store import Store
from brainfm.errors import ConfigError, ScanError, WeightsError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import save_backbone
from brainfm.nets.latents import Latents
from brainfm.probing import features as module
from brainfm.probing.features import Embedding, Encoder, Extent, embed, pool, read, write
from brainfm.specs import PreprocessSpec, Provenance

PARTS = {"anatomy": 0.7, "looks": 0.3}


def save(path: Path, with_latents: bool = True, **more: Any) -> Path:
    torch.manual_seed(0)
    backbone = build_backbone("unet_tiny")
    latents = Latents(backbone.widths, PARTS, 10, variational=True)
    state = {f"latents.{name}": value for name, value in latents.state_dict().items()} if with_latents else {}
    save_backbone(
        path, backbone,
        objective={"name": "toy", "config": {"parts": PARTS, "latent_channels": 10}},
        objective_state=state | {"decoder.out.weight": torch.zeros(1)},
        preprocess=PreprocessSpec(spacing_mm=(2, 2, 2)),
        patch_vox=(16, 16, 16), provenance=Provenance("0", "", ""), **more,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("backbone") / "backbone.safetensors")


@pytest.fixture(scope="module")
def found(file: Path, toy_store: Store) -> Embedding:
    return embed(file, toy_store.path, device="cpu")


def test_a_row_for_each_scan_and_a_column_for_each_channel(found: Embedding, toy_store: Store) -> None:
    wanted = sorted((*s.key, scan.name, scan.contrast) for s in toy_store.sessions for scan in s.scans)
    assert list(found.rows) == wanted and len(wanted) == 11
    assert {part: values.shape for part, values in found.parts.items()} == {
        "backbone": (11, 64), "anatomy": (11, 14), "looks": (11, 6),
    }  # fmt: skip
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in found.parts.values())
    assert found.matrix.shape == (11, 84) and len(found.names) == 84
    assert found.names[0] == "backbone_mean_0" and found.names[-1] == "looks_std_2"
    assert found.about["store"] == toy_store.fingerprint() and found.about["backbone"] == {"name": "unet_tiny"}
    assert "note" not in found.about
    assert len({row.tobytes() for row in found.matrix}) == 11


def test_pooled_as_a_loop_over_the_points_of_the_head(file: Path, found: Embedding, toy_store: Store) -> None:
    encoder = Encoder.load(file)
    session = toy_store.sessions[2]
    scan = session.scans[0]
    shape = np.array(session.shape)
    room = -shape % 4
    before = room // 2
    image = toy_store.block(session, scan.name, tuple(-before), tuple(shape + room)).astype(np.float32)
    with torch.no_grad():
        maps = encoder.backbone.features(torch.from_numpy(image)[None, None])
        assert encoder.latents is not None
        wanted = {"backbone": maps[-1], "anatomy": encoder.latents(maps)["anatomy"].mean}
    row = found.rows.index((*session.key, scan.name, scan.contrast))
    for part, value in wanted.items():
        cells = [tuple((point + before) // 4) for point in toy_store.foreground(session).astype(int)]
        seen = np.array([value[0, :, x, y, z].numpy() for x, y, z in cells], np.float64)
        both = np.concatenate([seen.mean(axis=0), seen.std(axis=0)])
        np.testing.assert_allclose(found.parts[part][row], both, rtol=1e-4, atol=1e-5)


def test_the_same_numbers_whoever_else_is_asked(file: Path, found: Embedding, toy_store: Store) -> None:
    some = {session.key for session in toy_store.sessions[2:4]}
    again = embed(file, toy_store, sessions=some, device="cpu")
    own = [place for place, row in enumerate(found.rows) if row[:3] in some]
    assert again.rows == tuple(found.rows[place] for place in own)
    assert np.array_equal(again.matrix, found.matrix[own])
    one = embed(file, toy_store, contrasts=["flair"], sessions=some, parts=["backbone"], device="cpu")
    assert [row[4] for row in one.rows] == ["flair"] * 2 and list(one.parts) == ["backbone"]
    assert np.array_equal(one.matrix, again.parts["backbone"][[row[4] == "flair" for row in again.rows]])


def test_air_around_the_head_does_not_count() -> None:
    """Air in steps of the stride moves no cell; a network without a norm sees what it saw."""

    class Blocks(torch.nn.Module):
        strides = (1, 4)

        def features(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image, torch.nn.functional.avg_pool3d(image, 4)]

    rng = np.random.default_rng(0)
    volume = rng.normal(size=(16, 12, 20)).astype(np.float32)
    points = np.argwhere(np.ones(volume.shape))
    encoder = Encoder(Blocks(), None, ("backbone",), {})  # type: ignore[arg-type]
    tight = pool(encoder, volume, points, Extent())
    wide = pool(encoder, np.pad(volume, 4, constant_values=volume.min()), points + 4, Extent())
    np.testing.assert_allclose(wide["backbone"], tight["backbone"], rtol=1e-6)
    assert tight["backbone"][0] == pytest.approx(volume.mean(), abs=1e-6)
    for window in ((8, 8, 8), (12, 12, 12), (1, 1, 1), (100, 8, 16)):  # overlapping windows count every cell once
        windows = pool(encoder, volume, points, Extent(0, window))
        np.testing.assert_allclose(windows["backbone"], tight["backbone"], rtol=1e-5, atol=1e-7)


def test_windows_cover_every_cell_and_small_heads_are_not_cut() -> None:
    for cells in ((5, 7, 2), (4, 4, 4), (9, 3, 6)):
        seen = np.zeros(cells, int)
        boxes = module._windows(cells, 4, Extent(0, (16, 10, 8)))
        for box in boxes:
            seen[box] += 1
            assert [part.stop - part.start for part in box] == [min(n, w) for n, w in zip(cells, (4, 3, 2))]
        assert seen.min() == 1
        assert len(boxes) == np.prod([-(-n // min(n, w)) for n, w in zip(cells, (4, 3, 2))])
    assert len(module._windows((40, 50, 45), 4, Extent())) == 1  # 5.8 million voxels: a head at 1 mm
    assert len(module._windows((80, 50, 60), 4, Extent())) > 1


def test_windows_read_a_real_network_close_to_the_whole(file: Path, found: Embedding, toy_store: Store) -> None:
    some = {toy_store.sessions[0].key}
    windows = embed(file, toy_store, sessions=some, extent=Extent(0, (24, 24, 24)), device="cpu").matrix[0]
    whole = found.matrix[[row[:3] in some for row in found.rows].index(True)]
    assert not np.array_equal(windows, whole)
    assert np.corrcoef(windows, whole)[0, 1] > 0.9


@pytest.mark.parametrize("ending", module.FORMATS)
def test_every_format_gives_back_what_was_written(ending: str, found: Embedding, tmp_path: Path) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    files = write(found, tmp_path / f"f{ending}")
    assert sorted(files) == sorted(tmp_path.iterdir())
    back = read(tmp_path / f"f{ending}")
    assert back.rows == found.rows and list(back.parts) == list(found.parts)
    assert all(np.array_equal(back.parts[part], values) for part, values in found.parts.items())
    assert back.about.items() >= found.about.items()


def test_parquet_is_a_plain_table_for_others(found: Embedding, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write(found, tmp_path / "f.parquet")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == [*module.IDS, *found.names]
    assert str(table.schema.field("backbone_mean_0").type) == "float"
    assert table["contrast"].to_pylist() == [row[4] for row in found.rows]


def test_npy_is_the_matrix_with_ids_beside_it(found: Embedding, tmp_path: Path) -> None:
    write(found, tmp_path / "f.npy")
    assert np.array_equal(np.load(tmp_path / "f.npy"), found.matrix)
    lines = (tmp_path / "f.ids.csv").read_text().splitlines()
    assert lines[0] == "dataset,subject,session,scan,contrast" and lines[1] == ",".join(found.rows[0])
    assert json.loads((tmp_path / "f.about.json").read_text())["features"] == found.names


def test_features_of_others_are_read_as_one_part(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("volume,dataset,subject,session,scan,contrast,age2\n3.5,d,s,1,t1,t1,-2\n")
    back = read(tmp_path / "f.csv")
    assert back.rows == (("d", "s", "1", "t1", "t1"),) and back.parts["features"].tolist() == [[3.5, -2.0]]


def test_a_file_is_prepared_and_gives_what_its_store_gives(file: Path, found: Embedding, toy_manifest: Path) -> None:
    """The session that has one scan: the store's grid is then the file's own."""
    scan = toy_manifest.parent / "sub-00" / "t1.nii.gz"
    alone = brainfm.embed(file, {"t1": scan}, device="cpu")
    assert alone.rows == (("", "t1.nii.gz", "", "t1", "t1"),)
    row = found.rows.index(("toy", "00", "1", "t1", "t1"))
    np.testing.assert_allclose(alone.matrix[0], found.matrix[row], rtol=0.02, atol=0.02)  # a store rounds its voxels
    assert brainfm.embed(file, scan, device="cpu").rows[0][3:] == ("unknown", "unknown")


def test_a_file_without_named_parts_has_the_backbone_alone(tmp_path: Path) -> None:
    plain = Encoder.load(save(tmp_path / "b.safetensors", with_latents=False))
    assert plain.parts == ("backbone",) and plain.latents is None
    with pytest.raises(ConfigError, match=r"parts: unknown part 'anatomy', expected one or more of backbone$"):
        Encoder.load(tmp_path / "b.safetensors", ["anatomy"])


def test_a_random_network_is_a_function_of_its_seed_and_leaves_the_generator_alone(file: Path) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (Encoder.random({"name": "unet_tiny"}, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [next(e.backbone.parameters()) for e in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not one.backbone.training


@pytest.mark.parametrize(
    ("voxel_mm", "said"),
    [((1.0, 4.0), None), ((2.0, 2.0), None), (None, None), ((2.1, 4.0), "2.1 to 4 mm"), ((0.8, 1.5), "0.8 to 1.5 mm")],
)
def test_voxels_of_a_size_that_was_never_seen_are_noted(
    voxel_mm: tuple[float, float] | None, said: str | None, toy_store: Store, toy_manifest: Path, tmp_path: Path
) -> None:
    """Of a store, and of a file, which is prepared as the backbone's scans were."""
    file = save(tmp_path / "b.safetensors", with_latents=False, voxel_mm=voxel_mm)
    scan = toy_manifest.parent / "sub-00" / "t1.nii.gz"
    for source, more in ((toy_store, {"sessions": {toy_store.sessions[0].key}}), (scan, {})):
        note = embed(file, source, device="cpu", **more).about.get("note")  # type: ignore[arg-type]
        assert (note is None) == (said is None)
        if said is not None:
            assert f"voxels of 2 x 2 x 2 mm; the backbone was trained on voxels of {said}" in note


def test_scans_prepared_otherwise_are_noted(file: Path, toy_store: Store, found: Embedding) -> None:
    store = Store.open(toy_store.path)
    store.spec = PreprocessSpec(spacing_mm=(2, 2, 2), clip_percentiles=(1, 99))
    noted = embed(file, store, sessions={toy_store.sessions[0].key}, device="cpu")
    assert noted.about["note"].startswith("the backbone was trained on scans prepared as {'spacing_mm': [2.0,")


def test_refusals(file: Path, toy_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"contrasts=swi: .*has none of them, expected one of flair, t1$"):
        embed(file, toy_store, contrasts=["swi"], device="cpu")
    with pytest.raises(WeightsError, match="no such file"):
        embed(tmp_path / "nothing.safetensors", toy_store)
    with pytest.raises(ScanError, match="no such file, expected a NIfTI file"):
        embed(file, {"t1": tmp_path / "no.nii.gz"}, device="cpu")
    with pytest.raises(ConfigError, match=r"whole_mvox=-1: expected 0 or more"):
        Extent(-1)
    with pytest.raises(ConfigError, match=r"expected a file that ends in \.parquet, \.npy, \.npz, \.csv"):
        module.check_format(tmp_path / "f.txt")
    with pytest.raises(ConfigError, match=r"no such file, expected features"):
        read(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text("dataset,subject,session,contrast,x\nd,s,1,t1,2\n")
    with pytest.raises(ConfigError, match=r"f\.csv: cannot be read as features with ids \('scan' is not in list\)"):
        read(tmp_path / "f.csv")
    (tmp_path / "f.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ConfigError, match=r"f\.npz: cannot be read as features with ids"):
        read(tmp_path / "f.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"Parquet needs pyarrow.*pip install 'brainfm-mri\[train\]', or write"):
        module.check_format(tmp_path / "f.parquet")


def test_the_verb(file: Path, found: Embedding, toy_store: Store, tmp_path: Path, capsys) -> None:
    spaced = tmp_path / "a folder = here" / "f.csv"
    words = [f"backbone={file}", f"store={toy_store.path}", f"out={spaced}", "contrasts=[t1]", "parts=[anatomy]"]
    assert main(["embed", *words, "device=cpu"]) == 0
    assert "6 scans; features: anatomy 14" in capsys.readouterr().out
    t1 = [row[4] == "t1" for row in found.rows]
    assert np.array_equal(read(spaced).matrix, found.parts["anatomy"][t1])
    assert main(["embed", f"backbone={file}", f"out={spaced}"]) == 2
    assert "expected either store=DIR or input.CONTRAST=FILE" in capsys.readouterr().err
