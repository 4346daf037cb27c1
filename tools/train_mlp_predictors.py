"""Train predictors like PowerInfer's for a model for which none was published: one small network for each FFN.

    python -m svdengine.tools.train_mlp_predictors model.svdp --text text.txt -o model.powerinfer.gguf
    svdengine calibrate model.svdp --predictor powerinfer --from model.powerinfer.gguf --text other.txt

A network has one hidden layer with ReLU and no biases, and learns by binary cross-entropy whether a neuron's gate is
above 0 (Deja Vu, arXiv:2310.17157; PowerInfer, arXiv:2312.12456). As in Deja Vu's training, an active neuron weighs
as much more than an inactive one as it is rarer, or the few active ones would be missed. One window of text in five
is held out, and the table is measured on these. Calibrate on another text: on this one the scores are too good.

All inputs are held in memory: 2 bytes times tokens, layers and hidden size, 1.4 GB for the default and SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from svdengine.converters.calibration_text import WINDOW, text_windows
from svdengine.converters.ffn_layer import Neurons, read_ffn_layer, require_sparse, run_neurons
from svdengine.converters.gguf_file import import_gguf
from svdengine.converters.powerinfer import THRESHOLD_FIELD, Network, check_norm, tensor_name
from svdengine.converters.predictor_quality import Selection, mean_auroc, select
from svdengine.converters.statistics import Statistics, StatisticsCollector, collect_statistics
from svdengine.errors import SvdEngineError
from svdengine.llm import LLM
from svdengine.loading import load
from svdengine.models.config import ModelConfig

Array = NDArray[np.float32]
Progress = Callable[[], None]  # called after each epoch

_SMALLEST_SHARE = 0.005  # of active neurons, which bounds how much more one of them weighs


@dataclass(frozen=True)
class Training:
    """How the networks are trained."""

    rank: int = 128  # width of the hidden layer
    epochs: int = 8
    batch: int = 128  # tokens
    learning_rate: float = 3e-3  # at the start, for Adam; it falls to 0 along a cosine
    seed: int = 0


@dataclass(frozen=True)
class LayerResult:
    """A trained network, and how it does on held-out tokens with the trained threshold."""

    network: Network
    auroc: float
    selection: Selection


def import_torch() -> Any:
    """The package torch. Raises SvdEngineError with what to install."""
    try:
        import torch
    except ImportError as error:
        raise SvdEngineError("training needs PyTorch; run: pip install torch") from error
    return torch


def train_network(x: Array, active: NDArray[np.bool_], training: Training, progress: Progress | None = None) -> Network:
    """A network that tells from FFN inputs x (n, d) which neurons are active (n, f)."""
    torch = import_torch()
    torch.manual_seed(training.seed)
    # Inputs of one size learn faster; it goes back into the first matrix.
    size = np.sqrt(np.square(x).mean(0)) + np.float32(1e-6)
    inputs, targets = torch.from_numpy(x / size), torch.from_numpy(active)
    first = torch.nn.Linear(x.shape[1], training.rank, bias=False)
    second = torch.nn.Linear(training.rank, active.shape[1], bias=False)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    weight = 1 / max(float(active.mean()), _SMALLEST_SHARE)
    optimizer = torch.optim.Adam(model.parameters(), training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(x)).split(training.batch):
            optimizer.zero_grad()
            logits, wanted = model(inputs[rows]), targets[rows].float()
            # The gradient of the weighted cross-entropy, which costs a fifth of what it does by way of the loss.
            logits.backward((torch.sigmoid(logits.detach()) - wanted) * (1 + (weight - 1) * wanted) / wanted.numel())
            optimizer.step()
        schedule.step()
        if progress is not None:
            progress()
    return Network(first.weight.detach().numpy() / size, second.weight.detach().numpy().copy())


def train_model(
    llm: LLM, statistics: Statistics, training: Training, progress: Progress | None = None
) -> Iterator[LayerResult]:
    """Train and measure the network of each layer in turn."""
    for index in range(llm.config.layer_count):
        layer = read_ffn_layer(llm.model_file, index)
        x, held = (rows[index].astype(np.float32) for rows in (statistics.fit, statistics.held_out))
        network = train_network(x, run_neurons(layer, x).active, training, progress)
        yield _measure(network, held, run_neurons(layer, held))


def _measure(network: Network, x: Array, neurons: Neurons) -> LayerResult:
    found = network.scores(x)
    return LayerResult(network, mean_auroc(found, neurons.active), select(found > 0, neurons))


def record_inputs(llm: LLM, text: Path, tokens: int, progress: Callable[[int, int], None] | None = None) -> Statistics:
    """FFN inputs of all layers on up to `tokens` tokens of a text, in random order. Raises ConversionError."""
    windows = text_windows(llm, text, tokens, min(WINDOW, llm.context))
    config = llm.config
    collector = StatisticsCollector(
        config.layer_count, config.hidden_size, fit_rows=tokens, held_out_rows=max(1, tokens // 4)
    )
    executor: Any = llm.executor
    return collect_statistics(executor, windows, collector, progress=progress)


def write_gguf(path: Path, config: ModelConfig, networks: Sequence[Network], norm_weights: Array) -> None:
    """Write networks as PowerInfer has them, in float16 and for what enters the norm with the weights (layers, d).

    The file holds nothing else of the model. Raises ConversionError when the gguf package is missing.
    """
    gguf = import_gguf()
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, config.family)
    try:
        writer.add_block_count(config.layer_count)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.ffn_size)
        writer.add_float32(THRESHOLD_FIELD, 0.0)
        for layer, network in enumerate(networks):
            for matrix, values in ((1, network.first * norm_weights[layer]), (2, network.second)):
                writer.add_tensor(tensor_name(layer, matrix), values.astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def table(results: Sequence[LayerResult]) -> list[str]:
    """How each layer's network does, and the mean of all."""
    rows = [(str(index), *_figures(result)) for index, result in enumerate(results)]
    means = np.mean([row[1:] for row in rows], axis=0).tolist()
    lines = [f"{'layer':<6}{'AUROC':>9}{'recall':>9}{'predicted':>11}{'active':>9}{'rel. error':>12}"]
    for name, auroc, recall, predicted, active, error in [*rows, ("mean", *means)]:
        lines.append(f"{name:<6}{auroc:>9.3f}{recall:>9.3f}{predicted:>11.1%}{active:>9.1%}{error:>12.1e}")
    return lines


def _figures(result: LayerResult) -> tuple[float, float, float, float, float]:
    s = result.selection
    return result.auroc, s.recall, s.predicted_density, s.active_density, s.relative_error


def train_file(model: Path, text: Path, output: Path, tokens: int, training: Training, threads: int | None) -> None:
    """Train the networks of a model file on a text, write them, and print how good they are."""
    torch = import_torch()
    if threads is not None:
        torch.set_num_threads(threads)
    with load(model, "cpu", "dense", threads, context=WINDOW, kv_tokens=8 * WINDOW) as llm:
        require_sparse(llm.config)
        check_norm(llm.config)
        if not 1 <= training.rank <= max(llm.config.hidden_size, llm.config.ffn_size):
            raise SvdEngineError(f"--rank must lie in 1..{max(llm.config.hidden_size, llm.config.ffn_size)}")
        with click.progressbar(length=1, label="Running the model", file=sys.stderr) as bar:

            def ran(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            statistics = record_inputs(llm, text, tokens, ran)
        steps = llm.config.layer_count * training.epochs
        with click.progressbar(length=steps, label="Training", file=sys.stderr) as bar:
            results = list(train_model(llm, statistics, training, lambda: bar.update(1)))
        norm_weights = np.asarray(llm.model_file.arrays["ffn_norm.weight"], np.float32)
        write_gguf(output, llm.config, [result.network for result in results], norm_weights)
    print("\n".join(table(results)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="svdengine.tools.train_mlp_predictors", description="Train PowerInfer-style predictors for a model file."
    )
    default = Training()
    parser.add_argument("model", type=Path, help=".svdp file of a model of the ReLU family")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text like what the model will read")
    parser.add_argument("-o", "--output", type=Path, required=True, help="GGUF file to write")
    parser.add_argument("--tokens", type=int, default=40_960, help="of the text to use (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=default.rank, help="hidden width (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=default.batch, help="tokens of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; by default one a core")
    o = parser.parse_args(arguments)
    if min(o.tokens, o.rank, o.epochs, o.batch) < 1 or not o.learning_rate > 0:
        parser.error("--tokens, --rank, --epochs, --batch and --learning-rate must be above 0")
    training = Training(o.rank, o.epochs, o.batch, o.learning_rate, o.seed)
    try:
        train_file(o.model, o.text, o.output, o.tokens, training, o.threads)
    except (SvdEngineError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
