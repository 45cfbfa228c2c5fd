"""Names of gin sections, ranges of settings, and the base class of settings that have a section of their own."""

import dataclasses

from memorizing.errors import InputError


def section_name(settings: type) -> str:
    """Returns the gin section of a settings dataclass: `Ivf` for `IvfSettings`, `Github` for the corpus `Github`."""
    return settings.__name__.removesuffix("Settings")


LARGEST_COUNT = 2**31 - 1
"""Largest count of slots, steps and tokens: arrays hold them in 32 bits."""


LARGEST_SEED = 2**32 - 1
"""Largest random seed: that of JAX without 64-bit numbers."""


def check_range(settings: object, least: int, most: int, *names: str) -> None:
    """Checks whole numbers among settings, before anything of their size is made or looped over.

    Raises:
        InputError: names the setting, its value and the bound.
    """
    for name in names:
        value = getattr(settings, name)
        if not least <= value <= most:
            bound = f"at least {least:,}" if value < least else f"at most {most:,}"
            raise InputError(f"{section_name(type(settings))}.{name} = {value}: must be {bound}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Settings with a gin section of their own: the fields of `IvfSettings` are `Ivf.lists`, `Ivf.probes`, ..."""

    @classmethod
    def section(cls) -> str:
        """Returns the name of the gin section."""
        return section_name(cls)

    def _check_positive(self) -> None:
        whole = [field.name for field in dataclasses.fields(self) if isinstance(getattr(self, field.name), int)]
        check_range(self, 1, LARGEST_COUNT, *whole)
