"""What is refused once the model and what trains of it are there, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrimp.base.errors import ScrimpError
from scrimp.methods import piece
from scrimp.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from scrimp.assembly import Assembly


def check_tune(made: Assembly, recipe: Recipe) -> None:
    """Refuse before training what could not be done after it.

    Raises:
        ScrimpError: What trains cannot be merged, or cannot be updated within the backward pass, as asked.
    """
    from scrimp.base.protocols import Adapter

    tune = made.tune
    if not isinstance(tune, Adapter):
        if recipe.tune.merge:
            raise ScrimpError(
                f"tune.merge: {recipe.tune.name} trains the model itself; leave --tune.merge out"
            )
        return
    if recipe.optimizer.fused_backward and getattr(tune, "needs_step", False):
        raise ScrimpError(
            f"tune {recipe.tune.name} changes gradients before the step, and updates in the backward pass "
            "come too early for it: leave --optimizer.fused-backward out"
        )
    is_away = recipe.device != "cpu" and piece("placement", recipe.placement.name).pages_state
    if is_away and getattr(tune, "needs_step", False):
        raise ScrimpError(
            f"tune {recipe.tune.name} works on the optimizer's state besides the updates, and "
            f"placement {recipe.placement.name} keeps that on the host: leave --placement out"
        )
    if recipe.tune.merge and not tune.is_mergeable:
        raise ScrimpError(
            f"tune.merge: {recipe.tune.name} cannot be merged, as the weights of {recipe.model.name} "
            "cannot hold what it adds; leave --tune.merge out, and name the adapter's folder where it is used"
        )


def check_model(model: PreTrainedModel, recipe: Recipe, device: torch.device) -> None:
    """Refuse what the model cannot do, by trying it.

    Raises:
        ScrimpError: Its attention crosses documents, or its head does not fit the loss without logits.
    """
    if recipe.data.boundaries == "isolate":
        _check_isolation(model, recipe, device)
    if recipe.activations.loss == "chunked":
        from scrimp.activations.loss import check_head

        check_head(model)


def _check_isolation(model: PreTrainedModel, recipe: Recipe, device: torch.device) -> None:
    """Refuse a model whose second document in a row sees the first one.

    Whether restarted positions isolate documents depends on the model's own masking code, so it is
    tried: changing the first document must not change the second one's logits.
    """
    import torch

    length = 8
    positions = torch.arange(length, device=device).repeat(2)[None]
    first = torch.arange(2 * length, device=device)[None]
    second = first.clone()
    second[:, :length] += length
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            seen = [
                model(input_ids=row, position_ids=positions, use_cache=False).logits[:, length:]
                for row in (first, second)
            ]
    except (TypeError, ValueError) as error:
        seen = []
        reason = f"it takes no positions ({error})"
    else:
        reason = "its attention crosses them"
    model.train(was_training)
    if not seen or not torch.equal(seen[0], seen[1]):
        raise ScrimpError(
            f"data.boundaries isolate: model {recipe.model.name} cannot keep documents of one row apart: "
            f"{reason}; use --data.boundaries join, or --data.packing padded"
        )
