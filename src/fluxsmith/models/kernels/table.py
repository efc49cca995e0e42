"""TRITON: the lean table with the kernels of this folder in place of layer norm and of the preparation of heads.

`gate` stays torch's: `addcmul` is one pass over memory already. Importing this module needs triton.
"""

from fluxsmith.models.kernels.heads import turned_heads
from fluxsmith.models.kernels.norm import modulated
from fluxsmith.models.ops import LEAN

TRITON = LEAN._replace(modulate=modulated, heads=turned_heads)
