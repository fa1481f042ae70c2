"""contrastive and mae+contrastive: the loss against a loop, who counts as another person, the queue."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.contrastive import MAEContrastive, info_nce
from brainfm.objectives.masking import draw_mask
from brainfm.objectives.objective import build_objective
from tests.processes import leave

PATCH = (16, 16, 16)


def _objective(name="mae+contrastive", **config) -> MAEContrastive:
    torch.manual_seed(0)
    small = {"latent_channels": 16, "hidden_channels": 16, "projected_channels": 8, "queue": 8}
    objective = build_objective(name, build_backbone("unet_tiny"), patch_vox=PATCH, seed=3, **(small | config))
    assert isinstance(objective, MAEContrastive)
    return objective


def _batch(subjects=(0, 1, 2, 3)) -> Batch:
    torch.manual_seed(1)
    return Batch(
        image=torch.randn(4, 1, *PATCH),
        sample=torch.tensor([5, 9, 2, 7]),
        partner=torch.randn(4, 1, *PATCH),
        paired=torch.tensor([True, True, False, True]),
        interval_years=torch.tensor([0.0, 2.0, 0.0, torch.nan]),
        subject=torch.tensor(subjects),
    )


def test_info_nce__compare():
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    keys = torch.nn.functional.normalize(torch.randn(7, 6), dim=1)
    subjects, all_subjects = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 0, 2, 0, 3, -1])
    own = torch.tensor([2, 1, 4, 3])
    found = info_nce(queries, keys, subjects, all_subjects, own, 0.2)
    for i in range(4):
        right = torch.exp(queries[i] @ keys[own[i]] / 0.2)
        wrong = sum(
            torch.exp(queries[i] @ keys[j] / 0.2)
            for j in range(7)
            if all_subjects[j] >= 0 and all_subjects[j] != subjects[i]
        )
        torch.testing.assert_close(found[i], -torch.log(right / (right + wrong)))


def test_other_patches_of_the_same_person_are_no_wrong_answers():
    """Two samples of one person: each then has fewer wrong answers, and the loss of an uninformed code falls."""
    objective = _objective(queue=0)
    apart, together = objective(_batch(), 0.0), objective(_batch((0, 1, 0, 2)), 0.0)
    assert together.parts["contrast"] < apart.parts["contrast"]


def test_total_is_the_weighted_sum_and_hidden_voxels_alone_are_reconstructed():
    objective, batch = _objective(reconstruction_weight=2.0, contrastive_weight=0.5), _batch()
    terms = objective(batch, 0.0)
    torch.testing.assert_close(terms.total.detach(), 2 * terms.parts["hidden"] + 0.5 * terms.parts["contrast"])
    hidden = [draw_mask(batch.sample, PATCH, 4, 0.6, 3, f"mask_{v}") for v in "ab"]
    assert not torch.equal(*hidden)
    errors = []
    for image, where in zip((batch.image, batch.partner), hidden):
        code = objective.latents(objective.backbone(image.masked_fill(where, 0)))["all"].mean
        errors += [((objective.decoder(code)[i] - image[i]) ** 2)[where[i]].mean() for i in range(4)]
    torch.testing.assert_close(terms.parts["hidden"], torch.stack(errors).mean().detach())


def test_queue_remembers_in_training_only_and_forgets_the_oldest():
    objective = _objective(queue=12).train()
    first, second = _batch((0, 1, 2, 3)), replace(_batch((4, 5, 6, 7)), image=torch.randn(4, 1, *PATCH))
    objective(first, 0.0)
    assert objective.queue_subjects.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, -1, -1, -1, -1]
    objective(second, 0.0)
    assert objective.queue_subjects.tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]
    assert not objective.queue_codes.requires_grad
    before = objective.queue_codes.clone()
    objective.eval()(first, 0.0)
    assert torch.equal(before, objective.queue_codes)


def test_codes_of_earlier_steps_are_wrong_answers_but_not_those_of_the_same_person():
    objective = _objective().train()
    one_person = _batch((0, 0, 0, 0))
    assert objective(one_person, 0.0).parts["contrast"] == 0  # nobody to be told from
    assert objective(one_person, 0.0).parts["contrast"] == 0  # the queue holds the same person
    objective(_batch((4, 5, 6, 7)), 0.0)
    assert objective(one_person, 0.0).parts["contrast"] > 0


def test_long_intervals_weigh_less():
    objective, batch = _objective(interval_tau_years=1.0, queue=0).eval(), _batch()
    whole = objective(batch, 0.0).parts["contrast"]
    views, hidden = objective._views(batch)
    codes = objective.projector(objective._codes(views, hidden)["all"])
    people = torch.cat([batch.subject, batch.subject])
    losses = info_nce(codes, codes, people, people, (torch.arange(8) + 4) % 8, 0.1)
    weight = torch.tensor([1.0, torch.e**-2, 1.0, 1.0]).repeat(2)
    torch.testing.assert_close(whole, ((losses * weight).sum() / weight.sum()).detach())


def test_contrastive_alone_has_no_decoder_and_learns():
    objective, batch = _objective("contrastive", queue=0, mask_ratio=0.1, reconstruction_weight=0.0), _batch()
    heads = torch.nn.functional.interpolate(torch.randn(4, 1, 4, 4, 4), PATCH, mode="trilinear")
    batch = replace(batch, image=heads, partner=heads + 0.1 * batch.partner)
    assert objective.decoder is None
    optimiser = torch.optim.Adam(objective.parameters(), lr=1e-2)
    first = objective(batch, 0.0)
    assert list(first.parts) == ["contrast", "rank1"]
    for _ in range(30):
        optimiser.zero_grad()
        terms = objective(batch, 0.0)
        terms.total.backward()
        optimiser.step()
    assert terms.parts["contrast"] < 0.5 * first.parts["contrast"] and terms.parts["rank1"] == 1


def test_every_parameter_gets_a_gradient_and_the_queue_is_not_shipped():
    objective = _objective(parts={"anatomy": 0.5, "rest": 0.5})
    objective(_batch(), 0.0).total.backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert not [name for name in objective.state_for_file() if "queue" in name]
    assert set(objective.encode(torch.randn(2, 1, *PATCH))) == {"anatomy", "rest"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"interval_tau_years": -1.0}, "more than 0 years"),
        ({"contrastive_weight": 0.0}, "contrastive_weight"),
        ({"mask_ratio": 0.0}, "nothing to reconstruct"),
        ({"shift": 1.0}, "0 <= shift < 1"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(ConfigError, match=words):
        _objective(**config)


def _rank(rank, meeting, batches, out):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    objective = _objective()
    terms = objective(batches[rank], 0.0)
    terms.total.backward()
    for p in objective.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    if rank == 0:
        torch.save({"grad": [p.grad for p in objective.parameters()], "people": objective.queue_subjects}, out)
    leave()


def test_two_processes_contrast_against_each_other(tmp_path):
    """Half the batch in each of two processes gives the gradients of the whole batch in one."""
    whole = _batch()

    def half(start):
        values = {name: getattr(whole, name) for name in ("image", "sample", "partner", "paired", "subject")}
        return Batch(**{name: value[start : start + 2] for name, value in values.items()})

    out = tmp_path / "rank0.pt"
    mp.spawn(_rank, args=(str(tmp_path / "meeting"), [half(0), half(2)], str(out)), nprocs=2)
    objective = _objective()
    objective(replace(whole, interval_years=None), 0.0).total.backward()
    found = torch.load(out, weights_only=True)
    for got, parameter in zip(found["grad"], objective.parameters()):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)
    assert sorted(found["people"].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
