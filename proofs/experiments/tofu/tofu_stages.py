"""The stages: two models that learn, the arms that unlearn, and what is measured of each. Finished ones are not done again.

OUTPUT/settings.json               what all stages share; another command cannot go on with it
OUTPUT/memorised/, never_saw/      the two models that learn; the second only until it is measured
OUTPUT/stages/NAME.json            of a finished stage; written to another name first, then renamed
"""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tofu_data import Row, Tofu, evenly, steps, to_learn, to_unlearn, write
from tofu_evaluate import Evaluation, free

from bnf_train import cli, objectives
from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError, is_out_of_memory, one_line
from bnf_train.flags import parse
from bnf_train.model.load import load_tokenizer
from bnf_train.run import run

MEMORISED, NEVER_SAW = "memorised", "never_saw"
ON_GPU = ("--no_packing",)  # of short rows: one padded product is faster than a call of the attention for each
# methods that are no objective's name: the objective, and whether they see rows to forget alone
SPECIAL = {"gradient_ascent": ("log_likelihood", True), "gradient_difference": ("log_likelihood", False)}


@dataclass(frozen=True)
class Arm:
    """One unlearning run.

    >>> Arm("gradient_ascent", 3e-5, 0).name
    'gradient_ascent-lr3e-05-seed0'
    """

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def objective(self) -> str:
        return SPECIAL.get(self.method, (self.method, False))[0]

    @property
    def forget_only(self) -> bool:
        return SPECIAL.get(self.method, (self.method, False))[1]


@dataclass(frozen=True)
class Settings:
    """What all stages share.

    Attributes:
      each: rows to forget in an optimizer step, and as many to retain.
      learn_rows: rows of an optimizer step of the models that learn.
      eval_rows: at most so many of each set that must not suffer; None: all.
      flags: of bnf_train, for every training.
    """

    model: str
    data: str
    learn_epochs: float
    learn_rate: float
    learn_rows: int
    epochs: float
    each: int
    eval_rows: int | None
    max_length: int
    max_new_tokens: int
    flags: Sequence[str] = ()


class Experiment:
    """All stages of one output folder.

    Args:
      bars: progress bars of training.

    Raises:
      UsageError: a flag of bnf_train is wrong.
    """

    def __init__(self, output: Path, tofu: Tofu, settings: Settings, console: Console, bars: bool = False) -> None:
        self.output, self.tofu, self.settings, self.console, self.bars = output, tofu, settings, console, bars
        self.config = self._parse(Arm("log_likelihood", 1e-5, 0))  # device and precision, as runs find them
        self._evaluation: Evaluation | None = None

    def begin(self, arms: Sequence[Arm]) -> None:
        """Takes up the folder, after flags, tokenizer and rows: what is wrong with the last arm is said first.

        Raises:
          UsageError: any of these is wrong, or the folder holds something else, or was begun with other settings.
        """
        for arm in arms:
            config = self._parse(arm)
            if objectives.resolve(config.objective, config.hyperparameters).pairwise:
                raise UsageError(
                    f"--methods {arm.method}: compares the two sides of a pair, and these rows are single responses."
                )
        assert self.evaluation.asked
        _take_up(self.output, self.settings)

    def learn(self, arms: Sequence[Arm] = ()) -> None:
        """The model that knows everything, from which the arms start, and the one that never saw the rows to forget."""
        starts = any(not self._is_finished(arm.name) for arm in arms)
        self._learn(MEMORISED, self.tofu.retain + self.tofu.forget, needed=starts)
        self._learn(NEVER_SAW, self.tofu.retain, needed=False)
        for path in (self.output / NEVER_SAW).glob("*.safetensors"):
            path.unlink()

    def _learn(self, name: str, rows: Sequence[Row], needed: bool) -> None:
        """Training and scores; weights that are gone come back where they are needed."""
        folder = self.output / name
        if (needed or not self._is_finished(name)) and not any(folder.glob("*.safetensors")):
            self._stage(f"{name}-training", lambda: self._train(name, rows), again=True)
        self._stage(f"{name}-training", lambda: self._train(name, rows))
        self._stage(name, lambda: {"scores": self.evaluation.of_folder(str(folder))})

    def unlearn(self, arm: Arm) -> None:
        """One arm, and its scores. An arm that fails says so in its file, and is tried again by the next command."""
        self._stage(arm.name, lambda: self._unlearn(arm))

    def unlearn_all(self, arms: Sequence[Arm], workers: int) -> None:
        """The arms, in so many processes of which each does its share of those that are left."""
        left = [arm for arm in arms if not self._is_finished(arm.name)]
        if workers == 1 or len(left) < 2:
            for arm in left:
                self.unlearn(arm)
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = [left[place::workers] for place in range(workers)]
            for share in [pool.submit(_unlearn_share, self.output, self.tofu, self.settings, share) for share in shares]:
                share.result()

    def found(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left."""
        path = self.output / "stages" / f"{name}.json"
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or the machine went down before it was on the disk
            return None
        return result

    def _is_finished(self, name: str) -> bool:
        found = self.found(name)
        return found is not None and "failed" not in found

    @property
    def evaluation(self) -> Evaluation:
        if self._evaluation is None:
            settings, gpu = self.settings, self.config.device.type == "cuda"
            sets = {"forget": self.tofu.forget}
            sets |= {name: evenly(rows, settings.eval_rows) for name, rows in self.tofu.utility.items()}
            self._evaluation = Evaluation(
                sets, load_tokenizer(settings.model), self.config.device, torch.bfloat16 if self.config.bf16 else None,
                most=settings.max_length, max_new_tokens=settings.max_new_tokens, questions=64 if gpu else 4,
            )  # fmt: skip
        return self._evaluation

    def _stage(self, name: str, work: Callable[[], dict[str, Any]], again: bool = False) -> None:
        if self._is_finished(name) and not again:
            return
        self.console.print(f"{name} …")
        started = time.perf_counter()
        path = self.output / "stages" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        with path.with_suffix(".log").open("a", encoding="utf-8") as log, redirect_stdout(log):  # what a run says of itself
            result = work()
        result["seconds"] = round(time.perf_counter() - started, 2)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        self.console.print(f"{name}: {result.get('failed') or 'done'}, {result['seconds']:.0f} s")

    def _train(self, name: str, rows: Sequence[Row]) -> dict[str, Any]:
        settings, folder = self.settings, self.output / name
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left of it
        dataset = write(self.output / "rows" / f"{name}.jsonl", to_learn(rows))
        trainer = run(
            parse([
                *self._flags(settings.model, dataset, folder, settings.learn_rows, settings.learn_rate, 0),
                "--objective", "log_likelihood", "--num_train_epochs", str(settings.learn_epochs), *settings.flags,
            ])
        )  # fmt: skip
        result = {"rows": len(rows), "steps": trainer.state.global_step, "loss": trainer.state.log_history[-1]["train_loss"]}
        del trainer
        free(self.config.device)
        return result

    def _unlearn(self, arm: Arm) -> dict[str, Any]:
        folder = self.output / "arms" / arm.name
        shutil.rmtree(folder, ignore_errors=True)
        about = {"method": arm.method, "learning_rate": arm.learning_rate, "seed": arm.seed}
        settings = self.settings
        write(self._rows_of(arm), to_unlearn(self.tofu, arm.seed, settings.epochs, settings.each, arm.forget_only))
        trainer: Any = None
        try:
            trainer = run(self._parse(arm), leave="nothing")
            wanted = steps(self.tofu, settings.epochs, settings.each)
            assert trainer.state.global_step == wanted, f"{trainer.state.global_step} steps, expected {wanted}"
            scores = self.evaluation(trainer.model)
        except UsageError as error:
            return about | {"failed": str(error)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return about | {"failed": f"out of memory ({one_line(error)})"}
        finally:
            trainer = None
            free(self.config.device)
            shutil.rmtree(folder, ignore_errors=True)
        return about | {"steps": wanted, "scores": scores}

    def _parse(self, arm: Arm) -> BNFConfig:
        settings, model, folder = self.settings, self.output / MEMORISED, self.output / "arms" / arm.name
        each = settings.each * (1 if arm.forget_only else 2)
        return parse([
            *self._flags(str(model), self._rows_of(arm), folder, each, arm.learning_rate, arm.seed),
            "--objective", arm.objective, "--num_train_epochs", "1", "--train_sampling_strategy", "sequential",
            *settings.flags,
        ])  # fmt: skip

    def _rows_of(self, arm: Arm) -> Path:
        return self.output / "rows" / f"{'forget' if arm.forget_only else 'both'}-seed{arm.seed}.jsonl"

    def _flags(self, model: str, dataset: Path, folder: Path, rows: int, learning_rate: float, seed: int) -> list[str]:
        return [
            "--model", model, "--dataset", str(dataset), "--output_dir", str(folder), "--learning_rate", str(learning_rate),
            "--batch_size", str(rows), "--per_device_train_batch_size", str(rows), "--seed", str(seed), "--eval_size", "0",
            "--max_length", str(self.settings.max_length), "--no_share_prompts", "--reference_cache",
            str(self.output / "reference"), "--save_strategy", "no", "--report_to", "none", "--show_examples", "0",
            "--logging_strategy", "no", "--disable_tqdm", str(not self.bars),
            *(ON_GPU if torch.cuda.is_available() else ()),
        ]  # fmt: skip


def _unlearn_share(output: Path, tofu: Tofu, settings: Settings, arms: Sequence[Arm]) -> None:
    """In a process of its own, which ends with the arm at work where the one that started it was killed."""
    parent = os.getppid()
    experiment = Experiment(output, tofu, settings, Console(soft_wrap=True, highlight=False))
    for arm in arms:
        if os.getppid() == parent:
            experiment.unlearn(arm)


def _take_up(output: Path, settings: Settings) -> None:
    """Notes the settings in a new folder, or finds the same in one to go on with."""
    path, now = output / "settings.json", json.loads(json.dumps(vars(settings)))
    if not path.is_file():
        cli.check_new_folder(output, ", or that of an experiment to go on with")
        output.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    if changed := sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key)):
        raise UsageError(
            f"{path}: this experiment was begun with {changed[0]} {then.get(changed[0])} in place of {now.get(changed[0])}; "
            "pass the same flags, or another --output_dir."
        )
