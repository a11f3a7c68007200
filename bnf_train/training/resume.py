"""Resuming: a run that is killed, interrupted, out of disk or fed a NaN loses nothing that a checkpoint had.

transformers.Trainer saves and resumes, too. What it lacks, and `ResumeMixin` adds:

- a checkpoint that is complete or does not count (`bnf_train.training.checkpoint`), also while old ones are deleted;
- state without pickle;
- a resumed run has the weights of an undisturbed one, bitwise, also where it had finished or evaluates at other steps;
- SIGTERM and SIGINT stop all processes after the micro-batch at work, with an exact checkpoint. Trainer's own
  --enable_jit_checkpoint knows SIGTERM alone, waits for the end of the optimizer step, and stores its random numbers late;
- a non-finite loss or gradient stops the run before it reaches the weights, and names the rows.
"""

import math
import multiprocessing
import multiprocessing.context
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from bnf_train.errors import Interrupted, UsageError
from bnf_train.training import distributed
from bnf_train.training.checkpoint import ARGUMENTS, PARTIAL, checkpoints, naming_a_full_disk, read_state, seal, write_state

RNG, OPTIMIZER, SCHEDULER, SCALER = (f"{name}.safetensors" for name in ("rng_state", "optimizer", "scheduler", "scaler"))
OPTIMIZER_OF_SUBCLASSES = "optimizer.pt"  # its moments are tensor subclasses

if TYPE_CHECKING:  # what `self` and `super()` are, once the mixin stands before Trainer among a class's bases
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class ResumeMixin(_Trainer):
    """For a subclass of transformers.Trainer: it can be killed at any moment and, resumed, ends with the same weights.

    Optimizer, scheduler, scaler and random numbers are stored as safetensors, and whole: what one process wrote, or several
    with DDP or FSDP2, any number of processes goes on from. Two kinds keep their libraries' format: moments that are tensor
    subclasses (torchao), read by torch.load(weights_only=True), which runs nothing, and all that DeepSpeed partitions, which
    it unpickles, and reads in the number of processes that wrote it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._partial: Path | None = None  # the folder PARTIAL while a checkpoint is being written
        self.beside: dict[str, str] = {}  # texts of more files in each checkpoint, by name
        self._step_inputs: list[dict[str, Any]] = []  # micro-batches since the last optimizer step
        self.stop_on_signal = StopOnSignal(self)
        self.add_callback(self.stop_on_signal)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.stop_on_signal.listening():
            result = super().train(*args, **kwargs)
        if self.stop_on_signal.received is not None:
            raise Interrupted(self.stop_on_signal.received, self._how_to_resume())
        if not all(p.sum().isfinite() or p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise UsageError(
                f"step {self.state.global_step}: after this last step the weights are no finite numbers, so the model is not "
                "saved; lower --learning_rate."
            )
        return result

    def _how_to_resume(self) -> str:
        kept = checkpoints(Path(self.args.output_dir))
        if not kept:
            return "no optimizer step was finished, so there is nothing to save: run the same command again."
        return f"saved {kept[-1]}; the same command with --resume_from_checkpoint True goes on from there."

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers and accelerate do so, too, but not where several processes go on within an epoch: two wrappers too deep
        sampler: Any = kwargs["train_dataloader"]
        while (sampler := getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)) is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(kwargs["epoch"])
        if self.state.global_step >= self.state.max_steps:  # a finished run, resumed within an epoch: Trainer adds a step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer's, without drawing random numbers that training would draw."""
        state = rng_state()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            set_rng_state(state)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if loader.num_workers and hasattr(signal, "sigwaitinfo"):  # not on macOS
            method = self.args.dataloader_multiprocessing_context or multiprocessing.get_start_method()
            # accelerate's wrapper starts workers by the loader inside; where it skips batches, it copies what is its own
            for part in (loader, getattr(loader, "base_dataloader", loader)):
                part.worker_init_fn = partial(_start_worker, part.worker_init_fn)
                if method == "fork":
                    part.multiprocessing_context = _WorkerContext()
        return loader

    # --- checkpoints ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        self._partial = folder / PARTIAL
        try:
            with naming_a_full_disk(folder):
                if self.args.should_save and self._partial.exists():
                    shutil.rmtree(self._partial)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # every process has written its part
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(final)  # in every process; not where it is being written
                if self.args.should_save:
                    written = self._partial / final.name
                    self.state.save_to_json(str(written / "trainer_state.json"))
                    seal(written, final)
                    self._partial.rmdir()
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._partial is None:  # only what is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with naming_a_full_disk(Path(self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # Trainer pickles its arguments, and never reads them
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / ARGUMENTS).write_text(self.args.to_json_string() + "\n")
            for name, text in self.beside.items():
                (folder / name).write_text(text)

    def _sharded(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            distributed.load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            distributed.load_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = distributed.whole_state(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            write_state(Path(output_dir) / SCHEDULER, self.lr_scheduler.state_dict())
            try:
                write_state(Path(output_dir) / OPTIMIZER, state)
            except TypeError:  # tensor subclasses, as torchao's 8-bit moments
                torch.save(state, Path(output_dir) / OPTIMIZER_OF_SUBCLASSES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path, other = Path(checkpoint) / OPTIMIZER, Path(checkpoint) / OPTIMIZER_OF_SUBCLASSES
        state = read_state(path) if path.is_file() else torch.load(other, "cpu", weights_only=True)
        self.optimizer.load_state_dict(distributed.sharded_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(read_state(Path(checkpoint) / SCHEDULER))

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and self.accelerator.scaler is not None:
            write_state(Path(output_dir) / SCALER, self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (path := Path(checkpoint) / SCALER).is_file():
            self.accelerator.scaler.load_state_dict(read_state(path))

    def _rng_file(self, folder: str) -> Path:
        return Path(folder) / (RNG if self.args.world_size == 1 else f"{self.args.process_index}-{RNG}")

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_state(self._rng_file(output_dir), self.stop_on_signal.rng_at_step or rng_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (path := self._rng_file(checkpoint)).is_file():  # absent: other number of processes
            set_rng_state(read_state(path))

    # --- non-finite losses and gradients -------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._step_inputs.append(inputs)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise self._non_finite("loss", self._rows_with_non_finite_loss(inputs))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None  # float16: the scaler skips such a step and lowers its factor
        if norm is not None and not scaled and not math.isfinite(float(norm)):
            raise self._non_finite("gradient", self._rows_with_non_finite_gradient())
        self._step_inputs.clear()
        return norm

    def _non_finite(self, what: str, rows: list[int]) -> UsageError:
        shown = ", ".join(map(str, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        kept = checkpoints(Path(self.args.output_dir))
        return UsageError(
            f"step {self.state.global_step + 1}: the {what} is not a finite number, at row{'s' * (len(rows) > 1)} {shown} of "
            f"{getattr(self.args, 'dataset', 'the data')}; the step was not taken"
            + (f" and {kept[-1]} is complete" if kept else "")
            + "; look at these rows, or lower --learning_rate."
        )

    def _rows_with_non_finite_loss(self, inputs: dict[str, Any]) -> list[int]:
        """Row numbers of the responses whose own loss is non-finite; all of the micro-batch where that cannot be told."""
        numbers = inputs["number"]
        if not self._sharded():
            with torch.no_grad(), self.compute_loss_context_manager():
                _, responses = self.compute_loss(self.model, inputs, return_outputs=True)
            bad = ~responses.sums.isfinite().all(dim=1)
            numbers = numbers[bad] if bad.any() else numbers
        return sorted(set(numbers.tolist()))

    def _rows_with_non_finite_gradient(self) -> list[int]:
        """Row numbers of the micro-batches whose own gradient is non-finite; all of the step where that cannot be told."""
        bad = self._step_inputs
        if self.accelerator.num_processes == 1:
            bad = [inputs for inputs in self._step_inputs if not self._gradient_is_finite(inputs)] or bad
        return sorted({number for inputs in bad for number in inputs["number"].tolist()})

    def _gradient_is_finite(self, inputs: dict[str, Any]) -> bool:
        self.model.zero_grad()
        super().training_step(self.model, inputs, torch.ones((), device=self.args.device))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return all(bool(g.isfinite().all()) for g in gradients)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT, stops after the current micro-batch, with a checkpoint of the last finished optimizer step.

    An optimizer step of 128 rows may take longer than the half minute that schedulers grant. Between two of them only
    gradients and random numbers change. The resumed run computes the gradients again; the random state is kept from the end
    of the last step.
    """

    def __init__(self, trainer: ResumeMixin) -> None:
        self.trainer = trainer
        self.received: int | None = None
        self.rng_at_step: Any = None  # set where the checkpoint is written within an optimizer step
        self._rng_of_last_step: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles signals inside. A second SIGINT, from somebody who will not wait, does what it does without this.

        A second SIGTERM changes nothing: a scheduler sends one to every process, and a launcher passes its own on.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = None
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def receive(number: int, frame: Any) -> None:
            self.received = number
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])

        try:
            for number in before:
                signal.signal(number, receive)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stopping(self) -> bool:
        """Whether any process got a signal: all of them stop together."""
        if self.trainer.args.world_size > 1:
            told = torch.tensor(self.received or 0, device=self.trainer.args.device)
            self.received = int(self.trainer.accelerator.gather(told.unsqueeze(0)).max()) or None
        return self.received is not None

    def _saved(self, step: int) -> bool:
        return step == 0 or (Path(self.trainer.args.output_dir) / f"checkpoint-{step}").exists()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rng_of_last_step = rng_state()
        if self._stopping():
            control.should_training_stop = control.should_save = True
            control.should_evaluate &= args.load_best_model_at_end  # which checkpoint is best depends on it

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled and self._stopping():
            control.should_training_stop = True
            self.rng_at_step = self._rng_of_last_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopping():
            control.should_training_stop = True
            control.should_evaluate = control.should_log = False
            control.should_save = not self._saved(state.global_step)


class _Worker(multiprocessing.context.ForkProcess):
    """A data worker that is born with SIGTERM blocked."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WorkerContext(multiprocessing.context.ForkContext):
    Process = _Worker


def _start_worker(prepare: Callable[[int], None] | None, worker: int) -> None:
    """In a data worker: signals to the whole process group are the trainer's to answer, which still needs its batches.

    The worker ends when the trainer ends it, by SIGTERM too, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(worker)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)  # as torch's own handler: a worker that a signal kills is an error to the trainer


def rng_state() -> dict[str, Any]:
    """The state of every generator that training may draw from."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
