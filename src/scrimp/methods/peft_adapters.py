"""The adapters that peft has: what each is, with its source's defaults."""

from __future__ import annotations

from typing import Any

from scrimp.methods.adapter_entry import FACTORS, FEW, LOW_RANK, Entry

_LORA: dict[str, Any] = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ("all-linear",)}
_MOVED = {**_LORA, "alpha": 16}  # what begins large needs no larger scale

_L, _P = "scrimp.tuning.from_peft.lora", "scrimp.tuning.from_peft.others"
_A = "scrimp.tuning.from_peft.adalora"
PEFT_ENTRIES: tuple[Entry, ...] = (
    Entry(
        "lora", f"{_L}:LoRA", "two factors a matrix, whose product is added", LOW_RANK, _LORA,
        FACTORS, "Hu et al., ICLR 2022, arXiv 2106.09685; peft",
    ),
    Entry(
        "rslora", f"{_L}:RsLoRA", "LoRA scaled by the root of its rank", LOW_RANK, _LORA,
        FACTORS, "Kalajdzievski, 2023, arXiv 2312.03732; peft",
    ),
    Entry(
        "dora", f"{_L}:DoRA", "LoRA for the direction of each row, and its length apart", LOW_RANK, _LORA,
        "16 (r (m + n) + m) a matrix", "Liu et al., ICML 2024, arXiv 2402.09353; factored norm: arXiv "
        "2603.22276; peft's layers",
    ),
    Entry(
        "pissa", f"{_L}:PiSSA", "LoRA that begins with W's principal directions", LOW_RANK, _MOVED,
        FACTORS, "Meng et al., NeurIPS 2024, arXiv 2404.02948; peft",
    ),
    Entry(
        "olora", f"{_L}:OLoRA", "LoRA that begins with W's QR decomposition", LOW_RANK, _MOVED,
        FACTORS, "Buyukakyuz, 2024, arXiv 2406.01775; peft",
    ),
    Entry(
        "eva", f"{_L}:EVA", "LoRA that begins with the principal directions of the inputs", LOW_RANK,
        {**_MOVED, "passes": 4}, FACTORS, "Paischer et al., 2024, arXiv 2410.07170; peft",
    ),
    Entry(
        "corda", f"{_L}:CorDA", "LoRA that begins with the directions of W that the text uses", LOW_RANK,
        {**_MOVED, "passes": 4}, FACTORS, "Yang et al., NeurIPS 2024, arXiv 2406.05223; peft",
    ),
    Entry(
        "adalora", f"{_A}:AdaLoRA", "LoRA whose rank moves to where it counts", LOW_RANK,
        {**_LORA, "rank": 8}, "24 r (m + n + 1) a matrix: half as much rank again at the start",
        "Zhang et al., ICLR 2023, arXiv 2303.10512; peft",
    ),
    Entry(
        "vera", f"{_P}:VeRA", "two vectors a matrix around random factors that all share", FEW,
        {"rank": 256, "dropout": 0.0, "targets": ("all-linear",)},
        "16 (r + m) a matrix, and 4 r (max m + max n) once",
        "Kopiczko et al., ICLR 2024, arXiv 2310.11454; peft",
        lr_ratio=50.0,
    ),
    Entry(
        "randlora", f"{_P}:RandLoRA", "a sum of random bases with trained diagonals", FEW,
        {**_LORA, "rank": 32, "alpha": 640}, "16 (n + r) min(m, n) / r a matrix, and the bases once",
        "Albert et al., ICLR 2025, arXiv 2502.00987; peft",
        lr_ratio=50.0,
    ),
    Entry(
        "miss", f"{_P}:MiSS", "one shard a matrix, shared by groups of its columns", LOW_RANK,
        {"rank": 64, "dropout": 0.0, "targets": ("all-linear",)}, "16 r m a matrix",
        "Kang and Yin, 2024, arXiv 2409.15371; peft",
    ),
    Entry(
        "ia3", f"{_P}:IA3", "factors of keys, values and the MLP's inner activations", FEW, {},
        "16 a channel", "Liu et al., NeurIPS 2022, arXiv 2205.05638; peft",
        lr_ratio=50.0,
    ),
    Entry(
        "layernorm", f"{_P}:LayerNormTuning", "the norms alone", FEW, {}, "12 a number of the norms",
        "Zhao et al., ICLR 2024, arXiv 2312.11420; peft",
        lr_ratio=50.0,
    ),
    Entry(
        "bias", f"{_P}:BiasTuning", "a bias on every linear layer", FEW, {"targets": ("all-linear",)},
        "16 m a matrix", "Ben Zaken et al., ACL 2022, arXiv 2106.10199; peft's BEFT",
        lr_ratio=50.0,
    ),
    Entry(
        "prompt", f"{_P}:PromptTuning", "vectors before the text", FEW, {"prompt": 20},
        "16 times the model's width a vector", "Lester et al., EMNLP 2021, arXiv 2104.08691; peft",
        lr_ratio=500.0, wraps=True,
    ),
    Entry(
        "prefix", f"{_P}:PrefixTuning", "keys and values before the text, in every layer", FEW,
        {"prompt": 20}, "32 times the width of keys, a layer and vector",
        "Li and Liang, ACL 2021, arXiv 2101.00190; peft", lr_ratio=500.0, wraps=True,
    ),
    Entry(
        "p-tuning", f"{_P}:PTuning", "vectors before the text, made by a small network", FEW,
        {"prompt": 20}, "16 a number of the vectors and their network",
        "Liu et al., 2021, arXiv 2103.10385; peft", lr_ratio=50.0, wraps=True,
    ),
    Entry(
        "llama-adapter", f"{_P}:LlamaAdapter", "gated prompts within the attention", FEW, {"prompt": 10},
        "16 times the model's width, a layer and vector", "Zhang et al., ICLR 2024, arXiv 2303.16199; peft",
        lr_ratio=50.0,
    ),
)  # fmt: skip
