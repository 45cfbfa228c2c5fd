"""A search for each kind of device, of which the program that is compiled takes one."""

import dataclasses

from jax import lax

from memorizing.memory.search.contract import Keys, Neighbours, Search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Search):
    """By the platform that is compiled for, which need not be one that is here. None of them may keep an index.

    Attributes:
        by_platform: searches by the platform's name in JAX.
        otherwise: on all others.
    """

    by_platform: tuple[tuple[str, Search], ...]
    otherwise: Search

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbours: int) -> Neighbours:
        def with_neighbours(search: Search):
            return lambda queries_BHND, keys, valid_BM: search(queries_BHND, keys, valid_BM, neighbours)

        ways = {platform: with_neighbours(search) for platform, search in self.by_platform}
        default = with_neighbours(self.otherwise)
        return lax.platform_dependent(queries_BHND, keys, valid_BM, default=default, **ways)
