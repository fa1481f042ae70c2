"""cross_contrast against a reference that walks through the samples one by one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.latents import draw_noise
from brainfm.objectives.cross_contrast import CrossContrast
from brainfm.objectives.masking import draw_mask
from brainfm.objectives.objective import build_objective

PATCH, SEED = (16, 16, 16), 4
MENDED = {"terms_on": "means", "centred": True, "logvar_start": -6.0}


def _objective(**config) -> CrossContrast:
    torch.manual_seed(0)
    objective = build_objective(
        "cross_contrast", build_backbone("unet_tiny"), patch_vox=PATCH, seed=SEED, **({"latent_channels": 16} | config)
    )
    assert isinstance(objective, CrossContrast)
    with torch.no_grad():
        # a fresh network answers nearly 0 to anything, and then swapped roles would hardly show in the errors
        for conv in objective.latents.mean.values():
            conv.weight.mul_(5)
        objective.decoder.out.weight.mul_(10)
    return objective


def _batch(paired=(True, False, True, True), same=(False, False, True, False)) -> Batch:
    torch.manual_seed(1)
    # coarse blobs: with fine noise as target every wrong reconstruction would be equally wrong
    image = F.interpolate(2 * torch.randn(4, 1, 4, 4, 4), PATCH, mode="trilinear")
    paired = torch.tensor(paired)
    other = F.interpolate(2 * torch.randn(4, 1, 4, 4, 4), PATCH, mode="trilinear")
    partner = torch.where(paired[:, None, None, None, None], other, image)
    return Batch(image, torch.tensor([5, 2, 9, 30]), partner, paired, torch.tensor(same))


def _codes(objective, image, number, which):
    """Mean, log variance and value of every part of ONE scan [1, X, Y, Z], the long way."""
    number = torch.tensor([number])
    hidden = draw_mask(number, PATCH, 4, objective.settings.mask_ratio, SEED, f"mask_{which}")
    maps = objective.backbone.features(torch.where(hidden, torch.zeros(()), image[None]))
    grid = maps[-1].shape[2:]
    pooled = torch.cat([F.adaptive_avg_pool3d(m, grid) for m in maps], 1)
    noise = draw_noise(number, (16, *grid), SEED, f"latent_{which}")
    codes, start = {}, 0
    for name, size in objective.latents.sizes.items():
        mean = objective.latents.mean[name](pooled)
        logvar = objective.latents.logvar[name](pooled)
        value = mean + (logvar / 2).exp() * noise[:, start : start + size] if objective.training else mean
        codes[name], start = (mean, logvar, value), start + size
    return codes, hidden


def _reference(objective, batch, swap, anatomy_from, loss_on="all", swap_targets=False):
    """Every term as a list over the samples it applies to, then averaged."""
    selfs_a, selfs_b, cross_a, cross_b, agreement, separation, kl_a, kl_b = ([] for _ in range(8))

    def decode(anatomy, rest):
        values = [anatomy["anatomy"][2] if name == "anatomy" else code[2] for name, code in rest.items()]
        return objective.decoder(torch.cat(values, 1))

    def error(output, target, hidden):
        d = (output[0] - target).abs()
        smooth = torch.where(d < 0.1, d * d / 0.2, d - 0.05)
        return smooth[hidden[0]].mean() if loss_on == "hidden" else smooth.mean()

    def kl(codes):
        return sum((0.5 * (m**2 + v.exp() - 1 - v)).mean() for m, v, _ in codes.values())

    def cos(u, v):
        return (u * v).sum() / (u.norm() * v.norm())

    for i, number in enumerate(batch.sample.tolist()):
        a = batch.image[i]
        code_a, hidden_a = _codes(objective, a, number, "a")
        selfs_a.append(error(decode(code_a, code_a), a, hidden_a))
        kl_a.append(kl(code_a))
        if not batch.paired[i]:
            continue
        b = batch.partner[i]
        code_b, hidden_b = _codes(objective, b, number, "b")
        selfs_b.append(error(decode(code_b, code_b), b, hidden_b))
        kl_b.append(kl(code_b))
        mean = {"anatomy": (None, None, (code_a["anatomy"][2] + code_b["anatomy"][2]) / 2)}
        from_b, from_a = (mean, mean) if anatomy_from == "mean" else (code_b, code_a)
        with_a, with_b = (code_a, code_b) if swap == "standard" else (code_b, code_a)
        target_a, target_b = (b, a) if swap_targets else (a, b)
        cross_a.append(error(decode(from_b, with_a), target_a, hidden_a))
        cross_b.append(error(decode(from_a, with_b), target_b, hidden_b))
        agreement.append(1 - cos(code_a["anatomy"][2], code_b["anatomy"][2]))
        if not batch.same_contrast[i]:
            separation.append(cos(code_a["contrast"][2], code_b["contrast"][2]))

    def mean_of(values):
        return torch.stack(values).mean() if values else torch.zeros(())

    return {
        "self": mean_of(selfs_a) + mean_of(selfs_b),
        "cross": mean_of(cross_a) + mean_of(cross_b),
        "agreement": mean_of(agreement),
        "separation": mean_of(separation),
        "kl": mean_of(kl_a) + mean_of(kl_b),
    }


def _same(got, want) -> None:
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name].detach(), atol=1e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("config", "swap", "anatomy_from"),
    [
        ({}, "standard", "other"),
        ({"anatomy_from": "mean"}, "standard", "mean"),
        ({"swap": "published"}, "published", "mean"),
        ({"parts": {"free": 0.25, "anatomy": 0.5, "contrast": 0.25}}, "standard", "other"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_terms__compare_to_a_loop_over_samples(config, swap, anatomy_from, training):
    objective, batch = _objective(**config).train(training), _batch()
    terms = objective(batch, 0.05)
    want = _reference(objective, batch, swap, anatomy_from)
    _same(terms.parts, want)
    weights = {"self": 3.0, "cross": 1.0, "agreement": 0.5, "separation": 0.5, "kl": 0.001 * 0.5}
    torch.testing.assert_close(terms.total, sum(weights[n] * want[n] for n in want), atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in terms.parts.values())


def test_terms__on_hidden_voxels_only():
    objective, batch = _objective(loss_on="hidden"), _batch()
    _same(objective(batch, 1.0).parts, _reference(objective, batch, "standard", "other", loss_on="hidden"))


@pytest.mark.parametrize("config", [MENDED, MENDED | {"terms_on": "samples"}, {"terms_on": "means"}])
def test_mended_terms__compare_to_a_loop_over_samples(config):
    """Which codes are looked at, and less what; everything else stays the published objective."""
    objective, batch = _objective(**config), _batch()
    found = objective(batch, 0.05)
    want = _reference(objective, batch, "standard", "other")
    pairs = {"anatomy": [], "contrast": []}
    for i, number in enumerate(batch.sample.tolist()):
        if batch.paired[i]:
            a, b = (
                _codes(objective, image[i], number, which)[0]
                for image, which in ((batch.image, "a"), (batch.partner, "b"))
            )
            for part, seen in pairs.items():
                seen.append([code[part][0 if config["terms_on"] == "means" else 2][0] for code in (a, b)])
    floors = {}
    if config.get("centred"):
        for part, seen in pairs.items():
            mean = sum(code for pair in seen for code in pair) / 6  # of three pairs, at each cell
            seen[:] = [[code - mean for code in pair] for pair in seen]
            for channel in range(8):
                squares = torch.cat([code[channel].flatten() ** 2 for pair in seen for code in pair])
                floors.setdefault(f"{part}_floor", []).append((1 - (squares.mean() + 1e-4).sqrt()).clamp(min=0))
    cosines = {part: [F.cosine_similarity(*(c.flatten() for c in pair), dim=0) for pair in seen]
               for part, seen in pairs.items()}  # fmt: skip
    want["agreement"] = 1 - torch.stack(cosines["anatomy"]).mean()
    # of the samples 0, 2 and 3 that have a pair, 2 shows one contrast twice
    want["separation"] = torch.stack([cosines["contrast"][0], cosines["contrast"][2]]).mean()
    kl = want.pop("kl")
    want |= {name: torch.stack(values).mean() for name, values in floors.items()} | {"kl": kl}
    _same(found.parts, want)
    weights = {"self": 3.0, "cross": 1.0, "kl": 0.001 * 0.5}
    torch.testing.assert_close(found.total, sum(weights.get(n, 0.5) * want[n] for n in want), atol=1e-4, rtol=1e-4)


def test_noise_no_longer_separates_the_contrasts():
    """Codes that are the same for both scans: samples are far apart where the noise is large, means are not."""
    parts = {}
    for terms_on in ("samples", "means"):
        objective = _objective(terms_on=terms_on)
        with torch.no_grad():
            objective.latents.mean["contrast"].weight.zero_()
            objective.latents.logvar["contrast"].bias.fill_(4.0)
        parts[terms_on] = objective(_batch(), 1.0).parts["separation"].item()
    assert parts["samples"] < 0.3 and parts["means"] == pytest.approx(1.0)


def test_a_common_vector_no_longer_agrees():
    parts = {}
    for centred in (False, True):
        objective = _objective(terms_on="means", centred=centred)
        with torch.no_grad():
            for part in ("anatomy", "contrast"):
                objective.latents.mean[part].weight.mul_(1e-4)
                objective.latents.mean[part].bias.fill_(2.0)
        parts[centred] = objective(_batch(), 1.0).parts
    assert parts[False]["agreement"] < 1e-4
    assert parts[True]["agreement"] > 0.1 and parts[True]["anatomy_floor"] > 0.9 and parts[True]["contrast_floor"] > 0.9


def test_the_noise_starts_where_it_is_told():
    quiet, loud = (_objective(logvar_start=start).latents.logvar["contrast"].bias for start in (-6.0, None))
    assert (quiet == -6).all() and loud.abs().max() < 1
    assert not _objective(variational=False, logvar_start=-6.0).latents.logvar


@pytest.mark.parametrize("swap", ["standard", "published"])
def test_a_swapped_target_would_be_noticed(swap):
    objective, batch = _objective(swap=swap), _batch()
    wrong = _reference(objective, batch, swap, "mean" if swap == "published" else "other", swap_targets=True)
    got = objective(batch, 0.05).parts["cross"]
    assert abs(got - wrong["cross"]) > 0.001 * got  # fifty times what the comparison above tolerates


def test_standard_and_published_differ():
    parts = [_objective(**c)(_batch(), 0.0).parts["cross"] for c in ({"anatomy_from": "mean"}, {"swap": "published"})]
    assert abs(parts[0] - parts[1]) > 1e-3


@pytest.mark.parametrize("config", [{}, {"terms_on": "means", "centred": True}])
@pytest.mark.parametrize("partner", ["absent", "repeats", "nan"])
def test_single_scans_give_self_and_kl_of_a_only(partner, config):
    objective = _objective(**config)
    batch = _batch(paired=(False,) * 4)
    if partner == "absent":
        batch = replace(batch, partner=None, paired=None, same_contrast=None)
    if partner == "nan":
        batch = replace(batch, partner=torch.full_like(batch.image, float("nan")))
    terms = objective(batch, 1.0)
    want = _reference(objective, _batch(paired=(False,) * 4), "standard", "other")
    _same({name: value for name, value in terms.parts.items() if name in want}, want)
    assert all(value.item() == 0 for name, value in terms.parts.items() if name not in ("self", "kl"))
    terms.total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_an_unpaired_partner_counts_nowhere():
    objective, batch = _objective(), _batch()
    partner = batch.partner.clone()
    partner[1] = float("nan")
    one, two = objective(batch, 1.0), objective(replace(batch, partner=partner), 1.0)
    assert torch.equal(one.total, two.total)


def test_repeats_of_one_contrast_are_not_pushed_apart():
    objective = _objective()
    assert objective(_batch(same=(True,) * 4), 1.0).parts["separation"].item() == 0
    assert objective(_batch(same=(False,) * 4), 1.0).parts["separation"].item() != 0
    unknown = replace(_batch(same=(False,) * 4), same_contrast=None)
    assert torch.equal(objective(unknown, 1.0).total, objective(_batch(same=(False,) * 4), 1.0).total)


def test_separation_floor():
    objective = _objective()
    assert -1 < objective(_batch(), 1.0).parts["separation"] < 0.99
    assert _objective(separation_floor=0.99)(_batch(), 1.0).parts["separation"].item() == pytest.approx(0.99)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [{"swap": "standard"}, {"swap": "published"}, MENDED])
def test_every_parameter_gets_a_gradient(autocast, config):
    objective = _objective(**config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = objective(_batch(), 0.5)
    assert terms.total.dtype == torch.float32 and all(p.dtype == torch.float32 for p in terms.parts.values())
    terms.total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # the bias before an instance norm is the one thing whose true gradient is 0
        before_norm = name.endswith(".0.bias") and name.replace("bias", "weight") in dict(objective.named_parameters())
        assert before_norm or parameter.grad.abs().max() > 0, name


def test_without_variation_there_is_no_noise_and_no_kl():
    objective = _objective(variational=False)
    terms = objective(_batch(), 1.0)
    assert terms.parts["kl"].item() == 0 and not objective.latents.logvar
    assert torch.equal(terms.total, objective.eval()(_batch(), 1.0).total)


def test_kl_weight_ramps():
    objective = _objective(kl_weight=10.0)
    totals = [objective(_batch(), p).total.item() for p in (0.0, 0.05, 0.1, 1.0)]
    kl = objective(_batch(), 0.0).parts["kl"].item()
    assert totals[1] - totals[0] == pytest.approx(5 * kl, rel=1e-3)
    assert totals[2] == totals[3] == pytest.approx(totals[0] + 10 * kl, rel=1e-3)


def test_a_sample_meets_the_same_draws_in_any_batch():
    objective, batch = _objective(), _batch(paired=(True,) * 4, same=(False,) * 4)
    pieces = [
        objective(
            Batch(
                batch.image[i : i + 1],
                batch.sample[i : i + 1],
                batch.partner[i : i + 1],
                batch.paired[i : i + 1],
                batch.same_contrast[i : i + 1],
            ),
            1.0,
        ).total
        for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(pieces).mean(), objective(batch, 1.0).total, atol=1e-4, rtol=1e-4)
    assert torch.equal(objective(batch, 1.0).total, objective(batch, 1.0).total)


def test_the_two_scans_are_masked_independently():
    objective, batch = _objective(), _batch()
    a = objective._hidden(batch, batch.sample, "mask_a")
    b = objective._hidden(batch, batch.sample, "mask_b")
    scans = objective._scans(batch)
    assert torch.equal(scans.hidden_a, a) and torch.equal(scans.hidden_b, b[scans.rows])
    assert (a.flatten(1).sum(1) == 13 * 64).all() and not (a == b).flatten(1).all(1).any()


def test_pictures():
    objective, batch = _objective(), _batch()
    pictures = objective.pictures(batch)
    assert list(pictures) == ["input", "masked", "self", "partner", "cross"]
    assert all(p.shape == batch.image.shape and p.dtype == torch.float32 for p in pictures.values())
    assert not pictures["cross"][1].any() and not pictures["partner"][1].any()
    assert all(pictures["cross"][i].any() for i in (0, 2, 3))
    assert torch.equal(pictures["partner"][3], batch.partner[3])
    objective.eval()
    code, _ = _codes(objective, batch.image[0], 5, "a")
    other, _ = _codes(objective, batch.partner[0], 5, "b")
    want = objective.decoder(torch.cat([other["anatomy"][2], code["contrast"][2]], 1))
    torch.testing.assert_close(pictures["cross"][:1], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"swap": "both"}, "expected standard or published"),
        ({"terms_on": "codes"}, "expected means or samples"),
        ({"logvar_start": -20.0}, "expected -10 to 10, or null"),
        ({"loss_on": "visible"}, "expected all or hidden"),
        ({"anatomy_from": "a"}, "expected other, mean or null"),
        ({"swap": "published", "anatomy_from": "other"}, "expected 'mean'"),
        ({"parts": {"anatomy": 1.0}}, "needs 'anatomy' and 'contrast'"),
        ({"parts": {"anatomy": 0.5, "contrast": 0.4}}, "sum to 1"),
        ({"beta": -1.0}, "beta"),
        ({"mask_unit_vox": 7}, "divisor"),
        ({"kl": 1.0}, "no key 'objective.kl'"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(ConfigError, match=words):
        _objective(**config)


def test_published_size():
    with torch.device("meta"):
        objective = build_objective("cross_contrast", build_backbone("unet_b"), patch_vox=(64, 64, 64), seed=0)
    assert sum(p.numel() for p in objective.parameters()) == 18_896_449
    assert objective.views.pairs and objective.views.patch_vox == (64, 64, 64)


def test_visits_are_asked_of_the_loader():
    assert _objective(visits=True).views.visits and not _objective().views.visits
