"""Calling a layer otherwise than it is: with other weights, or with work before its activation."""

import keras


def call_with_weights(layer, weights, args, kwargs):
  """Calls `layer` with tensors in place of its weights.

  What the layer itself assigns, such as moving statistics, and its activity losses stay.

  Args:
    layer: a Keras layer.
    weights: {attribute that holds a weight: tensor}.
    args, kwargs: of the call.
  """
  mapping = [(getattr(layer, point), value) for point, value in weights.items()]
  with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
    given = dict(scope.state_mapping)
    outputs = layer(*args, **kwargs)
  for variable in layer.variables:
    value = scope.get_current_value(variable)
    if value is not None and value is not given.get(id(variable)):
      variable.assign(value)
  if scope.losses:  # of an activity regularizer
    layer.add_loss(scope.losses)
  return outputs


def with_preactivation(layer, transforms, activate, compute):
  """Returns compute(), a call of `layer`, with transforms of what its own activation reads.

  They run after the call, so that what they remember is not kept in the call's stateless scope.
  """
  if not transforms:
    return compute()
  activation, layer.activation = layer.activation, None
  try:
    outputs = compute()
  finally:
    layer.activation = activation
  for transform in transforms:
    outputs = activate(transform, outputs)
  return activation(outputs)
