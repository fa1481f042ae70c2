"""Models for sharing: graphs, a hub's folder, MONAI's bundle."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import brainfm
from brainfm.cli import main
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.cpu import swap_out
from brainfm.tasks.bundle import read_bundle
from tests import phantoms

OLD = Path(__file__).parents[1] / "fixtures" / "format_9328027"
LESIONS, AGE, BACKBONE = OLD / "lesion_bundle", OLD / "age_bundle", OLD / "cross_contrast.safetensors"


def exported(kind: str, out: Path, *words: str) -> Path:
    assert main(["export", f"format={kind}", f"out={out}", *words]) == 0
    return out


def windows(cases: int) -> Tensor:
    task = read_bundle(LESIONS).task
    return torch.randn(cases, len(task.contrasts), *task.patch_vox, generator=torch.Generator().manual_seed(cases))


@torch.no_grad()
def probabilities(image: Tensor) -> Tensor:
    members = [swap_out(member) for member in read_bundle(LESIONS).networks]
    return torch.stack([torch.softmax(member(image), 1) for member in members]).mean(0)


@pytest.mark.parametrize("cases", [1, 3])
@torch.no_grad()
def test_a_traced_bundle_answers_for_any_number_of_windows(tmp_path: Path, cases: int) -> None:
    path = exported("torchscript", tmp_path / "lesions.pt", f"bundle={LESIONS}")
    files = {"brainfm.json": ""}
    network = torch.jit.load(path, _extra_files=files)
    torch.testing.assert_close(network(windows(cases)), probabilities(windows(cases)), atol=1e-6, rtol=1e-5)
    assert json.loads(files["brainfm.json"])["fingerprint"] == read_bundle(LESIONS).fingerprint


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_does_so_too(tmp_path: Path) -> None:
    path = exported("torch_export", tmp_path / "lesions.pt2", f"bundle={LESIONS}")
    network = torch.export.load(path).module()
    for cases in (1, 3):
        torch.testing.assert_close(network(windows(cases)), probabilities(windows(cases)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_onnx_gives_the_same_probabilities_in_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = exported("onnx", tmp_path / "lesions.onnx", f"bundle={LESIONS}")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for cases in (1, 3):
        found = session.run(None, {"image": windows(cases).numpy()})[0]
        np.testing.assert_allclose(found, probabilities(windows(cases)).numpy(), atol=1e-5)
    held = json.loads(session.get_modelmeta().custom_metadata_map["brainfm"])
    assert held["task"]["contrasts"] == list(read_bundle(LESIONS).task.contrasts)


@torch.no_grad()
def test_onnx_gives_a_backbones_maps(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = exported("onnx", tmp_path / "b.onnx", f"backbone={BACKBONE}", "patch_vox=[16,16,16]")
    image = torch.randn(3, 1, 16, 16, 16)
    found = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image.numpy()})
    for ours, theirs in zip(brainfm.load(BACKBONE)(image), found, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)


def test_without_onnx_one_sentence_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainfm.extras.find_spec", lambda name: None)
    assert main(["export", "format=onnx", f"bundle={LESIONS}", f"out={tmp_path / 'x.onnx'}"]) == 2
    assert "pip install 'brainfm-mri[exchange]'" in capsys.readouterr().err


def test_a_folder_for_a_hub_holds_what_brainfm_reads(tmp_path: Path) -> None:
    one = exported("hub", tmp_path / "one", f"backbone={BACKBONE}", "licence=cc-by-4.0")
    assert load_backbone(one / "model.safetensors").fingerprint == load_backbone(BACKBONE).fingerprint
    card = (one / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: brainfm\n") and "million parameters" in card
    assert json.loads((one / "config.json").read_text())["backbone"] == load_backbone(BACKBONE).backbone.config
    two = exported("hub", tmp_path / "two", f"bundle={LESIONS}")
    assert read_bundle(two / "bundle").fingerprint == read_bundle(LESIONS).fingerprint
    assert (LESIONS / "README.md").read_text() in (two / "README.md").read_text()


def test_monai_runs_its_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ignite")
    pytest.importorskip("monai")
    from monai.bundle import run

    out = exported("monai", tmp_path / "monai", f"bundle={LESIONS}")
    shape, affine = (26, 30, 24), phantoms.centred(phantoms.axes("LPS"), (4, 4, 4), (26, 30, 24))
    for contrast in read_bundle(LESIONS).task.contrasts:
        place = out / "inputs" / "p1" / f"{contrast}.nii.gz"
        place.parent.mkdir(parents=True, exist_ok=True)
        phantoms.write(place, phantoms.head(shape, affine, np.random.default_rng(0)), affine)
    run(config_file=str(out / "configs" / "inference.json"), bundle_root=str(out))
    (written,) = (out / "outputs").rglob("*.nii.gz")
    assert nib.load(written).shape == shape and np.allclose(nib.load(written).affine, affine)


def test_monai_can_prepare_and_name_everything_in_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    from monai.bundle import ConfigParser

    out = exported("monai", tmp_path / "monai", f"bundle={LESIONS}")
    meta = json.loads((out / "configs" / "metadata.json").read_text())
    assert meta["network_data_format"]["inputs"]["image"]["channel_def"] == {
        str(index): contrast for index, contrast in enumerate(read_bundle(LESIONS).task.contrasts)
    }
    shape, affine = (26, 30, 24), phantoms.centred(phantoms.axes("LPS"), (4, 4, 4), (26, 30, 24))
    contrasts = read_bundle(LESIONS).task.contrasts
    for contrast in contrasts:
        place = out / "inputs" / "p1" / f"{contrast}.nii.gz"
        place.parent.mkdir(parents=True, exist_ok=True)
        phantoms.write(place, phantoms.head(shape, affine, np.random.default_rng(0)), affine)
    parser = ConfigParser()
    parser.read_config(out / "configs" / "inference.json")
    parser["bundle_root"] = str(out)
    case = parser.get_parsed_content("dataset")[0]
    network, inferer = (parser.get_parsed_content(name) for name in ("network", "inferer"))
    case["pred"] = inferer(case["image"][None], network)[0]
    done = parser.get_parsed_content("postprocessing")(case)
    assert tuple(done["pred"].shape[1:]) == shape and set(np.unique(done["pred"].numpy())) <= {0, 1}
    (written,) = (out / "outputs").rglob("*.nii.gz")
    assert nib.load(written).shape == shape and np.allclose(nib.load(written).affine, affine, atol=1e-4)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["export", *words]) == 2
        return capsys.readouterr().err

    assert "answers for a whole head" in said("format=onnx", f"bundle={AGE}", f"out={tmp_path / 'a.onnx'}")
    assert "either backbone=FILE or bundle=DIR" in said("format=hub", f"out={tmp_path / 'a'}")
    assert "bundle must be given" in said("format=monai", f"out={tmp_path / 'a'}")
    assert "expected a file *.pt for" in said("format=torchscript", f"bundle={LESIONS}", f"out={tmp_path / 'a.onnx'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for format in ("hub", "monai"):
        assert "expected a free place" in said(f"format={format}", f"bundle={LESIONS}", f"out={tmp_path / 'full'}")
    words = ("format=torchscript", f"backbone={BACKBONE}", f"out={tmp_path / 'a.pt'}")
    assert "a window of 1,000,000,000,000 million voxels, expected at most 134 million" in said(
        *words, "patch_vox=[1000000,1000000,1000000]"
    )


@pytest.mark.parametrize("licence", ["cc-by-4.0", "other: see the card", "yes", 'a "quoted" one', "# none", ""])
def test_a_licence_in_any_words_is_one_value_of_the_front_matter(licence: str, tmp_path: Path) -> None:
    words = ["export", "format=hub", f"backbone={BACKBONE}", f"out={tmp_path / 'hub'}", f"licence={licence}"]
    assert main(words) == 0
    front = (tmp_path / "hub" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == licence
