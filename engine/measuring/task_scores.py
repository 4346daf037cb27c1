"""How many tasks a model gets right, on each path of its FFN or beside another model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svdengine.errors import RequestError
from svdengine.kernels.executor import FfnMode
from svdengine.measuring.code_runner import run_program
from svdengine.measuring.tasks import ChoiceTask, CodeTask, GenerateTask, Task
from svdengine.scheduling.sampler import negative_log_likelihood
from svdengine.scheduling.sampling import SamplingParams

if TYPE_CHECKING:
    from svdengine.llm import LLM

Progress = Callable[[int, int], None]  # tasks done, tasks in all


@dataclass(frozen=True)
class TaskScore:
    """The tasks of one name on one path."""

    task: str
    ffn: str
    count: int
    correct: int
    accuracy: float
    accuracy_normalized: float | None  # likelihoods divided by the bytes of the choice; None: nothing to choose


@dataclass(frozen=True)
class PairedScore:
    """The same tasks answered twice: by a dense and a sparse path, or by two models.

    p: how likely it is, if both were equally good, that one of them is alone right at least so much more often than
        the other: the exact McNemar test, two-sided. Small values mean that the difference is no chance.
    """

    task: str
    first: str
    second: str
    both: int  # right in both
    only_first: int
    only_second: int
    neither: int
    p: float


@dataclass(frozen=True)
class Outcome:
    """One task, answered once.

    normalized: whether it is right by likelihood per byte; None where nothing was to choose.
    """

    correct: bool
    normalized: bool | None = None


def answer_tasks(
    llm: LLM,
    tasks: Sequence[Task],
    paths: Sequence[FfnMode],
    sparsity_bias: float = 0.0,
    progress: Progress | None = None,
) -> dict[FfnMode, list[Outcome]]:
    """Run every task on every path. `llm` must be idle.

    Raises RequestError, with the task's line, where a task does not fit the model.
    """
    before = llm.ffn
    outcomes: dict[FfnMode, list[Outcome]] = {path: [] for path in paths}
    try:
        for done, task in enumerate(tasks, 1):
            for path in paths:
                llm.ffn = path
                try:
                    outcomes[path].append(run_task(llm, task, sparsity_bias))
                except RequestError as error:
                    raise RequestError(f"the task in line {task.line}: {error}") from error
            if progress is not None:
                progress(done, len(tasks))
    finally:
        llm.ffn = before
    return outcomes


def score(tasks: Sequence[Task], outcomes: Sequence[Outcome], ffn: str) -> list[TaskScore]:
    """How many tasks of each name are right."""
    return [_score(tasks, outcomes, name, ffn) for name in _names(tasks)]


def pair(
    tasks: Sequence[Task], first: tuple[str, Sequence[Outcome]], second: tuple[str, Sequence[Outcome]]
) -> list[PairedScore]:
    """The tasks of each name, answered by two that have names."""
    return [_pair(tasks, first, second, name) for name in _names(tasks)]


def run_task(llm: LLM, task: Task, sparsity_bias: float = 0.0) -> Outcome:
    """One task on the path that is set."""
    if isinstance(task, ChoiceTask):
        likelihoods = [_likelihood(llm, task, choice, sparsity_bias) for choice in task.choices]
        per_byte = [value / len(c.encode()) for value, c in zip(likelihoods, task.choices, strict=True)]
        return Outcome(_best(likelihoods) == task.answer, _best(per_byte) == task.answer)
    text = _generate(llm, task, sparsity_bias)
    if isinstance(task, CodeTask):
        return Outcome(not run_program(task.program(text), task.tests))
    return Outcome(task.matches(text))


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _likelihood(llm: LLM, task: ChoiceTask, choice: str, bias: float) -> float:
    """Log-likelihood of a choice after the prompt, in nats."""
    if task.chat:
        before = _message_tokens(llm, task)
        tokens = before + llm.tokenizer.encode(choice, bos=False)
    else:
        before, tokens = llm.tokenizer.encode(task.prompt), llm.tokenizer.encode(task.prompt + choice)
    start = 0
    while start < min(len(before), len(tokens) - 1) and before[start] == tokens[start]:
        start += 1
    start = max(start, 1)  # the first token of all has nothing before it
    if len(tokens) < 2:
        raise RequestError("prompt and choice are one token, whose likelihood nothing tells")
    logits = llm.logits(tokens[:-1], sparsity_bias=bias)
    return -negative_log_likelihood(logits[start - 1 :], tokens[start:])


def _generate(llm: LLM, task: GenerateTask | CodeTask, bias: float) -> str:
    params = SamplingParams(temperature=0.0, max_tokens=task.max_tokens, stop=task.stop, sparsity_bias=bias)
    prompt = _message_tokens(llm, task) if task.chat else task.prompt
    return llm.generate(prompt, params)[0].text


def _message_tokens(llm: LLM, task: Task) -> list[int]:
    return llm.chat_template.encode([{"role": "user", "content": task.prompt}])


def _score(tasks: Sequence[Task], outcomes: Sequence[Outcome], name: str, path: str) -> TaskScore:
    found = [outcome for task, outcome in zip(tasks, outcomes, strict=True) if task.task == name]
    choices = [outcome.normalized for outcome in found if outcome.normalized is not None]
    return TaskScore(
        task=name,
        ffn=path,
        count=len(found),
        correct=sum(outcome.correct for outcome in found),
        accuracy=sum(outcome.correct for outcome in found) / len(found),
        accuracy_normalized=sum(choices) / len(choices) if choices else None,
    )


def _pair(
    tasks: Sequence[Task], first: tuple[str, Sequence[Outcome]], second: tuple[str, Sequence[Outcome]], name: str
) -> PairedScore:
    answered = zip(tasks, first[1], second[1], strict=True)
    pairs = [(a.correct, b.correct) for task, a, b in answered if task.task == name]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return PairedScore(
        task=name,
        first=first[0],
        second=second[0],
        both=pairs.count((True, True)),
        only_first=only_first,
        only_second=only_second,
        neither=pairs.count((False, False)),
        p=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test: a fair coin, thrown for each task that just one of two gets right."""
    thrown = only_first + only_second
    tail = sum(math.comb(thrown, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**thrown)


def _names(tasks: Sequence[Task]) -> list[str]:
    return sorted({task.task for task in tasks})
