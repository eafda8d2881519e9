"""Tuning: values of a template that trade distance, variety and cost best, found within a budget."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
import typer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from genkit.guidance import parse
from genkit_eval import provenance
from genkit_eval.command import Loaded, RunOptions, finish, load
from genkit_eval.config import differences
from genkit_eval.distributed import world
from genkit_eval.errors import InputError
from genkit_eval.generate import RefusedError
from genkit_eval.pareto import value_of
from genkit_eval.report import check_installed
from genkit_eval.results import earlier_entries
from genkit_eval.run import prepare_folder, run
from genkit_eval.runs import read_run
from genkit_eval.search.sweep import better_by_name, front_text, objectives_of
from genkit_eval.search.templates import check_names, fill, split, values_of

JOURNAL, STUDY, SEARCH = "tune.journal", "tune", "search"
DIGITS = 4  # of a value in a guidance: more would only make its name longer
IDLE = 50  # trials in a row that were refused or made before: then the ranges hold next to nothing else that works


def distribution_of(text: str, option: str) -> BaseDistribution:
    """``1:8``, ``0.01:1:log``, ``1:4:int``, ``1:8:0.5`` (steps), or ``linear,cosine``; InputError for anything else."""
    parts = [part.strip() for part in text.split(":")]
    if len(parts) == 1:
        return CategoricalDistribution(values_of(text, option))
    try:
        low, high, *rest = parts
        kind = rest[0] if rest else ""
        step = 1.0 if kind in ("", "int", "log") else float(kind)
        if len(rest) > 1 or not float(low) < float(high) or not all(map(math.isfinite, (float(low), float(high), step))):
            raise ValueError("finite numbers, low below high")
        if kind == "int":
            return IntDistribution(int(low), int(high))
        if kind in ("", "log"):
            return FloatDistribution(float(low), float(high), log=kind == "log")
        with warnings.catch_warnings(action="ignore"):  # that the last step may end below high, as it does in a grid
            return FloatDistribution(float(low), float(high), step=step)
    except ValueError as error:
        raise InputError(option, f"got {text!r} ({error}); low:high, low:high:log, low:high:int or a,b,c works") from None


def space_of(template: str, ranges: Sequence[str]) -> dict[str, BaseDistribution]:
    """The distribution of each name of the template; InputError where names do not fit."""
    pairs = [split(text, "--range") for text in ranges]
    if len({name for name, _ in pairs}) < len(pairs):
        raise InputError("--range", "a name is given twice")
    check_names([template], [name for name, _ in pairs], "--range")
    if not pairs:
        raise InputError("--range", f"{template} has no {{name}} to tune; 'CFG({{w}})' with --range w=1:8 works")
    return {name: distribution_of(rest, f"--range {name}") for name, rest in pairs}


@dataclass(frozen=True)
class Budget:
    """What may be spent in all: network evaluations, or images."""

    total: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``2e6`` (evaluations), ``20000 images``; InputError for anything else."""
        number, unit = text.strip(), "evaluations"
        for word in ("images", "evaluations"):
            if number.endswith(word):
                number, unit = number.removesuffix(word).strip(), word
        try:
            total = float(number)
        except ValueError:
            total = -1.0
        if not 0 < total < float("inf"):
            raise InputError("--budget", f"got {text!r}; a number of network evaluations such as 2e6, or '20000 images', works")
        return cls(total, unit)

    def cost(self, entry: dict[str, Any]) -> float:
        """What an entry took."""
        return float(entry["n"] * (entry["cost"]["nfe_mean"] if self.unit == "evaluations" else 1))

    def allows(self, costs: Sequence[float]) -> bool:
        """Whether another trial fits, if it takes no more than the dearest so far."""
        return not costs or sum(costs) + max(costs) <= self.total


def shown(value: Any) -> str:
    """A value as it stands in the guidance."""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Tuner:
    """A search in one folder: the study, and all that its trials share."""

    template: str
    space: dict[str, BaseDistribution]
    objectives: tuple[str, ...]
    budget: Budget
    options: RunOptions
    loaded: Loaded
    study: optuna.Study

    def text(self, trial: Trial | FrozenTrial) -> str:
        """The guidance of a trial."""
        return fill(self.template, {name: shown(trial.params[name]) for name in self.space})

    def entries(self) -> dict[str, dict[str, Any]]:
        """The results of finished trials, by expression."""
        done = {repr(parse(self.text(trial))) for trial in self.study.get_trials(False, (TrialState.COMPLETE,))}
        return {e["guidance"]: e for e in earlier_entries(self.options.out) if e["guidance"] in done}

    def next(self) -> Trial | FrozenTrial:
        """The trial that a stopped search had begun, else a new one; its values depend on the seed and earlier trials alone."""
        for begun in self.study.get_trials(False, (TrialState.RUNNING,)):
            if begun.params.keys() == self.space.keys():
                return begun
            self.study.tell(begun.number, state=TrialState.FAIL)
        # A sampler of its own for each trial: a resumed search goes on as if it had not been stopped.
        self.study.sampler = optuna.samplers.TPESampler(seed=self.options.seed + len(self.study.trials))
        return self.study.ask(self.space)

    def score(self, text: str, known: Mapping[str, dict[str, Any]]) -> list[float]:
        """Make and score one guidance that is not ``known`` yet, as a further entry of the run; InputError for one refused."""
        try:
            rule = repr(parse(text))
        except ValueError as error:
            raise InputError("--guidance", str(error)) from RefusedError(str(error))
        entry = known.get(rule)
        if entry is None:
            made, request = self.loaded, replace(self.options, guidance=[text], overwrite=False).request()
            found = run(made.pipe, made.extractor, made.reference, made.config, request)
            entry = next(entry for entry in found["guidances"] if entry["guidance"] == rule)
        values = [value_of(entry, name) for name in self.objectives]
        lacking = [name for name, value in zip(self.objectives, values, strict=True) if value is None]
        if lacking:
            raise InputError("--objective", f"the results have no {', '.join(lacking)}")
        return [value for value in values if value is not None]

    def go(self) -> int:
        """Trials until the budget is spent, or nothing new is found; returns how many were refused in all."""
        idle = 0
        while idle < IDLE:
            known = self.entries()
            if not self.budget.allows([self.budget.cost(entry) for entry in known.values()]):
                break
            trial = self.next()
            text = self.text(trial)
            try:
                values = self.score(text, known)
            except InputError as error:
                if not isinstance(error.__cause__, RefusedError):
                    raise
                idle += 1
                print(f"trial {trial.number}: {text} is left out ({error.__cause__})", file=sys.stderr)
                self.study.tell(trial.number, state=TrialState.FAIL)
                continue
            idle = idle + 1 if repr(parse(text)) in known else 0
            self.study.tell(trial.number, values)
            listed = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.objectives, values, strict=True))
            print(f"trial {trial.number}: {text}: {listed}", file=sys.stderr)
        return len(self.study.get_trials(False, (TrialState.FAIL,)))


def open_study(options: RunOptions, objectives: Sequence[str], search: dict[str, Any]) -> optuna.Study:
    """The study in the run's folder; InputError when it is of another search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = options.out / JOURNAL
    if options.overwrite:
        path.unlink(missing_ok=True)
    directions = ["minimize" if better_by_name(name) == "lower" else "maximize" for name in objectives]
    storage = JournalStorage(JournalFileBackend(str(path)))
    known = {study.study_name: study for study in storage.get_all_studies()}
    if STUDY in known:
        found = differences(known[STUDY].user_attrs.get(SEARCH, {}), search)
        if found:
            raise InputError("--out", f"{options.out} holds another search: {'; '.join(found)}. Choose another, or --overwrite")
        return optuna.load_study(study_name=STUDY, storage=storage)
    study = optuna.create_study(study_name=STUDY, storage=storage, directions=directions)
    study.set_user_attr(SEARCH, search)
    return study


def run_tune(
    template: str, ranges: Sequence[str], budget: str, objectives: Sequence[str] | None, options: dict[str, Any]
) -> None:
    """Search, then print the front and write the report; every trial is an entry of the run's results."""
    check_installed()
    if world().size > 1:
        raise InputError("tune", "works in one process, as every trial depends on those before; start it without torchrun")
    asked = RunOptions([template], **options)
    asked.check()
    asked.metrics.check()
    wanted, space, limit = objectives_of(objectives, asked.metrics), space_of(template, ranges), Budget.parse(budget)
    if limit.total < asked.num_samples:
        raise InputError("--budget", f"got {budget}; one trial takes {asked.num_samples} images (--num-samples)")
    loaded = load(asked)
    prepare_folder(asked.out, loaded.config, asked.overwrite)
    search = {"guidance": template, "ranges": sorted(ranges), "objectives": list(wanted), "num_samples": asked.num_samples}
    search["reference"] = loaded.reference.sha256  # what earlier trials found must be what they would find now
    tuner = Tuner(template, space, wanted, limit, asked, loaded, open_study(asked, wanted, search))
    try:
        refused = tuner.go()
    except KeyboardInterrupt:
        again = provenance.command(extra_remove=("--overwrite",))
        print(f"\ninterrupted: {len(tuner.entries())} trials are finished and kept. Go on with:\n  {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    entries = list(tuner.entries().values())
    if not entries:
        raise InputError("--range", f"no combination of {', '.join(ranges)} works in {template}")
    finish(asked.out, read_run(asked.out).results)
    spent = sum(limit.cost(entry) for entry in entries)
    print(f"\n{len(entries)} trials, {spent:,.0f} of {limit.total:,.0f} {limit.unit} spent; {refused} left out")
    print(front_text(entries, wanted))
