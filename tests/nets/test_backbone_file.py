"""The backbone file: whole or refused, and never executed."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import brainfm.nets.backbone_file as backbone_file
from brainfm.errors import BrainfmError, WeightsError
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.nets.transfer import fingerprint, transfer
from brainfm.objectives.objective import build_objective
from brainfm.seen import SeenSubjects
from brainfm.specs import PreprocessSpec, Provenance

SPEC = PreprocessSpec(spacing_mm=(1.0, 1.0, 2.0))
PROVENANCE = Provenance(version="0", commit="abc", data="d", config={"a": [1, {"b": None}]}, parents=("x",))


def _save(path: Path, backbone: Backbone | None = None) -> str:
    return backbone_file.save_backbone(
        path,
        backbone or build_backbone("unet", widths=[2, 3]),
        objective={"name": "mae", "config": {"loss": "mse"}},
        objective_state={"decoder.out.weight": torch.randn(1, 2)},
        preprocess=SPEC,
        patch_vox=(16, 16, 32),
        provenance=PROVENANCE,
    )


def _parts(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        return {n: file.get_tensor(n) for n in file.keys()}, json.loads(file.metadata()["brainfm"])  # noqa: SIM118


def _rewrite(path: Path, tensors: dict[str, torch.Tensor], about: object) -> None:
    if isinstance(about, dict) and "fingerprint" in about:
        about["fingerprint"] = fingerprint(tensors)
    save_file(tensors, path, metadata={"brainfm": json.dumps(about)})


def test_round_trip_is_bit_equal(tmp_path):
    objective = build_objective(
        "cross_contrast", build_backbone("unet_tiny"), patch_vox=(16, 16, 16), seed=0, latent_channels=16
    )
    path = tmp_path / "new" / "backbone.safetensors"
    mark = backbone_file.save_backbone(
        path,
        objective.backbone,
        objective={"name": objective.name, "config": objective.config},
        objective_state=objective.state_for_file(),
        preprocess=SPEC,
        patch_vox=(16, 16, 16),
        provenance=PROVENANCE,
    )
    loaded = backbone_file.load_backbone(path)
    for name, value in objective.backbone.state_dict().items():
        assert torch.equal(value, loaded.backbone.state_dict()[name])
    assert set(loaded.extra) | {f"backbone.{n}" for n in loaded.report.loaded} == set(objective.state_dict())
    assert all(torch.equal(v, loaded.extra[n]) for n, v in objective.state_for_file().items())
    assert (loaded.preprocess, loaded.patch_vox, loaded.fingerprint) == (SPEC, (16, 16, 16), mark)
    assert loaded.provenance == PROVENANCE
    again = build_objective(
        loaded.objective["name"], loaded.backbone, patch_vox=loaded.patch_vox, seed=0, **loaded.objective["config"]
    )
    report = transfer(again, loaded.extra, allow_missing=["backbone.*"])
    assert len(report.loaded) == len(loaded.extra) and not report.unused
    assert not loaded.backbone.training and not backbone_file.load(path).training
    assert [p.name for p in path.parent.iterdir()] == ["backbone.safetensors"]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    _save(tmp_path / "a", build_backbone("unet", widths=[2, 3]))
    torch.manual_seed(0)
    _save(tmp_path / "b", build_backbone("unet", widths=[2, 3]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.safetensors"
    _save(path)
    before = path.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(backbone_file.os, "fsync", interrupt)
    with pytest.raises(OSError, match="no space"):
        _save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_executed(tmp_path, how):
    mark, path = tmp_path / "executed", tmp_path / "backbone.safetensors"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": _Bomb(mark)}))
    else:
        torch.save({"state_dict": _Bomb(mark)}, path)
    with pytest.raises(WeightsError, match="pickle is never opened"):
        backbone_file.load_backbone(path)
    assert not mark.exists()


def test_missing_truncated_foreign(tmp_path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(WeightsError, match="no such file"):
        backbone_file.load_backbone(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        backbone_file.load_backbone(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="no description"):
        backbone_file.load_backbone(path)
    _save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        backbone_file.load_backbone(path)


def test_any_damage_is_one_sentence(tmp_path):
    path = tmp_path / "b.safetensors"
    _save(path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        place = draw.randrange(len(damaged))
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged) if draw.random() < 0.7 else whole[:place])
        try:
            backbone_file.load_backbone(path)
        except WeightsError as error:
            assert str(path) in str(error)
        # a flipped bit inside the words of the provenance is still a legal file


def test_flipped_weights_are_noticed(tmp_path):
    path = tmp_path / "b.safetensors"
    _save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(WeightsError, match="checksum"):
        backbone_file.load_backbone(path)


def test_misfits_are_named_together(tmp_path):
    path = tmp_path / "b.safetensors"
    _save(path)
    tensors, about = _parts(path)
    del tensors["backbone.levels.0.0.0.bias"]
    tensors["backbone.levels.1.0.0.bias"] = torch.zeros(9)
    tensors["backbone.stranger"] = torch.zeros(1)
    _rewrite(path, tensors, about)
    with pytest.raises(WeightsError) as caught:
        backbone_file.load_backbone(path)
    text = str(caught.value)
    assert "levels.0.0.0.bias is missing" in text and "levels.1.0.0.bias is 9, expected 3" in text
    assert "stranger has no place" in text and str(path) in text and "\n" not in text


def test_ten_misfits_are_named_and_the_rest_counted(tmp_path):
    path = tmp_path / "b.safetensors"
    _save(path)
    tensors, about = _parts(path)
    _rewrite(path, {n: v for n, v in tensors.items() if n.startswith("objective")}, about)
    with pytest.raises(WeightsError, match="and 6 more") as caught:
        backbone_file.load_backbone(path)
    assert str(caught.value).count("is missing") == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 3}, "update brainfm"),
        ({"backbone": {"name": "resnet"}}, "unknown backbone 'resnet'"),
        ({"backbone": {"name": "unet", "widths": "ab"}}, "widths"),
        ({"backbone": {"name": "unet", "widths": [4096] * 8}}, "does not fit unet"),
        ({"backbone": {"name": "unet", "widths": 5}}, "cannot be used"),
        ({"backbone": {}}, "does not name a backbone"),
        ({"preprocess": {"spacing_mm": [0, 1, 1]}}, "spacing_mm"),
        ({"preprocess": {"spacing": 1}}, "unknown PreprocessSpec key"),
        ({"preprocess": None}, "lacks a usable preprocess"),
        ({"patch_vox": [16, 16]}, "cannot be used"),
        ({"provenance": {}}, "incomplete Provenance"),
    ],
)
def test_descriptions_that_cannot_be_used(tmp_path, change, words):
    path = tmp_path / "b.safetensors"
    _save(path)
    tensors, about = _parts(path)
    _rewrite(path, tensors, about | change)
    with pytest.raises(WeightsError, match=words):
        backbone_file.load_backbone(path)


@pytest.mark.parametrize("about", [[], 3, "x", {}])
def test_descriptions_of_another_kind(tmp_path, about):
    path = tmp_path / "b.safetensors"
    _rewrite(path, {"backbone.a": torch.zeros(1)}, about)
    with pytest.raises(WeightsError, match="lacks a usable"):
        backbone_file.load_backbone(path)


def test_a_tensor_of_neither_group_is_refused(tmp_path):
    path = tmp_path / "b.safetensors"
    _save(path)
    tensors, about = _parts(path)
    _rewrite(path, tensors | {"optimizer.m": torch.zeros(1)}, about)
    with pytest.raises(WeightsError, match=r"optimizer\.m is neither backbone\.\*, decoder"):
        backbone_file.load_backbone(path)


# ---- format 2: what was trained beside the encoder -------------------------------------------------------------------

PARTS = {"pathology": 3, "anatomy": 4, "free": 2}  # not in the order of the alphabet


def _dense_file(path: Path, **more: Any) -> tuple[Backbone, DenseDecoder, dict[str, DenseHead]]:
    torch.manual_seed(0)
    backbone = build_backbone("unet", widths=[2, 3])
    decoder = DenseDecoder(backbone.widths, backbone.strides, PARTS)
    heads = {"regions": DenseHead("anatomy", 4, ("a", "b")), "lesion": DenseHead("pathology", 3, ("lesion",))}
    backbone_file.save_backbone(
        path,
        backbone,
        objective={"name": "dense_split", "config": {"parts": PARTS}},
        objective_state={"code.weight": torch.randn(1, 2)},
        preprocess=SPEC,
        patch_vox=(16, 16, 32),
        provenance=PROVENANCE,
        **{"decoder": decoder, "heads": torch.nn.ModuleDict(heads)} | more,
    )
    return backbone, decoder, heads


def test_decoder_heads_and_people_come_back_bit_equal(tmp_path):
    path = tmp_path / "b.safetensors"
    people = SeenSubjects.of(["d/one", "d/two"], seed=3)
    backbone, decoder, heads = _dense_file(path, voxel_mm=(0.8, 4), subjects=people)
    loaded = backbone_file.load_backbone(path, needs_decoder=True)
    assert loaded.decoder is not None and list(loaded.heads) == ["regions", "lesion"]
    assert loaded.decoder.parts == PARTS and list(loaded.decoder.parts) == list(PARTS)  # the order of the channels
    pairs = [(backbone, loaded.backbone), (decoder, loaded.decoder), *zip(heads.values(), loaded.heads.values())]
    for one, other in pairs:
        assert list(one.state_dict()) == list(other.state_dict()) and not other.training
        assert all(torch.equal(v, other.state_dict()[n]) for n, v in one.state_dict().items())
    assert [head.config for head in loaded.heads.values()] == [head.config for head in heads.values()]
    assert (loaded.voxel_mm, loaded.subjects) == ((0.8, 4.0), people)
    image = torch.randn(1, 1, 4, 4, 4)
    for network in (backbone, decoder, *heads.values()):
        swap_in(network)  # as what is loaded
    with torch.no_grad():
        then = heads["lesion"](decoder.split(decoder(backbone.features(image)))["pathology"])
        now = loaded.heads["lesion"](loaded.decoder.split(loaded.decoder(loaded.backbone.features(image)))["pathology"])
    assert torch.equal(then, now)
    assert set(loaded.extra) == {"code.weight"}


def test_a_file_of_format_1_still_loads():
    """Written by the version before format 2."""
    path = Path(__file__).parent / "format_1.safetensors"
    assert _parts(path)[1]["format"] == 1
    loaded = backbone_file.load_backbone(path)
    assert loaded.fingerprint == "6238633b17f2468ca56d5c1ed0f1013e920e887d14d3597b0cedd04d295d6fbf"
    assert (loaded.provenance.steps, loaded.preprocess) == (7, SPEC) and set(loaded.extra) == {"decoder.out.weight"}
    assert (loaded.decoder, loaded.heads, loaded.voxel_mm, loaded.subjects) == (None, {}, None, None)
    with pytest.raises(WeightsError, match=r"format_1\.safetensors: holds no decoder, only an encoder"):
        backbone_file.load_backbone(path, needs_decoder=True)


def test_a_file_without_decoder_is_whole(tmp_path):
    path = tmp_path / "b.safetensors"
    _save(path)
    loaded = backbone_file.load_backbone(path)
    assert (loaded.decoder, loaded.heads, loaded.voxel_mm, loaded.subjects) == (None, {}, None, None)


def test_any_damage_to_format_2_is_one_sentence(tmp_path):
    path = tmp_path / "b.safetensors"
    _dense_file(path, voxel_mm=(1, 2), subjects=SeenSubjects.of(["d/one"], seed=0))
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        place = draw.randrange(len(damaged))
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged) if draw.random() < 0.7 else whole[:place])
        try:
            backbone_file.load_backbone(path)
        except WeightsError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder": None}, "head regions reads 4 channels of part 'anatomy', the decoder has None"),
        ({"decoder": None, "heads": {}}, r"decoder\.out\.weight has no place"),
        ({"decoder": {"parts": "ab"}}, "expected parts with their channels"),
        ({"decoder": {"parts": {"anatomy": 0}}}, "expected parts with their channels"),
        ({"decoder": {"parts": PARTS, "depth": 3}}, "cannot be used"),
        ({"decoder": {"parts": {"pathology": 3, "anatomy": 4}}}, "does not fit the decoder: out.weight is 9x2"),
        ({"decoder": {"parts": PARTS | {"free": 10**9}}}, "does not fit the decoder"),
        ({"heads": {}}, r"heads\.regions\.weight has no place"),
        ({"heads": {"lesion": {"part": "pathology", "channels": 3, "names": ["lesion"]}}}, "regions.bias has no place"),
        ({"heads": {"regions": {"part": "free", "channels": 4, "names": ["a"]}}}, "reads 4 channels of part 'free'"),
        ({"heads": {"regions": {"part": [], "channels": 4, "names": ["a"]}}}, "cannot be used"),
        ({"heads": {"regions": {"part": "anatomy", "channels": 4}}}, "expected a name without dots, part"),
        ({"heads": [1]}, "expected names with their settings"),
        ({"voxel_mm": [2, 1]}, "the smallest and the largest edge"),
        ({"voxel_mm": 1}, "cannot be used"),
        ({"subjects": {"salt": "00", "hashes": ["Anna"]}}, "expected hashes of 16 hexadecimal digits"),
        ({"subjects": {"salt": "x", "hashes": []}}, "found the salt 'x'"),
        ({"subjects": {"hashes": []}}, "expected a salt and a list of hashes"),
        ({"subjects": ["d/one"]}, "expected a salt and a list of hashes"),
    ],
)
def test_descriptions_of_decoder_heads_and_people_that_cannot_be_used(tmp_path, change, words):
    path = tmp_path / "b.safetensors"
    _dense_file(path)
    tensors, about = _parts(path)
    _rewrite(path, tensors, about | change)
    with pytest.raises(WeightsError, match=words) as caught:
        backbone_file.load_backbone(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_without_its_part_is_not_saved(tmp_path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(BrainfmError, match="head lesion reads 2 channels of part 'pathology', the decoder has"):
        _dense_file(path, heads={"lesion": DenseHead("pathology", 2, ("lesion",))})
    assert not path.exists()
