"""Compare predictors of a sparse model on a text that they were not calibrated on.

    svdengine calibrate relu.svdp --predictor svd --text a.txt -o svd.safetensors
    svdengine calibrate relu.svdp --predictor lowbit --text a.txt -o lowbit.safetensors
    python docs/examples/compare_predictors.py relu.svdp other.txt svd.safetensors lowbit.safetensors

Without predictor files, the model's own is measured. The demo model is no ReLU model and has none.
"""

import sys
from pathlib import Path

import svdengine
from svdengine.commands.demo_model import demo_model
from svdengine.measuring.evaluation import compare_paths

TEXT = "A text that no calibration saw. " * 40
HEAD = ("predictor", "perplexity", "same token", "predicted", "computed", "MB/token")


def measure(model: Path, predictor: Path | None, text: str) -> tuple[str, ...]:
    """One row: what sparse execution with this predictor costs against dense, and what it reads."""
    with svdengine.load(model, ffn="sparse", predictor=predictor) as llm:
        found = compare_paths(llm, text, window=min(256, llm.context))
    sparse = found.sparse[0]
    return (
        predictor.name if predictor else "the model's own",
        f"{100 * (sparse.score.perplexity / found.dense.perplexity - 1):+.2f} %",
        f"{100 * sparse.agreement:.1f} %",
        f"{100 * sparse.predicted_density:.1f} %",
        f"{100 * sparse.active_density:.1f} %",
        f"{sparse.bytes_per_token / 1e6:.2f}",
    )


def main() -> None:
    """Print a table with a row for each predictor."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model(print)
    text = Path(sys.argv[2]).read_text(encoding="utf-8") if len(sys.argv) > 2 else TEXT
    predictors = [Path(name) for name in sys.argv[3:]] or [None]
    try:
        rows = [measure(model, predictor, text) for predictor in predictors]
    except svdengine.SvdEngineError as error:
        sys.exit(f"error: {error}")
    for row in (HEAD, *rows):
        print("| " + " | ".join(f"{cell:<16}" for cell in row) + " |")


if __name__ == "__main__":
    main()
