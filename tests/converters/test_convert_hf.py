"""Conversion of Hugging Face folders: the tensors arrive, and what cannot be converted is explained."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_zoo import random_weights, relative_error
from safetensors.numpy import save_file
from small_checkpoints import CONFIG, HF_CONFIG, TEMPLATE, checkpoint_weights, hf_tensors, tokenizer_json, write_hf

import svdengine
from svdengine.converters import convert
from svdengine.converters.conversion import open_checkpoint
from svdengine.errors import ConversionError, ModelFileError
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.kernels.formats import dequantize


def converted(source: Path, dtype: Any = "f32", activation: str | None = None) -> ModelFile:
    output = source.parent / f"{source.name}-{dtype}.svdp"
    convert(source, output, dtype, activation)
    return read_model_file(output)


def assert_weights(file: ModelFile, weights: dict[str, Any]) -> None:
    for name, w in weights.items():
        np.testing.assert_array_equal(file.arrays[name][..., : w.shape[-1]], w, err_msg=name)


INDEX = "model.safetensors.index.json"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def test_everything_arrives(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.svdp", "f32", progress=lambda *step: steps.append(step))
    file = read_model_file(tmp_path / "m.svdp")
    assert file.config == CONFIG
    assert_weights(file, checkpoint_weights())
    info = file.tokenizer_info
    assert (info.kind, info.bos_id, info.eos_id, info.eos_token_ids, info.add_bos) == (
        "tokenizer.json",
        1,
        2,
        (2, 0),
        0,
    )
    assert info.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert file.tokenizer_bytes.decode() == tokenizer_json()
    assert file.chat_template == TEMPLATE
    assert file.generation == {"temperature": 0.6}
    provenance = json.loads(file.metadata["provenance"])
    assert provenance["source"] == "hf"
    assert {f["name"] for f in provenance["files"]} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert str(tmp_path) not in file.metadata["provenance"]
    done, totals = zip(*steps, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {file.size_bytes}


def test_a_model_saved_by_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = {k: v for k, v in HF_CONFIG.items() if k not in ("architectures", "model_type")}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    files = {}
    for name, dtype, size in (("f32", torch.float32, "1GB"), ("shards", torch.float32, "100KB"), ("bf16", None, "1GB")):
        write_hf(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        saved = model.to(dtype) if dtype else model.to(torch.bfloat16)
        saved.save_pretrained(tmp_path / name, max_shard_size=size)
        files[name] = converted(tmp_path / name)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert files["f32"].config == files["shards"].config == files["bf16"].config == CONFIG
    for name, array in files["f32"].arrays.items():
        np.testing.assert_array_equal(array, files["shards"].arrays[name], err_msg=name)
        rounded = torch.from_numpy(array.copy()).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(rounded, files["bf16"].arrays[name], err_msg=name)
    down = model.model.layers[1].mlp.down_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(files["bf16"].arrays["down_T"][1, :, : CONFIG.hidden_size], down.T)


def test_f16_and_f64_weights(tmp_path: Path) -> None:
    for dtype in (np.float16, np.float64):
        tensors = {name: w.astype(dtype) for name, w in hf_tensors(checkpoint_weights()).items()}
        assert_weights(converted(write_hf(tmp_path / np.dtype(dtype).name, tensors)), checkpoint_weights())


def test_padded_embedding_rows(tmp_path: Path) -> None:
    padded = replace(CONFIG, vocab_size=320)
    file = converted(write_hf(tmp_path / "hf", hf_tensors(random_weights(padded))))
    assert file.config == padded


def test_activation_can_be_named(tmp_path: Path) -> None:
    file = converted(write_hf(tmp_path / "hf", hidden_act="silu"), activation="fatrelu")
    assert (file.config.activation, file.config.activation_threshold) == ("fatrelu", 0.01)
    assert "down_T" in file.arrays
    assert "down" in converted(write_hf(tmp_path / "silu", hidden_act="silu")).arrays


def test_conversion_is_reproducible(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    for name in ("a", "b"):
        convert(tmp_path / "hf", tmp_path / name, "q4")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def shards(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    tensors = hf_tensors(checkpoint_weights())
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in halves.items() for name in members}
    change(weight_map)
    edit(folder / INDEX, weight_map=weight_map)
    (folder / "model.safetensors").unlink(missing_ok=True)


def replaced(**changes: Any) -> dict[str, Any]:
    tensors = hf_tensors(checkpoint_weights())
    for name, value in changes.items():
        key = {"up": "model.layers.1.mlp.up_proj.weight", "norm": "model.norm.weight", "embedding": "embed"}[name]
        tensors[key] = value(tensors[key])
    return tensors


def resaved(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: save_file(replaced(**changes), folder / "model.safetensors")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def dropped(folder: Path) -> None:
    tensors = hf_tensors(checkpoint_weights())
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def nan(w: Any) -> Any:
    w[0] = np.nan
    return w


UP = "model.layers.1.mlp.up_proj.weight"
FAILURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (lambda f: edit(f / "config.json", architectures=["BertModel"], model_type="bert"), "BertModel"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}), "'gptq'"),
    "activation": (lambda f: edit(f / "config.json", hidden_act="swish9"), "swish9"),
    "config": (lambda f: (f / "config.json").write_text("{"), r"config.json: not valid JSON"),
    "no config": (without("config.json"), "config.json"),
    "no weights": (without("model.safetensors"), "found no weights"),
    "no pickle": (only_pickle, "pytorch_model.bin: not a file that torch.save writes"),
    "missing": (dropped, "model.layers.2.self_attn.o_proj.weight"),
    "shape": (resaved(up=lambda w: w[:-1]), rf"{UP}.*found .*\(149, 90\), expected .*\(150, 90\)"),
    "vector": (resaved(norm=lambda w: w[:-1]), "model.norm.weight.*expected"),
    "dtype": (resaved(up=lambda w: w.astype(np.int8)), rf"{UP}.*found I8"),
    "nan": (resaved(up=nan), f"{UP}.*NaN"),
    "nan norm": (resaved(norm=nan), "model.norm.weight.*NaN"),
    "truncated": (truncated, "truncated"),
    "layers": (lambda f: edit(f / "config.json", num_hidden_layers=4), "model.layers.3"),
    "shard": (lambda f: shards(f, lambda m: m.update({UP: "c.safetensors"})), "'c.safetensors', which is missing"),
    "shard name": (lambda f: shards(f, lambda m: m.update({UP: "../c"})), "not the name of a file"),
    "not in shard": (lambda f: shards(f, lambda m: m.update({"x": "a.safetensors"})), "lacks the tensor 'x'"),
    "index": (lambda f: (f / "model.safetensors").rename(f / INDEX).write_text("{}"), "weight_map"),
    "tokenizer": (without("tokenizer.json"), "found neither tokenizer.json nor"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    "vocabulary": (lambda f: save_file(hf_tensors(random_weights(SMALL)), f / "model.safetensors"), "ids up to 263"),
}
SMALL = replace(CONFIG, vocab_size=200)


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_converted(tmp_path: Path, failure: str) -> None:
    folder = write_hf(tmp_path / "hf")
    break_it, message = FAILURES[failure]
    break_it(folder)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(folder, tmp_path / "m.svdp", "q8")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("embedding", "expected"), [(None, "q8"), ("q4", "q4"), ("f16", "f16")])
def test_embeddings_can_have_a_format_of_their_own(tmp_path: Path, embedding: Any, expected: str) -> None:
    output = tmp_path / "m.svdp"
    convert(write_hf(tmp_path / "hf"), output, "q4", embedding_dtype=embedding)
    with svdengine.load(output, device="cpu", context=64) as cpu, svdengine.load(output, device="reference") as exact:
        formats = cpu.model_file.formats
        assert formats["embedding"] == expected and formats["up"] == "q4"
        ours, theirs = cpu.logits([1, 2, 3]), exact.logits([1, 2, 3])
    assert relative_error(ours, theirs) < 0.02  # activations have 8 bits


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_down_can_have_a_format_of_its_own(tmp_path: Path, activation: str) -> None:
    source, output = write_hf(tmp_path / "hf", hidden_act=activation), tmp_path / "m.svdp"
    convert(source, output, "q4", down_dtype="q8")
    with svdengine.load(output, device="cpu", context=64) as cpu, svdengine.load(output, device="reference") as exact:
        formats = cpu.model_file.formats
        assert formats["down_T" if activation == "relu" else "down"] == "q8" and formats["up"] == "q4"
        ours, theirs = cpu.logits([1, 2, 3]), exact.logits([1, 2, 3])
    assert relative_error(ours, theirs) < 0.02  # activations have 8 bits


def with_tensors(folder: Path, **tensors: Any) -> Path:
    return write_hf(folder, {**hf_tensors(checkpoint_weights()), **tensors})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.mlp.up_proj.bias",
        "model.layers.0.self_attn.sinks",
        "model.layers.2.self_attn.q_norm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.norm.bias",
    ],
)
def test_tensors_that_nothing_is_made_of_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = with_tensors(tmp_path / "hf", **{name: np.ones(90, np.float32)})
    with pytest.raises(ConversionError, match=re.escape(repr(name))):
        converted(folder)


def test_tensors_without_effect_are_taken(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.position_ids")
    converted(with_tensors(tmp_path / "hf", **{name: np.ones(5, np.float32) for name in names}))


def test_an_output_projection_beside_a_tied_embedding(tmp_path: Path) -> None:
    """As transformers: a copy of the embedding is that, another matrix is the output projection."""
    weights = hf_tensors(checkpoint_weights())
    other = converted(write_hf(tmp_path / "other", weights, tie_word_embeddings=True))
    assert not other.config.tied_embeddings
    assert_weights(other, checkpoint_weights())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    assert converted(write_hf(tmp_path / "copy", weights, tie_word_embeddings=True)).config.tied_embeddings


def test_a_setting_that_is_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"hf: settings .*'logit_scale' \(0\.5\)"):
        converted(write_hf(tmp_path / "hf", logit_scale=0.5))


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    other = hf_tensors({name: w + 1 for name, w in checkpoint_weights().items()})
    save_file(other, folder / "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(other, "shard.safetensors")}))
    assert_weights(converted(folder), checkpoint_weights())


@pytest.mark.parametrize("name", ["x" * 10_000, "a\0b", "..", ".", "", "a/b", "\ud800"])
def test_names_of_shards_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    folder = write_hf(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ConversionError) as caught:
        converted(folder)
    assert len(str(caught.value)) < 500 + len(str(folder)) and "\n" not in str(caught.value)


def test_a_mark_before_the_text_of_json_files_is_left_out(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for file in (*folder.glob("*.json"), folder / "chat_template.jinja"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    file = converted(folder)
    assert (file.tokenizer_bytes.decode(), file.chat_template) == (tokenizer_json(), TEMPLATE)


DIGITS = "9" * 400


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings"])
@pytest.mark.parametrize("value", [DIGITS, "9" * 5000, "-" + DIGITS, str(1 << 63), "1e999", "NaN", "-Infinity"])
def test_numbers_that_are_too_large(tmp_path: Path, key: str, value: str) -> None:
    folder = write_hf(tmp_path / "hf", **{key: "MARK"})
    text = (folder / "config.json").read_text().replace('"MARK"', value)
    (folder / "config.json").write_text(text)
    if (key, value) == ("rope_theta", str(1 << 63)):
        converted(folder)  # a large one, but one that can be
    else:
        with pytest.raises(ConversionError, match=key.split("_")[-1]):
            converted(folder)


def test_numbers_that_are_too_large_elsewhere(tmp_path: Path) -> None:
    """In a tokenizer_config.json they are common: a model_max_length of 10^30 is what transformers writes."""
    folder = write_hf(tmp_path / "hf")
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    edit(folder / "generation_config.json", top_k=10**400, temperature=float("nan"), top_p=0.5, min_p=10**18)
    assert converted(folder).generation == {"top_p": 0.5, "min_p": 10**18}


def test_wrong_calls(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    with pytest.raises(ConversionError, match="no such file"):
        convert(tmp_path / "none", tmp_path / "m.svdp")
    with pytest.raises(ConversionError, match="give the folder"):
        convert(folder / "model.safetensors", tmp_path / "m.svdp")
    with pytest.raises(ConversionError, match="unknown dtype"):
        convert(folder, tmp_path / "m.svdp", "q2")  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="unknown dtype 'q2'"):
        convert(folder, tmp_path / "m.svdp", "q4", embedding_dtype="q2")  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="would replace the checkpoint"):
        convert(folder, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="swish9"):
        convert(folder, tmp_path / "m.svdp", activation="swish9")
    with pytest.raises(ModelFileError, match="No such file"):
        convert(folder, tmp_path / "none" / "m.svdp")


def test_f16_overflow_is_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", replaced(up=lambda w: w * np.float32(1e6)))
    with pytest.raises(ConversionError, match="too large for f16"):
        convert(folder, tmp_path / "m.svdp", "f16")
    converted(folder, "bf16")


def test_tokenizer_settings(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    content = json.loads(tokenizer_json())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    content["added_tokens"].append({"id": CONFIG.vocab_size, "content": "<pad>", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    file = converted(folder)
    assert file.tokenizer_info.add_bos  # what the post-processor does, where nothing is said
    stored = json.loads(file.tokenizer_bytes)
    assert stored["truncation"] is None
    assert "<pad>" not in file.tokenizer_bytes.decode()  # the model has no row for it
    edit(folder / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    info = converted(folder).tokenizer_info
    assert (info.add_bos, info.add_eos) == (True, False)  # tokenizer.json decides, as in transformers


def test_chat_templates(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert converted(folder).chat_template == "d"
    edit(folder / "chat_template.json", chat_template="from json")
    assert converted(folder).chat_template == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert converted(folder).chat_template == "from jinja"


def test_tokenizer_model(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    lines = ["some text to learn from", "and a little more of it"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=50, minloglevel=2
    )
    folder = write_hf(tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    edit(folder / "added_tokens.json", **{"<|user|>": 60, "<tool>": 61, "<pad>": CONFIG.vocab_size})
    file = converted(folder)
    assert file.tokenizer_info.added_tokens == {"<tool>": 61}
    info = file.tokenizer_info
    assert (info.kind, info.bos_id, info.eos_id, info.add_bos) == ("tokenizer.model", 1, 2, True)
    assert info.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|user|>": 60}
    assert file.tokenizer_bytes == model.getvalue()
    (folder / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(ConversionError, match=r"tokenizer\.model cannot be read"):
        converted(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        *((file, {key: junk}) for file in ("tokenizer_config.json", "special_tokens_map.json") for key in (
            "bos_token", "eos_token", "pad_token", "added_tokens_decoder", "additional_special_tokens",
            "tokenizer_class", "chat_template", "add_bos_token", "model_max_length",
        ) for junk in (["<s>"], [["<s>"]], {"content": ["<s>"]}, {"1": {"content": ["<s>"]}}, {"1": "x"}, {"x": {}},
                       {"9" * 400: {}}, 10**400, True, [{"name": ["default"], "template": 3}], [None])),
        *((file, {"x": junk}) for file in ("added_tokens.json", "generation_config.json") for junk in ([5], {}, True)),
        *(("config.json", {key: junk}) for key in ("bos_token_id", "eos_token_id", "model_type", "architectures")
          for junk in ([1, 2], [[1]], {"x": 1}, 10**400, True, "x")),
        *(("generation_config.json", {key: junk}) for key in ("bos_token_id", "eos_token_id", "temperature", "top_k")
          for junk in ([1, 2], [[1]], {"x": 1}, 10**400, True, "x")),
    ],
)  # fmt: skip
def test_junk_beside_the_weights_is_an_error_or_nothing(tmp_path: Path, file: str, changes: dict[str, Any]) -> None:
    folder = write_hf(tmp_path / "hf")
    edit(folder / file, **changes)
    try:
        open_checkpoint(folder)
    except ConversionError as error:
        assert "\n" not in str(error) and len(str(error)) < 600 + len(str(folder))


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = write_hf(tmp_path / "hf")
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    lines = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_bos_token=True)
    file = converted(folder)
    tokenizer = Tokenizer.from_str(file.tokenizer_bytes.decode())
    assert tokenizer.encode("hello w</s>").tokens == ["hello", "\u0120w", "</s>"]
    assert file.tokenizer_info.add_bos
    edit(folder / "tokenizer_config.json", tokenizer_class="OtherTokenizer")
    with pytest.raises(ConversionError, match="OtherTokenizer"):
        converted(folder)


MEMORY = """
import resource, sys
from pathlib import Path
from svdengine.converters import convert, conversion
conversion.open_checkpoint(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    config = replace(CONFIG, hidden_size=360, head_count=9, kv_head_count=9, head_dim=40, ffn_size=1440, layer_count=24)
    weights = {name: np.zeros(w.shape, np.float32) for name, w in random_weights(config).items()}
    sizes = {"hidden_size": 360, "intermediate_size": 1440, "num_hidden_layers": 24, "num_key_value_heads": 9}
    folder = write_hf(tmp_path / "hf", hf_tensors(weights, config), head_dim=40, **sizes)
    assert (folder / "model.safetensors").stat().st_size > 190e6
    for dtype in ("q8", "f32"):
        command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "m.svdp"), dtype]
        grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert grown < 40_000, f"{dtype}: {grown} KiB"  # the largest tensor takes 2 MB
    shutil.rmtree(tmp_path)  # pytest would keep these 400 MB for three runs


def test_bitnet_arrives_in_two_bits_from_master_weights_and_from_packed_ones(tmp_path: Path) -> None:
    config = replace(CONFIG, family="bitnet", activation="relu2", sub_norms=True, norm_eps=1e-5, ffn_size=160)
    weights = {
        name: np.sign(w) * (np.abs(w) > 0.05) * np.float32(0.75)
        if name in ("q", "k", "v", "o", "gate", "up", "down_T")
        else w
        for name, w in checkpoint_weights(config).items()
    }
    names = hf_tensors(weights, replace(config, sub_norms=False))
    for layer in range(config.layer_count):
        names[f"model.layers.{layer}.self_attn.attn_sub_norm.weight"] = weights["attention_sub_norm.weight"][layer]
        names[f"model.layers.{layer}.mlp.ffn_sub_norm.weight"] = weights["ffn_sub_norm.weight"][layer]
    settings = {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2"}
    settings |= {"intermediate_size": 160, "hidden_size": config.hidden_size, "rms_norm_eps": 1e-5}
    write_hf(tmp_path / "whole", names, **settings)
    packed = {}
    for name, w in names.items():
        if "_proj" not in name or len(w) % 4:
            packed[name] = w
            continue
        quarters = (np.sign(w) + 1).astype(np.uint8).reshape(4, len(w) // 4, -1)
        packed[name] = np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None, None], axis=0)
        packed[f"{name}_scale"] = np.array([0.75], np.float32)
    assert any(w.dtype == np.uint8 for w in packed.values())
    packing = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    write_hf(tmp_path / "packed", packed, **settings, quantization_config=packing)
    for folder in ("whole", "packed"):
        file = converted(tmp_path / folder, "ternary")
        assert file.config == config
        assert (file.formats["up"], file.formats["down_T"], file.formats["embedding"]) == ("ternary", "ternary", "q8")
        for name in ("q", "o", "gate", "down_T"):
            parts = {part: file.arrays[name + part][1] for part in ("", ".scale", ".min", ".row")}
            np.testing.assert_array_equal(dequantize(parts, "ternary", weights[name].shape[-1]), weights[name][1])
    write_hf(tmp_path / "llama")
    with pytest.raises(ConversionError, match=r"ternary is for models that were trained .* found a llama model"):
        converted(tmp_path / "llama", "ternary")
