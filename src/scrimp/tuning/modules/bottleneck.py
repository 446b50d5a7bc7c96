"""Adapters of the first kind: small networks between the layers. No weight can hold what they do.

    series        h <- h + U f(D h)            on what a sub-layer gives
    parallel      h <- h + s U f(D x)          on what a sub-layer takes, x, added to what it gives
    invertible    o1 = h1 + F(h2), o2 = h2 + G(o1)      on the embeddings, and its inverse before the head

U begins at zero (and the second matrices of F and G), so that the model begins as it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.base.decoder_layers import decoder_layers
from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.parts import draw_uniform
from scrimp.tuning.modules.attached import (
    Arguments,
    AttachedTuning,
    Part,
    base_model_path,
    embedded,
    replace_first,
)
from scrimp.tuning.option_checks import check_choice, check_positive

SubLayers = Literal["mlp", "attention", "both"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Bottleneck(nn.Module):
    """x -> U f(D x + d) + u, in fp32; D as torch draws linear layers, all else zero.

    Attributes:
        down: D, (bottleneck, width) float32.
        down_bias: d, (bottleneck,) float32.
        up: U, (width, bottleneck) float32.
        up_bias: u, (width,) float32.
    """

    def __init__(self, width: int, bottleneck: int, *, activation: Activation, seed: int) -> None:
        super().__init__()
        self.down = nn.Parameter(draw_uniform(seed, (bottleneck, width), bound=width**-0.5))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(torch.zeros(width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self._function = FUNCTIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., width) in x's dtype."""
        inner = self._function(functional.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return functional.linear(inner, self.up, self.up_bias).to(x.dtype)


class Series(Part):
    """h <- h + U f(D h)."""

    def __init__(self, net: Bottleneck) -> None:
        super().__init__()
        self.net = net

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add to what the sub-layer gives."""
        return replace_first(output, lambda h: h + self.net(h))


class Parallel(Part):
    """h <- h + s U f(D x), x what the sub-layer takes."""

    def __init__(self, net: Bottleneck, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add to what the sub-layer gives."""
        added = self.scale * self.net(args[0] if args else kwargs["hidden_states"])
        return replace_first(output, lambda h: h + added)


class Coupling(Part):
    """o1 = h1 + F(h2), o2 = h2 + G(o1) on a decoder's embeddings; its inverse on what the decoder gives."""

    def __init__(self, f: Bottleneck, g: Bottleneck) -> None:
        super().__init__()
        self.f, self.g = f, g

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Call the decoder with changed embeddings."""
        given, rest = embedded(module, args, kwargs)
        return (), {**rest, "inputs_embeds": self.forward(given)}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Change hidden states back."""
        return replace_first(output, self.inverse)

    def forward(self, h: Tensor) -> Tensor:
        """Return o of (..., width)."""
        first, second = h.chunk(2, dim=-1)
        first = first + self.f(second)
        return torch.cat([first, second + self.g(first)], dim=-1)

    def inverse(self, o: Tensor) -> Tensor:
        """Return h of (..., width)."""
        first, second = o.chunk(2, dim=-1)
        second = second - self.g(first)
        return torch.cat([first - self.f(second), second], dim=-1)


def SeriesAdapter(
    *,
    bottleneck: int = 256,
    activation: Activation = "relu",
    sublayers: SubLayers = "mlp",
    seed: int = 0,
) -> AttachedTuning:
    """Series adapters: a small network on what every MLP (or attention) gives, before the residual.

    h <- h + U f(D h)

    Args:
        bottleneck: Rows of D.
        activation: f.
        sublayers: After MLPs, where LLM-Adapters finds it best; after attention; or both, as Houlsby has it.
        seed: Of D.

    Memory:
        16 (2 width bottleneck + width + bottleneck) bytes a sub-layer (itself, gradient, AdamW's moments);
        activations width + bottleneck numbers a token and sub-layer. It runs in inference, too.

    Raises:
        ScrimpError: An option is out of its range, or the model has no such sub-layers.

    References:
        Parameter-Efficient Transfer Learning for NLP, Houlsby et al., ICML 2019, arXiv 1902.00751;
        LLM-Adapters, Hu et al., EMNLP 2023, arXiv 2304.01933, whose bottleneck and place are taken.
    """
    name = "series-adapter"
    _check(name, bottleneck, activation, sublayers)

    def find(model: Any) -> dict[str, Part]:
        net = _networks(name, model, bottleneck, activation, seed)
        return {path: Series(net(path)) for path in _sublayers(name, model, sublayers, whole=False)}

    settings = {"bottleneck": bottleneck, "activation": activation, "sublayers": sublayers}
    return AttachedTuning(name=name, find=find, settings=settings)


def ParallelAdapter(
    *,
    bottleneck: int = 256,
    scale: float = 1.0,
    activation: Activation = "relu",
    sublayers: SubLayers = "mlp",
    seed: int = 0,
) -> AttachedTuning:
    """Parallel adapters: a small network beside every MLP (or attention), on the same input.

    h <- h + s U f(D x)

    Args:
        bottleneck: Rows of D.
        scale: s; He et al. take 4 where they scale at all.
        activation: f.
        sublayers: Beside MLPs, where both papers find it best; beside attention; or both.
        seed: Of D.

    Memory:
        As series adapters, but the input is kept for the sub-layer's own trained parts anyway, if it has any.

    Raises:
        ScrimpError: An option is out of its range, or the model has no such sub-layers.

    References:
        Towards a Unified View of Parameter-Efficient Transfer Learning, He et al., ICLR 2022, arXiv
        2110.04366; LLM-Adapters, Hu et al., EMNLP 2023, arXiv 2304.01933.
    """
    name = "parallel-adapter"
    _check(name, bottleneck, activation, sublayers)
    check_positive(name, {"scale": scale})

    def find(model: Any) -> dict[str, Part]:
        net = _networks(name, model, bottleneck, activation, seed)
        return {path: Parallel(net(path), scale) for path in _sublayers(name, model, sublayers, whole=True)}

    settings = {"bottleneck": bottleneck, "scale": scale, "activation": activation, "sublayers": sublayers}
    return AttachedTuning(name=name, find=find, settings=settings)


def InvertibleAdapter(
    *, reduction: int = 2, bottleneck: int | None = None, activation: Activation = "relu", seed: int = 0
) -> AttachedTuning:
    """Invertible adapters: a coupling of the embeddings' halves, undone before the output head.

    o1 = h1 + F(h2), o2 = h2 + G(o1);   h2 = o2 - G(o1), h1 = o1 - F(h2)

    MAD-X's language adapter, which has series adapters after every MLP as well.

    Args:
        reduction: F and G narrow half the width by it.
        bottleneck: Of the series adapters; None is the width over `reduction`, 0 leaves them out.
        activation: Of all networks.
        seed: Of their first matrices.

    Memory:
        16 (width^2 / reduction + width / reduction + width) bytes for the coupling, and what series adapters
        take. It also runs in inference: not mergeable.

    Raises:
        ScrimpError: An option is out of its range, or the model's width is odd.

    References:
        MAD-X, Pfeiffer et al., EMNLP 2020, arXiv 2005.00052.
    """
    name = "invertible-adapter"
    check_positive(name, {"reduction": reduction})
    check_choice(name, "activation", activation, get_args(Activation))
    if bottleneck is not None and bottleneck < 0:
        raise ScrimpError(f"tune {name}: bottleneck {bottleneck} must not be negative; 0 leaves it out")

    def find(model: Any) -> dict[str, Part]:
        width = _width(model)
        if width % 2 or width // 2 < reduction:
            raise ScrimpError(
                f"tune {name}: width {width} has no halves that {reduction} narrows; lower reduction"
            )
        half, inner = width // 2, width // 2 // reduction
        f, g = (
            Bottleneck(half, inner, activation=activation, seed=derive(seed, name, each))
            for each in ("f", "g")
        )
        inside = width // reduction if bottleneck is None else bottleneck
        parts: dict[str, Part] = {base_model_path(model, tune=name): Coupling(f, g)}
        if inside:
            net = _networks(name, model, inside, activation, seed)
            parts |= {path: Series(net(path)) for path in _sublayers(name, model, "mlp", whole=False)}
        return parts

    settings = {"reduction": reduction, "bottleneck": bottleneck, "activation": activation}
    return AttachedTuning(name=name, find=find, settings=settings)


def _check(name: str, bottleneck: int, activation: str, sublayers: str) -> None:
    check_positive(name, {"bottleneck": bottleneck})
    check_choice(name, "activation", activation, get_args(Activation))
    check_choice(name, "sublayers", sublayers, get_args(SubLayers))


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _networks(
    name: str, model: Any, bottleneck: int, activation: Activation, seed: int
) -> Callable[[str], Bottleneck]:
    """Return what makes the network of a sub-layer by its path."""
    width = _width(model)
    return lambda path: Bottleneck(width, bottleneck, activation=activation, seed=derive(seed, name, path))


def _sublayers(name: str, model: nn.Module, wanted: SubLayers, *, whole: bool) -> list[str]:
    """Return the paths of the modules that end attention or MLP.

    Args:
        name: Who asks, for the message.
        model: The model.
        wanted: Which sub-layers.
        whole: Whether a module must be the whole sub-layer, so that its input is the sub-layer's.

    Raises:
        ScrimpError: There are none, or one is not whole.
    """
    paths = {module: path for path, module in model.named_modules()}
    found = []
    for layer in decoder_layers(model):
        attention = [m for child, m in layer.named_children() if _is_sublayer(m) and "att" in child]
        rest = [m for m in layer.children() if _is_sublayer(m) and m not in attention]
        if whole and wanted != "attention" and len(rest) > 1:  # OPT's fc1 and fc2 lie in the layer itself
            raise ScrimpError(
                f"tune {name}: the layers of {type(model).__name__} hold their MLP in pieces; use "
                "--tune.name series-adapter"
            )
        found += [*(attention if wanted != "mlp" else []), *(rest[-1:] if wanted != "attention" else [])]
    if not found:
        raise ScrimpError(
            f"tune {name}: {type(model).__name__} has no sub-layers of the kind {wanted!r} in decoder layers"
        )
    return [paths[module] for module in found]


def _is_sublayer(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in module.modules()) or any(_matrices(module))


def _matrices(module: nn.Module) -> Iterator[bool]:
    return (p.ndim >= 2 for p in module.parameters())
