"""Every architecture that the coverage table has a row for: random weights, small, as users call
them.

Names of models live in the benchmarks and nowhere else: the compiler knows none of them.
"""

from benchmarks.zoo.records import ROW, TINY, Architecture, Scale, Unavailable, checkpoint
from benchmarks.zoo.routing import Routing, decisive_routers
from benchmarks.zoo.rows import ZOO

__all__ = [
    "ROW",
    "TINY",
    "ZOO",
    "Architecture",
    "Routing",
    "Scale",
    "Unavailable",
    "checkpoint",
    "decisive_routers",
]
