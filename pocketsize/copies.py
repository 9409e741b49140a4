"""Copies of models, and which models can be copied."""

import random

import keras

from pocketsize.errors import UserError, first_sentence
from pocketsize.graph import Graph


def copied(model):
  """Returns a copy of a model: its structure, names, weights and frozen flags.

  Raises:
    UserError: see `check_copyable`.
  """
  try:
    copy = keras.models.clone_model(model)
  except Exception:
    check_copyable(Graph(model))
    raise
  originals = Graph(model).layers
  # By path, since a layer that is shared among nested models has a copy in each of them.
  for path, layer in Graph(copy).layers.items():
    if layer.weights:
      layer.set_weights(originals[path].get_weights())
  finalize_normalization(copy)
  return copy


def finalize_normalization(model):
  """Lets `Normalization` layers take over weights that were set: they compute with constants."""
  for layer in Graph(model).layers.values():
    if isinstance(layer, keras.layers.Normalization) and layer.weights:
      layer.finalize_state()


def check_copyable(graph):
  """Raises a UserError for a layer of a `Graph` that Keras cannot make again from its config."""
  # Keras draws seeds for what it makes from Python's generator: a check changes no later model.
  state = random.getstate()
  try:
    for path, layer in graph.layers.items():
      _check_copyable(path, layer)
  finally:
    random.setstate(state)


def _check_copyable(path, layer):
  try:
    type(layer).from_config(layer.get_config())
  except Exception as error:
    raise UserError(
      f'Layer {path!r} cannot be made again from its configuration, as for a file: give it '
      'functions and classes that are registered with keras.saving.register_keras_serializable, '
      f'and no lambda. Received: {type(error).__name__}: {first_sentence(error)}.'
    ) from error
