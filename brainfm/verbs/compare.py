"""Compare models that are pre-trained and asked alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from brainfm.comparison.contenders import UNTRAINED, VOLUMES, Contender, ModelName, pairs_of
from brainfm.comparison.settings import CompareSettings
from brainfm.errors import ConfigError
from brainfm.settings import narrowed, shown
from brainfm.training.settings import FinetuneSettings, PretrainSettings
from brainfm.verbs.compose import options, resolve, settings_of

PLACE = 13

_TAKEN = {  # what a comparison decides for all of its runs
    "pretrain": ("store", "run", "seed", "backbone", "objective", "trainer.max_steps", "data.side_column",
                 "data.validation", "data.split_seed", "data.only", "probe", "finish"),
    "finetune": ("store", "run", "seed", "backbone", "backbone_from", "task", "optim.lr", "folds", "repeats",
                 "protocol", "baselines", "task.target", "task.contrasts"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(CompareSettings):
    """Pre-train models alike, ask them alike, on people whom no pre-training has seen. Interrupted, the same command
    goes on; a model, a task or a seed more adds its own runs only.

      brainfm compare models=[unet_s:dense_split,unet_s:mae,vit_s:mae,untrained,volumes] budget=steps steps=2000 \\
        store=store tasks=[age,sex,tissues] out=compared
      brainfm compare experiment=compare_ixi2mm store=store out=compared
    """

    RECIPES: ClassVar[str] = "all of this as a file of configs/experiment/ has it"


def run(settings: Settings) -> int:
    from brainfm.comparison.runs import Comparison
    from brainfm.comparison.scores import document, write_tables
    from brainfm.reports.models import write_models_page

    asked = narrowed(CompareSettings, settings)
    comparison: Comparison = prepared(asked)
    comparison.begin()
    if not comparison.do():
        return 0
    found = document(comparison)
    write_tables(asked.out, found)
    for one in found["measures"]:
        for model, score in one["scores"].items():
            ends = " to ".join("?" if score[end] is None else f"{score[end]:.3f}" for end in ("low", "high"))
            mean = "?" if score["mean"] is None else f"{score['mean']:.3f}"
            print(f"{one['name']:<24} {one['metric']:<6} {model:<32} {mean} [{ends}]")
    print(write_models_page(asked.out, found))
    return 0


def prepared(asked: CompareSettings) -> Any:
    """Everything that can be refused is refused here, before anything is trained."""
    from brainfm.comparison.questions import kind_in, question_of
    from brainfm.comparison.runs import Comparison, sides_by_person
    from brainfm.data.store import Store
    from brainfm.files import check_writable

    pairs = pairs_of(asked.models, options("backbone"), _objectives())
    _check_names(asked, pairs)
    check_writable(asked.out)
    store = Store.open(asked.store)
    contenders = tuple(_contender(asked, pair, pairs) for pair in pairs)
    _check_batches(contenders)
    trained = [contender.pretrain for contender in contenders if contender.pretrain is not None]
    any_network = next((pair.backbone for pair in pairs if pair.backbone), options("backbone")[0])
    sides = sides_by_person(store, trained[0] if trained else _pretrain(asked, ModelName(any_network, "mae"), {}))
    questions = []
    for target in asked.tasks:
        kind = kind_in(store, target, asked.contrasts)
        base = _finetune(asked, kind, target, any_network)
        questions.append(question_of(target, base, store, sides, asked.inner, asked.tested))
    return Comparison(asked, store, contenders, tuple(questions))


def _objectives() -> list[str]:
    from brainfm.settings import keys_of

    return options("objective", keys_of(settings_of("pretrain"))["objective"])


def _check_names(asked: CompareSettings, pairs: list[ModelName]) -> None:
    names = [pair.name for pair in pairs]
    if asked.against is not None and asked.against not in names:
        raise ConfigError(f"against={asked.against}: expected one of {', '.join(names)}")
    pairs_of(list(asked.of_model) or [VOLUMES], options("backbone"), _objectives())  # of models that may be added later
    strange = [name for name in asked.of_task if name not in asked.tasks]
    if strange:
        raise ConfigError(f"of_task: found {strange[0]!r}, expected one of {', '.join(asked.tasks)}")


def _check_batches(contenders: tuple[Contender, ...]) -> None:
    """The same steps are the same number of samples."""
    sizes = {c.name: c.pretrain.trainer.batch_size for c in contenders if c.pretrain is not None}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"trainer.batch_size differs ({said}), expected one for all: pretrain.trainer.batch_size=")


def _contender(asked: CompareSettings, pair: ModelName, pairs: list[ModelName]) -> Contender:
    """An untrained network is that of the first model of its name, where nothing else is said."""
    if not pair.backbone:
        return Contender(pair.name)
    own = asked.of_model.get(pair.name, {})
    if pair.objective != UNTRAINED:
        found = _pretrain(asked, pair, own)
        return Contender(pair.name, dict(found.backbone), found)
    first = next((other.name for other in pairs if other.backbone == pair.backbone and other != pair), "")
    network = asked.of_model.get(first, {}).get("backbone")
    own = own or ({"backbone": network} if network else {})
    return Contender(pair.name, dict(_pretrain(asked, replace(pair, objective="mae"), own).backbone))


def _pretrain(asked: CompareSettings, pair: ModelName, own: Mapping[str, Any]) -> PretrainSettings:
    side = ["data.side_column=" + asked.side_column] if asked.side_column else []
    given = {"trainer.evaluate_every": "0"} | dict(_words("pretrain", asked.pretrain, "pretrain"))
    given |= dict(_words("pretrain", own, f"of_model.{pair.name}"))
    words = [
        f"store={asked.store}", "run=-", f"backbone={pair.backbone}", f"objective={pair.objective}",
        f"data.validation={asked.held}", f"data.split_seed={asked.split_seed}", "probe=null", *side,
        *(f"{key}={value}" for key, value in given.items()),
    ]  # fmt: skip
    return narrowed(PretrainSettings, resolve("pretrain", words))


def _finetune(asked: CompareSettings, kind: str, target: str, network: str) -> FinetuneSettings:
    """Of every model; each puts its own network in the place of this one, but for volumes, which look at none."""
    given = {"baselines": "[]", "audit": "false", "report": "false", "mirror": "[]", "clean": "false"}
    given |= dict(_words("finetune", asked.finetune, "finetune"))
    given |= dict(_words("finetune", asked.of_task.get(target, {}), f"of_task.{target}"))
    contrasts = [f"task.contrasts={shown(asked.contrasts)}"] if asked.contrasts else []
    words = [
        f"task={kind}", f"task.target={target}", f"store={asked.store}", "run=-", "backbone_from=none",
        f"backbone={network}", *contrasts, *(f"{key}={value}" for key, value in given.items()),
    ]  # fmt: skip
    return narrowed(FinetuneSettings, resolve("finetune", words))


def _words(verb: str, values: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """Nested values as dotted keys. Raises: ConfigError for a key that the comparison itself decides."""
    for key, value in _flat(values, ""):
        taken = next((name for name in _TAKEN[verb] if key == name or _is_of(key, name)), None)
        if taken is not None:
            raise ConfigError(f"{where}.{key}={value}: a comparison decides {taken} for all of its runs")
        yield key, value


def _is_of(key: str, taken: str) -> bool:
    """Whether a dotted key lies in one that is taken; of a group its option is, not what the option has."""
    return taken not in ("backbone", "objective", "task") and key.startswith(f"{taken}.")


def _flat(values: Mapping[str, Any], at: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", shown(value)
