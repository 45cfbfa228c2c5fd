"""The settings of one member of a family (a search, an eviction rule): a dataclass in the member's file."""

import dataclasses

from memorizing.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Settings with a gin section of their own: the fields of `IvfSettings` are `Ivf.lists`, `Ivf.probes`, ..."""

    @classmethod
    def section(cls) -> str:
        """Returns the name of the gin section."""
        return cls.__name__.removesuffix("Settings")

    def _check_positive(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"{self.section()}.{field.name} = {value}: must be at least 1. Use 1 or more")
