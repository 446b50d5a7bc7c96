"""Parameter groups: what the user hands in, read, checked and divided.

An optimizer takes a model, parameters, (name, parameter) pairs, or groups of either, as torch's do. What
comes out is one list of groups that hold every option, with None for those of projected groups in all
others, and what is known of each parameter.

    handed in                         projected                                  weight decay
    a model                           matrices inside the layers, by role        not on norms and biases
    pairs                             by the usual words in names, then shape    as given
    parameters                        by shape                                   as given
    groups, some with a `rank`        those groups                               as given
    groups, none with a `rank`        each like parameters or pairs              as given

By shape: two or three dimensions, the larger side of the matrix less than eight times the smaller, or less
than three times where at most two matrices have a side of that length, as a vocabulary is. A guess all the
same: better hand in the model.

Groups may be written in our words or in those of galore-torch, apollo-torch and fira, not in both at once.
Everything is checked here, before the first step. Frozen parameters of a model are left out; a parameter
handed in by itself stays, and is not updated while it has no gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.optim.group_options import Authors, check_options, marker, own_words
from scrimp.optim.pieces import Role
from scrimp.optim.roles import heads, role_by_name, roles

_INNER: tuple[Role, ...] = ("linear", "experts")
_LONG = 3  # Larger side over smaller one from which a matrix may be one, if its length is a rare one.
_MANY = 6  # Matrices among which a length can be rare.
_LONGEST = 8  # Larger side over smaller one from which a matrix is taken for an embedding or a head.


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What is known of a parameter.

    Attributes:
        name: Its name in the model, or where it stood in what was handed in.
        role: What it is in the model, or by its name or shape.
        heads: Of a query or key projection: how many heads its rows are divided among; else 1.
        asked: Whether the user put it into a projected group by hand, so that a rank too large for it is
            a mistake and no reason to leave it as it is.
    """

    name: str
    role: Role
    heads: int = 1
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What was handed in.

    Attributes:
        groups: Every option of every group, "params" a list of parameters; "param_names" where they
            have names.
        targets: What is known of each parameter, in the order of the groups.
    """

    groups: list[dict[str, Any]]
    targets: dict[Tensor, Info]


def read(
    params: Any,
    *,
    options: Mapping[str, Any],
    projected: Mapping[str, Any] | None,
    first: int = 0,
    authors: Authors | None = None,
) -> Given:
    """Read what an optimizer was handed.

    Args:
        params: A module, an iterable of parameters or of (name, parameter), or groups of either.
        options: The options of every group, with the values where a group has none of its own.
        projected: The options of projected groups alone (`rank`, `refresh_every`, ...), likewise; None
            where the method projects nothing. Where its rank is None, no group is projected that has none
            of its own.
        first: The number of the first group, where there are groups already.
        authors: How values are converted in a group of the authors' words.

    Returns:
        The groups, and what is known of the parameters.

    Raises:
        ScrimpError: There are no parameters; one is there twice, complex, or no leaf; an option is
            unknown, out of range, or in the words of two packages at once.
    """
    parts = [_Part.of_model(params)] if isinstance(params, nn.Module) else _parts(params, first)
    _check_members(parts)
    parts = _without_vocabularies(parts)
    by_hand = projected is not None and any(marker(projected) in part.own for part in parts)
    found = Given(groups=[], targets={})
    for part in parts:
        own = own_words(part.own, options, projected, part.where, authors)
        for divided in _divide(replace(part, own=own), options, projected, by_hand):
            found.groups.append(divided.group(options, projected))
            found.targets.update((member.parameter, member.info) for member in divided.members)
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Member:
    """A parameter and what is known of it; `is_named` where its name is its own."""

    parameter: Tensor
    info: Info
    is_named: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Parameters treated alike.

    Attributes:
        members: The parameters.
        own: The options given for them alone.
        where: What messages call it.
        is_model: Whether it is a whole model, whose norms and biases do not decay.
        is_projected: Whether it takes the options of projected groups; None where roles decide.
    """

    members: tuple[_Member, ...]
    own: Mapping[str, Any]
    where: str = ""
    is_model: bool = False
    is_projected: bool | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> _Part:
        """Read a model's trainable parameters."""
        role, head = roles(model), heads(model)
        members = tuple(
            _Member(parameter=p, info=Info(name=name, role=role[name], heads=head.get(name, 1)))
            for name, p in model.named_parameters()
            if p.requires_grad
        )
        if not members:
            raise ScrimpError(
                f"no parameter of {type(model).__name__} trains: set requires_grad of those that should"
            )
        return cls(members=members, own={}, is_model=True)

    def group(self, options: Mapping[str, Any], projected: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the group as torch's constructor takes it, checked."""
        apart = projected or {}
        defaults = {**options, **(apart if self.is_projected else dict.fromkeys(apart))}
        own = {key: value for key, value in self.own.items() if value is not None or key not in apart}
        group = {"params": [member.parameter for member in self.members], **defaults, **own}
        if self.members and all(member.is_named for member in self.members):
            group["param_names"] = [member.info.name for member in self.members]
        check_options(group, self.where)
        return group


def _parts(params: Any, first: int) -> list[_Part]:
    """Read parameters, pairs or groups; a generator is consumed once."""
    entries = _listed(params, "an optimizer")
    if not entries:
        raise ScrimpError("the optimizer got no parameters: hand it the model, or model.parameters()")
    if not any(isinstance(entry, dict) for entry in entries):
        return [_Part(members=_members(entries, "parameter"), own={})]
    return [_group_part(entry, number) for number, entry in enumerate(entries, first)]


def _group_part(group: Any, number: int) -> _Part:
    where = f"group {number}"
    if not isinstance(group, dict) or "params" not in group:
        raise ScrimpError(f"{where} must be a dict with the key 'params', not {_kind(group)}")
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    given = group["params"]
    entries = [given] if isinstance(given, Tensor) else _listed(given, where)
    names = group.get("param_names")
    if names is not None and not any(isinstance(entry, tuple) for entry in entries):
        if len(names) != len(entries):
            raise ScrimpError(f"{where} has {len(entries)} parameters and {len(names)} 'param_names'")
        entries = list(zip(names, entries, strict=True))
    return _Part(members=_members(entries, f"{where}, parameter"), own=own, where=where)


def _listed(params: Any, where: str) -> list[Any]:
    """Return an ordered collection's entries."""
    if isinstance(params, (Tensor, nn.Module, str, dict, set, frozenset)) or not isinstance(params, Iterable):
        raise ScrimpError(
            f"{where} takes parameters in an order, as in a list or model.parameters(), not {_kind(params)}"
        )
    return list(params)


def _members(entries: list[Any], where: str) -> tuple[_Member, ...]:
    members = [_member(entry, f"{where} {number}") for number, entry in enumerate(entries)]
    if len({member.is_named for member in members}) > 1:
        raise ScrimpError(f"some parameters came with a name and some without ({where}s): name all or none")
    return tuple(members)


def _member(entry: Any, where: str) -> _Member:
    is_named = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
    name, parameter = entry if is_named else (where, entry)
    if not isinstance(parameter, Tensor):
        raise ScrimpError(f"{where} must be a tensor or (name, tensor), not {_kind(entry)}")
    known = role_by_name(name, parameter.ndim) if is_named else None
    info = Info(name=name, role=known or _role_by_shape(parameter))
    return _Member(parameter=parameter, info=info, is_named=is_named)


def _role_by_shape(parameter: Tensor) -> Role:
    if parameter.ndim > 3:
        return "conv"
    if parameter.ndim < 2:
        return "other"
    smaller, larger = sorted(parameter.shape[-2:])
    # A side of 1 is no matrix: a depthwise convolution's kernels, a gate of one row.
    if smaller < 2 or larger >= _LONGEST * smaller:
        return "other"
    return "linear" if parameter.ndim == 2 else "experts"


def _without_vocabularies(parts: list[_Part]) -> list[_Part]:
    """Take long matrices for embeddings and heads whose longer side hardly any other one has.

    A vocabulary is a side of one or two matrices, a width one of many. Only shapes are known here.
    """
    members = [member for part in parts for member in part.members if not member.is_named]
    sides = Counter(side for member in members for side in set(member.parameter.shape[-2:]))
    if sum(member.info.role == "linear" for member in members) < _MANY:
        return parts

    def told(member: _Member) -> _Member:
        smaller, larger = sorted(member.parameter.shape[-2:]) if member.parameter.ndim == 2 else (1, 1)
        if member.is_named or larger < _LONG * smaller or sides[larger] > 2:
            return member
        return replace(member, info=replace(member.info, role="embedding"))

    return [replace(part, members=tuple(map(told, part.members))) for part in parts]


def _check_members(parts: list[_Part]) -> None:
    """Refuse what cannot be optimized, and what is there twice."""
    seen: dict[Tensor, str] = {}
    for member in (member for part in parts for member in part.members):
        parameter, name = member.parameter, member.info.name
        if parameter in seen:
            raise ScrimpError(f"{name} is the same parameter as {seen[parameter]}: hand it in once")
        if parameter.is_complex():
            raise ScrimpError(f"{name} is complex, which no optimizer here treats: hand in its real view")
        if not (parameter.is_leaf or parameter.retains_grad):
            raise ScrimpError(f"{name} is computed from other tensors: hand in those it is computed from")
        seen[parameter] = name


def _divide(
    part: _Part, options: Mapping[str, Any], projected: Mapping[str, Any] | None, by_hand: bool
) -> list[_Part]:
    """Divide a part into projected and other parameters, and a model's into decaying and other ones."""
    if projected is None:
        pieces = [replace(part, is_projected=False)]
    elif by_hand or projected[marker(projected)] is None:
        pieces = [_by_hand(part, projected)]
    else:
        pieces = _by_role(part, projected)
    if part.is_model and "weight_decay" in options:
        pieces = [half for piece in pieces for half in _by_decay(piece)]
    return pieces


def _by_hand(part: _Part, projected: Mapping[str, Any]) -> _Part:
    """Return a group as the user wrote it: projected where it has a rank."""
    word = marker(projected)
    if part.own.get(word) is None:
        useless = [key for key in projected if part.own.get(key) is not None]
        if useless:
            raise ScrimpError(f"{part.where}: {useless[0]} has no effect without {word}; give both or none")
        return replace(part, is_projected=False)
    return replace(part, is_projected=True, members=tuple(_asked(member) for member in part.members))


def _asked(member: _Member) -> _Member:
    """Return a matrix that is projected because the user says so, whatever its sides are."""
    info = member.info
    by_shape: dict[int, Role] = {2: "linear", 3: "experts"}
    role = by_shape.get(member.parameter.ndim, info.role) if info.role == "other" else info.role
    return replace(member, info=replace(info, role=role, asked=True))


def _by_role(part: _Part, projected: Mapping[str, Any]) -> list[_Part]:
    inner = tuple(member for member in part.members if member.info.role in _INNER)
    rest = tuple(member for member in part.members if member.info.role not in _INNER)
    others = {key: value for key, value in part.own.items() if key not in projected}
    pieces = [
        replace(part, members=inner, is_projected=True),
        replace(part, members=rest, is_projected=False, own=others),
    ]
    return [piece for piece in pieces if piece.members] or pieces[1:]


def _by_decay(part: _Part) -> list[_Part]:
    matrices = tuple(member for member in part.members if member.parameter.ndim >= 2)
    others = tuple(member for member in part.members if member.parameter.ndim < 2)
    pieces = [
        replace(part, members=matrices),
        replace(part, members=others, own={**part.own, "weight_decay": 0.0}),
    ]
    return [piece for piece in pieces if piece.members]


def _kind(value: Any) -> str:
    return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"
