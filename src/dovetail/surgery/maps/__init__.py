"""Weight maps, one file a family: from part to part, each with its class of exactness.

    mixers       any mixer of heads for another: queries, keys, values and what is behind the heads by their names
    heads        numbers of key/value heads, biases, masks (window and sinks), score options of attention
    feedforward  widths, MLP to GLU
    gau          options of a gated attention unit, one normaliser for another
    norm         LayerNorm to RMSNorm, with the mean folded away or without; options of either
    position     one position for another, tables of another length
    embedding    another scale of the vectors
    ties         a head tied to the embedding, or freed from it

How weights are kept (int8, NF4) is in no spec: `quantise`, in `surgery/storage.py`, changes it in place. Maps to more or fewer layers, ids or neurons chosen by importance are functions of their own in `dovetail.surgery`:
which layer, id or neuron goes where is not in the spec.
"""

from dovetail.surgery.maps import embedding, feedforward, gau, heads, mixers, norm, position, ties
from dovetail.surgery.maps.base import (
    Exactness,
    MapEntry,
    Mapped,
    Place,
    find_map,
    map_entries,
    relative_error,
    weight_map,
    whole_map,
    whole_maps,
)

__all__ = [
    "Exactness", "MapEntry", "Mapped", "Place", "embedding", "feedforward", "find_map", "gau", "heads", "map_entries", "mixers", "norm", "position",
    "relative_error", "ties", "weight_map", "whole_map", "whole_maps",
]  # fmt: skip
