"""The traces of a model, kept in the cache: asked for without torch, traced where one is missing.

They lie in one JSON file for each model, under a name made of its configuration, the versions of torch
and transformers, and scrimp's own source, so that none of them can be stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.base.lock import run_lock
from scrimp.base.platform import passive_openmp
from scrimp.data import cache_folder
from scrimp.memory.profile import (
    EvaluationProfile,
    ModelSize,
    OptimizerProfile,
    StepProfile,
    evaluation_profile,
    holds_for,
    step_profile,
)
from scrimp.memory.untraceable import Untraceable
from scrimp.recipe import Recipe, flat, replace
from scrimp.shapes import CONTEXT, SHAPES, Dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from scrimp.memory.profiling import Tracer
    from scrimp.models import Source

Say = Callable[[str, float | None], None]
BYTE_VOCAB = 259  # of scrimp's byte-level tokenizer, which a shape without a vocabulary of its own takes
_MODEL_FIELDS = ("weights.", "tune.")
_EVALUATION_FIELDS = (
    *_MODEL_FIELDS,
    "activations.loss",
    "precision",
    "seq",
    "device",
    "threads",
    "data.boundaries",
)
_STEP_FIELDS = (*_EVALUATION_FIELDS, "activations.", "gradient.")


@dataclass(slots=True)
class Profiles:
    """What tracing found out about one model.

    Attributes:
        source: Where the model comes from.
        vocab: Tokens of the tokenizer, for a shape that takes its vocabulary from there.
        trust_remote_code: Whether the model's own code may run.
        config: Its configuration, where it was read already.
        folder: Where traces are kept.
        traced: How many traces had to be made.
        say: Told what is about to be traced, and how much of the work is done where that is known.
        share: How much of the work is done.
    """

    source: Source
    vocab: int = BYTE_VOCAB
    trust_remote_code: bool = False
    config: PreTrainedConfig | None = None
    folder: Path = field(default_factory=lambda: cache_folder() / "plans")
    traced: int = 0
    say: Say = lambda *_: None
    share: float | None = None
    _found: dict[str, Any] = field(default_factory=dict)
    _tracer: Tracer | None = None

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._found = json.loads(self._path.read_text(encoding="utf-8"))

    def size(self, recipe: Recipe) -> ModelSize:
        """Return the size of a recipe's model.

        Raises:
            Untraceable: The model cannot be made without its bytes.
        """
        key = f"size {_key(recipe, *_MODEL_FIELDS, 'precision')}"
        return ModelSize(**self._get(key, lambda tracer: tracer.size(recipe)))

    def step(self, recipe: Recipe, rows: int) -> StepProfile:
        """Return the profile of a recipe's step that holds for a micro-batch of `rows`.

        Raises:
            Untraceable: A step of it cannot be simulated.
        """
        fields: tuple[str, ...] = _STEP_FIELDS
        if recipe.optimizer.fused_backward and recipe.batch == recipe.micro_batch:
            fields = (*fields, "optimizer.", "clip")
        else:  # with several micro-batches, updates come after the last one's gradients
            recipe = replace(recipe, {"optimizer.fused_backward": False})
        key = f"step {_key(recipe, *fields, without='optimizer.lr')}"
        return step_profile(self._for_rows(key, rows, lambda tracer: tracer.step(recipe, rows)))

    def evaluation(self, recipe: Recipe, rows: int) -> EvaluationProfile:
        """Return the profile of an evaluation of micro-batches of `rows`, whatever is kept in training.

        Raises:
            Untraceable: It cannot be simulated.
        """
        key = f"evaluation {_key(recipe, *_EVALUATION_FIELDS)}"
        return evaluation_profile(self._for_rows(key, rows, lambda tracer: tracer.evaluation(recipe, rows)))

    def optimizer(self, recipe: Recipe) -> OptimizerProfile:
        """Return the profile of a recipe's optimizer over its model.

        Raises:
            Untraceable: It cannot be simulated.
        """
        fields = (*_MODEL_FIELDS, "optimizer.", "precision", "device")
        key = f"optimizer {_key(recipe, *fields, without='optimizer.lr')}"
        return OptimizerProfile(**self._get(key, lambda tracer: tracer.optimizer(recipe)))

    def dimensions(self) -> Dimensions:
        """Return the model's dimensions."""
        if self.source.kind == "shape":
            shape = SHAPES[self.source.name]
            return Dimensions(CONTEXT, shape.hidden, shape.layers)
        return Dimensions(**self._get("dimensions", lambda tracer: tracer.dimensions()))

    def save(self) -> None:
        """Write what was traced into the cache; a cache that cannot be written is no loss."""
        if self.traced:
            with contextlib.suppress(OSError, ScrimpError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Several programs may have traced the same model at once: the others need not wait.
                with run_lock(self._path.parent):
                    files.write_atomic(self._path, json.dumps(self._found))

    def _for_rows(self, key: str, rows: int, make: Any) -> Any:
        for name, found in self._found.items():
            if name.startswith(key) and "untraceable" not in found and holds_for(found["rows"], rows):
                return found
        return self._get(f"{key} rows {rows}", make)

    def _get(self, key: str, make: Any) -> Any:
        if key not in self._found:
            if self._tracer is None:
                self.say("loading torch", None)
                self._tracer = self._make_tracer()
            self.say(f"tracing {self.source.name}", self.share)
            self.traced += 1
            try:
                made = make(self._tracer)
            except Untraceable as error:
                made = {"untraceable": str(error)}  # kept too: to find it out again would take as long
            # Through JSON, so that what was traced now is what a later run reads.
            self._found[key] = json.loads(json.dumps(made if isinstance(made, dict) else asdict(made)))
        if "untraceable" in self._found[key]:
            raise Untraceable(self._found[key]["untraceable"])
        return self._found[key]

    def read_config(self) -> PreTrainedConfig:
        """Return the model's configuration, read by transformers."""
        if self.config is None:
            from scrimp import models

            self.config = models.load_config(
                self.source, vocab=self.vocab, trust_remote_code=self.trust_remote_code
            )
        return self.config

    def _make_tracer(self) -> Tracer:
        with passive_openmp():
            from scrimp.memory.profiling import Tracer

        return Tracer(self.read_config(), trust_remote_code=self.trust_remote_code)

    @property
    def _path(self) -> Path:
        described = [_describe(self.source, self.vocab), versions()]
        name = hashlib.blake2b(json.dumps(described).encode(), digest_size=12).hexdigest()
        return self.folder / f"{name}.json"


def _describe(source: Source, vocab: int) -> Any:
    """Say what a model's configuration depends on."""
    if source.kind == "shape":
        return [asdict(SHAPES[source.name]), vocab]
    assert source.path is not None
    if source.kind == "folder":
        return (source.path / "config.json").read_text(encoding="utf-8")
    status = source.path.stat()
    return [str(source.path), status.st_size, status.st_mtime_ns]


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions that a trace depends on, scrimp's by the content of its source."""
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return {"scrimp": digest.hexdigest(), **{name: version(name) for name in ("torch", "transformers")}}


def _key(recipe: Recipe, *names: str, without: str = "") -> str:
    """Write the fields of a recipe that a profile depends on; a name with a dot at its end is a section."""
    values = {
        name: value
        for name, value in flat(recipe).items()
        if name != without and any(name == n or (n.endswith(".") and name.startswith(n)) for n in names)
    }
    return json.dumps(values, sort_keys=True)
