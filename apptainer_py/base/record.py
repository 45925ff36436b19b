"""Immutable records without `dataclasses`, whose import alone costs more than our whole set-up."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, dataclass_transform
else:

    def dataclass_transform(**_rules):
        return lambda cls: cls


@dataclass_transform(frozen_default=True, kw_only_default=True)
class RecordType(type):
    """Turns the annotations of a class body into the fields of a keyword-only constructor."""

    def __new__(
        mcs, name: str, bases: tuple[type, ...], body: dict[str, Any], **options: Any
    ) -> RecordType:
        own = tuple(body.get("__annotations__", {}))
        defaults = {field: body.pop(field) for field in own if field in body}
        inherited: tuple[str, ...] = ()
        for base in bases:
            inherited += getattr(base, "_fields", ())
            defaults = {**getattr(base, "_defaults", {}), **defaults}
        body["_fields"] = inherited + own
        body["_known"] = frozenset(inherited + own)
        body["_defaults"] = defaults
        return super().__new__(mcs, name, bases, body, **options)


class Record(metaclass=RecordType):
    """A value: keyword-only, immutable, comparable, printable.

    Its fields are in its `__dict__`: a class with slots takes as long to make as a hundred values.
    """

    if TYPE_CHECKING:
        _fields: ClassVar[tuple[str, ...]]
        _defaults: ClassVar[dict[str, Any]]
    else:

        def __init__(self, **values):
            own = self.__dict__
            own.update(self._defaults)
            own.update(values)
            if own.keys() != self._known:
                self._explain(own)

        def _explain(self, own):
            for field in self._fields:
                if field not in own:
                    raise TypeError(f"{type(self).__name__}: missing field {field!r}")
            unknown = min(own.keys() - self._known)
            raise TypeError(f"{type(self).__name__}: unknown field {unknown!r}")

        def __setattr__(self, field, value):
            raise AttributeError(f"{type(self).__name__}.{field} is read-only")

        __delattr__ = lambda self, field: self.__setattr__(field, None)  # noqa: E731

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            TypeError: a name in `changes` is not a field.
        """
        return type(self)(**{**self.asdict(), **changes})

    def asdict(self) -> dict[str, Any]:
        """Return the fields by name, in the order in which they were declared."""
        own = self.__dict__
        return {field: own[field] for field in self._fields}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(
            getattr(self, field) == getattr(other, field) for field in self._fields
        )

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, field) for field in self._fields)))

    def __repr__(self) -> str:
        inside = ", ".join(f"{field}={getattr(self, field)!r}" for field in self._fields)
        return f"{type(self).__name__}({inside})"
