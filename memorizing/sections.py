"""Names of gin sections, and the settings of one member of a family (a search, an eviction rule) in its own section."""

import dataclasses

from memorizing.errors import InputError


def section_name(settings: type) -> str:
    """Returns the gin section of a settings dataclass: `Ivf` for `IvfSettings`, `Github` for the corpus `Github`."""
    return settings.__name__.removesuffix("Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Settings with a gin section of their own: the fields of `IvfSettings` are `Ivf.lists`, `Ivf.probes`, ..."""

    @classmethod
    def section(cls) -> str:
        """Returns the name of the gin section."""
        return section_name(cls)

    def _check_positive(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"{self.section()}.{field.name} = {value}: must be at least 1. Use 1 or more")
