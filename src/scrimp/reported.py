"""What the papers report, as data: one entry a figure, each with its set-up and its source.

None of these figures is ours, and none may be set against ours without its set-up. What is odd about them:

- The C4 perplexities share one protocol (GaLore's, which the others took over): LLaMA shapes, T5's tokenizer,
  documents cut or padded to 256 tokens, 512 of them a step, bf16 weights and moments. Their perplexity is a
  little too low: the sum over N batches is divided by N + 1. Tokens count the padding.
- `memory` beside such a perplexity is an estimate of weights and optimizer state, never a measurement;
  GaLore's own cannot be derived from its formula. Where memory was measured, it is the value itself.
- A method has a row here where its figure was read in the paper or in its authors' repository. FRUGAL, SPAM,
  Lion, CAME, Muon and others are absent because theirs were not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

PERPLEXITY: Final = "C4 perplexity"
SPEED: Final = "tokens/s"
MEMORY: Final = "measured memory in GB"
PEAK: Final = "peak memory in GB"
LOG: Final = "C4 log-perplexity"
STEP: Final = "optimizer step in s"
COMMONSENSE: Final = "commonsense accuracy"
MMLU: Final = "MMLU accuracy"
GLUE: Final = "GLUE average"
MT_BENCH: Final = "MT-bench score"

# What the protocol feeds each shape, padding included: 131,072 tokens a step.
TOKENS: Final[Mapping[str, str]] = {
    "60M": "1.3B",
    "130M": "2.6B",
    "350M": "7.8B",
    "1B": "13.1B",
    "7B": "19.7B",
}

GALORE: Final = "GaLore, arXiv 2403.03507"
Q_GALORE: Final = "Q-GaLore, arXiv 2407.08296"
FIRA: Final = "Fira, arXiv 2410.01623"
APOLLO: Final = "APOLLO, arXiv 2412.05270"
SLTRAIN: Final = "SLTrain, arXiv 2406.02214"
NATURAL: Final = "Natural GaLore, arXiv 2410.16029"
BADAM: Final = "BAdam, arXiv 2404.02827"
MEZO: Final = "MeZO, arXiv 2305.17333"
SPARSE_MEZO: Final = "Sparse MeZO, arXiv 2402.15751"
ZO2: Final = "ZO2, arXiv 2503.12668"
OWLORE: Final = "OwLore, arXiv 2405.18380, abstract"
LOST: Final = "LOST, arXiv 2508.02668, table 3, as its public reviews quote it"
NEURO_ADA: Final = "NeuroAda, arXiv 2510.18940, its repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """One figure of one paper.

    Attributes:
        method: The method's name in the catalogue.
        model: The model, as the paper sizes or names it.
        metric: What the value is, with its unit.
        value: The figure.
        memory: The memory that stands beside it in the paper, with its unit.
        tokens: The training tokens, padding included.
        device: What it ran on; empty where the paper's table does not say.
        setup: What else one must know to compare it.
        source: Paper, identifier and table.
    """

    method: str
    model: str
    metric: str
    value: float
    memory: str | None = None
    tokens: str | None = None
    device: str = ""
    setup: str = ""
    source: str

    def plain(self) -> dict[str, str | float | None]:
        """Return it as plain data without the method, as a suite's document holds it."""
        return {name: value for name, value in asdict(self).items() if name != "method"}


def reported(method: str) -> tuple[Reported, ...]:
    """Return what the papers report on a method, the main table first; nothing where none was read."""
    return tuple(entry for entry in REPORTED if entry.method == method)


def sentence(method: str) -> str:
    """Return a paper's main table in a few words, or an empty string where none was read."""
    figures = reported(method)
    if not figures:
        return ""
    first = figures[0]
    main = [entry for entry in figures if (entry.metric, entry.source) == (first.metric, first.source)]
    values = ", ".join(f"{entry.value:g} at {entry.model}" for entry in main)
    return f"{first.metric} {values} ({'; '.join(filter(None, [first.setup, first.source]))})"


def _c4(
    method: str, values: tuple[float, ...], memory: str, source: str, setup: str = "bf16 weights and moments"
) -> tuple[Reported, ...]:
    """Return perplexities under the shared protocol, by size from 60M on, each with its estimated memory."""
    amounts: list[str | None] = [*memory.split()] or [None] * len(values)
    return tuple(
        Reported(
            method=method,
            model=model,
            metric=PERPLEXITY,
            value=value,
            memory=amount,
            tokens=TOKENS[model],
            setup=setup,
            source=source,
        )
        for model, value, amount in zip(TOKENS, values, amounts, strict=False)
    )


def _c4_7b(method: str, value: float, memory: str, source: str, setup: str) -> Reported:
    """Return a perplexity at 7B after 150,000 steps; each paper counts its own memory."""
    return Reported(
        method=method,
        model="7B",
        metric=PERPLEXITY,
        value=value,
        memory=memory,
        tokens=TOKENS["7B"],
        setup=setup,
        source=source,
    )


def _row(
    model: str, metric: str, values: Mapping[str, float], source: str, setup: str = "", device: str = ""
) -> tuple[Reported, ...]:
    """Return one figure of each of several methods, from one row of one table."""
    return tuple(
        Reported(
            method=method, model=model, metric=metric, value=value, device=device, setup=setup, source=source
        )
        for method, value in values.items()
    )


_TABLE_2 = f"{GALORE}, table 2"
_TABLE_11 = f"{GALORE}, table 11"
_APOLLO_2 = f"{APOLLO}, table 2"
_APOLLO_7 = f"{APOLLO}, table 7"
_APOLLO_8 = f"{APOLLO}, table 8"
_FIGURE_3 = f"{SLTRAIN}, figure 3"
_RANKS = "rank 128, 256, 256 and 512 by size; bf16 weights and moments"
_BF16 = "bf16 weights and moments"
_INT8 = "int8 weights in groups of 128"
_LAYERWISE = "8-bit moments, updated layer by layer; AdamW: bf16, all at once"
_STEP = "a new projector every 200 steps, spread over them"
_WHOLE = "256 tokens a step, one update for the whole model"
_LOG = "mean of five runs; its GaLore at 1.1B contradicts GaLore's own table"

# Pre-training on C4. At 7B Q-GaLore's figure is one of step 40,000, so that step is a model of its own.
_PRETRAINING: Final = (
    *_c4("adamw", (34.06, 25.08, 18.80, 15.56), "0.36G 0.76G 2.06G 7.80G", _TABLE_2),
    *_c4("galore", (34.88, 25.36, 18.95, 15.64), "0.24G 0.52G 1.22G 4.38G", _TABLE_2, _RANKS),
    *_c4("low-rank", (78.18, 45.51, 37.41, 142.53), "0.26G 0.54G 1.08G 3.57G", _TABLE_2, _RANKS),
    *_c4(
        "lora", (34.99, 33.92, 25.58, 19.21), "0.36G 0.80G 1.76G 6.17G", _TABLE_2, f"from scratch; {_RANKS}"
    ),
    *_c4("relora", (37.04, 29.37, 29.08, 18.33), "0.36G 0.80G 1.76G 6.17G", _TABLE_2, _RANKS),
    *_c4(
        "q-galore",
        (34.88, 25.53, 19.79, 16.25),
        "0.18G 0.39G 0.88G 3.08G",
        f"{Q_GALORE}, table 1",
        "int8 weights, int4 projector, 8-bit moments",
    ),
    *_c4("fira", (31.06, 22.73, 16.85, 14.31), "", f"{FIRA}, table 3", _RANKS),
    *_c4(
        "apollo",
        (31.55, 22.94, 16.85, 14.20),
        "0.24G 0.52G 1.22G 4.38G",
        _APOLLO_2,
        f"rank a quarter of the width; {_BF16}",
    ),
    *_c4(
        "apollo",
        (31.26, 23.18, 16.98, 14.25),
        "0.18G 0.39G 0.95G 3.49G",
        _APOLLO_2,
        f"rank an eighth of the width; {_BF16}",
    ),
    *_c4(
        "apollo",
        (31.26, 22.84, 16.67, 14.10),
        "0.24G 0.52G 1.22G 4.38G",
        _APOLLO_2,
        f"projection by SVD; {_BF16}",
    ),
    *_c4(
        "apollo-mini",
        (31.93, 23.53, 17.18, 14.17),
        "0.12G 0.25G 0.69G 2.60G",
        _APOLLO_2,
        f"rank 1, learning rate 0.01; {_BF16}",
    ),
    *_c4(
        "apollo-mini",
        (30.95, 22.85, 16.63, 13.95),
        "",
        _APOLLO_2,
        f"rank 1, learning rate 0.02; {_BF16}",
    ),
    *_c4("q-apollo", (31.97, 24.16, 18.79), "0.18G 0.39G 0.88G", _APOLLO_8, _INT8),
    *_c4("q-apollo-mini", (33.05, 24.70, 18.90), "0.06G 0.12G 0.35G", _APOLLO_8, f"{_INT8}, rank 1"),
    *_c4("lost", (32.25,), "", LOST, "low rank plus sparse columns, chosen by SVD and L2 norm"),
    *_row("1B", PERPLEXITY, {"sltrain": 16.14}, SLTRAIN, f"low rank plus 3 % sparse; {_BF16}"),
    _c4_7b("adamw-8bit", 14.61, "26G", GALORE, "8-bit moments; memory in all"),
    _c4_7b("galore-8bit", 14.65, "18G", GALORE, "rank 1024, 8-bit moments; memory in all"),
    _c4_7b("apollo", 13.02, "1.6G", APOLLO, "rank 256; memory of the state alone"),
    _c4_7b("apollo-mini", 13.09, "0.0G", APOLLO, "rank 1; memory of the state alone"),
    *_row(
        "7B at 40k steps",
        PERPLEXITY,
        {"adamw-8bit": 18.09, "galore-8bit": 17.94, "q-galore": 18.83, "apollo": 17.55, "apollo-mini": 18.03},
        f"{GALORE}; {Q_GALORE}; {APOLLO}",
        "5.2B tokens",
    ),
    *_row("60M", LOG, {"adamw": 3.52, "galore": 3.56, "natural-galore": 3.53}, NATURAL, _LOG),
    *_row("130M", LOG, {"adamw": 3.22, "galore": 3.24, "natural-galore": 3.22}, NATURAL, _LOG),
    *_row("350M", LOG, {"adamw": 2.93, "galore": 2.95, "natural-galore": 2.93}, NATURAL, _LOG),
    *_row("1.1B", LOG, {"adamw": 2.72, "galore": 2.90, "natural-galore": 2.80}, NATURAL, _LOG),
)

_MEASURED: Final = (
    *_row(
        "1B",
        MEMORY,
        {"adamw": 13.60, "adafactor": 13.15, "adamw-8bit": 9.54, "galore-8bit": 7.95},
        _TABLE_11,
        _WHOLE,
    ),
    *_row(
        "1B",
        SPEED,
        {"adamw": 1257, "adafactor": 581, "adamw-8bit": 1570, "galore-8bit": 1109},
        _TABLE_11,
        _WHOLE,
    ),
    *(
        entry
        for model, amounts in {
            "350M": (4.5, 3.5, 3.1, 2.2),
            "1B": (16.3, 11.8, 10.3, 6.8),
            "7B": (67.4, 29.4, 22.0, 18.3),
        }.items()
        for entry in _row(
            model,
            PEAK,
            dict(zip(("adamw", "adamw-8bit", "galore-8bit", "sltrain"), amounts, strict=True)),
            _FIGURE_3,
            _LAYERWISE,
            "one A100 of 80 GB",
        )
    ),
    *(
        entry
        for model, seconds in {
            "1B": (0.036, 0.051, 0.048, 0.371, 0.421),
            "7B": (0.173, 0.159, 0.142, 2.874, 3.086),
        }.items()
        for entry in _row(
            model,
            STEP,
            dict(zip(("adamw", "apollo", "apollo-mini", "galore", "fira"), seconds, strict=True)),
            _APOLLO_7,
            _STEP,
            "one A100",
        )
    ),
    *_row("LLaMA-2-7B", MEMORY, {"owlore": 21}, OWLORE),
)

_FINE_TUNING: Final = (
    *_row(
        "LLaMA-7B",
        COMMONSENSE,
        {"adamw": 58.6, "lora": 74.7, "galore": 62.7, "flora": 64.9, "fira": 76.9},
        FIRA,
        "commonsense-170k; Fira at rank 32",
    ),
    *_row(
        "Llama-3.2-1B",
        COMMONSENSE,
        {
            "adamw": 68.07,
            "lora": 59.21,
            "dora": 66.38,
            "galore": 61.14,
            "fira": 68.98,
            "apollo": 68.21,
            "apollo-mini": 68.23,
        },
        f"{APOLLO}, table 5",
        "rank 32; APOLLO-Mini rank 1",
    ),
    *_row(
        "LLaMA-3-8B",
        MMLU,
        {
            "adamw": 64.85,
            "lora": 64.25,
            "galore": 64.43,
            "fira": 64.32,
            "apollo": 64.35,
            "apollo-mini": 64.41,
        },
        f"{APOLLO}, table 6",
        "rank 8",
    ),
    *_row("LLaMA-3-8B", MMLU, {"q-galore": 64.20}, Q_GALORE, "in 8 GB; LoRA there: 64.25 in 16 GB"),
    *_row(
        "RoBERTa-base",
        GLUE,
        {"adamw": 86.28, "galore": 85.89, "lora": 85.61},
        f"{GALORE}, appendix D",
        "30 epochs, rank 4",
    ),
    *_row("RoBERTa-base", GLUE, {"natural-galore": 86.05}, NATURAL, "rank 4; GaLore there: 85.89"),
    *_row("LLaMA-3-8B", MT_BENCH, {"badam": 6.67, "lora": 6.41}, BADAM, "BAdam in 23.5 GB"),
    *_row("LLaMA-2-7B", MT_BENCH, {"badam": 5.21, "lora": 4.86}, BADAM, "BAdam in 21.8 GB"),
    *_row("LLaMA-7B", COMMONSENSE, {"neuroada": 82.7}, NEURO_ADA, "eight tasks; 0.404 % of the parameters"),
    *_row("LLaMA-13B", COMMONSENSE, {"neuroada": 85.3}, NEURO_ADA, "eight tasks"),
    *_row("LLaMA-2-7B", COMMONSENSE, {"neuroada": 84.3}, NEURO_ADA, "eight tasks"),
    *_row("LLaMA-3-8B", COMMONSENSE, {"neuroada": 87.3}, NEURO_ADA, "eight tasks"),
    *_row("OPT-13B", "SST-2 accuracy", {"mezo": 91.4, "adamw": 92.0}, f"{MEZO}, table 1", "1,000 examples"),
    *_row("OPT-13B", MEMORY, {"mezo": 26, "adamw": 316}, MEZO, "MultiRC, 400 tokens, one row a device"),
    *_row("LLaMA-7B", "BoolQ accuracy", {"sparse-mezo": 80.9, "mezo": 75.9}, SPARSE_MEZO, "1,000 examples"),
    *_row("OPT-13B", MEMORY, {"zo2": 6.18}, ZO2),
    *_row("OPT-66B", MEMORY, {"zo2": 12.07}, ZO2),
    *_row("OPT-175B", MEMORY, {"zo2": 18.04}, ZO2),
)

REPORTED: Final[tuple[Reported, ...]] = (*_PRETRAINING, *_MEASURED, *_FINE_TUNING)
