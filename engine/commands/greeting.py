"""What is said before a conversation: what runs, in how much memory, and what its predictor brings on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svdengine.commands.chat_session import share_text

if TYPE_CHECKING:
    from svdengine.llm import LLM


def greeting(llm: LLM) -> str:
    """A few lines on the model, measured where it has a predictor, and one on how to go on."""
    from svdengine.measuring.memory_traffic import parameter_count, weight_bytes
    from svdengine.scheduling.block_pool import kv_pool_bytes_per_token

    config, file = llm.config, llm.model_file
    formats = "/".join(dict.fromkeys(name for name in file.formats.values() if name != "f32")) or "f32"
    pool = llm.executor.block_count * llm.executor.block_size * kv_pool_bytes_per_token(config, llm.kv_dtype)
    return "\n".join(
        [
            f"{file.path.name}: {_count(parameter_count(config))} parameters in {formats}, on {llm.executor.name}",
            f"context {llm.context} tokens; memory {_size(weight_bytes(file))} of weights, {_size(pool)} of KV cache",
            _sparsity(llm),
            "/help for help, Ctrl-D to leave",
        ]
    )


def _sparsity(llm: LLM) -> str:
    """The predictor, and how sparse and how much faster it makes a token."""
    from svdengine.files.advising_executor import AdvisingExecutor
    from svdengine.files.predictor_file import why_not_sparse
    from svdengine.kernels.predictor import predictor_bytes
    from svdengine.measuring.decode_rates import decode_rates
    from svdengine.measuring.predictor_table import predictor_report

    if llm.predictor is None:
        if llm.config.sparse_ffn:
            return "no predictor: all FFN neurons are computed; `svdengine calibrate` makes one"
        return f"dense: {why_not_sparse(llm.config)}"
    if llm.predictor.scores_nothing:
        return "no predictor pays for these experts: only neurons that are exactly zero are skipped; `inspect` says why"
    kind = f"predictor {predictor_report(llm.predictor)['kind']}, {_size(predictor_bytes(llm.predictor))}"
    if llm.ffn in ("dense", "exact"):
        return f"{kind}, not used with --ffn {llm.ffn}"
    if isinstance(llm.executor, AdvisingExecutor):  # a dense token would read all weights from storage
        return kind
    rates = decode_rates(llm, [("dense", 0.0), (llm.ffn, 0.0)])
    if rates is None:
        return kind
    llm.executor.reset_neuron_counts()  # what the conversation takes is counted from here on
    dense, now = rates
    shares = share_text(now.predicted_density, now.active_density)
    if not shares:
        return f"{kind}: not used, since dense is as fast on this machine"
    return (
        f"{kind}: {shares} for a token\n"
        f"{now.tokens_per_second:.0f} tokens/s, dense {dense.tokens_per_second:.0f}:"
        f" {now.tokens_per_second / dense.tokens_per_second:.2f} times as fast"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
