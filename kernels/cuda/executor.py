"""CudaExecutor: weights and KV blocks in the GPU's memory, decode steps as recorded graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.base_executor import BaseExecutor, ExecutorSetup
from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.cuda.ahead import Ahead, has_room_ahead, take_chosen
from svdengine.kernels.cuda.attention import tile_rows
from svdengine.kernels.cuda.batch_tiles import cut_tiles
from svdengine.kernels.cuda.device import Array, Device, Graph
from svdengine.kernels.cuda.early_launch import record_and_run
from svdengine.kernels.cuda.gemm import OWN_ROWS, HalfCopies, first_library_rows
from svdengine.kernels.cuda.half_copies import copy_items
from svdengine.kernels.cuda.kv_cache import allocate_cache, kv_bytes_per_token, read_blocks, write_blocks
from svdengine.kernels.cuda.memory_split import MemorySplit, split_memory
from svdengine.kernels.cuda.model import build_model
from svdengine.kernels.cuda.placed_predictor import place_predictor
from svdengine.kernels.cuda.router import route
from svdengine.kernels.cuda.sampling import MOST_TOKENS, pack_choices, sample_tokens
from svdengine.kernels.cuda.state import State
from svdengine.kernels.cuda.step import Keep, Sample, Shape, ffn, run_step
from svdengine.kernels.cuda.workspace import (
    COUNTS,
    Sizes,
    allocate_workspace,
    inputs_size,
    pack_inputs,
    pack_parts,
    workspace_bytes,
)
from svdengine.kernels.executor import Choice, FfnPath, LayerCounts, Logits, NeuronCounts
from svdengine.kernels.predictor import Predictor

_FEW_ROWS = 8  # up to which every row attends alone, so that a step's launches depend on its size only


class CudaExecutor(BaseExecutor):
    """Runs a model on a device of kernels/cuda/device.py.

    `gpu_memory`: bytes that the model may take of the device's memory, by default all that is free; `host_memory`:
    bytes of the host's for FFN rows that do not fit, by default any. Raises DeviceError, with how much is missing, when
    they do not suffice.
    """

    name = "cuda"

    def __init__(
        self, setup: ExecutorSetup, *, device: Device, gpu_memory: int | None = None, host_memory: int | None = None
    ) -> None:
        super().__init__(setup)
        config = setup.config
        if config.vocab_size > MOST_TOKENS:
            raise DeviceError(
                f"the model has a vocabulary of {config.vocab_size} tokens, and at most {MOST_TOKENS} can be sampled"
                " from on the GPU; use --device cpu"
            )
        sizes = Sizes.of(config, self.max_batch_rows, self.context)
        if setup.kv_dtype not in ("f16", "f32"):
            raise DeviceError(
                f"the KV cache on a GPU is f16 or f32, found --kv-dtype {setup.kv_dtype}; use one of these, or --device"
                " cpu"
            )
        self.kv_bytes_per_token = kv_bytes_per_token(config, setup.kv_dtype)
        free = device.free_bytes()
        available = free if gpu_memory is None else min(free, gpu_memory)
        cache_bytes = self.kv_bytes_per_token * BLOCK_SIZE * self.block_count
        self.memory, copies = _plan(setup, sizes, device.has_blas, cache_bytes, available, host_memory)
        # Products of the library cannot be recorded.
        self._library_rows = first_library_rows(config, setup.formats, bool(self.memory.splits))
        # Layers that are split differ in what they read over the bus, so all of them are measured.
        self._measured_layers = config.layer_count if self.memory.splits else None
        self._state = State(
            device=device,
            model=build_model(device, config, setup.arrays, setup.formats, self.context, self.memory.splits),
            work=allocate_workspace(device, sizes),
            cache=allocate_cache(device, config, self.block_count, setup.kv_dtype),
            copies=HalfCopies(*(device.zeros(c, np.float16) for c in copies)) if device.has_blas else None,
        )
        self._graphs: dict[Shape, Graph | None] = {}
        self._latest_rows = 0  # of the step that ran last
        self._known_counts: NeuronCounts | None = None  # what the device has counted, where that is known
        self._known_layers: LayerCounts = self._counted  # the same by layer
        self._staged = device.staging(inputs_size(sizes), np.int32)  # what is written to work.inputs
        self._is_staged = False  # whether the device may still have to read it
        self._tokens = device.staging(sizes.rows, np.int32)  # where work.chosen goes
        self._counts = device.staging(config.layer_count * COUNTS, np.int64)  # where work.counts goes
        self._ahead: Ahead | None = None  # the step that was launched before it was asked for
        self.predictor = setup.predictor
        self.prepare()

    def prepare(self) -> None:
        """Have the machine code of what steps need as things stand; it is made when something is missing only."""
        self._state.device.prepare(self._steps_to_come())

    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor`. Raises ValueError for a batch that breaks the rules of `Batch`."""
        shape = self._load(batch)
        self._run(shape)
        return self._logits(0, shape.wanted)

    def forward_and_sample(self, batch: Batch, choices: Sequence[Choice | None]) -> tuple[NDArray[np.int32], Logits]:
        """Run one step; see `SamplingExecutor`. ValueError as from `forward`, and for too many or few choices."""
        if len(choices) != len(batch.logit_rows):
            raise ValueError(f"{len(choices)} choices for {len(batch.logit_rows)} rows of logits")
        ahead = self._ahead
        if ahead is not None and ahead.shape.ffn == self.ffn_path(len(batch.tokens)) and ahead.is_step_of(batch):
            shape = self._choose_ahead(ahead, choices)
        else:
            shape = self._load(batch, choices)
            self._run(shape)
        tokens = self._chosen_tokens(batch, shape, choices)
        rows = [self._logits(row, row + 1) for row, choice in enumerate(choices) if choice is None]
        return tokens, np.concatenate([np.empty((0, self.config.vocab_size), np.float32), *rows])

    def _choose_ahead(self, ahead: Ahead, choices: Sequence[Choice | None]) -> Shape:
        """Choose tokens from the logits of a step that was launched before it was asked for."""
        device, work, sizes = self._state.device, self._state.work, self._state.work.sizes
        numbers, top_k = pack_choices(choices, sizes.rows)
        device.write(work.inputs, pack_parts(sizes, {"choice_numbers": numbers, "choice_top_k": top_k}, self._staged))
        shape = replace(ahead.shape, sample=_sample_of(choices))
        sample_tokens(device, work, shape.wanted, self.config.vocab_size, shape.sample == "drawn")
        self._ahead = None
        return shape

    def _chosen_tokens(self, batch: Batch, shape: Shape, choices: Sequence[Choice | None]) -> NDArray[np.int32]:
        """The tokens that a step chose, and with them what it counted. The next step may be launched meanwhile."""
        device, work = self._state.device, self._state.work
        waits = [device.fetch(work.chosen[: shape.wanted], self._tokens)]
        if shape.ffn != "dense":
            waits.append(device.fetch(work.counts, self._counts))
        next_one = self._go_on(batch, shape, choices)
        for wait in waits:
            wait()
        self._is_staged = False
        tokens: NDArray[np.int32] = self._tokens[: shape.wanted].copy()
        if shape.ffn != "dense":
            self._note_counts(self._counts.reshape(-1, COUNTS).copy())
        self._ahead = None if next_one is None else Ahead(batch, tokens, next_one)
        return tokens

    def _go_on(self, batch: Batch, shape: Shape, choices: Sequence[Choice | None]) -> Shape | None:
        """Launch the step that most likely follows, if a graph has run for such steps; its shape."""
        if None in choices or self._graphs.get(shape) is None or not has_room_ahead(batch, self.context):
            return None
        following, device = replace(shape, sample=""), self._state.device
        take_chosen(device, self._state.work, shape.n)
        graph = self._graphs.get(following)
        if graph is None:
            self._graphs[following] = self._recorded(following)
        else:
            device.replay(graph)
        return following

    def _drop_ahead(self) -> None:
        """Nobody asks for the step that was launched: nothing of it counts."""
        if self._ahead is not None and self._ahead.shape.ffn != "dense":
            self._state.device.write(self._state.work.counts, self._known_layers.reshape(-1))
        self._ahead = None

    def hidden_states(self) -> NDArray[np.float32]:
        """See `HiddenStates`. The residual stream comes to the host, and is normed there.

        Raises ValueError after a step of which the device chose all tokens, where the next one is on its way.
        """
        self._check_open()
        if self._ahead is not None:
            raise ValueError("hidden states are kept of steps some of whose logits come to the host")
        stride, n = self._state.work.sizes.hidden, self._latest_rows
        residual = self._fetch(self._state.work.x[: n * stride]).reshape(n, stride)
        return self._normed(residual[:, : self.config.hidden_size])

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[Any]:
        """See `BlockStore`."""
        self._check_open()
        return read_blocks(self._state.device, self._state.cache, self.config, blocks)

    def write_blocks(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """See `BlockStore`. Raises ValueError for data of another shape or type."""
        self._check_open()
        write_blocks(self._state.device, self._state.cache, self.config, blocks, data)

    def _fetch(self, array: Array, to: NDArray | None = None) -> NDArray:
        """A host copy of what steps left, once they are done."""
        found = self._state.device.download(array, to)
        self._is_staged &= not found.size
        return found

    def _logits(self, first: int, end: int) -> Logits:
        """Some of the rows with logits."""
        stride = self._state.work.sizes.logits
        found: Logits = self._fetch(self._state.work.logits[first * stride : end * stride])
        return found.reshape(-1, stride)[:, : self.config.vocab_size]

    def neuron_counts(self) -> NeuronCounts:
        """Neurons of rows that took the sparse path since the last reset."""
        if self._known_counts is None:
            return self._note_counts(self._fetch(self._state.work.counts).reshape(-1, COUNTS))
        return self._known_counts

    def _note_counts(self, layers: LayerCounts) -> NeuronCounts:
        """Note what the device has counted."""
        self._known_layers, self._known_counts = layers, NeuronCounts(*map(int, layers.sum(0)))
        return self._known_counts

    def layer_counts(self) -> LayerCounts:
        """See `Executor`."""
        self.neuron_counts()
        return self._known_layers.copy()

    def expert_counts(self) -> tuple[NDArray[np.int64], ...]:
        """See `BaseExecutor`: nothing, since the device keeps its choices of experts to itself."""
        return ()

    def _set_layer_counts(self, counts: LayerCounts) -> None:
        self._ahead = None
        self._note_counts(np.array(counts, np.int64))
        self._state.device.write(self._state.work.counts, self._known_layers.reshape(-1))

    def _place_predictor(self, predictor: Predictor | None) -> None:
        orders = [layer.order for layer in self._state.model.layers]
        self._placed = place_predictor(self._state.device, self.config, predictor, orders)
        self._graphs.clear()  # they hold the addresses of what was placed before
        self._drop_ahead()

    def _keep_ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        shape = self._load(batch)
        stride, kept = self._state.work.sizes.hidden, []
        chosen = np.zeros((self.config.layer_count, shape.n, self.config.chosen_blocks), np.int32)
        self.kept_experts = chosen if self.config.expert_count else None

        def keep(index: int, x: NDArray) -> None:
            rows = self._state.device.download(x[: shape.n * stride]).reshape(shape.n, stride)
            kept.append(rows[:, : self.config.hidden_size])
            if index in self.config.expert_layers:
                blocks = self._state.work.blocks[: chosen[index].size]
                chosen[index] = self._state.device.download(blocks).reshape(shape.n, -1)

        self._run(shape, keep)
        return np.stack(kept)

    def _run_ffns(self, inputs: NDArray[np.float32], layers: int, sparsity_bias: float) -> NDArray[np.float32]:
        self._drop_ahead()
        device, work, model = self._state.device, self._state.work, self._state.model
        n, hidden, stride = inputs.shape[-2], self.config.hidden_size, work.sizes.hidden
        rows = np.zeros((*inputs.shape[:-1], stride), np.float32)
        rows[..., :hidden] = inputs
        device.write(work.x, np.zeros((n, stride), np.float32))
        device.write(work.sparsity_bias, np.full(n, sparsity_bias, np.float32))
        path = self.ffn_path(n)
        self._note_counting(path)
        for index in range(layers):
            if inputs.ndim == 3 or index == 0:
                device.write(work.normed, rows[index] if inputs.ndim == 3 else rows)
            if (blocks := model.layers[index].blocks) is not None:
                route(self._state, blocks, work.normed, n)
            ffn(self._state, self._placed, index, model.layers[index], work.normed, n, path)
        found: NDArray[np.float32] = device.download(work.x[: n * stride]).reshape(n, stride)[:, :hidden]
        return found

    def _release(self) -> None:
        device = self._state.device
        with suppress(DeviceError):  # where the GPU has stopped, a step has said so
            device.synchronize()  # nothing may still use what goes now
        self._graphs.clear()
        del self._state, self._placed, self._staged, self._tokens, self._counts
        device.close()  # which gives back only what nobody refers to

    def _run(self, shape: Shape, keep: Keep | None = None) -> None:
        """Run a step: its first time as launches, which compiles what it needs, from then on as a graph."""
        self._note_counting(shape.ffn)
        device = self._state.device
        graph = self._graphs.get(shape)
        if keep is not None or not self._is_recorded(shape) or shape not in self._graphs:
            run_step(self._state, self._placed, shape, keep)
            if keep is None and self._is_recorded(shape):
                self._graphs[shape] = None
            return
        if graph is None:
            self._graphs[shape] = self._recorded(shape)
        else:
            device.replay(graph)

    def _recorded(self, shape: Shape) -> Graph:
        """Record a step, and run it."""
        work = self._state.work
        left = (work.logits[: shape.wanted * work.sizes.logits], work.chosen[: shape.wanted])
        step = partial(run_step, self._state, self._placed, shape)
        return record_and_run(self._state.device, step, left, work.counts)

    def _load(self, batch: Batch, choices: Sequence[Choice | None] = ()) -> Shape:
        """Check the batch, copy it to the device, and say which launches it takes."""
        self._check(batch)
        self._drop_ahead()
        device, work = self._state.device, self._state.work
        n, wanted = len(batch.tokens), len(batch.logit_rows)
        group = self.config.head_count // self.config.kv_head_count
        alone = n <= _FEW_ROWS or len(np.unique(batch.sequences)) == n
        most = 1 if alone else tile_rows(group, self.config.head_dim, self._state.cache.dtype)
        tiles = cut_tiles(batch.sequences, most)
        tables = np.zeros((len(batch.block_tables), work.sizes.blocks), np.int32)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        values: dict[str, NDArray] = {
            "tokens": batch.tokens,
            "positions": batch.positions,
            "sequences": batch.sequences,
            "logit_rows": batch.logit_rows,
            "tiles": tiles,
            "block_tables": tables,
        }
        if batch.sparsity_bias is not None:
            values["sparsity_bias"] = np.asarray(batch.sparsity_bias, np.float32)[batch.sequences]
        if choices:
            values["choice_numbers"], values["choice_top_k"] = pack_choices(choices, work.sizes.rows)
        if self._is_staged:
            device.synchronize()
        device.write(work.inputs, pack_inputs(work.sizes, values, self._staged))
        self._is_staged = True
        self._latest_rows = n
        return Shape(n, wanted, len(tiles), most, self.ffn_path(n), sample=_sample_of(choices))

    def _steps_to_come(self) -> Iterator[Callable[[], None]]:
        """Steps of the kinds that launch different kernels."""
        config, most = self.config, self.max_batch_rows
        rows = tile_rows(config.head_count // config.kv_head_count, config.head_dim, self._state.cache.dtype)
        sizes = {*OWN_ROWS, _FEW_ROWS, _FEW_ROWS + 1, self._library_rows - 1, self._library_rows, most}
        shapes = {
            Shape(n, n, -(-n // tile), tile, path, sample="drawn")
            for n in sizes
            if n <= most
            for tile in {1, 1 if n <= _FEW_ROWS else rows}
            for path in self._paths()
        }
        yield partial(take_chosen, self._state.device, self._state.work, 1)
        for shape in shapes:
            yield partial(run_step, self._state, self._placed, shape)

    def _is_recorded(self, shape: Shape) -> bool:
        """Whether steps of a shape come back often: decode, where every row is wanted and attends alone."""
        return shape.n < self._library_rows and shape.tiles == shape.n == shape.wanted

    def _paths(self) -> tuple[FfnPath, ...]:
        """How steps may run their FFNs as things stand."""
        if not self._can_skip or self.ffn == "dense":
            return ("dense",)
        if self.predictor is None or self.ffn == "exact":
            return ("dense", "skip_zeros")
        return ("predict",) if self.ffn == "sparse" else ("dense", "skip_zeros", "predict")

    def _note_counting(self, path: FfnPath) -> None:
        """Neurons are about to be counted, unless the path is dense."""
        if path != "dense":
            self._known_counts = None


def _sample_of(choices: Sequence[Choice | None]) -> Sample:
    """What has to be launched for these choices."""
    if any(choice is not None and choice.temperature > 0 for choice in choices):
        return "drawn"
    return "likeliest" if any(choice is not None for choice in choices) else ""


def _plan(
    setup: ExecutorSetup, sizes: Sizes, has_blas: bool, cache: int, available: int, host_available: int | None
) -> tuple[MemorySplit, tuple[int, int]]:
    """Where the model lies, and items of the library's copies, which are larger where the FFN is split."""
    for split in (False, True):
        copies = (0, 0)
        if has_blas and sizes.rows >= first_library_rows(setup.config, setup.formats, split):
            copies = copy_items(setup.config, setup.formats, sizes, split)
        memory = split_memory(
            setup.config,
            setup.arrays,
            setup.predictor,
            cache=cache,
            buffers=workspace_bytes(sizes) + 2 * sum(copies),
            available=available,
            host_available=host_available,
        )
        if not memory.splits:
            break
    return memory, copies
