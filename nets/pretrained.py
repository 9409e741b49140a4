"""Pretrained weights from a file: read all, compare all with the model, and only then assign."""

import pathlib
import zipfile

import h5py
import keras
import numpy as np

from pocketsize.copies import finalize_normalization
from pocketsize.errors import UserError
from pocketsize.graph import Graph, inlined
from pocketsize.instrument import Instrumented


def load(model, path, names):
  """Copies the weights of a file into `model`: all of them or, on an error, none.

  Args:
    model: a built keras.Model.
    path: `.keras` file (any architecture with the same weights in the same order), `.weights.h5`
      file of the same architecture, or `.npz` file.
    names: function model -> {weight path: array name in an .npz file}.

  Raises:
    UserError: the file is missing, of another kind, unreadable, or does not fit the model.
  """
  path = _existing(path)
  _assign(model, path, _arrays(model, path, names, _saved(path)))


def load_or_pruned(model, path, names):
  """Returns `model` with the weights of a file, or the model in it where pruning left that of it.

  Args, errors: those of `load`.
  """
  path = _existing(path)
  saved = _saved(path)
  if saved is not None and is_pruned(saved, model):
    return saved
  _assign(model, path, _arrays(model, path, names, saved))
  return model


def is_pruned(saved, model):
  """Returns whether a Keras model is another one with fewer channels.

  It then has inputs and outputs of the same shapes and the layers with weights of `model`, with as
  many axes and no more channels. A layer may have got a bias, which holds what dropped channels of
  constant value gave it.
  """
  if not isinstance(saved, keras.Model):
    return False
  layers, theirs = Graph(model).layers, Graph(saved).layers
  ours = inlined(layers)
  found = {id(ours.get(name)) for name in theirs}
  if any(layer.weights and id(layer) not in found for layer in layers.values()):
    return False
  smaller = False
  for name, layer in theirs.items():
    known = ours.get(name)
    shapes = _shapes(layer, known)
    limits = [tuple(weight.shape) for weight in known.weights] if known else []
    if shapes and not _fit(shapes, limits):
      return False
    smaller |= shapes != limits
  return smaller and _ends(saved) == _ends(model)


def _shapes(layer, known):
  """The shapes of a layer's weights, without a bias that the layer it was made of has not."""
  added = getattr(layer, 'bias', None) if getattr(known, 'bias', None) is None else None
  return [tuple(weight.shape) for weight in layer.weights if weight is not added]


def _fit(shapes, limits):
  """Whether weights have the axes of others, and no axis is longer."""
  return [len(shape) for shape in shapes] == [len(limit) for limit in limits] and all(
    size <= limit
    for shape, most in zip(shapes, limits, strict=True)
    for size, limit in zip(shape, most, strict=True)
  )


def _ends(model):
  return [tuple(symbol.shape) for symbol in (*model.inputs, *model.outputs)]


def _existing(path):
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    raise UserError(f'Pretrained file {path}: must be a file. Received: a folder.')
  if not path.is_file():
    raise UserError(f'Pretrained file {path}: must exist. Received: no such file.')
  return path


def _saved(path):
  """Returns what a `.keras` file holds, None for other files."""
  if path.suffix != '.keras':
    return None
  saved = _read(path, lambda: keras.models.load_model(path, compile=False))
  if isinstance(saved, Instrumented):
    raise UserError(
      f'Pretrained file {path}: must hold a float model, such as final.keras of a work folder. '
      'Received: a model that has been quantized already.'
    )
  return saved


def _arrays(model, path, names, saved):
  """Returns the arrays of a file in the order of `model.weights`, None where it has none."""
  if saved is not None:
    return [np.array(weight) for weight in saved.weights]
  if path.name.endswith('.weights.h5'):
    return _read(path, lambda: _from_h5(model, path))
  if path.suffix == '.npz':
    return _read(path, lambda: _from_npz(names(model), path))
  raise UserError(f'Pretrained file {path}: must end in .keras, .weights.h5 or .npz.')


def _assign(model, path, arrays):
  for index, weight in enumerate(model.weights):
    array = arrays[index] if index < len(arrays) else None
    if array is None:
      raise UserError(f'Pretrained file {path}: has no weight {weight.path}, the model wants one.')
    if array.shape != tuple(weight.shape):
      raise UserError(
        f'Pretrained file {path}: weight {weight.path} has shape {array.shape}, '
        f'the model wants {tuple(weight.shape)}'
      )
  if len(arrays) > len(model.weights):
    raise UserError(
      f'Pretrained file {path}: has {len(arrays)} weights, the model wants {len(model.weights)}.'
    )
  for weight, array in zip(model.weights, arrays, strict=True):
    weight.assign(array)
  finalize_normalization(model)


def _read(path, read):
  if path.suffix == '.h5':
    kind, is_whole = 'HDF5 file', h5py.is_hdf5(path)
  else:
    kind, is_whole = f'{path.suffix} archive', zipfile.is_zipfile(path)
  if not is_whole:
    raise UserError(f'Pretrained file {path}: cannot be read: it is not a whole {kind}.')
  try:
    return read()
  except UserError:
    raise
  # Whatever a damaged file, or one with layers that this process does not know, makes readers do.
  except Exception as error:
    raise UserError(
      f'Pretrained file {path}: cannot be read: {type(error).__name__}: {error}'
    ) from error


def _from_npz(name_by_path, path):
  """Arrays in the order of the names."""
  with np.load(path, allow_pickle=False) as archive:
    for weight, name in name_by_path.items():
      if name not in archive:
        raise UserError(
          f'Pretrained file {path}: has no array {name!r}, which the model wants for {weight}.'
        )
    surplus = [name for name in archive.files if name not in set(name_by_path.values())]
    if surplus:
      raise UserError(f'Pretrained file {path}: has {surplus[0]!r}, the model wants no such array.')
    return [archive[name] for name in name_by_path.values()]


def _from_h5(model, path):
  """Arrays in the order of `model.weights`, None where the file has none.

  Keras finds each layer's group in the file but assigns as it goes and says little when a shape
  differs. So it walks a clone, whose layers only note what they are given.
  """
  clone = keras.models.clone_model(model)
  array_by_weight = {}
  for layer in clone._flatten_layers():
    layer.load_own_variables = _note(layer, array_by_weight)
  clone.load_weights(path)
  arrays = [array_by_weight.get(id(weight)) for weight in clone.weights]
  # Layers of the file that the model lacks are never asked for; they show in the count alone.
  return arrays + [None] * (_count_weights(path) - len(array_by_weight))


def _count_weights(path):
  """Arrays of layers in a `.weights.h5` file, without optimizer and random states."""
  names = []
  with h5py.File(path) as file:
    file.visititems(
      lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
    )
  return len([name for name in names if name.startswith('layers/') and 'seed_gen' not in name])


def _note(layer, array_by_weight):
  """A `load_own_variables` that keeps the stored arrays by weight and changes nothing."""
  inner = {
    id(weight)
    for child in layer._flatten_layers(include_self=False, recursive=False)
    for weight in child.weights
  }
  own = [weight for weight in layer.weights if id(weight) not in inner]

  def load_own_variables(store):
    for index, weight in enumerate(own):
      if str(index) in store.keys():
        array_by_weight[id(weight)] = np.array(store[str(index)])

  return load_own_variables
