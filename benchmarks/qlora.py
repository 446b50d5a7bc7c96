"""What 4-bit storage costs SmolLM2-135M: bits, bytes and held-out loss, beside bitsandbytes' and bf16.

    python benchmarks/qlora.py --model SmolLM2-135M.gguf [--data TEXT]

The linear layers of the decoder are stored as NF4 with double quantisation, by us and by bitsandbytes, which
decodes its own; as our int8; and as they were, in bf16. The loss is taken on the same rows of a text, on
Python's own language reference where none is given. bitsandbytes decodes rightly here, since every row of
this model is whole groups of 64. Where the model's file is quantised itself, its weights are decoded first.
"""

from __future__ import annotations

import argparse
import pydoc_data
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import say, start

MOST_BITS = 4.13
MARGIN = 0.005  # nats by which ours may lie above bitsandbytes': what ties of the second level come to


def main() -> None:
    benchmark = start("qlora", __doc__, _options)
    options = benchmark.arguments
    import torch

    torch.set_num_threads(options.threads)
    rows = _rows(options)
    sides: dict[str, Callable[[Any], None]] = {
        "bf16": lambda _: None,
        "nf4": _nf4,
        "nf4_single": _nf4_single,
        "bitsandbytes_nf4": _bitsandbytes,
        "int8": _int8,
    }
    results: dict[str, Any] = {"tokens": rows.numel(), "data": options.data.name, "model": options.model.name}
    for name, change in sides.items():
        model = _load(options.model)
        change(model)
        began = time.perf_counter()
        results[name] = {"loss": _loss(model, rows), "seconds": round(time.perf_counter() - began, 2)}
        results[name] |= _bytes(model)
        say(f"{name}: {results[name]}")
    ours, theirs = results["nf4"], results["bitsandbytes_nf4"]
    benchmark.expect("bits a parameter of the quantised matrices", ours["bits"], below=MOST_BITS)
    benchmark.expect("loss above bitsandbytes'", ours["loss"] - theirs["loss"], below=MARGIN)
    benchmark.write(results)


def _options(parser: argparse.ArgumentParser) -> None:
    reference = Path(pydoc_data.__path__[0]) / "topics.py"
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M: a GGUF file or a folder")
    parser.add_argument("--data", type=Path, default=reference, help="a text; default: Python's reference")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)


def _source(path: Path) -> tuple[Path, dict[str, Any]]:
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})


def _load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, which = _source(path)
    if which:
        which["quantization_config"] = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **which).eval()


def _rows(options: argparse.Namespace) -> Any:
    """Return the beginning of the text as (rows, seq) tokens."""
    from transformers import AutoTokenizer

    folder, which = _source(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, **which)
    text = options.data.read_text(encoding="utf-8")[: 16 * options.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    wanted = options.tokens // options.seq * options.seq
    if len(ids) < wanted:
        raise SystemExit(f"{options.data} has {len(ids)} tokens, and {wanted} are wanted: lower --tokens")
    return ids[:wanted].view(-1, options.seq)


def _loss(model: Any, rows: Any) -> float:
    """Return the mean cross-entropy of every next token within the rows, in nats."""
    import torch
    import torch.nn.functional as F

    nats = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for row in rows.split(2):
            logits = model(input_ids=row).logits[:, :-1].float()
            nats += F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum")
    return (nats / rows[:, 1:].numel()).item()


def _bytes(model: Any) -> dict[str, Any]:
    """Return the bytes of a whole model, and the bits a parameter of what is coded in it."""
    linears = {name: m for name, m in model.named_modules() if hasattr(m, "plain")}
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    found: dict[str, Any] = {"bytes": sum(tensor.nbytes for tensor in tensors.values())}
    if linears:
        stored = [part for linear in linears.values() for name, part in linear.state_dict().items()
                  if name.startswith("weight_")]  # fmt: skip
        numel = sum(linear.weight.shape.numel() for linear in linears.values())
        found |= {"coded": numel, "bits": 8 * sum(part.nbytes for part in stored) / numel}
    return found


def _nf4(model: Any) -> None:
    from scrimp.weights.nf4 import nf4

    nf4().apply(model)


def _nf4_single(model: Any) -> None:
    from scrimp.weights.nf4 import nf4

    nf4(double=False).apply(model)


def _int8(model: Any) -> None:
    from scrimp.weights.int8 import int8

    int8().apply(model)


def _bitsandbytes(model: Any) -> None:
    """Replace every matrix that we would code by what bitsandbytes decodes of its own codes."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    coded = quantize_4bit(module.weight, compress_statistics=True, quant_type="nf4")
                    module.weight.copy_(dequantize_4bit(*coded))


if __name__ == "__main__":
    main()
