"""The library: load a model, complete prompts, hold conversations, score tokens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import RequestError, SvdEngineError
from svdengine.executors import Device, KvDtype, check_ffn, create_executor
from svdengine.files.advising_executor import AdvisingExecutor
from svdengine.files.kv_file import KvFile, KvOrigin, restore, write_kv_file
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.predictor_file import find_predictor, model_fingerprint, predictor_fingerprint, require_predictor
from svdengine.files.residency import arrange_memory
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.executor import BlockStore, Executor, FfnMode
from svdengine.kernels.predictor import Predictor
from svdengine.models.config import ModelConfig
from svdengine.scheduling.block_pool import context_limit, kv_pool_bytes_per_token, pool_blocks
from svdengine.scheduling.completion import Completion, FinishReason
from svdengine.scheduling.constraint import Constraint, ConstraintMaker
from svdengine.scheduling.engine_loop import Engine, EngineStats
from svdengine.scheduling.request import ContextLimit, Generation, ScoredGeneration, Scoring
from svdengine.scheduling.sampling import (
    SamplingFields,
    SamplingParams,
    check_sparsity_bias,
    merge_params,
    params_from_generation,
)
from svdengine.scheduling.scheduler import PREFILL_ROWS
from svdengine.scheduling.sequence import blocks_for
from svdengine.speculation.speculation import Speculation
from svdengine.text.chat_template import ChatTemplate, Message, check_messages
from svdengine.text.stream_decoder import StreamDecoder
from svdengine.text.tokenizer import Prompt, Tokenizer, as_prompts, token_list
from svdengine.text_stream import TextStream


def load(
    path: str | Path,
    device: Device = "auto",
    ffn: FfnMode = "auto",
    threads: int | None = None,
    predictor: str | Path | None = None,
    *,
    context: int | None = None,
    kv_dtype: KvDtype = "f16",
    kv_tokens: int | None = None,
    kv_memory: int | None = None,
    sequences: int = 1,
    prefill_rows: int = PREFILL_ROWS,
    speculative: bool = False,
    gpu_memory: int | None = None,
    mlock: bool = False,
    prefetch: bool = False,
) -> LLM:
    """Open a `.svdp` model file and make it ready to run.

    path: the model file, as `svdengine convert` writes it.
    device: cpu, cuda (an NVIDIA GPU), ascend (a Huawei NPU), reference (NumPy: slow, and the definition of correct), or
        auto: what the environment variable SVDENGINE_DEVICE names, else a GPU or NPU that can be used, else the CPU.
    ffn: how FFNs run: dense, sparse, which needs a predictor, or auto, which takes for each step what costs less.
    threads: CPU threads, at most 1024; by default one a core.
    predictor: a predictor file of `svdengine calibrate`; by default the one in the model file, if there is one.
    context: most tokens of one sequence, prompt and answer; by default what the model was made for, at most 4096.
    kv_dtype: how keys and values are cached, f16 or f32.
    kv_tokens: tokens that the KV cache holds for all sequences together; by default `sequences` whole contexts.
    kv_memory: the size of the KV cache in bytes, instead of in tokens.
    sequences: how many whole contexts the KV cache holds where neither kv_tokens nor kv_memory says.
    prefill_rows: most tokens of prompts that a step reads while others decode: more read prompts faster, fewer let the
        others wait less for each token.
    speculative: let steps try tokens that followed the same ones before, or that the model drafted by its sparse path,
        where that is measured to be faster. Those are kept that are sampled anyway.
    gpu_memory: bytes of a GPU's memory for weights and KV cache; by default what is free. FFN weights that do not fit
        stay in the host's memory.
    mlock: keep the weights in memory.
    prefetch: read the weights into memory before anything runs.

    Raises ModelFileError on a model file or predictor that is missing, damaged or made for another model, DeviceError
    where the device is not there, has too little memory, or refuses to lock it, and RequestError on an argument that
    cannot be used.
    """
    mode = check_ffn(ffn)
    if isinstance(prefill_rows, bool) or not isinstance(prefill_rows, int) or prefill_rows < 1:
        raise RequestError(f"prefill_rows must be a whole number of at least 1, found {prefill_rows!r}")
    model_file = read_model_file(path)
    try:
        found = find_predictor(model_file, predictor)
        if ffn == "sparse":
            require_predictor(model_file, found)
        limit = context_limit(model_file.config, context)
        token_bytes = kv_pool_bytes_per_token(model_file.config, "f32" if device == "reference" else kv_dtype)
        if kv_tokens is None and kv_memory is None:
            kv_tokens = sequences * blocks_for(limit) * BLOCK_SIZE
        blocks = pool_blocks(limit, kv_tokens, kv_memory, token_bytes)
        fits = arrange_memory(model_file, mlock=mlock, prefetch=prefetch)
        opened = create_executor(
            model_file,
            device=device,
            threads=threads,
            context=limit,
            block_count=blocks,
            kv_dtype=kv_dtype,
            predictor=found,
            ffn=mode,
            gpu_memory=gpu_memory,
        )
        executor: Executor = opened
        if not fits and opened.name != "cuda":  # a GPU has its own copy of the weights
            executor = AdvisingExecutor(opened, model_file)
        return LLM(
            model_file,
            executor,
            context=limit,
            kv_dtype=kv_dtype,
            predictor=found,
            prefill_rows=prefill_rows,
            speculative=speculative,
        )
    except BaseException:
        model_file.close()
        raise


class LLM:
    """A loaded model. `load` makes one.

    It may be used from several threads: each step of the engine is taken under a lock and advances all requests. As a
    context manager it is closed at the end of the block.

    context: most tokens of one sequence, prompt and answer.
    kv_dtype: how keys and values are cached, f16 or f32.
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
    ) -> None:
        self.model_file = model_file
        self.predictor = predictor
        self.context = context
        self.kv_dtype = kv_dtype
        self.tokenizer = Tokenizer(model_file.tokenizer_info, model_file.tokenizer_bytes)
        self.default_params = params_from_generation(model_file.generation)
        drafter = Speculation(executor) if speculative else None
        self._engine = Engine(executor, prefill_rows=prefill_rows, drafter=drafter)
        self._lock = threading.Lock()
        self._abandoned: deque[Generation] = deque()
        self._template: ChatTemplate | None = None
        self._constraints: ConstraintMaker | None = None  # made when a request first has a grammar
        self._constraint_maker: Callable[[Tokenizer, int], ConstraintMaker] = ConstraintMaker
        self._making = threading.Lock()
        self._closed = False

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model_file.config

    @property
    def executor(self) -> Executor:
        """What runs the model; not to be called while requests run."""
        return self._engine.executor

    @property
    def ffn(self) -> FfnMode:
        """How FFNs run: dense, sparse, or auto, which takes for each step what is faster.

        It can be set, for steps from then on. That raises RequestError where the model cannot run sparse.
        """
        return self.executor.ffn

    @ffn.setter
    def ffn(self, ffn: FfnMode) -> None:
        mode = check_ffn(ffn)
        if ffn == "sparse":
            require_predictor(self.model_file, self.predictor)
        with self._lock:
            self._engine.set_ffn(mode)

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. Raises RequestError when it has none, ModelFileError when it is damaged."""
        if self._template is None:
            source = self.model_file.chat_template
            if source is None:
                raise RequestError("this model has no chat template; it can only complete text (generate)")
            self._template = ChatTemplate(source, self.tokenizer)
        return self._template

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> TextStream:
        """Complete one prompt, and iterate over the pieces of text as they come.

        prompt: a text, or token ids.
        params: how tokens are chosen and when generation ends; by default `default_params`, the model's own.
        context_shift: forget the oldest half of a full context, instead of ending with finish_reason "length".
        fields: fields of SamplingParams, such as temperature or max_tokens, that differ from `params`.

        Raises RequestError at once when prompt or parameters are unusable, ContextOverflowError when the prompt is too
        long, SvdEngineError when the model was closed. While iterating, what a step raises.
        """
        return self._start(self.prepare(prompt, params, context_shift=context_shift, **fields))

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
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> list[Completion]:
        """Complete prompts together, and return their completions in the same order.

        prompts: a text or token ids, or several of these.
        params: for all, or one for each; by default `default_params`, the model's own.
        context_shift: forget the oldest half of a full context, instead of ending with finish_reason "length".
        fields: fields of SamplingParams, such as temperature or max_tokens, that differ from `params`.

        Raises what `stream` raises, and RequestError when there is no prompt, or not one of `params` for each.
        """
        batch = as_prompts(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"found {len(each)} sampling parameters for {len(batch)} prompts")
        streams: list[TextStream] = []
        try:
            for prompt, one in zip(batch, each, strict=True):
                streams.append(self.stream(prompt, one, context_shift=context_shift, **fields))
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
        self.add(request)
        try:
            while not request.done and request.error is None:
                self._advance(request)
        finally:
            if not request.done:
                self.abort(request)
        if request.error is not None:
            raise request.error
        return request.logits

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        context_shift: bool = False,
        **fields: Unpack[SamplingFields],
    ) -> Generation:
        """The request that `stream` would run, for a program that drives the model itself with `add` and `step`.

        Arguments and errors are those of `stream`.
        """
        tokens = self._prompt_tokens(prompt)
        keep = 1 if tokens[:1] == [self.tokenizer.bos_id] else 0
        return self._generation(tokens, self._params(params, fields), context_shift, keep, tokens)

    def prepare_scored(
        self, prompt: Prompt, params: SamplingParams | None = None, *, generate: bool = True
    ) -> ScoredGeneration:
        """The same as `prepare`, with the log-probabilities of the prompt's own tokens.

        params: they must ask for logprobs. generate: false: it ends with the prompt.

        Errors are those of `stream`.
        """
        tokens = self._prompt_tokens(prompt)
        wanted = self._params(params, {})
        return ScoredGeneration(tokens, wanted, generate=generate, **self._options(wanted, False, 0, tokens))

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
        extra = dict(template or {})
        tokens = self.chat_template.encode(messages, **extra)
        keep = self._system_length(messages, tokens, extra) if context_shift else 0
        return self._generation(tokens, self._params(params, fields), context_shift, keep, ())

    def add(self, request: Generation | Scoring) -> None:
        """Queue a request of `prepare` or `prepare_chat`; `step` advances it until it is `done`.

        Raises ContextOverflowError when the KV cache cannot hold it, SvdEngineError when the model was closed.
        """
        with self._lock:
            if self._closed:
                raise SvdEngineError("the model was closed")
            self._engine.add(request)

    def step(self) -> None:
        """Advance all requests that were added. Raises what the executor raises, which is each request's error too."""
        with self._lock:
            self._end_abandoned()
            self._engine.step()

    def abort(self, request: Generation | Scoring, reason: FinishReason = "abort") -> None:
        """Take out a request and free its KV blocks; one that is done already is left as it is.

        reason: the finish_reason that its completion gets.
        """
        with self._lock:
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
        with self._making:
            self.tokenizer, self._template = tokenizer, template
            self._constraints, self._constraint_maker = None, constraints

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
        with self._lock:
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
        with self._lock:
            self._check_open()
            with KvFile(Path(path), self._kv_origin(), store) as file:
                return restore(file, self._engine.prefix_cache, store)

    def close(self) -> None:
        """Give back threads and memory; requests that still run end with an error. Closing twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._engine.close()
                self.model_file.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SvdEngineError("the model was closed")

    def _block_store(self) -> BlockStore:
        executor = self.executor.inner if isinstance(self.executor, AdvisingExecutor) else self.executor
        if not isinstance(executor, BlockStore):
            raise RequestError(f"KV blocks cannot be saved or loaded on the device {executor.name}; use --device cpu")
        return executor

    def _kv_origin(self) -> KvOrigin:
        model = model_fingerprint(self.model_file)
        if self.predictor is not None:
            model += predictor_fingerprint(self.predictor)
        return KvOrigin(model, self.executor.ffn, self.config.vocab_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _params(self, params: SamplingParams | None, fields: Mapping[str, Any]) -> SamplingParams:
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, found {type(params).__name__}")
        return merge_params(params or self.default_params, fields)

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return token_list(prompt)
        if not prompt:
            raise RequestError("the prompt is empty")
        return self.tokenizer.encode(prompt)

    def _generation(
        self, tokens: list[int], params: SamplingParams, shift: bool, keep: int, context: Sequence[int]
    ) -> Generation:
        return Generation(tokens, params, **self._options(params, shift, keep, context))

    def _options(self, params: SamplingParams, shift: bool, keep: int, context: Sequence[int]) -> dict[str, Any]:
        has_text = self.model_file.tokenizer_info.kind != "none"
        if params.stop and not has_text:
            raise RequestError("stop strings need a tokenizer, which this model file lacks; use stop_token_ids")
        return {
            "vocab_size": self.config.vocab_size,
            "end_tokens": self.tokenizer.eos_token_ids,
            "limit": ContextLimit(self.context, shift, keep),
            "decoder": StreamDecoder(self.tokenizer, context) if has_text else None,
            "constraint": self._constraint(params),
        }

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None:
            return None
        with self._making:
            if self._constraints is None:
                self._constraints = self._constraint_maker(self.tokenizer, self.config.vocab_size)
        return self._constraints.make(params.grammar)

    def _system_length(self, messages: Sequence[Message], tokens: list[int], extra: dict[str, Any]) -> int:
        """Tokens before the first turn: what the conversation shares with one of its system and last messages only."""
        check_messages(messages)
        system = [m for m in messages[:-1] if m["role"] == "system"]
        try:
            short = self.chat_template.encode([*system, messages[-1]], **extra)
        except SvdEngineError:
            return 0
        same = 0
        while same < min(len(short), len(tokens)) and short[same] == tokens[same]:
            same += 1
        return same if same < len(tokens) else 0

    def _start(self, request: Generation) -> TextStream:
        self.add(request)
        return TextStream(request, self._advance, self.abort, self._abandoned.append)

    def _advance(self, request: Generation | Scoring) -> None:
        with self._lock:
            self._end_abandoned()
            if not request.done and request.error is None:  # another thread may have taken the step meanwhile
                self._engine.step()

    def _end_abandoned(self) -> None:
        while self._abandoned:
            self._engine.abort(self._abandoned.popleft())
