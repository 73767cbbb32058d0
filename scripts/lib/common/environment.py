"""Settings from environment variables, checked by pydantic."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class InvalidConfiguration(Exception):
    """A variable has a value that cannot be used; the message names it and shows no secret."""


class Environment(BaseModel):
    """Base class of settings. The field ``host`` is read from the variable ``HOST``.

    Another variable is named with ``Field(alias=...)``. A field with ``Field(repr=False)`` is a
    secret: neither error messages nor ``repr`` show its value.
    """

    model_config = ConfigDict(
        frozen=True,
        alias_generator=str.upper,
        populate_by_name=True,
    )

    @classmethod
    def read(cls, environ: Mapping[str, str], prefix: str = "", **defaults: Any) -> Self:
        """Return the settings from the variables whose names begin with ``prefix``.

        ``defaults`` are the values of variables that are unset, by their names without prefix.
        An empty variable counts as unset: Compose passes on as empty what the user left out.
        Raises InvalidConfiguration.
        """
        values = defaults
        for variable, value in environ.items():
            if value and variable.startswith(prefix):
                values[variable.removeprefix(prefix)] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        secret = [field.alias for field in cls.model_fields.values() if not field.repr]
        shown = "***" if name in secret else str(values.get(name, ""))
        reason = problem["msg"].removeprefix("Value error, ")
        if shown.startswith("tcp://"):
            reason = (
                "Kubernetes sets this for a Service of that name; set enableServiceLinks: false"
            )
        raise InvalidConfiguration(f"invalid configuration: {prefix}{name}={shown}: {reason}")
