"""anatomy_pathology: terms against loops, targets that are missing, and what no gradient may reach."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from brainfm.batch import Batch
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.anatomy_pathology import AnatomyPathology, balanced_errors, region_errors
from brainfm.objectives.masking import draw_mask
from brainfm.objectives.objective import build_objective
from brainfm.specs import ConfigError

PATCH, SEED, K, R = (16, 16, 16), 3, 4, 5
FULL = {"groups": K, "volumes": R, "mask_unit_vox": 4, "latent_channels": 20}


def _objective(**config) -> AnatomyPathology:
    torch.manual_seed(0)
    objective = build_objective(
        "anatomy_pathology", build_backbone("unet_tiny"), patch_vox=PATCH, seed=SEED, **(FULL | config)
    )
    assert isinstance(objective, AnatomyPathology)
    return objective


def _batch() -> Batch:
    torch.manual_seed(1)
    lesion = torch.zeros(4, *PATCH, dtype=torch.int8)
    lesion[0, 2:9, 2:9, 2:9] = 1
    lesion[2:] = -1
    volumes = torch.randn(4, R)
    volumes[3, 2] = torch.nan
    regions = torch.randint(0, K, (4, *PATCH))
    regions[1:] = -1
    regions[0, :4] = -1
    return Batch(
        image=torch.randn(4, 1, *PATCH),
        sample=torch.tensor([5, 9, 2, 7]),
        partner=torch.randn(4, 1, *PATCH),
        paired=torch.tensor([True, False, True, True]),
        regions=regions,
        volumes=volumes,
        pathology=torch.tensor([1.0, 0.0, 1.0, torch.nan]),
        lesion=lesion,
    )


def _codes(objective, image, number, view="a"):
    hidden = draw_mask(torch.tensor([number]), PATCH, 4, 0.75, SEED, f"mask_{view}")
    maps = objective.backbone.features(image[None].masked_fill(hidden, 0))
    return {name: code.mean for name, code in objective.latents(maps).items()}, hidden


def test_terms__compare():
    objective, batch = _objective(agreement_weight=0.3), _batch()
    terms = objective(batch, 0.0)
    found, agreement = {n: [] for n in ("reconstruction", "regions", "volumes", "patch", "cells")}, []
    for i, number in enumerate(batch.sample.tolist()):
        first, _ = _codes(objective, batch.image[i], number)
        for view, image in (("a", batch.image), ("b", batch.partner)):
            if view == "b" and not batch.paired[i]:
                continue
            codes, hidden = _codes(objective, image[i], number, view)
            output = objective.decoder(torch.cat(list(codes.values()), 1))[0]
            found["reconstruction"].append(((output - image[i]) ** 2)[hidden[0]].mean())
            if i == 0:
                logits = objective.region_decoder(codes["anatomy"])[0].permute(1, 2, 3, 0).reshape(-1, K)
                target = batch.regions[0].reshape(-1)
                logits, target = logits[target >= 0], target[target >= 0]
                shares = logits.softmax(1)
                dice = [2 * shares[target == k, k].sum() / (shares[:, k].sum() + (target == k).sum()) for k in range(K)]
                found["regions"].append(F.cross_entropy(logits, target) + 1 - torch.stack(dice).mean())
            else:
                answer = objective.volume_head(codes["anatomy"])[0]
                known = ~batch.volumes[i].isnan()
                found["volumes"].append(F.smooth_l1_loss(answer[known], batch.volumes[i][known]))
            cells, patch = objective.pathology_head(codes["pathology"])
            torch.testing.assert_close(patch[0], cells.exp().mean().log())
            visible = batch.lesion[i].masked_fill(hidden[0, 0], -1)
            wanted = 1.0 if (visible == 1).any() else float(batch.pathology[i])
            if wanted == wanted:
                found["patch"].append(F.binary_cross_entropy_with_logits(patch[0], torch.tensor(wanted)))
            if (visible == 1).any():
                blocks = visible.reshape(4, 4, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(64, 64)
                flat, losses = cells.reshape(64), []
                for value in (0.0, 1.0):
                    ill = (blocks == 1).any(1)
                    rows = ill if value else ~ill & ((blocks >= 0).float().mean(1) > 0.5)
                    truth = torch.full((int(rows.sum()),), value)
                    losses.append(F.binary_cross_entropy_with_logits(flat[rows], truth) if len(truth) else 0.0)
                found["cells"].append(sum(losses) / 2)
            if view == "b":
                cosine = F.cosine_similarity(first["anatomy"].flatten(), codes["anatomy"].flatten(), dim=0)
                agreement.append(1 - cosine)
    want = {name: torch.stack(values).mean() for name, values in found.items()}
    want["agreement"] = torch.stack(agreement).mean()
    assert set(terms.parts) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(terms.parts[name], value.detach(), rtol=1e-4, atol=1e-5, msg=name)
    total = 0.7 * want["reconstruction"] + 0.15 * (want["regions"] + want["volumes"])
    total = total + 0.15 * (want["patch"] + want["cells"]) + 0.3 * want["agreement"]
    torch.testing.assert_close(terms.total, total, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_leak_between_the_parts():
    """Each head's term reaches its own projection and the encoder, and nobody else's projection or head."""
    own = {"regions": "anatomy", "volumes": "anatomy", "patch": "pathology", "cells": "pathology"}
    heads = {"regions": "region_decoder", "volumes": "volume_head", "pathology": "pathology_head"}
    for name, part in own.items():
        objective = _objective()
        batch = _batch()
        views = objective._views(batch)
        codes = objective._codes(views)
        terms = objective._anatomy(codes["anatomy"], views, batch)
        terms |= objective._pathology(codes["pathology"], views, batch)
        terms[name].backward()
        reached = {n for n, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert {n for n in reached if n.startswith("latents.")} == {
            f"latents.mean.{part}.weight",
            f"latents.mean.{part}.bias",
        }
        assert any(n.startswith("backbone.") for n in reached)
        outside = ("backbone.", "latents.", heads.get(name, heads["pathology"]))
        assert all(n.startswith(outside) for n in reached), name


def test_missing_targets_drop_their_term_and_not_the_sample():
    objective, batch = _objective(), _batch()
    bare = Batch(image=batch.image, sample=batch.sample)
    terms = objective(bare, 0.0)
    torch.testing.assert_close(terms.total.detach(), 0.7 * terms.parts["reconstruction"])
    assert terms.parts["reconstruction"] == objective(batch, 0.0).parts["reconstruction"]
    assert all(terms.parts[name] == 0 for name in ("regions", "volumes", "patch", "cells"))
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_hidden_lesion_is_no_question():
    """A patch whose lesion is wholly hidden is neither ill nor healthy; a visible part of it makes the patch ill."""
    objective, batch = _objective(), _batch()
    one = Batch(
        image=batch.image[:1],
        sample=batch.sample[:1],
        pathology=torch.ones(1),
        lesion=torch.zeros(1, *PATCH, dtype=torch.int8),
    )
    hidden = draw_mask(one.sample, PATCH, 4, 0.75, SEED, "mask_a")[0, 0]
    one.lesion[0][hidden] = 1
    assert objective(one, 0.0).parts["patch"] == 0
    one.lesion[0, *(~hidden).nonzero()[0]] = 1
    assert objective(one, 0.0).parts["patch"] > 0


def test_what_the_data_lack_costs_no_network():
    objective = _objective(groups=0, volumes=0, pathology_weight=0.0)
    assert objective.region_decoder is None and objective.volume_head is None and objective.pathology_head is None
    assert not (objective.views.regions or objective.views.volumes or objective.views.lesions or objective.views.pairs)
    assert list(objective(_batch(), 0.0).parts) == ["reconstruction"]
    assert _objective(agreement_weight=0.1, visits=True).views.visits


def test_region_errors__perfect_and_unknown():
    target = torch.randint(0, K, (2, *PATCH))
    logits = 40.0 * F.one_hot(target, K).permute(0, 4, 1, 2, 3).float()
    assert region_errors(logits, target).abs().max() < 1e-4
    assert region_errors(logits, torch.full_like(target, -1))[0] == 1  # masked out by whoever calls
    assert region_errors(-logits, target).min() > 1


def test_balanced_errors__ill_cells_weigh_as_much_as_healthy_ones():
    target = torch.zeros(1, 4, 4, 4, dtype=torch.int8)
    target[0, 0, 0, 0] = 1
    missed = torch.full((1, 4, 4, 4), -20.0)
    assert balanced_errors(missed, target)[0] == pytest.approx(10.0, abs=1e-3)


def test_learns_its_targets():
    objective, batch = _objective(mask_ratio=0.25), _batch()
    optimiser = torch.optim.Adam(objective.parameters(), lr=5e-3)
    first = objective(batch, 0.0)
    for _ in range(40):
        optimiser.zero_grad()
        terms = objective(batch, 0.0)
        terms.total.backward()
        optimiser.step()
    for name in ("volumes", "patch", "cells"):
        assert terms.parts[name] < 0.5 * first.parts[name], name


def test_pictures_show_the_regions():
    pictures = _objective().pictures(_batch())
    assert set(pictures) == {"input", "masked", "self", "regions", "predicted"}
    assert all(p.shape == (4, 1, *PATCH) and p.dtype == torch.float32 for p in pictures.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"parts": {"anatomy": 0.5, "rest": 0.5}}, "needs 'anatomy' and 'pathology'"),
        ({"groups": 1}, "two groups"),
        ({"anatomy_weight": -1.0}, "objective.anatomy_weight=-1.0"),
        ({"loss": "l1"}, "expected one of mse"),
        ({"beta": 0.0}, "beta"),
        ({"mask_unit_vox": 5}, "divisor"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(ConfigError, match=words):
        _objective(**config)


def test_partner_counts_only_where_there_is_one():
    objective, batch = _objective(agreement_weight=0.3), _batch()
    other = replace(batch, partner=batch.partner.clone())
    other.partner[1] += 100  # the second sample is not paired
    assert torch.equal(objective(batch, 0.0).total, objective(other, 0.0).total)
