"""Adapters merged into their base or into one adapter, or compressed, on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from scrimp import adapted, data, models
from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.tuning.merging.compeft import Compressed, compress_adapter
from scrimp.tuning.merging.merging import merge_adapters, merged_changes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scrimp.tuning.merging.task_vectors import How

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How several adapters become one; see `scrimp.tuning.merging.task_vectors`.

    Attributes:
        how: The operation.
        weights: A factor for each; None is the operation's.
        density: Share of each change that is kept; None is the operation's.
        rank: Of an adapter that is made; None is the sum of theirs.
        seed: Of random choices.
    """

    how: How = "linear"
    weights: Sequence[float] | None = None
    density: float | None = None
    rank: int | None = None
    seed: int = 0


def write_model(
    sources: Sequence[models.Source],
    out: Path,
    way: Way,
    *,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Write adapters and their base as an ordinary Hugging Face folder.

    Args:
        sources: The adapters, of one base.
        out: Where.
        way: How several become one.
        precision: Of the weights; auto is as the base is stored.
        trust_remote_code: Let the model's own Python code run.

    Raises:
        ScrimpError: The adapters are of different bases, or no weight can hold what one does.
    """
    first = sources[0]
    assert first.base is not None and first.tokenizer is not None
    dtype = models.stored_dtype(first.base) if precision == "auto" else DTYPES[precision]
    if len(sources) == 1:
        model = models.load(first, dtype=dtype, trust_remote_code=trust_remote_code)
        if adapted.is_wrapped(model):
            raise ScrimpError(
                f"merge {first.name}: no weight of the model can hold what this adapter does; name the "
                "adapter's own folder where it is used"
            )
    else:
        model = _several(sources, way, dtype, trust_remote_code=trust_remote_code)
    tokenizer = data.load_tokenizer(first.tokenizer)
    with files.atomic_directory(out) as partial:
        models.export(model, tokenizer, partial)


def write_adapter(sources: Sequence[models.Source], out: Path, way: Way) -> dict[str, float]:
    """Write several adapters as one, and return by layer which share of the change that loses.

    Raises:
        ScrimpError: They are of different bases, or no plain LoRA.
    """
    with _folders(sources) as folders:
        return merge_adapters(
            folders,
            out,
            how=way.how,
            weights=way.weights,
            density=way.density,
            rank=way.rank,
            seed=way.seed,
        ).errors


def write_compressed(source: models.Source, out: Path, *, density: float, alpha: float) -> Compressed:
    """Write an adapter as signs, positions and one number (ComPEFT), and return what that came to.

    Raises:
        ScrimpError: It is neither a LoRA nor IA3, or as for `compress_adapter`.
    """
    assert source.path is not None
    return compress_adapter(source.path, out, density=density, alpha=alpha)


def _several(
    sources: Sequence[models.Source], way: Way, dtype: torch.dtype, *, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers.pytorch_utils import Conv1D

    base = sources[0].base
    assert base is not None
    with _folders(sources) as folders, torch.no_grad():
        changes = merged_changes(  # refuses what does not belong together before a model is read
            folders, how=way.how, weights=way.weights, density=way.density, seed=way.seed
        )
        model = models.load(base, dtype=dtype, trust_remote_code=trust_remote_code)
        for folder in folders:
            adapted.check_base(model, folder)
        adapted.decode_as_trained(model, folders)
        for name, change in changes:
            module = model.get_submodule(name)
            weight = module.get_parameter("weight")
            added = change.T if isinstance(module, Conv1D) else change  # GPT-2's hold W transposed
            weight.copy_((weight.float() + added).to(dtype))
    return model


@contextmanager
def _folders(sources: Sequence[models.Source]) -> Iterator[list[Path]]:
    paths = [source.path for source in sources if source.path is not None]
    with ExitStack() as passing:
        yield [passing.enter_context(adapted.readable(path)) for path in paths]
