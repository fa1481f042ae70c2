"""Frozen baselines: slices and covariance against plain loops, labelled where weights are random, through the verbs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.resnet import ResNet
from brainfm.probing.features import read
from brainfm.probing.frozen import CovarianceDescriber, SliceDescriber

SHAPE = (20, 24, 18)
POINTS = np.argwhere(np.ones(SHAPE))[::5]


def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def test_covariance_is_that_of_every_level_over_the_head() -> None:
    asked = CovarianceDescriber({"name": "unet", "widths": [4, 20]}, device="cpu")
    found = asked(volume(), POINTS)
    assert found.shape == (2 * 4 + 4 * 5 // 2 + 2 * 20 + 16 * 17 // 2,) and np.isfinite(found).all()
    image = torch.from_numpy(volume())[None, None]
    with torch.no_grad():
        level = asked.network.features(image)[0][0].double().numpy()
    cells = level[:, POINTS[:, 0], POINTS[:, 1], POINTS[:, 2]]  # the first level has a cell a voxel
    turned = asked.directions[0].numpy().T @ (cells - cells.mean(1, keepdims=True))
    covariance = turned @ turned.T / len(POINTS)
    wanted = np.concatenate([cells.mean(1), cells.std(1), covariance[np.triu_indices(4)]])
    np.testing.assert_allclose(found[:18], wanted, rtol=1e-4, atol=1e-6)
    assert np.array_equal(found, CovarianceDescriber(asked.network.config, device="cpu")(volume(), POINTS))


def test_slices_along_three_axes_with_weights_of_a_file_or_random_ones_that_are_called_so(tmp_path: Path) -> None:
    torch.save(ResNet("resnet18", torch.Generator().manual_seed(7)).state_dict(), tmp_path / "r.pth")
    random, loaded = SliceDescriber(device="cpu"), SliceDescriber(str(tmp_path / "r.pth"), device="cpu")
    assert (random.part, loaded.part) == ("slices_random", "slices") and random.about["weights"] == "random, seed 0"
    for asked in (random, loaded):
        asked.edge = 32
    one, other = random(volume(), POINTS), loaded(volume(), POINTS)
    assert one.shape == (6 * 512,) and not np.allclose(one, other)
    turned = random(volume().transpose(1, 2, 0), POINTS[:, [1, 2, 0]])  # Y, Z, X: other axes come first
    assert not np.allclose(one, turned) and np.isfinite(turned).all()


def test_what_is_not_there_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"weights=timm:vit needs timm.*\[slices\].*or give a local file"):
        SliceDescriber("timm:vit", device="cpu")
    assert main(["embed", "baseline=covariance", f"input.t1={tmp_path}", f"out={tmp_path / 'f.npz'}"]) == 2
    assert "expected store=DIR" in capsys.readouterr().err
    assert main(["embed", f"store={tmp_path}", f"out={tmp_path / 'f.npz'}"]) == 2
    assert "either backbone=FILE or baseline=" in capsys.readouterr().err


def test_the_verb_leaves_features_that_a_probe_reads(toy_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    assert main(["embed", "baseline=covariance", f"store={toy_store.path}", f"out={out}", "device=cpu"]) == 0
    found = read(out)
    assert list(found.parts) == ["covariance"] and found.about["weights"] == "random, seed 0"
    assert len(found.rows) == 11
