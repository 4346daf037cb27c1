"""How many tasks a model gets right, on each path of its FFN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svdengine.errors import RequestError
from svdengine.kernels.executor import FfnMode
from svdengine.measuring.tasks import ChoiceTask, GenerateTask, Task
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
    """Tasks of one name that two paths answer differently."""

    task: str
    both: int  # right on both paths
    only_dense: int
    only_sparse: int
    neither: int


@dataclass(frozen=True)
class Outcome:
    """One task on one path."""

    correct: bool
    normalized: bool | None = None  # whether it is right by likelihood per byte


def score_tasks(
    llm: LLM,
    tasks: Sequence[Task],
    paths: Sequence[FfnMode],
    sparsity_bias: float = 0.0,
    progress: Progress | None = None,
) -> tuple[list[TaskScore], list[PairedScore]]:
    """Run every task on every path; pairs are counted where both dense and sparse are among them. `llm` must be idle.

    Raises RequestError, with the task's line, where a task does not fit the model.
    """
    before = llm.ffn
    outcomes: dict[str, list[Outcome]] = {path: [] for path in paths}
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
    names = sorted({task.task for task in tasks})
    scores = [_score(tasks, outcomes[path], name, path) for name in names for path in paths]
    if not {"dense", "sparse"} <= set(paths):
        return scores, []
    return scores, [_pairs(tasks, outcomes["dense"], outcomes["sparse"], name) for name in names]


def run_task(llm: LLM, task: Task, sparsity_bias: float = 0.0) -> Outcome:
    """One task on the path that is set."""
    if isinstance(task, ChoiceTask):
        likelihoods = [_likelihood(llm, task, choice, sparsity_bias) for choice in task.choices]
        per_byte = [value / len(c.encode()) for value, c in zip(likelihoods, task.choices, strict=True)]
        return Outcome(_best(likelihoods) == task.answer, _best(per_byte) == task.answer)
    return Outcome(task.matches(_generate(llm, task, sparsity_bias)))


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


def _generate(llm: LLM, task: GenerateTask, bias: float) -> str:
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


def _pairs(tasks: Sequence[Task], dense: Sequence[Outcome], sparse: Sequence[Outcome], name: str) -> PairedScore:
    pairs = [(d.correct, s.correct) for task, d, s in zip(tasks, dense, sparse, strict=True) if task.task == name]
    return PairedScore(
        task=name,
        both=pairs.count((True, True)),
        only_dense=pairs.count((True, False)),
        only_sparse=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )
