"""The library: load a model, complete prompts, hold conversations, score tokens."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from svdengine.async_stream import AsyncTextStream, StepThread, collect
from svdengine.errors import RequestError, SvdEngineError
from svdengine.executors import KvDtype, check_ffn
from svdengine.files.advising_executor import AdvisingExecutor
from svdengine.files.file_watch import FileWatch, check_files
from svdengine.files.kv_file import KvFile, KvOrigin, restore, write_kv_file
from svdengine.files.model_file import ModelFile
from svdengine.files.predictor_file import model_fingerprint, predictor_fingerprint, require_predictor
from svdengine.kernels.executor import BlockStore, Executor, FfnMode, HiddenStates
from svdengine.kernels.predictor import Predictor
from svdengine.models.config import ModelConfig
from svdengine.request_maker import RequestMaker
from svdengine.scheduling.completion import Completion, FinishReason
from svdengine.scheduling.constraint import ConstraintMaker
from svdengine.scheduling.embedding import Embedding, Pooling
from svdengine.scheduling.engine_loop import Engine, EngineStats
from svdengine.scheduling.request import Generation, ScoredGeneration, Scoring
from svdengine.scheduling.sampling import (
    SamplingFields,
    SamplingParams,
    check_sparsity_bias,
    merge_params,
    params_from_generation,
)
from svdengine.scheduling.scheduler import PREFILL_ROWS
from svdengine.speculation.speculation import Speculation
from svdengine.text.tokenizer import Prompt, Tokenizer, as_prompts, token_list
from svdengine.text_stream import TextStream

if TYPE_CHECKING:
    from svdengine.text.chat_template import ChatTemplate, Message


class LLM:
    """A loaded model. `load` makes one.

    It may be used from several threads: each step of the engine is taken under a lock and advances all requests. As a
    context manager it is closed at the end of the block; one that nobody refers to any more is closed too. In a process
    that was forked afterwards it cannot run: its threads are not there.

    context: most tokens of one sequence, prompt and answer.
    kv_dtype: how keys and values are cached: f16, q8 or f32.
    deterministic: whether a request gets the same bits whatever runs beside it.
    tokenizer: the Tokenizer of the model file.
    default_params: the SamplingParams that the model file states, where a call says nothing else.
    model_file, predictor: what was loaded.
    """

    def __init__(
        self,
        model_file: ModelFile,
        executor: Executor,
        *,
        context: int,
        kv_dtype: KvDtype = "f16",
        predictor: Predictor | None = None,
        prefill_rows: int = PREFILL_ROWS,
        speculative: bool = False,
        deterministic: bool = False,
        watches: Sequence[FileWatch] = (),
    ) -> None:
        """`deterministic`: whether the executor is.

        `watches`: files that must not change meanwhile; they are closed with the model.
        """
        self.model_file = model_file
        self.predictor = predictor
        self.context = context
        self.kv_dtype = kv_dtype
        self.deterministic = deterministic
        self.tokenizer = Tokenizer(model_file.tokenizer_info, model_file.tokenizer_bytes)
        self.default_params = params_from_generation(model_file.generation)
        self._requests = RequestMaker(model_file, self.tokenizer, context)
        drafter = Speculation(executor) if speculative else None
        self._engine = Engine(
            executor, prefill_rows=prefill_rows, drafter=drafter, check=partial(check_files, tuple(watches))
        )
        self._lock = threading.Lock()
        self._abandoned: deque[Generation] = deque()
        self._step_thread = StepThread()
        self._process = os.getpid()
        self._release = weakref.finalize(self, _release, self._engine, model_file, watches, self._process)
        self._release.atexit = False

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model_file.config

    @property
    def executor(self) -> Executor:
        """What runs the model; not to be called while requests run. Raises SvdEngineError in a forked process."""
        self._check_process()
        return self._engine.executor

    @property
    def ffn(self) -> FfnMode:
        """How FFNs run: dense, exact, sparse, or auto, which takes for each step what is faster.

        It can be set, for steps from then on. That raises RequestError where the model cannot run sparse.
        """
        return self.executor.ffn

    @ffn.setter
    def ffn(self, ffn: FfnMode) -> None:
        mode = check_ffn(ffn)
        if ffn == "sparse":
            require_predictor(self.model_file, self.predictor)
        with self._turn():
            self._engine.set_ffn(mode)

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. Raises RequestError when it has none, ModelFileError when it is damaged."""
        return self._requests.chat_template

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        special: bool = False,
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> TextStream:
        """Complete one prompt, and iterate over the pieces of text as they come.

        prompt: a text, or token ids.
        special: control tokens that are written in the text, such as <|im_start|>, are tokens, as a program needs that
            writes the chat template's text itself. By default they are text, which is safe with texts of others.
        params: how tokens are chosen and when generation ends; by default `default_params`, the model's own.
        context_shift: forget the oldest half of a full context, instead of ending with finish_reason "length".
        fields: fields of SamplingParams, such as temperature or max_tokens, that differ from `params`.

        Raises RequestError at once when prompt or parameters are unusable, ContextOverflowError when the prompt is too
        long, SvdEngineError when the model was closed. While iterating, what a step raises.
        """
        return self._start(self.prepare(prompt, params, special=special, context_shift=context_shift, **fields))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        context_shift: bool = False,
        template: Mapping[str, Any] | None = None,
        **fields: Unpack[SamplingFields],
    ) -> TextStream:
        """Answer a conversation, and iterate over the pieces of the answer.

        Nothing is kept between calls but the KV cache: a conversation that goes on costs only its new tokens.

        messages: objects with role and content, the oldest first: {"role": "user", "content": "Hello"}.
        params: how tokens are chosen and when generation ends; by default `default_params`, the model's own.
        context_shift: forget the oldest half of a full context after the system message, instead of ending with
            finish_reason "length".
        template: further variables for the chat template, such as tools.
        fields: fields of SamplingParams, such as temperature or max_tokens, that differ from `params`.

        Raises what `stream` raises, and RequestError when the model has no chat template or it refuses the messages,
        ModelFileError when it is damaged.
        """
        request = self.prepare_chat(messages, params, context_shift=context_shift, template=template, **fields)
        return self._start(request)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        special: bool = False,
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> list[Completion]:
        """Complete prompts together, and return their completions in the same order.

        prompts: a text or token ids, or several of these.
        special: control tokens that are written in the texts are tokens; see `stream`.
        params: for all, or one for each; by default `default_params`, the model's own.
        context_shift: forget the oldest half of a full context, instead of ending with finish_reason "length".
        fields: fields of SamplingParams, such as temperature or max_tokens, that differ from `params`.

        Raises what `stream` raises, and RequestError when there is no prompt, or not one of `params` for each.
        """
        streams: list[TextStream] = []
        try:
            for prompt, one in _with_params(prompts, params):
                streams.append(self.stream(prompt, one, special=special, context_shift=context_shift, **fields))
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.close()
        return [stream.completion for stream in streams]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        context_shift: bool = False,
        template: Mapping[str, Any] | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """Answer a conversation, and return the whole answer. Arguments and errors are those of `stream_chat`."""
        with self.stream_chat(messages, params, context_shift=context_shift, template=template, **fields) as stream:
            for _ in stream:
                pass
        return stream.completion

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        special: bool = False,
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> AsyncTextStream:
        """As `stream`, for `async for`. It begins with the first piece, which is also where errors are raised."""
        prepare = partial(self.prepare, prompt, params, special=special, context_shift=context_shift, **fields)
        return AsyncTextStream(self, self._step_thread, prepare)

    def astream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        context_shift: bool = False,
        template: Mapping[str, Any] | None = None,
        **fields: Unpack[SamplingFields],
    ) -> AsyncTextStream:
        """As `stream_chat`, for `async for`. It begins with the first piece, which is also where errors are raised."""
        prepare = partial(self.prepare_chat, messages, params, context_shift=context_shift, template=template, **fields)
        return AsyncTextStream(self, self._step_thread, prepare)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        special: bool = False,
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> list[Completion]:
        """As `generate`, to be awaited. Other tasks run meanwhile, and requests of all tasks share steps."""
        streams = [
            self.astream(prompt, one, special=special, context_shift=context_shift, **fields)
            for prompt, one in _with_params(prompts, params)
        ]
        return await collect(streams)

    async def achat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        context_shift: bool = False,
        template: Mapping[str, Any] | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """As `chat`, to be awaited. Cancelling the task ends generation and frees its KV blocks."""
        stream = self.astream_chat(messages, params, context_shift=context_shift, template=template, **fields)
        return (await collect([stream]))[0]

    def logits(
        self, token_ids: Sequence[int] | NDArray[np.integer[Any]], *, sparsity_bias: float = 0.0
    ) -> NDArray[np.float32]:
        """Logits after each of the tokens, teacher-forced: (n, vocabulary) float32.

        token_ids: (n,), at least one; `tokenizer.encode` makes them of a text.
        sparsity_bias: shifts the sparsity predictor's thresholds, as in SamplingParams.

        Raises RequestError on ids outside the vocabulary, ContextOverflowError on more tokens than the context holds,
        SvdEngineError when the model was closed.
        """
        check_sparsity_bias(sparsity_bias)
        request = Scoring(token_list(token_ids), self.config.vocab_size, self.context, sparsity_bias)
        self._run_all([request])
        return request.logits

    def embed(self, texts: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean") -> NDArray[np.float32]:
        """Vectors of length 1 that stand for texts: (n, hidden) float32.

        They are what this model, which was made to generate, computes on its way: not those of a model that was trained
        to embed, which finds what is alike much better.

        texts: a text or token ids, or several of these.
        pooling: "mean", of the last hidden states of all tokens, after the final norm; or "last", that of the last.

        Raises RequestError when a text is unusable, or the device gives no hidden states, ContextOverflowError when one
        is too long, SvdEngineError when the model was closed.
        """
        requests = [self.prepare_embedding(text, pooling=pooling) for text in as_prompts(texts)]
        self._run_all(requests)
        return np.stack([request.vector for request in requests if request.vector is not None])

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        special: bool = False,
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> Generation:
        """The request that `stream` would run, for a program that drives the model itself with `add` and `step`.

        Arguments and errors are those of `stream`.
        """
        self._check_process()  # here too: what hands the request to a thread that is not there would wait for ever
        return self._requests.complete(prompt, self._params(params, fields), special=special, shift=context_shift)

    def prepare_scored(
        self, prompt: Prompt, params: SamplingParams | None = None, *, generate: bool = True
    ) -> ScoredGeneration:
        """The same as `prepare`, with the log-probabilities of the prompt's own tokens.

        params: they must ask for logprobs. generate: false: it ends with the prompt.

        Errors are those of `stream`.
        """
        return self._requests.score(prompt, self._params(params, {}), generate=generate)

    def prepare_embedding(self, text: Prompt, *, pooling: Pooling = "mean", cut: bool = False) -> Embedding:
        """The request for one text of `embed`, for a program that drives the model itself with `add` and `step`.

        cut: a text that is too long loses its end, instead of being refused. Else arguments and errors are as there.
        """
        if not isinstance(self._device(), HiddenStates):
            raise RequestError(
                f"the device {self.executor.name} gives no hidden states to embed with; use --device cpu"
            )
        return self._requests.embed(text, pooling, cut=cut)

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        context_shift: bool = False,
        template: Mapping[str, Any] | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Generation:
        """The request that `stream_chat` would run, for a program that drives the model itself with `add` and `step`.

        Arguments and errors are those of `stream_chat`.
        """
        self._check_process()
        return self._requests.answer(messages, self._params(params, fields), template or {}, shift=context_shift)

    def add(self, request: Generation | Scoring) -> None:
        """Queue a request of `prepare` or `prepare_chat`; `step` advances it until it is `done`.

        Raises ContextOverflowError when the KV cache cannot hold it, SvdEngineError when the model was closed.
        """
        with self._turn():
            self._check_open()
            self._engine.add(request)

    def step(self) -> None:
        """Advance all requests that were added. Raises what the executor raises, which is each request's error too."""
        with self._turn():
            self._end_abandoned()
            self._engine.step()

    def abort(self, request: Generation | Scoring, reason: FinishReason = "abort") -> None:
        """Take out a request and free its KV blocks; one that is done already is left as it is.

        reason: the finish_reason that its completion gets.
        """
        if self._forked:  # nothing of it runs here
            return
        with self._turn():
            self._engine.abort(request)
            if isinstance(request, Generation):
                request.finish(reason)

    def read_with(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        constraints: Callable[[Tokenizer, int], ConstraintMaker] = ConstraintMaker,
    ) -> None:
        """Have prompts and grammars read by these from now on, such as ones that bound what a text may take.

        template: None: made of the model's source when it is first needed. constraints: makes what reads grammars.
        """
        self.tokenizer = tokenizer
        self._requests.read_with(tokenizer, template, constraints)

    def stats(self) -> EngineStats:
        """What was done since the model was loaded, and the state of queue and KV cache. It waits for no step."""
        return self._engine.stats()

    def save_kv(self, path: str | Path) -> int:
        """Write the KV cache's finished blocks and their tokens to a file, for `load_kv`; returns how many tokens.

        path: the file; it appears complete or not at all. Requests wait meanwhile.

        Raises RequestError where the device cannot, ModelFileError where the file cannot be written, SvdEngineError
        when the model was closed.
        """
        store = self._block_store()
        with self._turn():
            self._check_open()
            blocks = self._engine.prefix_cache.contents()
            write_kv_file(Path(path), self._kv_origin(), blocks, store)
        return sum(len(known.tokens) for known in blocks)

    def load_kv(self, path: str | Path) -> int:
        """Take what `save_kv` wrote into the KV cache, as far as blocks are free; returns how many tokens.

        path: the file that `save_kv` wrote.

        Raises RequestError where the device cannot, ModelFileError, with nothing changed, when the file is damaged or
        was written with another model, predictor, FFN path or kv_dtype, SvdEngineError when the model was closed.
        """
        store = self._block_store()
        with self._turn():
            self._check_open()
            with KvFile(Path(path), self._kv_origin(), store) as file:
                return restore(file, self._engine.prefix_cache, store)

    def close(self) -> None:
        """Give back threads and memory; requests that still run end with an error. Closing twice is fine."""
        if self._forked:
            return
        with self._turn():
            self._release()
            self.predictor = None  # arrays that would keep the file mapped

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._forked:
            raise SvdEngineError(
                f"the model was loaded in process {self._process}; process {os.getpid()} was forked from it, without"
                " the threads that run the model; load it in the process that uses it (multiprocessing: in the worker;"
                " gunicorn: without --preload)"
            )

    def _check_open(self) -> None:
        if not self._release.alive:
            raise SvdEngineError("the model was closed")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Have the engine to oneself. In a forked process the lock may be one that nobody will ever release."""
        self._check_process()
        with self._lock:
            yield

    def _device(self) -> Executor:
        """What runs the model, without what is around it."""
        executor = self.executor
        return executor.inner if isinstance(executor, AdvisingExecutor) else executor

    def _block_store(self) -> BlockStore:
        executor = self._device()
        if not isinstance(executor, BlockStore):
            raise RequestError(f"KV blocks cannot be saved or loaded on the device {executor.name}; use --device cpu")
        return executor

    def _kv_origin(self) -> KvOrigin:
        model = model_fingerprint(self.model_file)
        if self.predictor is not None:
            model += predictor_fingerprint(self.predictor)
        ffn = self.executor.ffn + (", deterministic" if self.deterministic else "")
        return KvOrigin(model, ffn, self.config.vocab_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise SvdEngineError("a loaded model cannot be copied or sent to another process; load the file there")

    def _params(self, params: SamplingParams | None, fields: Mapping[str, Any]) -> SamplingParams:
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, found {type(params).__name__}")
        merged = merge_params(params or self.default_params, fields)
        if merged.ffn == "sparse":
            require_predictor(self.model_file, self.predictor)
        return merged

    def _start(self, request: Generation) -> TextStream:
        self.add(request)
        return TextStream(request, self._advance, self.abort, self._abandoned.append)

    def _advance(self, request: Generation | Scoring) -> None:
        with self._turn():
            self._end_abandoned()
            if not request.done and request.error is None:  # another thread may have taken the step meanwhile
                self._engine.step()

    def _run_all(self, requests: Sequence[Generation | Scoring]) -> None:
        """Run requests together. Raises the error of one, which ends them all."""
        try:
            for request in requests:
                self.add(request)
            for request in requests:
                while not request.done and request.error is None:
                    self._advance(request)
                if request.error is not None:
                    raise request.error
        finally:
            for request in requests:
                if not request.done:
                    self.abort(request)

    def _end_abandoned(self) -> None:
        while self._abandoned:
            self._engine.abort(self._abandoned.popleft())


def _with_params(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams | None]]:
    """Each prompt with its parameters. Raises RequestError when their numbers differ."""
    batch = as_prompts(prompts)
    each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
    if len(each) != len(batch):
        raise RequestError(f"found {len(each)} sampling parameters for {len(batch)} prompts")
    return list(zip(batch, each, strict=True))


def _release(engine: Engine, model_file: ModelFile, watches: Sequence[FileWatch], process: int) -> None:
    """Close what a model was made of. The collector may call this, on any thread."""
    if os.getpid() != process:  # a forked process has a copy of all this, and no threads to end
        return
    with suppress(RuntimeError):  # on a thread of the team itself, which ends when it returns to its work
        engine.close()
    model_file.close()
    for watch in watches:
        watch.close()
