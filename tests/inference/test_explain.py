"""A map of what mattered: equal to other implementations, in the lesion where that is known, on the right voxels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from brainfm.batch import Batch
from brainfm.cli import main
from brainfm.errors import BundleError, ConfigError
from brainfm.inference import explain as module
from brainfm.inference.explain import explain, explain_volume, saliency
from brainfm.nets.backbone import build_backbone
from brainfm.nets.heads import fused_features
from brainfm.nets.saliency import layers_of
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.engine import Engine
from brainfm.tasks.explained import ExplainedCase, share_inside
from brainfm.tasks.segmentation.explain import ExplainedVoxels
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.tasks.task import Task
from brainfm.tasks.whole_head import network as scan_level
from brainfm.tasks.whole_head.answer import decided, raw_answers
from brainfm.tasks.whole_head.explain import ExplainedHead
from brainfm.tasks.whole_head.network import WholeHeadOutput, WholeHeadTask
from brainfm.tasks.whole_head.sorts import sort_of
from brainfm.tasks.whole_head.views import covering_corners, views_of_volumes
from brainfm.tasks.windows import gaussian_weight, window_slices
from tests.inference.test_predict_geometry import Threshold, marker_of, write

PATCH = (16, 16, 16)
SEGMENTATION = TaskSpec("segmentation", "lesion", ("t1", "flair"), (0, 1), PATCH)
CLASSES = TaskSpec("classification", "lesion", ("t1", "flair"), ("no", "yes"), PATCH, mode="exclusive", view_mm=2.0)
AGE = TaskSpec("regression", "age", ("t1", "flair"), (), PATCH, unit="years", view_mm=2.0, crops=True)
BOTH = np.array([True, True])


def head(
    rng: np.random.Generator, edge: int, with_lesion: bool = True, radius: float = 0.156
) -> tuple[np.ndarray, np.ndarray]:
    """(two contrasts of a ball with noise, its lesion), both bright there; all lengths are shares of the edge."""
    x = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1) / edge
    ball = ((x - 0.5) ** 2).sum(-1) < 0.45**2
    lesion = ((x - rng.uniform(0.3, 0.7, 3)) ** 2).sum(-1) < radius**2
    image = rng.normal(0, 0.3 * (edge / 32) ** 1.5, (2, edge, edge, edge)) + np.array([3, 2])[:, None, None, None] * (
        lesion & with_lesion
    )
    image[:, ~ball] = -2
    return image.astype(np.float32), lesion & ball & with_lesion


def task(spec: TaskSpec, seed: int = 0) -> Task:
    torch.manual_seed(seed)
    backbone = build_backbone("unet", widths=[8, 16])
    network = (
        SegmentationTask(spec, backbone) if spec.kind == "segmentation" else WholeHeadTask(spec, backbone, guidance=0.3)
    )
    for parameter in network.parameters():  # fresh heads are undecided: there would be nothing to explain
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    if spec.kind == "segmentation":
        nn.init.zeros_(network.decoder.out.bias)
    return network.eval()


def trained(spec: TaskSpec, steps: int) -> Task:
    torch.manual_seed(0)
    backbone = build_backbone("unet", widths=[8, 16])
    network = (
        SegmentationTask(spec, backbone) if spec.kind == "segmentation" else WholeHeadTask(spec, backbone, guidance=0.3)
    )
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        cases = [head(rng, 16, with_lesion=b % 2 == 0) for b in range(6)]
        image, lesion = (torch.from_numpy(np.stack(part)) for part in zip(*cases))
        batch = Batch(image, torch.arange(6), present=torch.ones(6, 2, dtype=torch.bool), label=lesion.long())
        if spec.kind != "segmentation":
            answer = torch.tensor([[1.0], [0.0]]).repeat(3, 1)
            batch = replace(batch, image=image[:, None], lesion=lesion[:, None].to(torch.int8), answer=answer)
        optimiser.zero_grad()
        network.loss(network(batch.image, batch.present), batch).total.backward()
        optimiser.step()
    return network.eval()


@pytest.fixture(scope="module")
def classifier() -> Task:
    return trained(CLASSES, 50)


@pytest.fixture(scope="module")
def segmenter() -> Task:
    return trained(SEGMENTATION, 40)


# ---- against others --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A task as other packages want it: one tensor in, log odds [B, 1] out, the layer a module of its own."""

    def __init__(self, network: Task, inside: torch.Tensor | None) -> None:
        super().__init__()
        self.network, self.inside, self.meet = network, inside, nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        present = torch.ones(1, image.shape[1], dtype=torch.bool)
        maps = fused_features(self.network.backbone, self.network.fusion, image, present)
        maps[-1] = self.meet(maps[-1])
        if self.inside is not None:
            logits = self.network.decoder(maps)
            return (logits[:, 1] - logits[:, 0])[:, self.inside].sum(dim=1, keepdim=True)
        with mock.patch.object(scan_level, "fused_features", lambda *given: maps):
            logits = self.network(image[:, None], present).logits
        return logits[:, 1:] - logits[:, :1]


@pytest.mark.parametrize("spec", [SEGMENTATION, CLASSES], ids=lambda spec: spec.kind)
def test_gradcam_is_that_of_captum_and_of_monai(spec):
    captum, monai = pytest.importorskip("captum.attr"), pytest.importorskip("monai.visualize")
    network, image = task(spec), head(np.random.default_rng(1), 16)[0]
    spec = replace(spec, view_mm=spec.view_mm / 2)  # the patch is the volume: one window, or one view as it stands
    given = torch.from_numpy(image)[None]
    inside = None
    if spec.kind == "segmentation":
        with torch.no_grad():
            inside = network(given, torch.ones(1, 2, dtype=torch.bool)).argmax(dim=1)[0] == 1
        assert 0.05 < inside.float().mean() < 0.95
    plain = Plain(network, inside).eval()  # MONAI restores the mode of what it is given
    theirs = captum.LayerGradCam(plain, plain.meet).attribute(given, relu_attributions=True).detach()
    other = monai.GradCAM(plain, "meet").compute_map(given, class_idx=0).detach()
    assert torch.allclose(theirs, other, rtol=1e-4, atol=1e-7) and theirs.max() > 0
    upsampled = captum.LayerAttribution.interpolate(theirs, PATCH, "trilinear")[0, 0].numpy()
    ours = explain_volume([network], spec, image, BOTH, spec.values[1], method="gradcam", layer="encoder.1")
    assert ours.peak == pytest.approx(upsampled.max(), rel=1e-3)
    assert np.allclose(ours.heat, upsampled / upsampled.max(), atol=2e-3)


def test_hirescam_is_a_naive_sum():
    network, image = task(SEGMENTATION), torch.from_numpy(head(np.random.default_rng(2), 16)[0])
    found = explain_volume([network], SEGMENTATION, image, BOTH, 1, layer="decoder.0")
    kept = {}
    network.decoder.merges[0].register_forward_hook(
        lambda m, i, output: kept.update(maps=output) or output.retain_grad()
    )
    logits = network(image[None], torch.ones(1, 2, dtype=torch.bool))
    odds = logits[0, 1] - logits[0, 0]
    odds[odds > 0].sum().backward()
    maps, gradients = kept["maps"].detach()[0].numpy(), kept["maps"].grad[0].numpy()
    expected = np.zeros(PATCH)
    for place in itertools.product(*map(range, PATCH)):
        expected[place] = max(sum(maps[e][place] * gradients[e][place] for e in range(len(maps))), 0)
    assert np.allclose(found.heat, expected / expected.max(), atol=1e-4)


def test_windows_are_put_together_by_their_weights():
    network, image = task(SEGMENTATION), head(np.random.default_rng(3), 24)[0]
    engine = Engine((network,), SEGMENTATION, PreprocessSpec(), torch.device("cpu"), None, "", overlap=0.25)
    found = explain_volume(engine, SEGMENTATION, image, BOTH, 1, method="gradcam")
    case = ExplainedCase(torch.from_numpy(image), torch.from_numpy(BOTH), SEGMENTATION, (1, 1, 1), engine.device, 0.25)
    question = ExplainedVoxels([network], case, 1)
    weight, total, mass = gaussian_weight(PATCH).numpy(), np.zeros(image.shape[1:]), np.zeros(image.shape[1:])
    for window in window_slices(image.shape[1:], PATCH, 0.25):
        plain = Plain(network, question.mask[window])
        kept = {}
        plain.meet.register_forward_hook(lambda m, i, o, kept=kept: kept.update(maps=o) or o.retain_grad())
        plain(torch.from_numpy(image[(slice(None), *window)])[None]).sum().backward()
        maps = kept["maps"]
        cam = torch.relu((maps.grad.mean((2, 3, 4), keepdim=True) * maps).sum(1, keepdim=True)).detach()
        total[window] += nn.functional.interpolate(cam, size=PATCH, mode="trilinear")[0, 0].numpy() * weight
        mass[window] += weight
    expected = total / mass
    assert found.peak == pytest.approx(expected.max(), rel=1e-3)
    assert np.allclose(found.heat, expected / expected.max(), atol=2e-3)


# ---- a known lesion --------------------------------------------------------------------------------------------------


def wide(lesion: np.ndarray) -> np.ndarray:
    """With one cell of the layer, 4 voxels, around it."""
    return ndimage.binary_dilation(lesion, iterations=4)


def test_the_mass_lies_in_the_lesion_that_a_classifier_found(classifier, record_property):
    """On a volume of half the voxel size: the view is averaged, and the map comes back to the volume's own voxels."""
    rng, shares, around, chance, plain = np.random.default_rng(5), [], [], [], []
    for _ in range(6):
        image, lesion = head(rng, 32)
        found = explain_volume([classifier], CLASSES, image, BOTH)
        assert found.target == "yes" and found.answer > 0.8, "the network must be right, else nothing is tested"
        assert wide(lesion)[np.unravel_index(found.heat.argmax(), lesion.shape)]
        shares.append(share_inside(found.heat, lesion))
        around.append(share_inside(found.heat, wide(lesion)))
        chance.append(lesion.mean())
        plain.append(share_inside(saliency([classifier], CLASSES, image, BOTH, "yes", method="gradcam"), lesion))
    for name, values in (("inside", shares), ("within a cell", around), ("chance", chance), ("gradcam", plain)):
        record_property(name, float(np.mean(values)))
    assert np.mean(shares) > 0.4 > 20 * np.mean(chance) and np.mean(around) > 0.85
    assert np.mean(shares) > 1.5 * np.mean(plain)  # why hirescam is what one gets


def test_occlusion_agrees_on_where(classifier, record_property):
    rng, apart = np.random.default_rng(6), []
    for _ in range(1):
        image, lesion = head(rng, 32)
        asked = {"target": "yes", "cube_mm": 12, "step_mm": 6}
        found = explain_volume([classifier], CLASSES, image, BOTH, method="occlusion", **asked)
        assert 0 < found.peak <= found.answer <= 1
        heat = saliency([classifier], CLASSES, image, BOTH, "yes")
        centres = [np.array(ndimage.center_of_mass(map_ > 0.5)) for map_ in (found.heat, heat, lesion)]
        apart.append(max(np.linalg.norm(a - b) for a, b in itertools.combinations(centres, 2)))
    record_property("apart in voxels", [round(float(a), 2) for a in apart])
    assert max(apart) < 5  # voxels; the head is 29 wide


def test_the_mass_lies_in_the_lesion_that_a_segmenter_found(segmenter, record_property):
    rng, shares, around, chance = np.random.default_rng(7), [], [], []
    for _ in range(3):
        image, lesion = head(rng, 24, radius=0.156 * 16 / 24)
        found = explain_volume([segmenter], SEGMENTATION, image, BOTH)
        assert found.target == "1" and found.answer == pytest.approx(lesion.sum() / 1000, rel=0.4)
        assert wide(lesion)[np.unravel_index(found.heat.argmax(), lesion.shape)]
        shares.append(share_inside(found.heat, lesion))
        around.append(share_inside(found.heat, wide(lesion)))
        chance.append(lesion.mean())
    for name, values in (("inside", shares), ("within 4 voxels", around), ("chance", chance)):
        record_property(name, float(np.mean(values)))
    assert np.mean(shares) > 6 * np.mean(chance)
    image, lesion = head(rng, 16)
    found = explain_volume([segmenter], SEGMENTATION, image, BOTH, method="occlusion", cube_mm=6, step_mm=3)
    assert wide(lesion)[np.unravel_index(found.heat.argmax(), lesion.shape)]


# ---- what a map is ---------------------------------------------------------------------------------------------------


def test_zero_stays_zero_and_the_largest_is_one():
    raw = np.array([[-2.0, 0.0, 1.0, 4.0]])
    heat, peak = module._normalised(raw, signed=False)
    assert heat.tolist() == [[0, 0, 0.25, 1]] and peak == 4 and heat.dtype == np.float32
    heat, peak = module._normalised(-raw, signed=True)
    assert heat.tolist() == [[0.5, 0, -0.25, -1]] and peak == 4
    assert not module._normalised(-np.abs(raw), signed=False)[0].any()
    assert np.isnan(share_inside(np.zeros((2, 2, 2)), np.ones((2, 2, 2))))
    assert share_inside(np.array([3.0, -1.0]), np.array([1, 0])) == 0.75


@pytest.mark.parametrize("spec", [SEGMENTATION, CLASSES, AGE], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("shape", [(18, 21, 16), (10, 17, 23)])
def test_any_shape_and_nothing_is_left_behind(spec, shape):
    network = task(spec)
    image = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)  # one more than the task was made for
    before = {name: p.clone() for name, p in network.state_dict().items()}
    present = np.array([True, False, True])
    for method in ("hirescam", "gradcam"):
        found = explain_volume([network], spec, image, present, method=method)
        assert found.heat.shape == shape and found.heat.dtype == np.float32
        assert np.abs(found.heat).max() == 1 and (spec.kind == "regression" or found.heat.min() >= 0)
    again = explain_volume([network, network], spec, image, present, method=method)
    assert np.allclose(again.heat, found.heat, atol=1e-5) and again.peak == pytest.approx(found.peak, rel=1e-4)
    image[1] = np.nan  # absent
    blind = explain_volume([network], spec, np.nan_to_num(image), present, method=method)
    assert np.array_equal(blind.heat, found.heat)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())
    assert all(torch.equal(before[name], p) for name, p in network.state_dict().items())


def test_a_regression_has_a_sign():
    network, image = task(AGE), head(np.random.default_rng(4), 24)[0]
    found = explain_volume([network], AGE, image, BOTH)
    assert found.heat.min() < 0 < found.heat.max()
    with torch.no_grad():
        network.out.weight.neg_()
        network.out.bias.neg_()
    turned = explain_volume([network], AGE, image, BOTH)
    assert np.allclose(turned.heat, -found.heat, atol=1e-5) and turned.answer == pytest.approx(-found.answer, abs=1e-4)


def test_the_answer_of_a_bundle_is_the_one_that_predict_gives():
    image, decisions = head(np.random.default_rng(4), 24)[0], Decisions(temperature=3.0, bias=(-2.0, 0.5))
    for asked in (CLASSES, AGE):
        members = (task(asked, 0), task(asked, 1))
        engine = Engine(members, asked, PreprocessSpec(), torch.device("cpu"), None, "", 0.5, decisions)
        views = torch.from_numpy(views_of_volumes(image, (1, 1, 1), asked))
        with torch.no_grad():
            given = decided(engine, raw_answers(engine, views), asked.contrasts)
        explained = explain_volume(engine, asked, image, BOTH)
        bare = explain_volume(members, asked, image, BOTH)
        expected = given.answer if given.probabilities is None else given.probabilities[explained.target]
        assert explained.answer == pytest.approx(expected) and explained.answer != pytest.approx(bare.answer)


def test_ordered_classes_and_labels():
    image = head(np.random.default_rng(4), 24)[0]
    ordinal, logits = replace(CLASSES, values=("0", "1", "2"), mode="ordinal"), torch.tensor([3.0, 0.5])
    assert [float(sort_of(ordinal).asked(logits, k)) for k in range(3)] == [-3.5, 2.5, 3.5]
    lowest, highest = (explain_volume([task(ordinal)], ordinal, image, BOTH, t) for t in (0, 2))
    assert np.corrcoef(lowest.heat.flat, highest.heat.flat)[0, 1] < 0  # what speaks for one speaks against the other
    labels = replace(CLASSES, values=("oedema", "blood"), mode="multilabel")
    both = [explain_volume([task(labels)], labels, image, BOTH, name) for name in labels.values]
    assert [e.target for e in both] == ["oedema", "blood"] and not np.allclose(both[0].heat, both[1].heat, atol=0.1)


def test_a_class_that_is_not_predicted_has_an_empty_map():
    network = task(SEGMENTATION)
    nn.init.constant_(network.decoder.out.bias, 0)
    with torch.no_grad():
        network.decoder.out.bias[0] = 1e4
    for method in module.METHODS:
        found = explain_volume([network], SEGMENTATION, head(np.random.default_rng(0), 16)[0], BOTH, 1, method=method)
        assert found.answer == 0 and not found.heat.any()


class Bright(nn.Module):
    """The mean of the first contrast over all views, as a probability in percent."""

    def forward(self, image, present):
        return WholeHeadOutput(image[:, :, 0].mean(dim=(1, 2, 3, 4))[:, None], image)

    def decode(self, output):
        return output.logits[:, 0]


def test_occlusion_is_a_naive_loop():
    spec = replace(AGE, view_mm=0.0)
    image = np.random.default_rng(0).uniform(0, 1, (2, 20, 16, 16)).astype(np.float32)
    case = ExplainedCase(
        torch.from_numpy(image), torch.from_numpy(BOTH), spec, (2.0, 2.0, 2.0), torch.device("cpu"), 0.5
    )
    asked = ExplainedHead([Bright(), Bright()], case, None, Decisions())
    found = module._occluded(asked, case, 12.0, 8.0, lambda done, total: None)

    def answer(volume):
        return np.mean([volume[x : x + 16, y : y + 16, z : z + 16].mean()
                        for x, y, z in covering_corners((20, 16, 16), PATCH)])  # fmt: skip

    total, count = np.zeros((20, 16, 16)), np.zeros((20, 16, 16))
    for x, y, z in itertools.product((0, 4, 8, 12, 14), (0, 4, 8, 10), (0, 4, 8, 10)):
        covered = image[0].copy()
        covered[x : x + 6, y : y + 6, z : z + 6] = image[0].min()
        total[x : x + 6, y : y + 6, z : z + 6] += answer(image[0]) - answer(covered)
        count[x : x + 6, y : y + 6, z : z + 6] += 1
    assert count.min() > 0 and np.allclose(found, total / count, atol=1e-5)


def test_an_answer_that_is_not_finite_is_refused():
    network = task(CLASSES)
    nn.init.constant_(network.out.bias, float("nan"))
    with pytest.raises(BundleError, match="not finite"):
        explain_volume([network], CLASSES, head(np.random.default_rng(0), 16)[0], BOTH)


def test_layers_are_named_from_fine_to_coarse_and_back():
    assert list(layers_of(task(SEGMENTATION))) == ["encoder", "encoder.0", "encoder.1", "decoder.0"]
    assert list(layers_of(task(CLASSES))) == ["encoder", "encoder.0", "encoder.1"]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oblique", "psr", "thick_slices"])
def test_the_map_lies_where_the_marker_lies(tmp_path, name):
    """The network is a threshold: what is covered matters exactly where it is bright."""
    spec = TaskSpec("segmentation", "marker", ("t1",), (0, 1), (32, 32, 32))
    engine = Engine((Threshold(),), spec, PreprocessSpec(spacing_mm=(2.0,) * 3), torch.device("cpu"), None, "")
    source = write(tmp_path / "t1.nii.gz", name)
    out = tmp_path / "new" / "why.nii.gz"
    found = explain(engine, {"t1": source}, out, method="occlusion", cube_mm=12, step_mm=6)
    written, like = nib.load(out), nib.load(source)
    assert written.get_data_dtype() == np.float32 and written.shape == like.shape[:3]
    assert np.array_equal(written.affine, like.affine)
    for field in ("sform_code", "qform_code", "srow_x", "quatern_b", "qoffset_x", "xyzt_units"):
        assert np.array_equal(written.header[field], like.header[field]), field
    heat = np.asarray(written.dataobj)
    assert heat.min() == 0 and heat.max() == 1
    marker, right_mm = marker_of(source)
    assert heat[marker].mean() > 4 * heat.mean()
    assert right_mm[heat > 0.5].max() < 0, "on the left, as the marker is"
    assert [path.name for path in out.parent.iterdir()] == [out.name], "the verb draws"
    assert found.scan is not None and found.scan.shape == found.heat.shape
    assert found.scan[found.heat > 0.5].mean() > found.scan.mean() + 2, "the prepared scan, where the map lies on it"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(
        path,
        task=replace(CLASSES, view_mm=12.0),
        backbone_config={"name": "unet", "widths": [8, 16]},
        members=[task(CLASSES, seed).state_dict() for seed in (0, 1)],
        preprocess=PreprocessSpec(spacing_mm=(6.0, 6.0, 6.0)),
        provenance=Provenance("0", "", ""),
    )
    return path


def test_the_verb(bundle, tmp_path, capsys):
    t1, flair = write(tmp_path / "t1.nii.gz", "oblique"), write(tmp_path / "flair.nii.gz", "thick_slices")
    given = [f"bundle={bundle}", f"input.t1={t1}", f"input.flair={flair}"]
    assert main(["explain", *given, f"out={tmp_path / 'why.nii.gz'}", "class=yes", "grid=flair"]) == 0
    assert "HiResCAM at encoder: lesion yes, probability 0." in capsys.readouterr().out
    assert nib.load(tmp_path / "why.nii.gz").shape == nib.load(flair).shape
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    for words, sentence in (
        (["class=maybe"], "class=maybe: the bundle of lesion has no such class, expected one of no or yes"),
        (["method=lime"], "method=lime: expected hirescam, gradcam or occlusion"),
        (
            ["layer=encoder.9"],
            "layer=encoder.9: the network has no such layer, expected one of encoder, encoder.0 or encoder.1",
        ),
        (["method=occlusion", "layer=encoder.1"], "layer=encoder.1: occlusion looks at no layer, expected none"),
        (["cube_mm=0"], "cube_mm=0, step_mm=None: expected an edge above 0"),
        (["grid=swi"], "no input swi to answer on, expected one of the inputs t1, flair"),
    ):
        assert main(["explain", *given, f"out={tmp_path / 'no.nii.gz'}", *words]) == 2
        said = capsys.readouterr().err
        assert sentence in said and len(said.splitlines()) == 1
    assert not list(tmp_path.glob("no.*"))
    assert main(["explain", *given, f"out={t1}"]) == 2 and "is one of the inputs" in capsys.readouterr().err


def test_a_regression_has_no_class_and_a_background_is_no_answer():
    image = head(np.random.default_rng(0), 16)[0]
    with pytest.raises(ConfigError, match="class=7: the bundle answers with a value of age, expected no class"):
        explain_volume([task(AGE)], AGE, image, BOTH, 7)
    with pytest.raises(ConfigError, match="class=0: the bundle of lesion has no such class, expected 1"):
        explain_volume([task(SEGMENTATION)], SEGMENTATION, image, BOTH, 0)


def test_a_real_head(data3d, tmp_path):
    folder = data3d / "openms_cross" / "patient07"
    if not folder.is_dir():
        pytest.skip("openms_cross is not there")
    spec = replace(CLASSES, contrasts=("t1", "flair"), view_mm=12.0, crops=True)
    engine = Engine((task(spec),), spec, PreprocessSpec(spacing_mm=(6.0,) * 3), torch.device("cpu"), None, "")
    files = {"flair": folder / "patient07_FLAIR.nii.gz", "t1": folder / "patient07_T1w.nii.gz"}
    found = explain(engine, files, tmp_path / "why.nii")
    written = nib.load(tmp_path / "why.nii")
    assert written.shape == nib.load(files["flair"]).shape and np.asarray(written.dataobj).max() == 1
    assert found.heat.max() == 1 and 0 < found.answer < 1
