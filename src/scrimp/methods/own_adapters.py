"""The adapters that peft lacks: what each is, with its source's defaults."""

from __future__ import annotations

from scrimp.methods.adapter_entry import FACTORS, FEW, LOW_RANK, Entry

_T = "scrimp.tuning"
_EVERY = {"targets": ("all-linear",)}
_PAIR = {"rank": 16, "alpha": 32, "dropout": 0.0, **_EVERY}
_SMALL = {**_PAIR, "rank": 8, "alpha": 16}
_CORE = "16 r^2 a matrix that train, 4 r (m + n) that do not"
_LATER = "a small network that runs whenever the model does"
_SPARSE = "20 a number that trains: itself, its place, gradient and moments"

OWN_ENTRIES: tuple[Entry, ...] = (
    Entry(
        "lora-ga", f"{_T}.low_rank.lora_ga:LoraGA", "LoRA whose first step follows full tuning's", LOW_RANK,
        {**_SMALL, "passes": 1}, f"{FACTORS}, and 4 r (m + n) of what is subtracted",
        "Wang et al., NeurIPS 2024, arXiv 2407.05000, as its authors' code",
    ),
    Entry(
        "lora-one", f"{_T}.low_rank.lora_ga:LoraOne", "LoRA that begins one step down the gradient", LOW_RANK,
        {**_SMALL, "passes": 1}, FACTORS, "Zhang et al., ICML 2025, arXiv 2502.01235",
    ),
    Entry(
        "lora-pro", f"{_T}.pairs.methods:LoraPro", "LoRA whose gradients follow full tuning's", LOW_RANK,
        _SMALL, FACTORS, "Wang et al., ICLR 2025, arXiv 2407.18242",
    ),
    Entry(
        "altlora", f"{_T}.pairs.methods:AltLora", "LoRA whose factors learn by turns", LOW_RANK,
        {**_SMALL, "dropout": 0.05}, f"{FACTORS}, less one factor's gradient",
        "Yu et al., 2025, arXiv 2505.12455; with AdamW, which is its AltLoRA+",
    ),
    Entry(
        "lora-fa", f"{_T}.pairs.methods:LoraFA", "LoRA whose A stays as it was drawn", LOW_RANK, _PAIR,
        "16 r m + 4 r n a matrix", "Zhang et al., 2023, arXiv 2308.03303",
    ),
    Entry(
        "lora-plus", f"{_T}.pairs.methods:LoraPlus", "LoRA whose B learns 16 times as fast as A", LOW_RANK,
        {**_PAIR, "ratio": 16.0}, FACTORS, "Hayou et al., ICML 2024, arXiv 2402.12354",
    ),
    Entry(
        "riemannian-lora", f"{_T}.pairs.methods:Riemannian", "LoRA by the metric of its product", LOW_RANK,
        _PAIR, FACTORS, "Zhang and Pilanci, ICML 2024, arXiv 2402.02347",
    ),
    Entry(
        "lora-xs", f"{_T}.low_rank.cores:LoraXS", "a small core between W's singular vectors", FEW,
        {"rank": 64, **_EVERY}, _CORE, "Balazy et al., 2024, arXiv 2405.17604",
        lr_ratio=50.0,
    ),
    Entry(
        "lora-sb", f"{_T}.low_rank.cores:LoraSB", "a small core between the first update's vectors", FEW,
        {"rank": 96, "passes": 1, "variant": "paper", **_EVERY}, _CORE,
        "Ponkshe et al., 2024, arXiv 2411.19557",
        lr_ratio=50.0,
    ),
    Entry(
        "svfit", f"{_T}.low_rank.cores:SVFit", "the leading singular values of W", FEW,
        {"rank": 128, **_EVERY}, "16 r a matrix that train, 4 r (m + n) that do not",
        "Sun et al., 2024, arXiv 2409.05926",
        lr_ratio=50.0,
    ),
    Entry(
        "lamda", f"{_T}.low_rank.lamda:LaMDA", "a small core, beside a factor that freezes", LOW_RANK,
        {"rank": 32, **_EVERY}, "4 r (n + 2 m) + 16 r^2 a matrix, and 12 r m until B is frozen",
        "Azizi et al., Findings of EMNLP 2024, arXiv 2406.12832",
    ),
    Entry(
        "lamda-plus", f"{_T}.low_rank.lamda:LaMDAPlusPlus", "LaMDA with ranks by W's spectra", LOW_RANK,
        {"rank": 32, **_EVERY}, "lamda's at most",
        "Azizi et al., Findings of EMNLP 2024, arXiv 2406.12832",
    ),
    Entry(
        "mos", f"{_T}.low_rank.pooled:MoS", "LoRAs put together from shards that layers share", FEW,
        {"rank": 8, "alpha": 16.0, **_EVERY}, "16 e L (m + n) a kind of L layers, e = 2",
        "Wang et al., ICLR 2025, arXiv 2410.00938",
    ),
    Entry(
        "s2-lora", f"{_T}.low_rank.pooled:S2Lora", "one LoRA for layers of a shape, its ranks weighed", FEW,
        {"rank": 32, "alpha": 32.0, **_EVERY}, "16 (r (m + n) + r L) a shape of L layers",
        "Liu et al., ICASSP 2024, arXiv 2309.11756; details of our own",
        lr_ratio=50.0,
    ),
    Entry(
        "block-lora", f"{_T}.low_rank.pooled:BlockLora", "LoRA over the sum of the input's blocks", LOW_RANK,
        {"rank": 8, "alpha": 16.0, **_EVERY}, "16 r (m + n / 4) a matrix",
        "Zhou et al., 2025, arXiv 2501.16720; details of our own",
    ),
    Entry(
        "flylora", f"{_T}.low_rank.routed:FlyLora", "LoRA whose strongest ranks a token uses", LOW_RANK,
        {"rank": 32, "alpha": 64.0, "variant": "paper", **_EVERY}, "16 r m + 4 r n a matrix",
        "NeurIPS 2025, arXiv 2510.08396",
    ),
    Entry(
        "snell", f"{_T}.sparse.kernel:Snell", "a sparse change from two kernels of low rank",
        "all but the change's largest entries", {"rank": 32, "variant": "released", **_EVERY},
        f"{FACTORS}, and 20 m n for a moment", "Shen et al., NeurIPS 2024, arXiv 2411.01800",
    ),
    Entry(
        "increlora", f"{_T}.low_rank.growing:IncreLora", "LoRA whose ranks grow where it counts", LOW_RANK,
        {"rank": 2, "alpha": 16.0, **_EVERY}, "16 R (m + n + 1) a matrix, R = 8 the largest rank",
        "Zhang et al., 2023, arXiv 2308.12043",
    ),
    Entry(
        "triadapt-lora", f"{_T}.low_rank.growing:TriAdaptLora", "LoRA with a core whose rank grows", LOW_RANK,
        {"rank": 8, "alpha": 16.0, **_EVERY}, "16 (R (m + n) + 2 R^2) a matrix, R = 16 the largest rank",
        "Liang et al., 2025, arXiv 2501.08008; details of our own",
    ),
    Entry(
        "neuroada", f"{_T}.sparse.methods:NeuroAda", "the largest entries of every row", FEW,
        {"per_row": 20, **_EVERY}, _SPARSE, "EMNLP 2025, arXiv 2510.18940",
        lr_ratio=50.0,
    ),
    Entry(
        "shira", f"{_T}.sparse.methods:Shira", "r (m + n) entries of every matrix", FEW,
        {"rank": 32, **_EVERY}, _SPARSE, "Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175",
    ),
    Entry(
        "sft", f"{_T}.sparse.methods:SFT", "a share of all entries, chosen again as it learns", FEW,
        {"density": 0.01, **_EVERY}, "40 a number that trains",
        "Ansell et al., 2024, arXiv 2401.16405",
    ),
    Entry(
        "sft-ma", f"{_T}.sparse.methods:SftMa", "SFT by sums over rows and columns, with SGD", FEW,
        {"density": 0.01, **_EVERY}, "12 a number that trains, and 4 (m + n) a matrix",
        "Ansell et al., 2024, arXiv 2401.16405",
        settings={"optimizer.name": "sgd-m", "optimizer.momentum": 0.0},
        lr_ratio=500.0,
    ),
    Entry(
        "peqa", f"{_T}.quantised_tuning:PEQA", "the scales of a base in 4 bits", "weights of 4 bits; all but"
        " their scales", {"bits": 4, **_EVERY}, "m n / 2 of codes, and 21 a scale",
        "Kim et al., NeurIPS 2023, arXiv 2305.14152",
    ),
    Entry(
        "l4q", f"{_T}.quantised_tuning:L4Q", "LoRA through the rounding of what it is merged into",
        "weights of 4 bits", {"rank": 4, "alpha": 8.0, "bits": 4, **_EVERY},
        "16 r (m + n) + 32 m n / 128 a matrix", "Jeon et al., ACL 2025, arXiv 2402.04902",
    ),
    Entry(
        "ssf", f"{_T}.modules.scaling:SSF", "every layer's and norm's output scaled and shifted", FEW, _EVERY,
        "32 a channel", "Lian et al., NeurIPS 2022, arXiv 2210.08823",
        lr_ratio=50.0,
    ),
    Entry(
        "difffit", f"{_T}.modules.scaling:DiffFit", "biases, norms, and scales of attention and MLP", FEW, {},
        "12 a channel of biases and norms, 16 a scale", "Xie et al., ICCV 2023, arXiv 2304.06648",
        lr_ratio=50.0,
    ),
    Entry(
        "series-adapter", f"{_T}.modules.bottleneck:SeriesAdapter", "a small network after every MLP", _LATER,
        {"bottleneck": 256}, "16 (2 d b + d + b) a layer of width d, b = 256",
        "Houlsby et al., ICML 2019, arXiv 1902.00751; as LLM-Adapters, EMNLP 2023, arXiv 2304.01933",
    ),
    Entry(
        "parallel-adapter", f"{_T}.modules.bottleneck:ParallelAdapter", "a small network beside every MLP",
        _LATER, {"bottleneck": 256}, "16 (2 d b + d + b) a layer of width d, b = 256",
        "He et al., ICLR 2022, arXiv 2110.04366; as LLM-Adapters, EMNLP 2023, arXiv 2304.01933",
    ),
    Entry(
        "invertible-adapter", f"{_T}.modules.bottleneck:InvertibleAdapter",
        "coupled embeddings, undone at the end, and series adapters", _LATER, {},
        "16 (d^2 / 2 + d / 2 + d), and the series adapters",
        "Pfeiffer et al., EMNLP 2020, arXiv 2005.00052",
    ),
    Entry(
        "dept", f"{_T}.modules.dept:DePT", "a short prompt, and a change of low rank for each position", FEW,
        {"prompt": 40, "rank": 45, "ratio": 60.0}, "16 (l d + r (L + d)) for a width d and sequences of L",
        "Shi and Lipani, ICLR 2024, arXiv 2309.05173",
        lr_ratio=50.0,
    ),
)  # fmt: skip
