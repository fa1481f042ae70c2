"""anatomy_pathology: terms against loops, targets that are missing, and what no gradient may reach."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.anatomy_pathology import AnatomyPathology, balanced_errors, region_errors, share_errors
from brainfm.objectives.masking import draw_mask
from brainfm.objectives.objective import build_objective

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
    light, skip = {}, {"region_decoder": "skip"}
    own = (
        ("regions", light, "anatomy", ("region_decoder.",)),
        ("regions", skip, None, ("dense.", "heads.regions.")),
        ("shares", skip, "anatomy", ("share_head.",)),
        ("volumes", light, "anatomy", ("volume_head.",)),
        ("patch", light, "pathology", ("pathology_head.",)),
        ("cells", light, "pathology", ("pathology_head.",)),
    )
    for name, config, part, networks in own:
        objective = _objective(**config)
        batch = _batch()
        views = objective._views(batch)
        maps = objective._maps(views)
        codes = objective._codes(maps)
        terms = objective._anatomy(codes["anatomy"], maps, views, batch)
        terms |= objective._pathology(codes["pathology"], views, batch)
        terms[name].backward()
        reached = {n for n, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        wanted = {f"latents.mean.{part}.{kind}" for kind in ("weight", "bias")} if part else set()
        assert {n for n in reached if n.startswith("latents.")} == wanted, name
        assert any(n.startswith("backbone.") for n in reached)
        assert all(n.startswith(("backbone.", "latents.", *networks)) for n in reached), name


def test_skip_decoder_teaches_every_level_and_travels_apart():
    """The finest map gets its gradient at single voxels, where the light decoder hands down block means only."""
    slopes = {}
    for kind in ("light", "skip"):
        objective, batch = _objective(region_decoder=kind), _batch()
        views = objective._views(batch)
        maps = [m.detach().requires_grad_() for m in objective._maps(views)]
        terms = objective._anatomy(objective._codes(maps)["anatomy"], maps, views, batch)
        terms["regions"].backward()
        slope = maps[0].grad[0].unfold(1, 4, 4).unfold(2, 4, 4).unfold(3, 4, 4).flatten(-3)
        slopes[kind] = float((slope - slope.mean(-1, keepdim=True)).norm() / slope.norm())
        assert all(m.grad[0].abs().sum() > 0 for m in maps)
    assert slopes["light"] < 1e-3 and slopes["skip"] > 0.3
    apart = {n.split(".")[0] for n in objective.state_dict()} - {n.split(".")[0] for n in objective.state_for_file()}
    assert apart == {"backbone", "dense", "heads"} and objective.share_head is not None
    assert objective.dense.parts == {"anatomy": 32} and objective.heads["regions"].names[-1] == f"group_{K - 1}"
    assert _objective(groups=0, region_decoder="skip").dense is None


@pytest.mark.parametrize("kind", ["skip", "light"])
def test_label_maps_are_asked_for_in_visible_voxels(kind):
    objective, batch = _objective(region_decoder=kind, regions_on="visible"), _batch()
    hidden = draw_mask(batch.sample, PATCH, 4, 0.75, SEED, "mask_a")[:, 0]
    elsewhere = torch.where(hidden & (batch.regions >= 0), (batch.regions + 1) % K, batch.regions)
    one, two = objective(batch, 0.0).parts, objective(replace(batch, regions=elsewhere), 0.0).parts
    assert one["regions"] == two["regions"] > 0 and one.get("shares") == two.get("shares")
    nothing = torch.where(hidden, batch.regions, -1)  # known under the mask alone: a question to nobody
    assert objective(replace(batch, regions=nothing), 0.0).parts["regions"] == 0
    everywhere = _objective(region_decoder=kind, regions_on="all")
    one, two = everywhere(batch, 0.0).parts, everywhere(replace(batch, regions=elsewhere), 0.0).parts
    assert one["regions"] != two["regions"]


def test_share_errors__compare():
    torch.manual_seed(2)
    target = torch.randint(-1, K, (2, 8, 8, 8))
    target[0, :4, :4, :3] = -1  # most of the first cell, so that it is no question
    target[1] = -1
    logits = torch.randn(2, K, 2, 2, 2)
    errors, known = share_errors(logits, target)
    wanted = []
    for x in range(2):
        for y in range(2):
            for z in range(2):
                block = target[0, 4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 4 * z : 4 * z + 4].flatten()
                block = block[block >= 0]
                if len(block) <= 32:
                    continue
                truth = torch.bincount(block, minlength=K) / len(block)
                said = logits[0, :, x, y, z].softmax(0)
                wanted.append(sum(t * (t / s).log() for t, s in zip(truth, said) if t > 0))
    assert 0 < len(wanted) < 8
    torch.testing.assert_close(errors[0], torch.stack(wanted).mean())
    assert known.tolist() == [True, False] and errors[1] == 0


def test_centred_agreement_is_not_met_by_a_common_vector():
    batch = _batch()
    parts = {}
    for centred in (False, True):
        objective = _objective(agreement_weight=0.3, centred=centred)
        with torch.no_grad():
            objective.latents.mean["anatomy"].weight.mul_(1e-3)
            objective.latents.mean["anatomy"].bias.fill_(1.0)
        parts[centred] = objective(batch, 0.0).parts
    assert parts[False]["agreement"] < 1e-4 and "anatomy_floor" not in parts[False]
    assert parts[True]["agreement"] > 0.1 and parts[True]["anatomy_floor"] > 0.9


@pytest.mark.parametrize("kind", ["skip", "light"])
def test_missing_targets_drop_their_term_and_not_the_sample(kind):
    objective, batch = _objective(region_decoder=kind), _batch()
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


@pytest.mark.parametrize("kind", ["skip", "light"])
def test_pictures_show_the_regions(kind):
    pictures = _objective(region_decoder=kind).pictures(_batch())
    assert set(pictures) == {"input", "masked", "self", "regions", "predicted"}
    assert all(p.shape == (4, 1, *PATCH) and p.dtype == torch.float32 for p in pictures.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"parts": {"anatomy": 0.5, "rest": 0.5}}, "needs 'anatomy' and 'pathology'"),
        ({"groups": 1}, "two groups"),
        ({"anatomy_weight": -1.0}, "objective.anatomy_weight=-1.0"),
        ({"loss": "l1"}, "expected mse or"),
        ({"beta": 0.0}, "beta"),
        ({"region_decoder": "unet"}, "region_decoder=unet: expected skip or light"),
        ({"regions_on": "hidden"}, "regions_on=hidden: expected visible or all"),
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
