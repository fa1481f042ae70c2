"""Weights by name: found where a file could be given, a file of that name wins, an unknown name lists the known ones.

The folder of what ships is one of tiny files here: no test depends on the weights that ship in earnest.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import brainfm
from brainfm.cli import main
from brainfm.crossdomain.networks import build_network
from brainfm.errors import BrainfmWarning, WeightsError
from brainfm.inference.anatomy import Labeller
from brainfm.nets import shipped
from brainfm.nets.backbone_file import load_backbone, read_description
from brainfm.probing.features import Encoder
from brainfm.submission.challenge import read_challenge
from brainfm.submission.container import BACKBONE, stage
from tests.inference.test_anatomy import save

RELEASE = {
    "name": "brainfm_s",
    "licence": {"name": "CC-BY-SA-4.0", "because": "share-alike of a", "terms": {"SBIA": ["a"]}, "use": "research"},
    "sources": [
        {"dataset": "a", "title": "A set", "used_for": ["image"], "licences": ["CC BY-SA 3.0"], "address": "http://a",
         "attribution": "the people of A"},
    ],
    "people": [{"dataset": "a", "people": 3, "scans": 4, "contrasts": {"t1": 3, "t2": 1}, "sex": {"F": 3},
                "ages": [20.0, 30.5, 80.0]}],
    "curves": {"val_total": [[0, 3.0], [10, 2.0]]},
    "half_precision": {"cosine": [1.0, 0.9999], "dice_mean": 0.999, "regions": 40, "head": "a/b"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "ships"
    save(place / "brainfm_s.safetensors", half=True, release=RELEASE)
    (place / "brainfm_s.md").write_text("## Where it fails\n\nOften.\n")
    monkeypatch.setattr(shipped, "FOLDER", place)
    monkeypatch.chdir(tmp_path)
    return place


def test_a_name_is_taken_wherever_a_file_is(folder: Path, tmp_path: Path) -> None:
    file = folder / "brainfm_s.safetensors"
    expected = load_backbone(file)
    assert load_backbone("brainfm_s").fingerprint == expected.fingerprint
    assert read_description("brainfm_s")["release"]["name"] == "brainfm_s"
    weights = brainfm.load("brainfm_s").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in expected.backbone.state_dict().items())
    assert Encoder.load(Path("brainfm_s")).about["weights"] == expected.fingerprint
    assert Labeller.load("brainfm_s", device="cpu").fingerprint == expected.fingerprint
    assert build_network("planar:brainfm_s").name == "planar:brainfm_s"
    task = read_challenge("fomo26").task("task6")
    app = stage(task, Path("brainfm_s"), tmp_path / "app")
    assert (app / BACKBONE).read_bytes() == file.read_bytes()
    assert main(["export", "format=hub", "backbone=brainfm_s", f"out={tmp_path / 'hub'}"]) == 0
    assert (tmp_path / "hub" / "model.safetensors").read_bytes() == file.read_bytes()


def test_half_precision_is_read_into_whole_networks_that_learn(folder: Path) -> None:
    network = brainfm.load("brainfm_s")
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    network.features(torch.randn(1, 1, 16, 16, 16))[-1].square().sum().backward()
    assert all(value.grad is not None for value in network.parameters())


def test_a_file_wins_over_a_name_and_says_so(folder: Path, tmp_path: Path) -> None:
    own = save(tmp_path / "own.safetensors")
    own.rename(tmp_path / "brainfm_s")
    with pytest.warns(BrainfmWarning, match="the file of this name that lies here is taken, not the weights that ship"):
        found = load_backbone("brainfm_s")
    assert not found.release


def test_an_unknown_name_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"^brainfm_x: no such file, and no weights .* those that do: brainfm_s$"):
        load_backbone("brainfm_x")
    with pytest.raises(WeightsError, match=r"^a/b: no such file, expected .* weights that ship: brainfm_s$"):
        load_backbone("a/b")
    with pytest.raises(WeightsError, match="no weights of this name"):
        build_network("planar:brainfm_x")
    with pytest.raises(WeightsError, match="holds 100000, more than half precision can"):
        save(folder / "c.safetensors", half=True, bias=1e5)


def test_nothing_ships_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(shipped, "FOLDER", folder / "none")
    assert main(["weights"]) == 0 and "no weights ship with this copy" in capsys.readouterr().out
    assert main(["weights", "name=brainfm_s"]) == 2 and "those that do: none" in capsys.readouterr().err


def test_the_verb_tells_receipt_sources_licence_and_writes_the_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["weights"]) == 0
    assert capsys.readouterr().out.startswith("brainfm_s: unet_tiny with a decoder and the heads regions; ")
    assert main(["weights", "name=brainfm_s", f"card={tmp_path / 'card.md'}"]) == 0
    said = capsys.readouterr().out
    for words in ("licence CC-BY-SA-4.0 (share-alike of a)", "the people of A, http://a", "code abc", "for research"):
        assert words in said, words
    card = (tmp_path / "card.md").read_text()
    assert "| a | 3 | t1 3, t2 1 | F 3 | 20 to 80, median 30 |" in card
    assert "| val_total | 0: 3.000, 10: 2.000 |" in card and card.endswith("## Where it fails\n\nOften.\n")
    assert main(["weights", f"card={tmp_path / 'x.md'}"]) == 2


def test_what_ships_is_small_and_its_licence_lies_beside_it() -> None:
    texts = {path.stem for path in shipped.FOLDER.glob("*.md")}
    for name in shipped.names():
        path = shipped.FOLDER / f"{name}.safetensors"
        about = read_description(path)
        assert path.stat().st_size <= shipped.MOST_BYTES and name in texts
        assert about["release"]["name"] == name and about["release"]["sources"] and about["provenance"]["commit"]
        assert not re.search(r'"/\w', str(about["provenance"]))  # no path of a machine
    licence = (shipped.FOLDER / "LICENSE").read_text()
    assert "CC BY-SA 4.0" in licence and "SBIA Contribution and Software License Agreement" in licence
