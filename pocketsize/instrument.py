"""Instrumenting a model: an overlay that puts transforms in the way of the model's own layers."""

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import AutocastScope

from pocketsize import fused_bn
from pocketsize.calls import call_with_weights, with_preactivation
from pocketsize.copies import copied
from pocketsize.errors import UserError
from pocketsize.graph import Graph, functional
from pocketsize.transform import Placement, check_data

ACTIVATION_POINTS = ('input', 'preactivation', 'output')


@keras.saving.register_keras_serializable(package='pocketsize')
class Instrumented(keras.Model):
  """Computes `source` with transforms in place.

  The layers and weights are those of `source`, not copies: training this trains `source`'s latent
  weights. It can be compiled, fitted, saved and loaded like any Keras model.

  Attributes:
    source: the user's model.
    graph: its `Graph`.
    transforms: all transforms, in order of placement, each once.
    stack: the `Stack` whose loss training adds, or None. Not saved.
    computed_by: `computed_by(node, args, kwargs, training)` computes a node and the transforms at
      it in place of this class, such as layers of another library; None as a rule. Not saved.
  """

  def __init__(self, source, placements=(), name=None, **kwargs):
    super().__init__(name=name or source.name, **kwargs)
    self.source = source
    self.graph = Graph(source)
    self.stack = None
    self.computed_by = None
    placements = sorted(placements, key=lambda placement: placement.transform.order)
    self._places = [(placement.path, placement.point) for placement in placements]
    self.transforms = list(
      {id(placement.transform): placement.transform for placement in placements}.values()
    )
    numbers = {id(transform): number for number, transform in enumerate(self.transforms)}
    self._numbers = [numbers[id(placement.transform)] for placement in placements]
    self._check()
    self._build_transforms()
    self.built = True

  @property
  def placements(self):
    """The placements, in the order in which they run at each place."""
    return [
      Placement(*place, self.transforms[number])
      for place, number in zip(self._places, self._numbers, strict=True)
    ]

  @property
  def output_names(self):
    """The names of the outputs, by which losses and metrics may be given."""
    return functional(self.source).output_names

  @property
  def trainable_variables(self):
    return self._training(super().trainable_variables)

  @property
  def trainable_weights(self):
    return self._training(super().trainable_weights)

  def _training(self, variables):
    """Returns those of `variables` that the stack trains; the user's model keeps its own flags."""
    if self.stack is None or self.stack.trains_source:
      return variables
    still = {id(variable) for variable in self.source.variables}
    return [variable for variable in variables if id(variable) not in still]

  @property
  def weight_places(self):
    """The (path, point) of the weights that have transforms, each once, in order."""
    return [place for place in dict.fromkeys(self._places) if place[1] not in ACTIVATION_POINTS]

  def transforms_at(self, path, point):
    """Returns the transforms at one place, in order."""
    return [
      self.transforms[number]
      for place, number in zip(self._places, self._numbers, strict=True)
      if place == (path, point)
    ]

  def _check(self):
    paths = {node.path for node in self.graph.nodes}
    for path, point, transform in self.placements:
      if path not in paths:
        raise UserError(
          f'There is no layer {path!r} to place {transform.name!r} at. '
          f'The layers are: {", ".join(sorted(paths))}.'
        )
      weight = getattr(self.graph.layers.get(path), point, None)
      if point not in ACTIVATION_POINTS and not isinstance(weight, keras.Variable):
        raise UserError(f'Layer {path!r} has no weight {point!r} to transform.')
      if point == 'preactivation' and not getattr(self.graph.layers.get(path), 'activation', None):
        raise UserError(f'Layer {path!r} has no activation of its own to put a transform before.')

  def _build_transforms(self):
    node_by_path = {node.path: node for node in self.graph.nodes}
    for path, point, transform in self.placements:
      if transform.built:
        continue
      if point in ACTIVATION_POINTS:
        node = node_by_path[path]
        transform.build(self.graph.shape((node.inputs if point == 'input' else node.outputs)[0]))
      else:
        transform.build(tuple(getattr(self.graph.layers[path], point).shape))

  def transformed(self, path, point, training=False, before=None):
    """Returns a layer's weight, a tensor, after its transforms, or those `before` one of them."""
    # Mixed precision would round it before the transforms; the layer casts what it gets.
    with AutocastScope(None):
      value = tf.convert_to_tensor(getattr(self.graph.layers[path], point))
    for transform in self.transforms_at(path, point):
      if transform is before:
        break
      value = transform(value, training=training)
    return value

  def baked(self, path, point='kernel'):
    """Returns a layer's weight as deployed, a float array."""
    return np.array(keras.ops.convert_to_numpy(self.transformed(path, point)))

  def deployed(self):
    """Returns {path of a layer: the arrays of its `weights`, as deployed}.

    A layer that stands in two nested models has two paths, and may have other transforms at each.
    """
    places = set(self.weight_places)
    arrays = {}
    for path, layer in self.graph.layers.items():
      point_by_weight = {
        id(getattr(layer, point)): point for place, point in places if place == path
      }
      arrays[path] = [
        self._deployed(path, weight, point_by_weight.get(id(weight))) for weight in layer.weights
      ]
    return arrays

  def _deployed(self, path, weight, point):
    array = np.array(keras.ops.convert_to_numpy(weight))
    return array if point is None else self.baked(path, point).astype(array.dtype)

  def call(self, inputs, training=None):
    # Symbolic calls, such as of a model around this one, compute nothing yet.
    if not training and not in_stateless_scope():
      with tf.init_scope():
        check_data(self.placements)
    observe = self.stack.observe if self.stack and training else None
    return self.run(inputs, training, observe=observe)

  def run(self, inputs, training=None, activate=None, observe=None):
    """Computes the outputs.

    Args:
      inputs: as `source` takes them.
      training: as for any Keras model; or a function of the node that says so.
      activate: `activate(transform, x)` in place of applying a transform to an activation; with it
        `computed_by` is passed by.
      observe: `observe(node, outputs)` is told what each node computes.
    """
    model = functional(self.source)

    def call(node, args, kwargs):
      mode = training(node) if callable(training) else training
      if self.computed_by and not activate:
        mode = bool(mode) and not node.inference_only
        outputs = self.computed_by(node, args, kwargs, mode)
      else:
        apply = activate or (lambda transform, x: transform(x, training=mode))
        outputs = self._call_node(node, args, kwargs, mode, apply)
      if observe:
        observe(node, outputs)
      return outputs

    outputs = self.graph.run(model._standardize_inputs(inputs), call)
    return keras.tree.pack_sequence_as(model._outputs_struct, outputs)

  def _call_node(self, node, args, kwargs, training, activate):
    training = False if node.inference_only else training
    for transform in self.transforms_at(node.path, 'input'):
      args = (activate(transform, args[0]), *args[1:])
    outputs = with_preactivation(
      node.operation,
      self.transforms_at(node.path, 'preactivation'),
      activate,
      lambda: self._compute_node(node, args, kwargs, training),
    )
    for transform in self.transforms_at(node.path, 'output'):
      outputs = activate(transform, outputs)
    return outputs

  def _compute_node(self, node, args, kwargs, training):
    if node.is_input:
      return args[0]
    weights = {
      point: self.transformed(node.path, point, training)
      for path, point in self.weight_places
      if path == node.path
    }

    def compute(training):
      if fused_bn.applicable(node.operation, args, kwargs):
        return fused_bn.batch_norm(node.operation, args[0], training, weights)
      given = {**kwargs, 'training': training} if node.takes_training else kwargs
      if weights:
        return call_with_weights(node.operation, weights, args, given)
      return node.operation(*args, **given)

    switches = self.transforms_at(node.path, fused_bn.SWITCH_POINT) if training else ()
    return fused_bn.unless_frozen(switches, lambda: compute(training), lambda: compute(False))

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    loss = super().compute_loss(x, y, y_pred, sample_weight, training)
    return loss + self.stack.loss(x, y, y_pred) if self.stack and training else loss

  def get_config(self):
    return {
      'name': self.name,
      'source': keras.saving.serialize_keras_object(self.source),
      # A transform that stands at several places is written once, then by its number.
      'placements': [
        [
          *place,
          number
          if number in self._numbers[:index]
          else keras.saving.serialize_keras_object(self.transforms[number]),
        ]
        for index, (place, number) in enumerate(zip(self._places, self._numbers, strict=True))
      ],
    }

  @classmethod
  def from_config(cls, config, custom_objects=None):
    load = keras.saving.deserialize_keras_object
    placements, transforms = [], []
    for path, point, transform in config['placements']:
      if not isinstance(transform, int):
        transforms.append(load(transform, custom_objects=custom_objects))
      number = transform if isinstance(transform, int) else -1
      placements.append(Placement(path, point, transforms[number]))
    return cls(
      load(config['source'], custom_objects=custom_objects), placements, name=config['name']
    )


def instrument(model, placements=()):
  """Returns `model` with transforms in place, sharing its layers and weights.

  Args:
    model: a built Functional or Sequential model, nested ones included.
    placements: iterable of `Placement`; what `is_shareable` may stand at several places.

  Raises:
    UserError: a subclassed or unbuilt model, or a place that does not exist.
  """
  placements = list(placements)
  own = [id(each.transform) for each in placements if not each.transform.is_shareable]
  if len(set(own)) < len(own):
    raise ValueError(
      'Argument `placements` has one transform at two places; each place needs its own.'
    )
  return Instrumented(model, placements)


def strip(model):
  """Returns an ordinary model: stock layers, the structure of the source, weights as deployed.

  Activation transforms are left out, so with quantized activations the outputs differ by them.

  Args:
    model: an `Instrumented` model. Its weights are copied, not shared.
  """
  stripped = copied(model.source)
  layers = Graph(stripped).layers
  for path, point in model.weight_places:
    getattr(layers[path], point).assign(model.baked(path, point))
  return stripped
