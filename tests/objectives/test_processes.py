"""Two processes with half of a batch each find the loss and the gradient of one process with all of it, whatever share
of the samples a term applies to lies on either."""

from __future__ import annotations

import multiprocessing
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from brainfm.batch import Batch
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.losses import mean_of_valid
from brainfm.objectives.objective import Objective, build_objective
from tests.processes import leave

PATCH = (16, 16, 16)
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("mae", {}),
    "published": ("cross_contrast", {}),
    "mended": ("cross_contrast", {"terms_on": "means", "centred": True, "logvar_start": -6.0}),
    "light": ("anatomy_pathology", {"groups": 4, "volumes": 3, "agreement_weight": 0.3}),
    "skip": (
        "anatomy_pathology",
        {"groups": 4, "volumes": 3, "agreement_weight": 0.3, "centred": True, "region_decoder": "skip",
         "regions_on": "visible"},
    ),
    "contrastive": ("mae+contrastive", {"interval_tau_years": 2.0, "queue": 8}),
    "dino": ("dino", {"prototypes": 12, "hidden_channels": 16, "bottleneck": 8, "local_crops": 2, "koleo_weight": 0.0}),
}  # fmt: skip
OWN = {"rank1", "used", "sure", "entropy"}  # said of this process's own samples
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class _Asked(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        question, config = ASKED[name]
        torch.manual_seed(0)
        common = {} if question == "dino" else {"latent_channels": 20, "mask_unit_vox": 4}
        backbone = build_backbone("unet_tiny")
        self.objective: Objective = build_objective(question, backbone, patch_vox=PATCH, seed=3, **common, **config)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        terms = self.objective(batch, 0.5)
        return terms.total, terms.parts


def _batch() -> Batch:
    """The first two samples have both scans, label maps and lesions, the last two hardly anything."""
    torch.manual_seed(1)
    regions = torch.randint(0, 4, (4, *PATCH))
    regions[1:] = -1
    lesion = (torch.rand(4, *PATCH) < 0.02).to(torch.int8)
    lesion[2:] = -1
    return Batch(
        image=torch.randn(4, 1, *PATCH),
        sample=torch.tensor([5, 9, 2, 7]),
        partner=torch.randn(4, 1, *PATCH),
        paired=torch.tensor([True, True, False, True]),
        same_contrast=torch.tensor([False, False, True, True]),
        interval_years=torch.tensor([0.0, 0.0, 0.0, 3.0]),
        subject=torch.tensor([1, 2, 3, 4]),
        regions=regions,
        volumes=torch.tensor([[1.0, 0, 2], [0.3, 1, 1], [torch.nan] * 3, [torch.nan, -1, 0]]),
        pathology=torch.tensor([1.0, 0.0, torch.nan, torch.nan]),
        lesion=lesion,
    )


def _answer(name: str, rows: slice, spread: bool) -> dict[str, Any]:
    """Loss, parts and gradients of these samples."""
    asked = _Asked(name)
    whole = _batch()
    batch = Batch(**{f.name: v[rows] for f in fields(whole) if (v := getattr(whole, f.name)) is not None})
    wrapped = DistributedDataParallel(asked) if spread else asked  # has to live until backward has met the others
    total, parts = wrapped(batch)
    total.backward()
    grads = {f"grad {n}": p.grad for n, p in asked.named_parameters() if p.requires_grad}
    return {"total": total.detach(), **parts} | grads


def _rank(rank: int, port: int, out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    answers = {name: _answer(name, slice(2 * rank, 2 * rank + 2), True) for name in names}
    values = torch.arange(3.0)[: 3 * rank].requires_grad_()
    answers["nobody on rank 0"] = {"total": mean_of_valid(values).detach()}
    torch.save(answers, out / f"rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_context.Process(target=_rank, args=(rank, port, out, list(ASKED))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging and [process.exitcode for process in processes] == [0, 0]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", list(ASKED))
def test_two_processes_find_what_one_finds(name: str, ranks: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    alone = _answer(name, slice(0, 4), False)
    for rank in ranks:
        assert set(rank[name]) == set(alone)
        for key, value in alone.items():
            if key not in OWN:
                atol = 2e-5 if name == "dino" else 2e-6  # its low temperatures magnify what sums in another order
                assert torch.allclose(rank[name][key], value, rtol=1e-4, atol=atol), key


def test_a_rank_without_a_sample_knows_the_mean(ranks: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    assert [float(rank["nobody on rank 0"]["total"]) for rank in ranks] == [1.0, 1.0]
