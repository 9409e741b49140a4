"""What each type of layer does with channels: one rule a type.

A rule reads the `Labels` of the inputs and returns those of the output. On the way it makes, ties
and freezes channels, and says which weights and arguments shrink with them. Layers and operators of
the same class name share a rule. A rule that cannot say what happens raises `Frozen`: the channels
that touch the layer then stay as they are.
"""

from pocketsize.channel_rules import joining, moving, weighted
from pocketsize.channel_rules.base import Dropped, apply

__all__ = ['Dropped', 'apply', 'joining', 'moving', 'weighted']
