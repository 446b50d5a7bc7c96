"""What schedules measure on a model: each layer's outliers, and the loss with some layers damped.

The model is run by a `Probe` of the caller's: without gradients, in evaluation mode, with hooks on modules,
and eagerly, because compiled code would pass the hooks by. Reading the result waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.base.protocols import Probe
from scrimp.tuning.layers import Layers, is_adapter


def outlier_ratios(layers: Layers, probe: Probe | None, *, threshold: float = 13.0) -> list[float]:
    """Return each layer's share of outliers, in percent (the layer outlier distribution of OWL).

    An outlier is an entry of |W_ij| ||X_j|| above `threshold` times the mean over all linear modules of the
    layer; X_j is a module's j-th input over all tokens that the probe runs. Stacked experts, whose inputs no
    module sees, are left out.

    Args:
        layers: Whose ratios.
        probe: Runs the model on the calibration tokens; None takes every norm as 1.
        threshold: M.

    References:
        Outlier Weighed Layerwise Sparsity (OWL), Yin et al., ICML 2024, arXiv 2310.05175.
    """
    linears = [[m for m in layer.modules() if _is_linear(m)] for layer in layers.modules]
    squares: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().square().flatten(0, -2).sum(dim=0)
        squares[module] = squares[module] + x if module in squares else x

    if probe is not None:
        with ExitStack() as hooks:
            for module in (m for layer in linears for m in layer):
                hooks.enter_context(module.register_forward_pre_hook(add))
            _measure(layers.model, probe)
    with torch.no_grad():
        return [_outlier_ratio(modules, squares, threshold) for modules in linears]


def _outlier_ratio(
    modules: Sequence[nn.Module], squares: Mapping[nn.Module, Tensor], threshold: float
) -> float:
    count = sum(_weight(module).numel() for module in modules)
    if count == 0:
        return 0.0
    # Twice over the matrices, so that a single one's entries lie in memory at a time.
    mean = torch.stack([_saliency(module, squares).sum() for module in modules]).sum() / count
    above = [(_saliency(module, squares) > threshold * mean).sum() for module in modules]
    return 100.0 * int(torch.stack(above).sum()) / count


def _saliency(module: nn.Module, squares: Mapping[nn.Module, Tensor]) -> Tensor:
    weight = _weight(module).float().abs()  # (out, in)
    return weight * squares[module].sqrt() if module in squares else weight


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    return is_matrix and not isinstance(module, nn.Embedding)


def _weight(module: Any) -> Tensor:
    """Return a linear module's matrix as (out, in); GPT-2's `Conv1D` keeps its transpose."""
    weight: Tensor = module.weight
    return weight.mT if type(module).__name__ == "Conv1D" else weight


def damped_loss(layers: Layers, damp: Collection[int], factor: float, probe: Probe) -> float:
    """Return the probe's loss while what some layers add is damped.

    In a layer with adapters, each one's change of its module's output is multiplied by `factor`; in another,
    what the layer adds to its input is.
    """
    with ExitStack() as hooks:
        for index in damp:
            layer = layers.modules[index]
            adapters = [module for module in layer.modules() if is_adapter(module)]
            for module in adapters or [layer]:
                hook = _damping(factor)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        return float(_measure(layers.model, probe))


def _damping(factor: float) -> Callable[..., Any]:
    """Return a forward hook that moves a module's output towards what it would be without the module."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if is_adapter(module):
            return torch.lerp(module.base_layer(*args, **kwargs), output, factor)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (torch.lerp(hidden, output[0], factor), *output[1:])
        return torch.lerp(hidden, output, factor)

    return hook


def _measure(model: nn.Module, probe: Probe) -> Tensor:
    with torch.no_grad(), _evaluating(model), torch.compiler.set_stance("force_eager"):
        return probe()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
