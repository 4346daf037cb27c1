"""A whole run: text, stage 1, stage 2, output; saved as it goes, so that it can be interrupted at any point."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from svdengine.converters.checkpoint import Checkpoint
from svdengine.converters.conversion import open_checkpoint
from svdengine.errors import SvdEngineError
from svdengine.tools.relufy.decoder import Decoder, make_student, read_decoder, read_student
from svdengine.tools.relufy.distill import (
    Distillation,
    StepResult,
    gate_gradients,
    hidden_moment,
    layer_zeros,
    perplexity,
)
from svdengine.tools.relufy.layerwise import LayerResult, tokens_in_time, train_layers
from svdengine.tools.relufy.output import write_model
from svdengine.tools.relufy.report import Report, Stage, duration, summary
from svdengine.tools.relufy.rounding import Rounding, round_embedding
from svdengine.tools.relufy.saved_run import SavedRun
from svdengine.tools.relufy.settings import Settings
from svdengine.tools.relufy.status_line import StatusLine
from svdengine.tools.relufy.text import Sampling, Text, Writer, held_out_count, joined, read_windows
from svdengine.tools.relufy.thresholds import balance, fold_thresholds, layer_shares, set_thresholds

SAVE_EVERY = 120.0  # seconds

# What the parts of a run may take of its time.
_SAMPLING_SHARE, _LAYERS_SHARE = 0.15, 0.35
_SHARE_WINDOWS = 4  # of text, on which the original tells how zeros are shared among layers
_KNOWN_AFTER = 0.2  # layers: before, making the first hidden states is most of the time spent
_SHOWN_STEPS = 20  # divergence and sparsity on the status line are means over so many


class Interrupted(SvdEngineError):
    """The run was stopped; what it has done is saved."""


class Run:
    """One run with its models and its saved state."""

    def __init__(self, settings: Settings, status: StatusLine, save_every: float = SAVE_EVERY) -> None:
        """Open everything that the settings name. Raises SvdEngineError."""
        if settings.output.exists():
            raise SvdEngineError(f"{settings.output}: exists already; choose another name, or remove it")
        self.settings, self.status = settings, status
        self.checkpoint: Checkpoint = open_checkpoint(settings.source)
        self.writer = Writer(self.checkpoint)
        self.teacher: Decoder = read_decoder(self.checkpoint).to(settings.device)
        self.student = self._begin_student()
        self.saved = SavedRun(settings, self.checkpoint)  # when nothing is left that may be refused
        self.state: dict[str, Any] = self.saved.load_state()
        self._rounding: Rounding | None = None
        self._save_every, self._last_save = save_every, time.monotonic()
        self._stop = False

    def run(self) -> Report:
        """Do what is left to do, and write the output. Raises Interrupted on SIGINT and SIGTERM."""
        with closing(self.saved), self._stopping():
            text = self._text()
            if self.settings.embedding_dtype is not None:
                round_embedding(self.student, hidden_moment(self.teacher, text.train.tokens))
            self._stages(text)
            self._first_stage(text)
            self._second_stage(text)
        with self._stored_weights():
            zeros = layer_zeros(self.student, text.held_out.tokens)
        report = Report(
            self.checkpoint.path.name,
            self._text_in_words(text),
            self.settings.activation,
            self.state["threshold"],
            tuple(Stage(**stage) for stage in self.state["stages"]),
            tuple(zeros),
            int(text.held_out.foretold[:, :-1].sum()),
        )
        write_model(self.student, self.checkpoint, self.state["threshold"], report, self.settings.output)
        self.saved.remove()
        self.status.say(summary(report))
        return report

    def _begin_student(self) -> Decoder:
        if self.settings.student is None:
            return make_student(self.teacher, self.settings.train)
        rounded = self.settings.embedding_dtype is not None
        student = read_student(open_checkpoint(self.settings.student), self.teacher, self.settings.train, rounded)
        student.to(self.settings.device)
        balance(student.ffns())
        return student

    def _stored_weights(self) -> AbstractContextManager[None]:
        """While it lasts, the student has the weights that the file will hold, where the settings name its format."""
        if self.settings.dtype is None:
            return nullcontext()
        if self._rounding is None:
            embedding, down = self.settings.embedding_dtype is not None, self.settings.down_dtype is None
            self._rounding = Rounding(self.student, embedding, down)
        return self._rounding.rounded()

    def _text(self) -> Text:
        """The text of the run: saved, from files, and sampled."""
        text = self.saved.load_text()
        if text is not None:
            return text
        settings, parts, started = self.settings, [], time.monotonic()
        if settings.text:
            parts.append(read_windows(self.writer, settings.text, settings.window))
        if settings.sampled_tokens or (settings.sampled_tokens is None and not settings.text):
            parts.append(self._sampled(started))
        if not parts:
            raise SvdEngineError("there is no text to train on; give --text, or --sample above 0")
        text = joined(parts)
        self.state.setdefault("text_seconds", time.monotonic() - started)
        self._save()  # before the text, which is not made again once it is there
        self.saved.save_text(text)
        self.state.pop("sampling", None)
        self.status.say(f"text: {text.train.tokens.size:,} tokens to train on, {text.held_out.tokens.size:,} held out")
        return text

    def _sampled(self, started: float) -> Text:
        """What the teacher writes. The state holds what it has written."""
        state, settings = self.state, self.settings
        sampling, held = (
            Sampling(self.teacher, self.writer, settings.window, settings.seed, held_out=held_out)
            for held_out in (False, True)
        )
        before = state.get("text_seconds", 0.0)
        if "sampling" in state:
            sampling.load(state["sampling"])

        def progress(done: int, total: int) -> None:
            state.update({"sampling": sampling.state(), "text_seconds": before + time.monotonic() - started})
            self.status.show(f"sampling text: {done:,} of {total:,} tokens")
            self._leave_if_stopped()
            self._save_sometimes()

        def held_out_progress(done: int, total: int) -> None:
            progress(sampling.windows.tokens.size + done, sampling.windows.tokens.size + total)

        sampling.write(settings.sampled_tokens, settings.seconds * _SAMPLING_SHARE - before, progress)
        held.write(held_out_count(len(sampling.windows)) * settings.window, progress=held_out_progress)
        return Text(sampling.windows, held.windows)

    def _text_in_words(self, text: Text) -> str:
        names = ", ".join(path.name for path in self.settings.text)
        sampled = self.settings.sampled_tokens != 0 and (self.settings.sampled_tokens or not self.settings.text)
        parts = [names] * bool(names) + ["text that the original wrote itself"] * bool(sampled)
        return f"{text.train.tokens.size:,} tokens of {' and '.join(parts)}"

    def _stages(self, text: Text) -> None:
        """Measure the teacher, and the student before it is trained."""
        if "stages" in self.state:
            return
        self.status.show("measuring the teacher")
        teacher = perplexity(self.teacher, text.held_out)
        fresh = self.settings.student is None
        with nullcontext() if fresh else self._stored_weights():
            found = perplexity(self.student, text.held_out)
            zeros = _mean(layer_zeros(self.student, text.held_out.tokens))
        given = "ReLU in place of SiLU" if fresh else "student of an earlier run"
        stages = [Stage("teacher, SiLU", 0, 0, teacher, 0), Stage(given, 0, 0, found, zeros)]
        self.state["stages"] = [asdict(stage) for stage in stages]
        self._say_stage(stages[0])
        self._say_stage(stages[1])

    def _first_stage(self, text: Text) -> None:
        """Layer by layer. The state holds the layers that are done."""
        state, settings = self.state, self.settings
        if "steps_done" in state:
            return  # stage 2 has begun
        if settings.student is not None:
            state["layer_seconds"] = 0.0
            self._begin_second_stage()
            return
        if "layer_windows" not in state:
            seconds = settings.seconds * _LAYERS_SHARE
            tokens = settings.layer_tokens or tokens_in_time(self.teacher, self.student, settings, seconds)
            rows = max(settings.rows, tokens // settings.window)
            state |= {"layer_windows": min(rows, len(text.train)), "layers": [], "layer_seconds": 0.0}
            self._save()
        for index, parts in enumerate(state["layers"]):
            self.student.layers[index].load_state_dict(parts)
        order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(settings.seed))
        windows = torch.from_numpy(text.train.tokens)[order[: state["layer_windows"]]].long().to(settings.device)
        count, first = len(self.student.layers), len(state["layers"])
        started = last = time.monotonic()

        def progress(share: float, error: float) -> None:
            done = index + share
            left = (time.monotonic() - started) / max(done - first, 1e-6) * (count - done)
            known = f", {duration(left)} left" if done - first > _KNOWN_AFTER else ""
            self.status.show(f"stage 1: layer {index + 1} of {count}, error {error:.4f}{known}")

        index = first
        results: Iterator[LayerResult] = train_layers(
            self.teacher, self.student, windows, settings, first, self._stopped, progress, self._layer_shares(text)
        )
        for result in results:
            state["layers"].append(_on_cpu(self.student.layers[result.index].state_dict()))
            now, index = time.monotonic(), result.index + 1
            state["layer_seconds"] += now - last
            last = now
            self._save_sometimes()
        self._leave_if_stopped()
        self._end_stage(
            "stage 1, layer by layer", state["layer_seconds"], windows.numel() * settings.layer_epochs, text
        )
        self._begin_second_stage()

    def _layer_shares(self, text: Text) -> list[float] | None:
        """What stage 1 makes zero of each layer's gates, as the original's gradients tell it; None with a penalty."""
        if self.settings.activation != "fatrelu":
            return None
        if "layer_shares" not in self.state:
            windows = text.train.tokens[:: -(-len(text.train) // _SHARE_WINDOWS)]
            some = torch.from_numpy(windows.astype(np.int64)).to(self.settings.device)
            copy = make_student(self.teacher, "ffn")
            for ffn in copy.ffns():
                ffn.threshold = None  # SiLU
            found = gate_gradients(copy, some, self.settings.seed)
            self.state["layer_shares"] = layer_shares(*found, self.settings.sparsity)
        shares: list[float] = self.state["layer_shares"]
        return shares

    def _begin_second_stage(self) -> None:
        self.state |= {"steps_done": 0, "step_seconds": 0.0, "student": self._trained(), "layers": []}
        self._save()

    def _second_stage(self, text: Text) -> None:
        """End to end. The state holds the trained tensors, the optimiser's, and where the schedule stands."""
        state, settings = self.state, self.settings
        if state.get("finished"):
            self._load_trained()
            set_thresholds(self.student.ffns(), state["threshold"])
            return
        self._load_trained()
        # A fresh student under the penalty becomes sparse late; any other is sparse already, and stays so.
        sparse = settings.student is not None or settings.activation == "fatrelu"
        floor = state["stages"][-1]["zeros"] if sparse else None
        distillation = Distillation(
            self.teacher, self.student, settings, text.train, floor=floor, stored_weights=self._stored_weights
        )
        if state["steps_done"]:
            distillation.load(state)
        if "steps" not in state:
            spent = state["layer_seconds"] + state["text_seconds"]
            state["steps"] = settings.steps or distillation.steps_in_time(settings.seconds - spent)
        total: int = state["steps"]
        recent: list[StepResult] = []
        before, started, first = state["step_seconds"], time.monotonic(), distillation.step

        def save() -> None:
            state["step_seconds"] = before + time.monotonic() - started
            state.update({"student": self._trained(), **distillation.state()})

        while distillation.step < total:
            recent = [*recent[-_SHOWN_STEPS + 1 :], distillation.run_step(total)]
            speed = (distillation.step - first) / (time.monotonic() - started)
            self.status.show(
                f"stage 2: step {distillation.step} of {total}, divergence {_mean([r.divergence for r in recent]):.4f},"
                f" zeros {_mean([r.zeros for r in recent]):.1%}{_goal(recent[-1])},"
                f" {speed * settings.step_tokens:,.0f} tokens/s, {duration((total - distillation.step) / speed)} left"
            )
            if self._stop:
                save()
            self._leave_if_stopped()
            self._save_sometimes(save)
        save()
        tokens = total * settings.step_tokens
        with self._stored_weights():
            name = "stage 2, end to end" + (f", in {settings.dtype}" if settings.dtype else "")
            self._end_stage(name, state["step_seconds"], tokens, text)
        threshold = fold_thresholds(self.student.ffns())
        state |= {"finished": True, "student": self._trained(), "threshold": threshold, "optimizer": {}}
        self._save()

    def _end_stage(self, name: str, seconds: float, tokens: int, text: Text) -> None:
        found = perplexity(self.student, text.held_out)
        stage = Stage(name, seconds, tokens, found, _mean(layer_zeros(self.student, text.held_out.tokens)))
        self.state["stages"].append(asdict(stage))
        self._say_stage(stage)

    def _say_stage(self, stage: Stage) -> None:
        zeros = f", {stage.zeros:.1%} zeros" if stage.zeros else ""
        took = f" ({duration(stage.seconds)})" if stage.seconds else ""
        self.status.say(f"{stage.name}: held-out perplexity {stage.perplexity:,.2f}{zeros}{took}")

    def _trained(self) -> dict[str, torch.Tensor]:
        """The trained tensors, and the thresholds."""
        own = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        return _on_cpu(own | dict(self.student.named_buffers()))

    def _load_trained(self) -> None:
        with torch.no_grad():
            named = {**dict(self.student.named_parameters()), **dict(self.student.named_buffers())}
            for name, tensor in self.state["student"].items():
                named[name].copy_(tensor)

    def _save_sometimes(self, update: Callable[[], None] = lambda: None) -> None:
        if time.monotonic() - self._last_save > self._save_every:
            update()
            self._save()

    def _save(self) -> None:
        self.saved.save_state(self.state)
        self._last_save = time.monotonic()

    def _stopped(self) -> bool:
        return self._stop

    def _leave_if_stopped(self) -> None:
        if self._stop:
            self._save()
            raise Interrupted(f"stopped; the same command goes on from {self.saved.folder}")

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """While it lasts, the first SIGINT or SIGTERM asks for a stop at the next border; a second one kills."""

        before: dict[int, Any] = {}

        def ask(number: int, _: object) -> None:
            self._stop = True
            signal.signal(number, before[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for changed, handler in before.items():
                signal.signal(changed, handler)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that later steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _goal(result: StepResult) -> str:
    """What the steering wants at the moment, for the status line."""
    target = "" if result.target is None else f" of {result.target:.1%}"
    return f"{target}, penalty weight {result.weight:.2f}" if result.weight else target


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
