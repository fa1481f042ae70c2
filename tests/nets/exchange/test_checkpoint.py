"""Tensors that no network can take, and a table that cannot be written: refused before anything is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from brainfm.cli import main
from brainfm.errors import WeightsError
from brainfm.nets.exchange.checkpoint import read_checkpoint
from tests.nets.exchange.test_nnssl import released


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.eye(3).to_sparse(), "stem.weight is sparse or quantised"),
        (torch.empty(3, 3, device="meta"), "stem.weight has a shape and no values"),
    ],
)
def test_tensors_without_plain_values_are_refused(value: Tensor, said: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"stem.weight": value}}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match=said):
        read_checkpoint(tmp_path / "c.pth")


def test_no_backbone_is_left_where_its_table_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.transfer.csv").mkdir()
    torch.save(released(), tmp_path / "c.pth")
    assert main(["import", f"checkpoint={tmp_path / 'c.pth'}", f"out={tmp_path / 'b.safetensors'}"]) == 2
    assert "b.transfer.csv: cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
