"""The overlay: the user's model to the last layer, with transforms in its way."""

import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import MODELS, compile_for_logits, conv_net, images, labels, nested_net, shared_net

from pocketsize import conversion
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.instrument import Instrumented, instrument, strip
from pocketsize.quantization.quantizers import ActivationQuantizer
from pocketsize.sparsity.magnitude import Mask
from pocketsize.targets import weight_points, weighted_layers
from pocketsize.transform import Placement, Transform


class Scaled(Transform):
  """Multiplies by a constant: a transform whose effect can be worked out by hand."""

  def __init__(self, factor, **kwargs):
    super().__init__(**kwargs)
    self.factor = factor

  def call(self, x, training=None):
    return x * self.factor


class Plus(Scaled):
  """Adds a constant, after every `Scaled`."""

  order = 10

  def call(self, x, training=None):
    return x + self.factor


def masked(model, seed=5, kept=0.5):
  """Returns `model` with a random mask on every kernel."""
  graph = Graph(model)
  placements = [
    Placement(path, point, Mask())
    for path, layer in weighted_layers(graph).items()
    for point in weight_points(layer)
  ]
  instrumented = instrument(model, placements)
  rng = np.random.default_rng(seed)
  for transform in instrumented.transforms:
    transform.mask.assign((rng.random(transform.mask.shape) < kept).astype('float32'))
  return instrumented


@pytest.mark.parametrize('name', MODELS)
def test_an_empty_overlay_computes_the_same_in_inference(name):
  model = MODELS[name]()
  np.testing.assert_allclose(
    instrument(model)(images(), training=False), model(images(), training=False), atol=1e-5
  )


@pytest.mark.parametrize('name', MODELS)
def test_an_empty_overlay_trains_like_the_model(name):
  """Fused and stock batch norm sum in another order: 1e-6 a step, 1e-4 after four steps."""
  twins = [compile_for_logits(MODELS[name]()), compile_for_logits(instrument(MODELS[name]()))]
  for model in twins:
    model.fit(images(32), labels(32), batch_size=8, epochs=1, shuffle=False, verbose=0)
  stock, overlay = twins
  for expected, got in zip(stock.weights, overlay.source.weights, strict=True):
    assert expected.path == got.path
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('scale', 'center'), [(True, True), (False, True), (True, False)])
def test_fused_batch_norm_equals_the_stock_layer(scale, center):
  """Outputs, statistics and gradients over several steps; 6 values, so that n / (n - 1) counts."""

  def net():
    inputs = keras.Input((2, 1, 3))
    return keras.Model(
      inputs,
      layers.BatchNormalization(momentum=0.7, epsilon=0.01, scale=scale, center=center, name='bn')(
        inputs
      ),
    )

  stock, source = net(), net()
  overlay = instrument(source)
  target = images(3, seed=9)[:, :2, :1]
  for step in range(4):
    x = tf.constant(images(3, seed=step)[:, :2, :1] * 2 + 1)
    gradients = []
    for model in (stock, overlay):
      with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=True)
        loss = tf.reduce_sum((y - target) ** 3)
      gradients.append(
        (y, *tape.gradient(loss, [x, *[v.value for v in model.trainable_variables]]))
      )
    for expected, got in zip(*gradients, strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  for expected, got in zip(stock.weights, source.weights, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  x = images(3)[:, :2, :1]
  np.testing.assert_allclose(overlay(x), stock(x), rtol=1e-5, atol=1e-5)


def test_moving_statistics_move_only_in_training():
  model = conv_net()
  overlay = instrument(model)
  before = np.array(model.get_layer('bn0').moving_mean)
  overlay(images(), training=False)
  np.testing.assert_array_equal(model.get_layer('bn0').moving_mean, before)
  overlay(images(), training=True)
  assert np.abs(model.get_layer('bn0').moving_mean - before).max() > 1e-3


def test_a_frozen_batch_norm_uses_and_keeps_its_moving_statistics():
  model = conv_net()
  model.get_layer('bn0').trainable = False
  overlay = instrument(model)
  before = np.array(model.get_layer('bn0').moving_mean)
  np.testing.assert_allclose(
    overlay(images(), training=True), model(images(), training=True), atol=1e-5
  )
  np.testing.assert_array_equal(model.get_layer('bn0').moving_mean, before)


def test_a_base_called_with_training_false_keeps_its_batch_norm_as_it_is():
  """As Keras' guide does transfer learning: no batch statistics, no new moving statistics."""
  base = conv_net('base')
  inputs = keras.Input((8, 8, 3))
  overlay = instrument(keras.Model(inputs, base(inputs, training=False)))
  before = np.array(base.get_layer('bn0').moving_mean)
  np.testing.assert_allclose(
    overlay(images(), training=True), base(images(), training=False), atol=1e-5
  )
  np.testing.assert_array_equal(base.get_layer('bn0').moving_mean, before)


def test_integer_images_into_batch_norm_fall_back_to_keras():
  inputs = keras.Input((4, 4, 3), dtype='uint8')
  model = keras.Model(inputs, layers.BatchNormalization()(inputs))
  x = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3)).astype('uint8')
  np.testing.assert_allclose(instrument(model)(x), model(x), rtol=1e-6)


LAYERS = [
  (layers.Conv1D(4, 3), (7, 2)),
  (layers.Conv2D(4, 3, groups=2), (7, 7, 2)),
  (layers.Conv3D(4, 2), (4, 4, 4, 2)),
  (layers.Conv1DTranspose(4, 3), (5, 2)),
  (layers.Conv2DTranspose(4, 3, strides=2), (5, 5, 2)),
  (layers.Conv3DTranspose(4, 2), (3, 3, 3, 2)),
  (layers.DepthwiseConv1D(3), (7, 2)),
  (layers.DepthwiseConv2D(3, depth_multiplier=2), (7, 7, 2)),
  (layers.SeparableConv1D(4, 3), (7, 2)),
  (layers.SeparableConv2D(4, 3), (7, 7, 2)),
  (layers.Dense(4), (5,)),
  (layers.EinsumDense('abc,cde->abde', (None, 2, 3), bias_axes='de'), (4, 5)),
]


@pytest.mark.parametrize(
  ('template', 'shape'), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS]
)
def test_a_mask_on_each_layer_type_acts_like_zeros_in_its_weights(template, shape):
  """The oracle is the stock layer with the masked weights written into it; also after strip."""
  keras.utils.set_random_seed(0)
  layer = type(template).from_config(template.get_config())
  inputs = keras.Input(shape)
  model = keras.Model(inputs, layer(inputs))
  overlay = masked(model)
  x = np.random.default_rng(0).normal(size=(3, *shape)).astype('float32')
  got, unmasked = np.array(overlay(x)), np.array(model(x))
  stripped = np.array(strip(overlay)(x))
  for path, point, transform in overlay.placements:
    weight = getattr(overlay.graph.layers[path], point)
    weight.assign(weight * transform.mask)
  np.testing.assert_allclose(got, model(x), atol=1e-6)
  np.testing.assert_allclose(stripped, model(x), atol=1e-6)
  assert np.abs(got - unmasked).max() > 1e-3


def norm_net(rank):
  """Dense or conv with bias, a batch norm that folds, a ReLU and a batch norm that does not."""
  keras.utils.set_random_seed(6)
  inputs = keras.Input((6, 6, 3) if rank == 4 else (5,))
  x = (layers.Conv2D(4, 3, name='first') if rank == 4 else layers.Dense(4, name='first'))(inputs)
  x = layers.ReLU()(layers.BatchNormalization(momentum=0.7, name='folds')(x))
  x = layers.Flatten()(layers.BatchNormalization(momentum=0.7, name='stays')(x))
  return keras.Model(inputs, layers.Dense(2, name='head')(x))


SCALED = [
  ('first', 'bias', 2.0),
  ('folds', 'gamma', 3.0),
  ('folds', 'beta', -1.0),
  ('stays', 'gamma', 0.5),
  ('stays', 'beta', 4.0),
  ('head', 'bias', -2.0),
]


def scaled_everywhere(rank):
  """Returns (overlay with scaled biases, factors and shifts, a stock model that has them)."""
  model, oracle = norm_net(rank), norm_net(rank)
  for each in (model, oracle):
    rng = np.random.default_rng(2)
    for weight in each.weights:
      if weight.name in ('bias', 'gamma', 'beta'):
        weight.assign(rng.normal(size=weight.shape))
  overlay = instrument(
    model, [Placement(path, point, Scaled(factor)) for path, point, factor in SCALED]
  )
  for path, point, factor in SCALED:
    weight = getattr(oracle.get_layer(path), point)
    weight.assign(weight * factor)
  x = np.random.default_rng(1).normal(size=(8, *model.inputs[0].shape[1:])).astype('float32')
  return overlay, oracle, x


@pytest.mark.parametrize('rank', [2, 4])
def test_biases_factors_and_shifts_can_be_transformed(rank):
  """On images by the fused kernel, else by the stock layer; their moving statistics move."""
  overlay, oracle, x = scaled_everywhere(rank)
  for training in (False, True, True, False):
    np.testing.assert_allclose(
      overlay(x, training=training), oracle(x, training=training), rtol=1e-4, atol=1e-4
    )
  for name in ('folds', 'stays'):
    norm, expected = overlay.source.get_layer(name), oracle.get_layer(name)
    assert np.abs(expected.moving_mean).max() > 0.01
    for point in ('moving_mean', 'moving_variance'):
      np.testing.assert_allclose(getattr(norm, point), getattr(expected, point), rtol=1e-4)
  for expected, got in zip(oracle.weights, strip(overlay).weights, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('rank', [2, 4])
def test_moving_statistics_move_within_fit_and_gradients_reach_the_latent_factor(rank):
  overlay, _, x = scaled_everywhere(rank)
  norm = overlay.source.get_layer('folds')
  before = [np.array(weight) for weight in norm.weights]
  compile_for_logits(overlay).fit(x, labels() % 2, batch_size=8, verbose=0)
  for old, weight in zip(before, norm.weights, strict=True):
    assert np.abs(old - weight).max() > 1e-6, weight.path


@pytest.mark.parametrize('rank', [2, 4])
def test_what_is_exported_has_biases_factors_and_shifts_as_deployed(rank, tmp_path):
  overlay, oracle, x = scaled_everywhere(rank)
  for each in (overlay, oracle):
    each(x, training=True)
  (file,) = conversion.export(overlay, tmp_path, ['tflite'])
  (got,) = conversion.open_file(file.path)(x)
  np.testing.assert_allclose(got, oracle(x), rtol=1e-4, atol=1e-4)


def test_gradients_flow_to_the_latent_kernel_and_masked_entries_get_none():
  """d/dK of sum(x @ (K * M)) is M times the column sums of x, by hand 2 and 5."""
  inputs = keras.Input((2,))
  model = keras.Model(inputs, layers.Dense(2, use_bias=False, name='dense')(inputs))
  overlay = instrument(model, [Placement('dense', 'kernel', Mask())])
  overlay.transforms[0].mask.assign([[1, 0], [0, 1]])
  with tf.GradientTape() as tape:
    y = tf.reduce_sum(overlay(tf.constant([[0.5, 2.0], [1.5, 3.0]]), training=True))
  kernel = model.get_layer('dense').kernel
  np.testing.assert_array_equal(tape.gradient(y, kernel.value), [[2, 0], [0, 5]])


def test_masked_weights_keep_their_latent_value_through_fit():
  overlay = compile_for_logits(masked(conv_net()))
  kernel, mask = (
    overlay.graph.layers['conv1'].kernel,
    np.array(overlay.transforms_at('conv1', 'kernel')[0].mask),
  )
  before = np.array(kernel)
  overlay.fit(images(16), labels(16), batch_size=8, verbose=0)
  np.testing.assert_array_equal(np.array(kernel)[mask == 0], before[mask == 0])
  assert np.all(np.array(kernel)[mask == 1] != before[mask == 1])


def test_transforms_run_in_their_order_whatever_the_order_of_placements():
  """Kernel 3, times 2, plus 1 is 7 (and not 8)."""
  inputs = keras.Input((1,))
  model = keras.Model(inputs, layers.Dense(1, use_bias=False, name='dense')(inputs))
  model.set_weights([np.float32([[3]])])
  overlay = instrument(
    model, [Placement('dense', 'kernel', Plus(1.0)), Placement('dense', 'kernel', Scaled(2.0))]
  )
  assert overlay.baked('dense').tolist() == [[7.0]]
  assert (
    overlay.transformed(
      'dense', 'kernel', before=overlay.transforms_at('dense', 'kernel')[1]
    ).numpy()
    == 6.0
  )


def test_input_and_output_transforms_by_hand():
  """x = 5: input times 2, dense times 3, output plus 1 is 31; an InputLayer takes them too."""
  inputs = keras.Input((1,), name='x')
  model = keras.Model(inputs, layers.Dense(1, use_bias=False, name='dense')(inputs))
  model.set_weights([np.float32([[3]])])
  overlay = instrument(
    model, [Placement('dense', 'input', Scaled(2.0)), Placement('dense', 'output', Plus(1.0))]
  )
  assert overlay(np.float32([[5]])).numpy().item() == 31.0
  overlay = instrument(model, [Placement('x', 'output', Plus(1.0))])
  assert overlay(np.float32([[5]])).numpy().item() == 18.0


def test_activate_replaces_activation_transforms_and_leaves_weight_transforms():
  inputs = keras.Input((1,), name='x')
  model = keras.Model(inputs, layers.Dense(1, use_bias=False, name='dense')(inputs))
  model.set_weights([np.float32([[3]])])
  overlay = instrument(
    model, [Placement('dense', 'kernel', Scaled(2.0)), Placement('dense', 'output', Plus(1.0))]
  )
  assert overlay.run(np.float32([[5]]), activate=lambda transform, x: x).numpy().item() == 30.0


def test_a_mask_travels_through_an_activation_transform():
  """Without the padding [1, 0, 0] has the mean of its one word; no warning of a lost mask."""
  keras.utils.set_random_seed(0)
  inputs = keras.Input((3,), dtype='int32')
  x = layers.Embedding(4, 2, mask_zero=True, name='words')(inputs)
  model = keras.Model(inputs, layers.GlobalAveragePooling1D()(x))
  overlay = instrument(model, [Placement('words', 'output', Scaled(1.0))])
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    mean = overlay(np.array([[1, 0, 0]]))[0]
  np.testing.assert_allclose(mean, model.get_layer('words').embeddings[1], atol=1e-6)


def test_an_activity_regularizer_is_in_the_loss_with_a_transform_on_the_kernel():
  """0.5 * (3^2 + 6^2), over the batch of 2 as Keras does: 11.25."""
  inputs = keras.Input((1,))
  model = keras.Model(
    inputs,
    layers.Dense(1, use_bias=False, activity_regularizer=keras.regularizers.L2(0.5), name='dense')(
      inputs
    ),
  )
  model.set_weights([np.float32([[3]])])
  x = np.float32([[1], [2]])
  overlay = instrument(model, [Placement('dense', 'kernel', Mask())])
  for _ in range(2):
    overlay(x)
    assert [float(loss) for loss in overlay.losses] == [11.25]


def test_a_weight_regularizer_is_in_the_loss():
  """0.5 * 3^2 = 4.5 on the latent kernel."""
  inputs = keras.Input((1,))
  model = keras.Model(
    inputs,
    layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5), name='dense')(
      inputs
    ),
  )
  model.set_weights([np.float32([[3]])])
  overlay = instrument(model, [Placement('dense', 'kernel', Mask())])
  overlay(np.float32([[1]]))
  assert [float(loss) for loss in overlay.losses] == [4.5]


def test_dropout_acts_in_training_only():
  inputs = keras.Input((4,))
  model = keras.Model(inputs, layers.Dropout(0.5, seed=1)(inputs))
  overlay, x = instrument(model), np.ones((100, 4), 'float32')
  np.testing.assert_array_equal(overlay(x, training=False), x)
  np.testing.assert_array_equal(overlay.predict(x, verbose=0), x)
  assert set(np.unique(overlay(x, training=True))) == {0.0, 2.0}


def test_transfer_learning_leaves_frozen_weights_alone_to_the_last_bit():
  model = nested_net()
  model.get_layer('base').trainable = False
  overlay = compile_for_logits(masked(model, kept=1.0))
  frozen = [np.array(weight) for weight in model.get_layer('base').weights]
  head = np.array(model.get_layer('head').kernel)
  overlay.fit(images(16), labels(16), batch_size=8, verbose=0)
  for before, weight in zip(frozen, model.get_layer('base').weights, strict=True):
    np.testing.assert_array_equal(weight, before)
  assert np.abs(model.get_layer('head').kernel - head).max() > 1e-4
  assert {variable.path for variable in overlay.trainable_variables} == {'head/kernel', 'head/bias'}


def test_a_shared_kernel_has_one_mask_that_acts_at_both_calls():
  model = shared_net()
  overlay = masked(model, kept=0.0)
  head = np.broadcast_to(model.get_layer('head').bias, (8, 4))
  np.testing.assert_array_equal(overlay(images()), head)
  assert [place[:2] for place in overlay.placements].count(('conv', 'kernel')) == 1


@pytest.mark.parametrize('name', MODELS)
def test_save_and_load_give_the_same_model(name, tmp_path):
  overlay = masked(MODELS[name]())
  first = Graph(overlay.source).inputs[0]
  overlay = instrument(
    overlay.source,
    [
      *overlay.placements,
      Placement(Graph(overlay.source).producer(first).path, 'output', ActivationQuantizer(6, 0.5)),
    ],
  )
  overlay.transforms[-1].low.assign(-1.0)
  overlay.transforms[-1].high.assign(1.5)
  overlay.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  assert type(loaded) is Instrumented and loaded.stack is None
  assert [place[:2] for place in loaded.placements] == [place[:2] for place in overlay.placements]
  assert loaded.transforms[-1].bits == 6 and loaded.transforms[-1].momentum == 0.5
  for expected, got in zip(overlay.weights, loaded.weights, strict=True):
    np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(loaded(images()), overlay(images()))


def test_a_compiled_model_loads_with_its_optimizer(tmp_path):
  overlay = compile_for_logits(masked(conv_net()))
  overlay.fit(images(16), labels(16), batch_size=8, verbose=0)
  overlay.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  assert int(loaded.optimizer.iterations) == 2
  for expected, got in zip(overlay.optimizer.variables, loaded.optimizer.variables, strict=True):
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('name', MODELS)
def test_strip_gives_stock_layers_with_the_same_names_structure_and_outputs(name):
  model = MODELS[name]()
  overlay = masked(model)
  stripped = strip(overlay)
  assert type(stripped) is type(model) and stripped.name == model.name
  described = [
    [(node.path, type(node.operation), node.inputs, node.outputs) for node in Graph(each).nodes]
    for each in (model, stripped)
  ]
  assert described[0] == described[1]
  assert list(Graph(stripped).layers) == list(Graph(model).layers)
  np.testing.assert_array_equal(stripped(images()), overlay(images()))
  sparsity = np.mean(np.array(Graph(stripped).layers['head'].kernel) == 0)
  assert 0.1 < sparsity < 0.9


@pytest.mark.parametrize('policy', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('make', [shared_net, nested_net])
def test_deployed_has_the_weights_of_the_stripped_model(make, policy):
  keras.config.set_dtype_policy(policy)
  try:
    overlay = masked(make())
    stripped = strip(overlay)
  finally:
    keras.config.set_dtype_policy('float32')
  layers_of = Graph(stripped).layers
  for path, arrays in overlay.deployed().items():
    expected = [keras.ops.convert_to_numpy(weight) for weight in layers_of[path].weights]
    assert [array.dtype for array in arrays] == [array.dtype for array in expected]
    for array, other in zip(arrays, expected, strict=True):
      np.testing.assert_array_equal(array, other)
  kernel = next(iter(weighted_layers(overlay.graph)))
  assert (overlay.deployed()[kernel][0] == 0).any()


def test_deployed_has_a_layer_at_each_of_its_paths():
  shared = layers.Dense(4, name='shared')
  inner = keras.Input((4,))
  nested = keras.Model(inner, shared(inner), name='nested')
  x = keras.Input((4,))
  overlay = instrument(
    keras.Model(x, layers.Add()([nested(x), shared(x)])),
    [Placement('nested/shared', 'kernel', Scaled(0.5)), Placement('shared', 'kernel', Scaled(3.0))],
  )
  kernel = np.array(shared.kernel)
  arrays = overlay.deployed()
  np.testing.assert_array_equal(arrays['nested/shared'][0], 0.5 * kernel)
  np.testing.assert_array_equal(arrays['shared'][0], 3.0 * kernel)


def test_strip_copies_so_training_on_does_not_reach_it():
  overlay = masked(conv_net())
  stripped = strip(overlay)
  before = np.array(stripped(images()))
  overlay.graph.layers['conv0'].kernel.assign_add(np.ones((3, 3, 3, 4)))
  np.testing.assert_array_equal(stripped(images()), before)


def test_strip_keeps_frozen_flags():
  model = nested_net()
  model.get_layer('base').trainable = False
  stripped = strip(instrument(model))
  assert {weight.path for weight in stripped.trainable_variables} == {'head/kernel', 'head/bias'}


LOADER = """
import sys
import numpy as np
sys.path = [path for path in sys.path if path]
import keras
model = keras.models.load_model(sys.argv[1])
assert not any(name.split('.')[0] == 'pocketsize' for name in sys.modules)
try:
  import pocketsize
except ImportError:
  np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
"""


def test_a_stripped_file_loads_where_pocketsize_is_not_installed(tmp_path):
  overlay = masked(nested_net())
  strip(overlay).save(tmp_path / 'final.keras')
  np.save(tmp_path / 'x.npy', images())
  subprocess.run(
    [
      sys.executable,
      '-c',
      LOADER,
      tmp_path / 'final.keras',
      tmp_path / 'x.npy',
      tmp_path / 'y.npy',
    ],
    cwd=tmp_path,
    check=True,
    env={'PATH': '/usr/bin:/bin', 'TF_CPP_MIN_LOG_LEVEL': '3'},
  )
  np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), overlay(images()), atol=1e-5)


def test_a_place_that_does_not_exist_is_refused():
  with pytest.raises(
    UserError, match=r"no layer 'conv7' to place .*The layers are: .*conv0, conv1"
  ):
    instrument(conv_net(), [Placement('conv7', 'kernel', Mask())])
  with pytest.raises(UserError, match=r"Layer 'relu0' has no weight 'kernel'"):
    instrument(conv_net(), [Placement('relu0', 'kernel', Mask())])
  with pytest.raises(UserError, match=r"Layer 'conv0' has no weight 'bias'"):
    instrument(conv_net(), [Placement('conv0', 'bias', Mask())])


def test_one_transform_at_two_places_is_refused():
  mask = Mask()
  with pytest.raises(ValueError, match='one transform at two places'):
    instrument(conv_net(), [Placement('conv0', 'kernel', mask), Placement('conv1', 'kernel', mask)])


def test_one_range_at_two_places_is_one_transform_again_when_loaded(tmp_path):
  quantizer = ActivationQuantizer(6)
  model = instrument(
    conv_net(),
    [
      Placement('relu0', 'output', quantizer),
      Placement('images', 'output', ActivationQuantizer(7)),
      Placement('relu1', 'output', quantizer),
      Placement('conv0', 'kernel', Mask()),
    ],
  )
  assert len(model.transforms) == 3 and len(model.placements) == 4
  quantizer.set_range(-1.0, 2.0)
  model.transforms_at('images', 'output')[0].set_range(-3.0, 3.0)
  model.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  assert [place[:2] for place in loaded.placements] == [place[:2] for place in model.placements]
  assert [each.name for each in loaded.transforms] == [each.name for each in model.transforms]
  (first,), (second,) = (loaded.transforms_at(path, 'output') for path in ('relu0', 'relu1'))
  assert first is second and first.range() == quantizer.range()
  np.testing.assert_array_equal(loaded(images()), model(images()))


@pytest.mark.parametrize('as_dictionary', [False, True])
def test_losses_and_metrics_are_given_by_the_names_of_the_outputs(as_dictionary):
  inputs = keras.Input((3,))
  outputs = [layers.Dense(2, name='a')(inputs), layers.Dense(1, name='b')(inputs)]
  rng = np.random.default_rng(0)
  x, a, b = (rng.normal(size=(8, size)).astype('float32') for size in (3, 2, 1))
  source = keras.Model(inputs, outputs)
  results = []
  for model in (source, instrument(source)):
    model.compile('sgd', {'a': 'mse', 'b': 'mae'}, metrics={'b': ['mse']})
    y = {'a': a, 'b': b} if as_dictionary else [a, b]
    results.append(model.evaluate(x, y, return_dict=True, verbose=0))
  assert results[0] == results[1] and 'b_mse' in results[0]


def test_a_layer_that_was_called_by_name_has_its_transforms():
  inputs = keras.Input((3,))
  model = keras.Model(inputs, layers.Dense(2, name='dense')(inputs=inputs))
  overlay = instrument(model, [Placement('dense', 'input', Scaled(2.0))])
  x = np.ones((1, 3), 'float32')
  np.testing.assert_allclose(overlay(x) - model.layers[1].bias, 2 * model(x), rtol=1e-6)


@pytest.mark.parametrize('policy', ['mixed_float16', 'mixed_bfloat16'])
def test_transforms_get_weights_as_they_are_in_mixed_precision(policy):
  received = []

  class Receiving(Scaled):
    def call(self, x, training=None):
      received.append(np.array(x))
      return x * self.factor

  keras.config.set_dtype_policy(policy)
  try:
    inputs = keras.Input((3,))
    source = keras.Model(inputs, layers.Dense(2, name='dense')(inputs))
    overlay = instrument(source, [Placement('dense', 'kernel', Receiving(1.0))])
    outputs = overlay(np.ones((1, 3), 'float32'))
  finally:
    keras.config.set_dtype_policy('float32')
  np.testing.assert_array_equal(received[0], source.get_layer('dense').kernel)
  assert keras.backend.standardize_dtype(outputs.dtype) == policy.removeprefix('mixed_')


def test_losses_are_scaled_in_mixed_precision():
  keras.config.set_dtype_policy('mixed_float16')
  try:
    overlay = masked(conv_net())
    overlay.compile('sgd', 'mse')
  finally:
    keras.config.set_dtype_policy('float32')
  assert isinstance(overlay.optimizer, keras.optimizers.LossScaleOptimizer)


def test_dictionary_models_keep_their_structure():
  first, second = keras.Input((3,), name='first'), keras.Input((3,), name='second')
  model = keras.Model(
    {'z': first, 'a': second}, {'o': layers.Dense(2, name='dense')(first) + second[:, :2]}
  )
  x = {'z': np.eye(3, dtype='float32'), 'a': np.ones((3, 3), 'float32')}
  for made in (instrument(model), strip(instrument(model))):
    np.testing.assert_allclose(made(x)['o'], model(x)['o'], atol=1e-6)
