"""Turn a SwiGLU checkpoint into a ReGLU one, whose FFN neurons are mostly zero, by self-distillation.

    python -m svdengine.tools.relufy SmolLM2-135M-Instruct -o relu-smollm2 --text manual.txt --budget 1h
    svdengine convert relu-smollm2 -o relu.svdp && svdengine calibrate relu.svdp && svdengine chat relu.svdp

Stage 1 trains the FFN of each layer in turn towards the original's hidden state after that layer, while a threshold for
each neuron (fatrelu) rises until as many gates are zero as is asked for; stage 2 trains all of them towards the
original's next-token distribution. With --activation relu it is stage 2 that makes gates zero, by a penalty on active
ones. Attention and embeddings stay as they are unless --train says otherwise.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from svdengine.errors import SvdEngineError
from svdengine.tools.relufy.settings import ACTIVATIONS, ROUNDED, TRAINED, Settings

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """A time such as 90s, 20m, 1h or 1h30m."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smh])+", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a time such as 90s, 20m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smh])", text))


def parse(arguments: Sequence[str] | None) -> Settings:
    """The settings of a command line."""
    default = Settings(Path(), Path())
    parser = argparse.ArgumentParser(
        prog="svdengine.tools.relufy", description="Turn a SwiGLU checkpoint into a ReGLU one by self-distillation."
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="Hugging Face folder or GGUF file")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="Hugging Face folder to write")
    add(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="UTF-8 text, or chats (.jsonl); repeatable",
    )
    add("--sample", type=int, metavar="N", help="tokens that the model writes itself (default: none with --text)")
    add("--budget", type=seconds, default=default.seconds, metavar="TIME", help="such as 20m or 2h (default: 1h)")
    add("--sparsity", type=float, default=default.sparsity, help="share of gates to be zero (default: %(default)s)")
    add(
        "--student",
        type=Path,
        metavar="FOLDER",
        help="output of an earlier run to go on from, in place of SRC's own FFNs and stage 1",
    )
    add(
        "--activation",
        choices=ACTIVATIONS,
        default=default.activation,
        help="fatrelu is sparse sooner and closer to the original; relu is more widely known (default: %(default)s)",
    )
    add("--train", choices=TRAINED, default=default.train, help="what stage 2 trains (default: %(default)s)")
    add(
        "--dtype",
        choices=ROUNDED,
        help="train the later half, or with --student all, with weights rounded as `convert --dtype` will store them",
    )
    add("--embedding-dtype", choices=ROUNDED, help="the same for embedding and output projection")
    add(
        "--down-dtype",
        choices=("q8",),
        help="where `convert --down-dtype` will store `down` so: it is not rounded then",
    )
    add("--window", type=int, default=default.window, help="tokens of a window of text (default: %(default)s)")
    add("--rows", type=int, help="windows of a step (default: 8, on a GPU 64)")
    add("--layer-tokens", type=int, metavar="N", help="tokens of stage 1 (default: what fits the budget)")
    add("--layer-epochs", type=int, default=default.layer_epochs, help="(default: %(default)s)")
    add("--layer-rate", type=float, default=default.layer_rate, help="learning rate (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="steps of stage 2 (default: what fits the budget)")
    add("--rate", type=float, default=default.rate, help="learning rate of stage 2 (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--threads", type=int, help="CPU threads; by default one a core")
    add("--seed", type=int, default=default.seed, help="(default: %(default)s)")
    o = parser.parse_args(arguments)
    if not 0 < o.sparsity < 1 or o.budget <= 0 or not min(o.rate, o.layer_rate) > 0:
        parser.error("--sparsity must lie between 0 and 1, --budget and the rates above 0")
    counts = (o.rows, o.layer_tokens, o.layer_epochs, o.steps, o.threads)
    if o.window < 2 or any(n is not None and n < 1 for n in counts) or (o.sample or 0) < 0 or o.seed < 0:
        parser.error("counts must be above 0, and a window has at least 2 tokens")
    if (o.embedding_dtype or o.down_dtype) and not o.dtype:
        parser.error("--embedding-dtype and --down-dtype go with --dtype")
    device = _device(o.device, o.threads)
    return Settings(
        source=o.source,
        output=o.output,
        student=o.student,
        text=tuple(o.text),
        sampled_tokens=o.sample,
        seconds=o.budget,
        sparsity=o.sparsity,
        activation=o.activation,
        window=o.window,
        rows=o.rows or (64 if device == "cuda" else default.rows),
        layer_tokens=o.layer_tokens,
        layer_epochs=o.layer_epochs,
        layer_rate=o.layer_rate,
        steps=o.steps,
        rate=o.rate,
        train=o.train,
        dtype=o.dtype,
        embedding_dtype=o.embedding_dtype,
        down_dtype=o.down_dtype,
        device=device,
        seed=o.seed,
    )


def _device(name: str, threads: int | None) -> str:
    """The device to train on. Raises SvdEngineError when torch or the GPU is missing."""
    if importlib.util.find_spec("torch") is None:
        raise SvdEngineError('ReLU-fication needs PyTorch; run: pip install "svdengine[relufy]"')
    import torch
    from numba import get_num_threads, set_num_threads

    if threads is not None:
        torch.set_num_threads(threads)
        set_num_threads(min(threads, get_num_threads()))  # at most those that it began with
    if name == "cuda" and not torch.cuda.is_available():
        raise SvdEngineError("PyTorch finds no GPU; use --device cpu, or install a build of it with CUDA")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def _keep_memory() -> None:
    """Let glibc keep what is freed: a step frees and takes gigabytes, and fresh pages cost a quarter of its time."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exit codes: 0 done, 1 an error that was explained, 130 interrupted and saved."""
    try:
        settings = parse(arguments)
        from svdengine.tools.relufy.run import Interrupted, Run
        from svdengine.tools.relufy.status_line import StatusLine

        try:
            Run(settings, StatusLine(sys.stderr)).run()
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(130)
        print(f"written to {settings.output}", file=sys.stderr)
    except (SvdEngineError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _keep_memory()  # of the whole process, so not where main() is called by another program
    main()
