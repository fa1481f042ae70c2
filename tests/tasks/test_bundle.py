"""A bundle is whole, untouched, or refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm.errors import BundleError
from brainfm.nets.backbone import build_backbone
from brainfm.seen import SeenSubjects
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import CHECKSUMS, model_card, read_bundle, write_bundle
from brainfm.tasks.registry import build_task

TASK = TaskSpec("segmentation", "lesion", ("t1", "flair"), (0, 1), (16, 16, 16))
PREPROCESS = PreprocessSpec(spacing_mm=(1.5, 1.5, 2.0))
PROVENANCE = Provenance("0.1.0", "abc", "data", {"optim": {"lr": 1e-3, "betas": [0.9, 0.99]}}, 3, 50, 100, 0.2)


def member(seed, task=TASK):
    torch.manual_seed(seed)
    return build_task(task, build_backbone("unet_tiny")).eval()


def write(path, members=1, **changes):
    values = {
        "task": TASK,
        "backbone_config": {"name": "unet_tiny"},
        "members": [member(seed).state_dict() for seed in range(members)] if isinstance(members, int) else members,
        "preprocess": PREPROCESS,
        "provenance": PROVENANCE,
        "scores": {"dice": 0.71234, "n_cases": 3, "best_steps": [4, 5], "note": "cross-validated"},
    }
    return write_bundle(path, **(values | changes))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_round_trip(tmp_path):
    fingerprint = write(tmp_path / "deep" / "bundle", members=12)
    bundle = read_bundle(tmp_path / "deep" / "bundle")
    assert (bundle.task, bundle.preprocess, bundle.provenance) == (TASK, PREPROCESS, PROVENANCE)
    assert bundle.fingerprint == fingerprint and len(bundle.networks) == 12
    image, present = torch.randn(1, 2, 16, 16, 16), torch.tensor([[True, False]])
    for seed, network in enumerate(bundle.networks):
        assert not network.training
        assert torch.equal(network(image, present), member(seed)(image, present))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bundle"]


def test_members_may_be_built_apart_and_say_whom_their_backbone_has_seen(tmp_path):
    torch.manual_seed(3)
    dense = build_task(TASK, build_backbone("unet_tiny"), dense_channels=7).eval()
    seen = SeenSubjects.of(["d/1", "d/2"], seed=0)
    members = [dense.state_dict(), member(1).state_dict()]
    write(tmp_path / "bundle", members=members, settings=[dense.settings(), {}], seen=seen)
    bundle = read_bundle(tmp_path / "bundle")
    image, present = torch.randn(1, 2, 16, 16, 16), torch.tensor([[True, True]])
    for network, original in zip(bundle.networks, (dense, member(1)), strict=True):
        assert torch.equal(network(image, present), original(image, present))
        assert network.settings() == original.settings()
    assert bundle.seen == seen
    with pytest.raises(BundleError, match="do not fit together"):
        write(tmp_path / "other", members=members, settings=[{}, {}])
    with pytest.raises(BundleError, match="do not fit together"):
        write(tmp_path / "other", members=members, settings=[{"depth": 2}, {}])


def test_a_plain_bundle_needs_no_further_files(folder):
    assert not {"members.json", "seen.json"} & {p.name for p in folder.iterdir()}
    assert read_bundle(folder).seen is None


def test_the_card_says_what_matters(folder):
    card = (folder / "README.md").read_text()
    for text in ("lesion", "t1, flair", "1.5 x 1.5 x 2 mm", "0.7123", "4, 5", "cross-validated", "Licence:",
                 "Not a medical device", "brainfm predict bundle="):  # fmt: skip
        assert text in card


@pytest.mark.parametrize(
    ("changes", "decisions", "said"),
    [
        ({"kind": "classification", "values": ("F", "M"), "mode": "exclusive", "view_mm": 3.0},
         Decisions(temperature=0.5),
         ["`sex`, one of F, M for the session", "whole head in 16 x 16 x 16 voxels of 3 mm, made from 1.5 x 1.5 x 2 mm",
          "temperature of 0.5", "whose probabilities are averaged", "out=sex.json", "baselines | features 0.6"]),
        ({"kind": "classification", "values": ("low", "high"), "mode": "ordinal", "view_mm": 3.0}, Decisions(),
         ["one of low, high (in this order)", "decided: nothing"]),
        ({"kind": "classification", "values": ("a", "b"), "mode": "multilabel", "crops": True}, Decisions(),
         ["which of a, b the session shows", "Looks: at windows of 16 x 16 x 16 voxels that cover the head"]),
        ({"kind": "regression", "values": (), "unit": "years", "view_mm": 3.0, "crops": True},
         Decisions(bias=(2.0, 0.5)),
         ["`sex` in years, one value", "(answer - 2 years) / 0.5", "whose values are averaged", "and at windows"]),
    ],
)  # fmt: skip
def test_the_card_of_a_question_about_the_session(changes, decisions, said):
    task = replace(TASK, target="sex", **changes)
    scores = {"auroc": 0.7, "slope": None, "baselines": {"features": 0.6}}
    card = model_card(task, PREPROCESS, PROVENANCE, 2, scores, "free", decisions)
    for words in (*said, "slope | undefined", "brainfm explain bundle="):
        assert words in card
    assert "background" not in card and "None" not in card and "{" not in card


def test_the_card_tells_what_is_done_to_masks():
    decisions = Decisions(mirror=(0, 2), largest_component=True, min_ml=0.1)
    card = model_card(TASK, PREPROCESS, PROVENANCE, 1, {}, "free", decisions)
    for words in ("1 network.", "mirrored along X, Z", "largest connected part", "below 0.1 ml", "out=lesion.nii.gz"):
        assert words in card


def test_the_same_content_gives_the_same_fingerprint(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b")
    assert write(tmp_path / "a") != write(tmp_path / "c", preprocess=PreprocessSpec())


@pytest.mark.parametrize("name", ["task.json", "preprocess.json", "member0.safetensors", "README.md", "backbone.json"])
def test_a_changed_file_is_named(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} was changed or damaged"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["task.json", "member0.safetensors", "README.md"])
def test_a_truncated_file_is_named(folder, name):
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    with pytest.raises(BundleError, match=rf"{name} was changed or damaged"):
        read_bundle(folder)


def test_a_missing_file_is_named(folder):
    (folder / "member0.safetensors").unlink()
    with pytest.raises(BundleError, match=r"member0.safetensors is missing"):
        read_bundle(folder)


def test_an_extra_file_is_named(folder):
    (folder / "weights.pth").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"weights.pth does not belong"):
        read_bundle(folder)


def test_no_bundle_at_all(tmp_path):
    with pytest.raises(BundleError, match="no bundle at"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no checksums\.json"):
        read_bundle(tmp_path)


def forge(folder, **files):
    """Replaces files and their checksums, as a careful forger would."""
    listed = json.loads((folder / CHECKSUMS).read_text())
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content)
        listed[name] = hashlib.sha256(content).hexdigest()
    (folder / CHECKSUMS).write_text(json.dumps(listed))


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (Bomb.place,))


def test_no_pickle_is_executed(folder, tmp_path):
    Bomb.place = str(tmp_path / "executed")
    forge(folder, member0__safetensors=pickle.dumps(Bomb()))
    with pytest.raises(BundleError, match="cannot be read as safetensors"):
        read_bundle(folder)
    torch.save({"x": Bomb()}, folder / "member0.safetensors")
    forge(folder, member0__safetensors=(folder / "member0.safetensors").read_bytes())
    with pytest.raises(BundleError, match="cannot be read as safetensors"):
        read_bundle(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("backbone__json", b'{"name": "unet_b"}', "do not fit together"),
        ("backbone__json", b'{"name": "os.system"}', "do not fit together"),
        ("task__json", b"[1]", "expected a JSON object"),
        ("task__json", b"{", "is not JSON"),
        ("task__json", b'{"format": 9}', "format 9"),
        ("task__json", b'{"format": 1, "kind": "segmentation"}', "incomplete TaskSpec"),
        ("preprocess__json", b'{"spacing": 1}', "unknown PreprocessSpec key"),
    ],
)
def test_files_that_do_not_fit(folder, name, content, text):
    forge(folder, **{name: content})
    with pytest.raises(BundleError, match=text):
        read_bundle(folder)


def test_checksums_reach_no_file_outside(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    listed = json.loads((folder / CHECKSUMS).read_text())
    listed["../secret"] = hashlib.sha256(b"x").hexdigest()
    (folder / CHECKSUMS).write_text(json.dumps(listed))
    with pytest.raises(BundleError, match="missing"):
        read_bundle(folder)


def test_an_existing_bundle_is_replaced_and_nothing_else(folder, tmp_path):
    before = read_bundle(folder).fingerprint
    write(folder, members=2)
    assert read_bundle(folder).fingerprint != before and len(read_bundle(folder).networks) == 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("irreplaceable")
    with pytest.raises(BundleError, match="not a bundle"):
        write(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1").read_text() == "irreplaceable"


def test_a_failed_write_leaves_the_old_bundle(folder, tmp_path, monkeypatch):
    before = read_bundle(folder).fingerprint
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(folder, members=2)
    monkeypatch.undo()
    assert read_bundle(folder).fingerprint == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_members_must_fit(tmp_path):
    with pytest.raises(BundleError, match="do not fit together"):
        write(tmp_path / "bundle", backbone_config={"name": "unet_b"})
    with pytest.raises(BundleError, match="at least one member"):
        write(tmp_path / "bundle", members=0)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_of_before_answers_as_it_did():
    """Written by commit 9c41fdf: no reads.json, features that are cut at five deviations."""
    bundle = read_bundle(Path(__file__).parent / "bundle_of_before")
    (network,) = bundle.networks
    assert network.reads is None and float(network.norm.bound) == 5
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(size=(12, 1, 1, 16, 16, 16))).float()[:2] * 3
    with torch.no_grad():
        found = network.decode(network(image, torch.ones(2, 1, dtype=torch.bool)))
    assert found.tolist() == pytest.approx([70.7085, 61.9248], abs=1e-2)  # processors differ by .002
