"""A run that was begun goes on: its identity is, to the letter, what earlier versions wrote into checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from brainfm.data.store import Store
from brainfm.settings import plain
from brainfm.training.run import identity_of, loop_spec
from brainfm.training.settings import OptimSettings, SteppedSettings, WsdSettings
from brainfm.verbs.compose import resolve

# Made by the version before settings had types (133fc24), from the same words; only a reason to refuse runs changes it:
# adapt.restore_lengths came later, and a fine-tuning begun without it would end with other weights; so would one begun
# when layer-wise rates were the default (decision 149).
KNOWN = json.loads(Path(__file__).with_name("identities.json").read_text())


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: " ".join(known["words"]))
def test_a_run_keeps_its_identity(known: dict, toy_store: Store) -> None:
    verb, *words = known["words"]
    found = identity_of(resolve(verb, words), toy_store)
    wanted = known["identity"] | {"store": toy_store.fingerprint()}
    assert json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def test_what_moves_no_weight_is_no_part_of_it(toy_store: Store) -> None:
    settings = resolve("pretrain", ["store=x", "run=y"])
    other = resolve("pretrain", ["store=x", "run=z", "probe=null", "guard.probes=9", "trainer.workers=7", "debug=true",
                                 "launch=slurm", "trainer.log_every=1", "finish.steps=3"])  # fmt: skip
    assert identity_of(settings, toy_store) == identity_of(other, toy_store)
    assert identity_of(replace(settings, seed=1), toy_store) != identity_of(settings, toy_store)


def test_an_optimiser_with_the_numbers_it_needs() -> None:
    words = ["store=x", "run=y", "experiment=dense_split_s"]  # which has a warm-up of so many steps
    kinds = {option: type(resolve("pretrain", [*words, f"optim={option}"]).optim) for option in ("adamw", "wsd")}
    assert kinds == {"adamw": SteppedSettings, "wsd": WsdSettings}
    usual = resolve("pretrain", words[:2]).optim
    assert type(usual) is OptimSettings and list(plain(usual)) == ["lr", "weight_decay", "betas", "warmup_fraction"]
    stepped = resolve("pretrain", [*words, "optim=adamw", "optim.warmup_steps=12"])
    spec = loop_spec(stepped.trainer, stepped.optim)
    assert (spec.warmup_steps, spec.wsd) == (12, None)
