"""The backbones that ship: receipt, sources, licence, card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from brainfm.settings import VERBATIM

PLACE = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The backbones that ship with brainfm. By name they can be given wherever a backbone file can:
    backbone_from=brainfm_s, backbone=brainfm_s, brainfm.load("brainfm_s").

      brainfm weights                                  a line each
      brainfm weights name=brainfm_s                   receipt, sources with licences, what it may be used for
      brainfm weights name=brainfm_s card=card.md      the model card
    """

    name: Annotated[str | None, "of weights that ship, or a backbone file; null: all that ship", VERBATIM] = None
    card: Annotated[Path | None, "a file for the model card, Markdown"] = None
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.errors import ConfigError
    from brainfm.files import write_text
    from brainfm.nets.backbone_file import read_description
    from brainfm.nets.shipped import FOLDER, located, names
    from brainfm.reports import weights_card

    if settings.name is None:
        if settings.card is not None:
            raise ConfigError(f"card={settings.card}: expected name= of the weights whose card it shall be")
        for name in names():
            path = located(FOLDER / f"{name}.safetensors")
            print(weights_card.receipt(read_description(path), path.stat().st_size)[0])
        if not names():
            print(f"no weights ship with this copy: {FOLDER} holds none")
        return 0
    path = located(settings.name)
    about, size = read_description(path), path.stat().st_size
    print("\n".join(weights_card.receipt(about, size)))
    print("\nmay be used for:", *weights_card.licence(about.get("release", {})), sep="\n  ")
    print("\nsources:", *(weights_card.sources(about.get("release", {})) or ["not told"]), sep="\n  ")
    if settings.card is not None:
        text = path.with_suffix(".md")
        said = text.read_text(encoding="utf-8") if text.is_file() else ""
        write_text(settings.card, weights_card.card(about, size, said))
        print(f"\n{settings.card}: the model card")
    return 0
