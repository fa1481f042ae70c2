"""Turn another tool's weights into a backbone file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from brainfm.errors import ConfigError

PLACE = 18


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Turn another tool's weights into a backbone file. Every tensor of the encoder finds its place, or nothing is
    written but the table of what does not fit.

      brainfm import checkpoint=checkpoint_final.pth out=openmind_mae.safetensors
      brainfm import format=fomo checkpoint=last.ckpt out=amaes.safetensors
    """

    checkpoint: Annotated[Path, ".pth, .pt, .ckpt or .safetensors; nothing in it is executed"]
    out: Annotated[Path, "the backbone file, .safetensors; beside it NAME.transfer.csv, a row a tensor"]
    format: Annotated[
        Literal["auto", "nnssl", "fomo"],
        "nnssl: residual U-Nets and Primus of nnssl and nnU-Net; fomo: baselines of FOMO25 and FOMO26, FOMO2JOMO",
    ] = "auto"
    axes: Annotated[
        Literal["zyx", "xyz"], "of nnssl: order of its arrays' axes; zyx: read by SimpleITK, xyz: by nibabel"
    ] = "zyx"
    order: Annotated[
        Literal["auto", "whd", "hwd"],
        "of a Primus: how its tokens follow each other; hwd: the array's first two axes exchanged, as nnssl trains it; "
        "auto: by what the file says of its maker",
    ] = "auto"
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"out={self.out}: expected a backbone file, *.safetensors")


def run(settings: Settings) -> int:
    from brainfm.nets.exchange.checkpoint import read_checkpoint
    from brainfm.nets.exchange.formats import imported
    from brainfm.nets.exchange.imported import save_imported
    from brainfm.nets.exchange.matching import MisfitError, summary, write_rows

    table = settings.out.with_suffix(".transfer.csv")
    checkpoint = read_checkpoint(settings.checkpoint)
    try:
        found = imported(checkpoint, settings.format, settings.axes, settings.order)
    except MisfitError as error:
        write_rows(table, error.rows)
        print(f"{summary(error.rows)}\n{table}")
        raise
    write_rows(table, found.rows)  # first: where it cannot be written there is no backbone either
    mark = save_imported(settings.out, checkpoint, found)
    print(summary(found.rows))
    for note in found.notes:
        print(f"note: {note}")
    beside = ", with its decoder" if found.decoder is not None else ""
    print(f"{settings.out}: {found.backbone.config['name']}{beside}, fingerprint {mark[:16]}; {table}")
    return 0
