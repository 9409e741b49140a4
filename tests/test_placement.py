"""Which tensors are quantized for which device, which have one range, and who reads them."""

import keras
import numpy as np
import pytest
from keras import layers
from toys import conv_net, nested_net, sequential_net, shared_net

from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.quantization.devices import DEFAULT, DEVICES
from pocketsize.quantization.placement import quantized_tensors
from pocketsize.quantization.uniform import Uniform, UniformConfig
from pocketsize.targets import Rule

LITERT = ('all', 'litert')
READERS = ('openvino', 'onnxruntime')


def placed(model, device=DEFAULT):
  """Returns {path: nonnegative} of the quantized tensors."""
  return {tensor.path: tensor.nonnegative for tensor in quantized_tensors(Graph(model), device)}


def places(model, device):
  """Returns the quantized paths; '<path>:preactivation' before a layer's own activation."""
  return [
    tensor.path + (':preactivation' if tensor.point == 'preactivation' else '')
    for tensor in quantized_tensors(Graph(model), device)
  ]


def shared(model, device=DEFAULT):
  """Returns the sorted paths of each range that several places have."""
  groups = {}
  for tensor in quantized_tensors(Graph(model), device):
    groups.setdefault(tensor.group, []).append(tensor.path)
  return sorted(sorted(paths) for paths in groups.values() if len(paths) > 1)


def conv(x, name, **arguments):
  return layers.Conv2D(4, 3, padding='same', name=name, **arguments)(x)


def model_of(body, **arguments):
  inputs = keras.Input((8, 8, 4), name='in', **arguments)
  return keras.Model(inputs, body(inputs))


def test_conv_batch_norm_relu_is_one_kernel_that_writes_one_tensor():
  assert placed(conv_net()) == {
    'images': False,
    'relu0': True,
    'relu1': True,
    'pool': True,
    'head': False,
  }


def test_a_fused_relu_belongs_to_its_conv_and_max_pool_and_flatten_write_nothing():
  tensors = placed(sequential_net())
  assert tensors == {'images': False, 'conv': True, 'head': False}


def test_a_channel_sampler_writes_nothing():
  inputs = keras.Input((8, 8, 4), name='in')
  x = conv(keras.ops.take(conv(inputs, 'first'), [0, 2], axis=-1), 'second')
  model = keras.Model(inputs, x)
  assert placed(model) == {'in': False, 'first': False, 'second': False}
  first = next(each for each in quantized_tensors(Graph(model)) if each.path == 'first')
  assert first.readers == ('second',)


def test_nested_models_are_seen_through():
  assert placed(nested_net()) == {
    'images': False,
    'base/relu': True,
    'base/conv': False,
    'pool': False,
    'head': False,
  }


def test_a_layer_called_twice_is_placed_once():
  calls = {tensor.path: tensor.calls for tensor in quantized_tensors(Graph(shared_net()))}
  assert calls == {'images': 1, 'conv': 2, 'tower/conv': 2, 'tower/pool': 2, 'head': 1}


def test_a_residual_block():
  """The branch ends at its batch norm, the addition at its ReLU; the way past is read twice."""

  def body(x):
    y = layers.ReLU(name='relu1')(layers.BatchNormalization(name='bn1')(conv(x, 'conv1')))
    y = layers.BatchNormalization(name='bn2')(conv(y, 'conv2'))
    return layers.ReLU(name='relu2')(layers.Add(name='add')([x, y]))

  assert placed(model_of(body)) == {'in': False, 'relu1': True, 'bn2': False, 'relu2': True}


def test_an_addition_written_as_an_operator():
  def body(x):
    return keras.ops.relu(conv(x, 'conv') + x)

  names = placed(model_of(body))
  assert list(names.values()) == [False, False, True] and list(names)[:2] == ['in', 'conv']


def test_concatenate_hands_on_what_it_joins_if_that_has_one_range():
  def body(x):
    return layers.Concatenate(name='join')([conv(x, 'a', activation='relu'), conv(x, 'b')])

  assert placed(model_of(body)) == {'in': False, 'a': True, 'b': False}
  assert shared(model_of(body)) == [['a', 'b']]


def test_concatenate_with_what_takes_no_range_writes_a_tensor_of_its_own():
  def with_softmax(x):
    return layers.Concatenate(name='join')([layers.Softmax(name='soft')(conv(x, 'a')), x])

  assert placed(model_of(with_softmax)) == {'in': False, 'a': False, 'join': False}
  assert shared(model_of(with_softmax)) == []
  inputs = keras.Input(batch_shape=(1, 8, 8, 4), name='in')
  ones = np.ones((1, 8, 8, 1), 'float32')
  model = keras.Model(inputs, conv(keras.ops.concatenate([inputs, ones], axis=-1), 'a'))
  assert len(placed(model)) == 3 and shared(model) == []


def test_a_depthwise_separable_block():
  def body(x):
    x = layers.DepthwiseConv2D(3, name='depth')(x)
    x = layers.ReLU(6.0, name='relu6')(layers.BatchNormalization(name='bn1')(x))
    x = layers.BatchNormalization(name='bn2')(conv(x, 'point'))
    return layers.Activation('relu6', name='act')(x)

  assert placed(model_of(body)) == {'in': False, 'relu6': True, 'act': True}


@pytest.mark.parametrize(
  'mover',
  [
    layers.MaxPooling2D(name='m'),
    layers.ZeroPadding2D(name='m'),
    layers.Dropout(0.5, name='m'),
    layers.Reshape((64, 4), name='m'),
    layers.Cropping2D(name='m'),
    layers.Activation('linear', name='m'),
    layers.GlobalMaxPooling2D(name='m'),
  ],
  ids=lambda layer: type(layer).__name__,
)
def test_what_only_moves_values_gets_no_quantizer(mover):
  mover = type(mover).from_config(mover.get_config())
  assert placed(model_of(lambda x: mover(conv(x, 'conv')))) == {'in': False, 'conv': False}


def test_average_pooling_computes_and_gets_one():
  assert 'pool' in placed(
    model_of(lambda x: layers.AveragePooling2D(2, name='pool')(conv(x, 'conv')))
  )


def test_a_padding_between_conv_and_conv_does_not_hide_the_reader():
  def body(x):
    return conv(layers.ZeroPadding2D(name='pad')(conv(x, 'conv1')), 'conv2')

  readers = {
    tensor.path: (tensor.readers, tensor.reaches_output)
    for tensor in quantized_tensors(Graph(model_of(body)))
  }
  assert readers == {'in': (('conv1',), False), 'conv1': (('conv2',), False), 'conv2': ((), True)}


def test_readers_are_found_through_additions_on_all_branches():
  def body(x):
    y = conv(x, 'conv1')
    z = layers.Add(name='add')([conv(y, 'conv2'), y])
    return conv(z, 'conv3')

  readers = {
    tensor.path: set(tensor.readers) for tensor in quantized_tensors(Graph(model_of(body)))
  }
  assert readers == {
    'in': {'conv1'},
    'conv1': {'conv2', 'conv3'},
    'conv2': {'conv3'},
    'add': {'conv3'},
    'conv3': set(),
  }


def test_a_preactivation_block_quantizes_batch_norm_with_its_relu_apart_from_the_sum():
  def body(x):
    y = layers.ReLU(name='relu1')(layers.BatchNormalization(name='bn1')(x))
    y = layers.Add(name='add')([conv(y, 'conv1'), x])
    z = layers.ReLU(name='relu2')(layers.BatchNormalization(name='bn2')(y))
    return layers.Add(name='end')([conv(z, 'conv2'), y])

  assert placed(model_of(body)) == {
    'in': False,
    'relu1': True,
    'conv1': False,
    'add': False,
    'relu2': True,
    'conv2': False,
    'end': False,
  }


def test_a_conv_output_with_two_readers_is_quantized_before_its_relu():
  def body(x):
    y = conv(x, 'conv')
    return layers.Add(name='add')([layers.ReLU(name='relu')(y), y])

  assert placed(model_of(body)) == {'in': False, 'conv': False, 'relu': True, 'add': False}


def test_a_conv_output_that_is_a_model_output_is_quantized_before_its_relu():
  inputs = keras.Input((8, 8, 4), name='in')
  y = conv(inputs, 'conv')
  assert placed(keras.Model(inputs, [y, layers.ReLU(name='relu')(y)])) == {
    'in': False,
    'conv': False,
    'relu': True,
  }


@pytest.mark.parametrize(
  'relu',
  [
    layers.ReLU(negative_slope=0.1, name='r'),
    layers.LeakyReLU(name='r'),
    layers.Activation('tanh', name='r'),
  ],
)
def test_other_activations_are_kernels_of_their_own(relu):
  relu = type(relu).from_config(relu.get_config())
  assert placed(model_of(lambda x: relu(conv(x, 'conv')))) == {
    'in': False,
    'conv': False,
    'r': False,
  }


@pytest.mark.parametrize(
  'end', [layers.Softmax(name='end'), layers.Activation('softmax', name='end')]
)
def test_a_softmax_at_the_end_stays_float(end):
  end = type(end).from_config(end.get_config())
  assert placed(model_of(lambda x: end(conv(x, 'conv')))) == {'in': False, 'conv': False}


def test_a_softmax_inside_the_last_layer_stays_float_and_what_it_reads_is_quantized():
  model = model_of(lambda x: conv(x, 'conv', activation='softmax'))
  places = [(tensor.path, tensor.point) for tensor in quantized_tensors(Graph(model))]
  assert places == [('in', 'output'), ('conv', 'preactivation')]


@pytest.mark.parametrize('activation', ['silu', layers.LeakyReLU(0.1)])
def test_another_activation_inside_a_layer_reads_one_tensor_and_writes_one(activation):
  def body(x):
    return layers.ReLU(name='relu')(conv(x, 'conv', activation=activation))

  places = [(tensor.path, tensor.point) for tensor in quantized_tensors(Graph(model_of(body)))]
  assert places == [
    ('in', 'output'),
    ('conv', 'preactivation'),
    ('conv', 'output'),
    ('relu', 'output'),
  ]


def test_integer_inputs_are_not_quantized():
  inputs = keras.Input((8, 8, 4), dtype='uint8', name='in')
  model = keras.Model(inputs, conv(layers.Rescaling(1 / 255, name='scale')(inputs), 'conv'))
  assert placed(model) == {'scale': False, 'conv': False}


# What each device quantizes, topology by topology.


def block(x, name):
  """A convolution with its batch norm `name`_bn and ReLU `name`."""
  x = conv(x, f'{name}_conv', use_bias=False)
  return layers.ReLU(name=name)(layers.BatchNormalization(name=f'{name}_bn')(x))


def classifier(x):
  """Global average, dense: logits that nothing reads."""
  return layers.Dense(3, name='head')(layers.GlobalAveragePooling2D(name='pool')(x))


def plain(x):
  return classifier(block(layers.MaxPooling2D(name='max')(block(x, 'one')), 'two'))


def residual(x):
  x = block(x, 'one')
  y = layers.BatchNormalization(name='bn')(conv(block(x, 'two'), 'three'))
  return classifier(layers.ReLU(name='sum')(layers.Add(name='add')([x, y])))


def inception(x):
  """A concatenation of a convolution, a max pooling of another one, and the trunk itself."""
  x = block(x, 'one')
  past = layers.MaxPooling2D(3, 1, 'same', name='max')(block(x, 'two'))
  x = layers.Concatenate(name='join')([block(x, 'three'), past, x])
  return classifier(block(x, 'four'))


def dense_block(x):
  """Each concatenation is joined again, and read by a convolution as well."""
  x = block(x, 'one')
  x = layers.Concatenate(name='join1')([x, block(x, 'two')])
  x = layers.Concatenate(name='join2')([x, block(x, 'three')])
  return classifier(block(x, 'four'))


def squeeze(x):
  x = block(x, 'one')
  y = layers.GlobalAveragePooling2D(keepdims=True, name='mean')(x)
  y = layers.Conv2D(2, 1, activation='relu', name='less')(y)
  y = layers.Conv2D(4, 1, activation='sigmoid', name='gate')(y)
  return classifier(block(layers.Multiply(name='product')([x, y]), 'two'))


def widest(x):
  return classifier(layers.Maximum(name='widest')([block(x, 'one'), block(x, 'two')]))


def hyperbolic(x):
  """Between convolutions there is something that only LiteRT computes in integers."""
  x = layers.Activation('tanh', name='tanh1')(conv(block(x, 'one'), 'two'))
  return conv(layers.Activation('tanh', name='tanh2')(x), 'end')


TOPOLOGIES = {
  plain: {
    LITERT: ['in', 'one', 'two', 'pool', 'head'],
    READERS: ['in', 'one', 'two', 'pool'],
  },
  residual: {
    LITERT: ['in', 'one', 'two', 'bn', 'sum', 'pool', 'head'],
    READERS: ['in', 'one', 'two', 'bn', 'sum', 'pool'],
  },
  inception: {
    LITERT: ['in', 'one', 'two', 'three', 'four', 'pool', 'head'],
    READERS: ['in', 'one', 'two', 'three', 'four', 'pool'],
  },
  dense_block: {
    LITERT: ['in', 'one', 'two', 'three', 'four', 'pool', 'head'],
    READERS: ['in', 'one', 'two', 'three', 'four', 'pool'],
  },
  squeeze: {
    LITERT: [
      *('in', 'one', 'mean', 'less', 'gate:preactivation', 'gate'),
      *('product', 'two', 'pool', 'head'),
    ],
    # oneDNN computes a sigmoid behind a convolution before it rounds.
    ('openvino',): ['in', 'one', 'mean', 'less', 'gate', 'product', 'two', 'pool'],
    ('onnxruntime',): [
      *('in', 'one', 'mean', 'less', 'gate:preactivation', 'gate'),
      *('product', 'two', 'pool'),
    ],
  },
  widest: {
    ('all',): ['in', 'one', 'two', 'widest', 'pool', 'head'],
    ('litert',): ['in', 'one', 'two', 'pool', 'head'],
    # ONNX Runtime computes a maximum in float, and the average behind it in integers.
    READERS: ['in', 'one', 'two', 'widest', 'pool'],
  },
  hyperbolic: {
    LITERT: ['in', 'one', 'two', 'tanh1', 'tanh2', 'end'],
    ('openvino',): ['in', 'one', 'tanh2'],
    # A convolution writes 8 bits there, or computes in float.
    ('onnxruntime',): ['in', 'one', 'two', 'tanh2', 'end'],
  },
}
EXPECTED = [
  (topology, device, expected)
  for topology, by_devices in TOPOLOGIES.items()
  for devices, expected in by_devices.items()
  for device in devices
]


@pytest.mark.parametrize(
  ('topology', 'device', 'expected'),
  EXPECTED,
  ids=[f'{topology.__name__}-{device}' for topology, device, _ in EXPECTED],
)
def test_each_topology_on_each_device(topology, device, expected):
  assert sorted(places(model_of(topology), device)) == sorted(expected)


def test_every_device_is_tested_on_every_topology():
  for topology in TOPOLOGIES:
    assert {device for each, device, _ in EXPECTED if each is topology} == set(DEVICES)


@pytest.mark.parametrize('device', DEVICES)
def test_what_is_joined_has_one_range_through_poolings_and_other_joins(device):
  assert shared(model_of(inception), device) == [['one', 'three', 'two']]
  assert shared(model_of(dense_block), device) == [['one', 'three', 'two']]


@pytest.mark.parametrize('device', DEVICES)
def test_two_joins_with_a_branch_in_common_have_one_range(device):
  def body(x):
    sides = [block(x, name) for name in ('one', 'two', 'three')]
    joins = [layers.Concatenate()(sides[:2]), layers.Concatenate()(sides[1:])]
    return classifier(layers.Add()([conv(join, f'end{i}') for i, join in enumerate(joins)]))

  assert shared(model_of(body), device) == [['one', 'three', 'two']]


@pytest.mark.parametrize('device', DEVICES)
def test_summands_and_factors_keep_ranges_of_their_own(device):
  assert shared(model_of(residual), device) == shared(model_of(squeeze), device) == []


def test_a_maximum_has_one_range_where_its_kernel_takes_one():
  groups = {device: shared(model_of(widest), device) for device in DEVICES}
  assert groups == {'all': [], 'litert': [['one', 'two']], 'openvino': [], 'onnxruntime': []}


@pytest.mark.parametrize('device', READERS)
def test_joined_branches_that_nothing_reads_in_integers_have_no_common_range(device):
  def body(x):
    return layers.Activation('tanh')(layers.Concatenate()([block(x, 'one'), block(x, 'two')]))

  assert shared(model_of(body), device) == []


@pytest.mark.parametrize('device', READERS)
def test_an_output_that_is_read_too_is_quantized(device):
  inputs = keras.Input((8, 8, 4), name='in')
  x = block(inputs, 'one')
  assert 'one' in placed(keras.Model(inputs, [x, classifier(x)]), device)


def test_what_cannot_be_moved_above_several_outputs_stays_below_them():
  """A quantizer fits behind one output only; the reshape behind a split has one."""

  def body(x):
    left, _ = keras.ops.split(conv(x, 'conv'), 2, axis=-1)
    return conv(layers.Reshape((8, 8, 2), name='shape')(left), 'end')

  assert places(model_of(body), 'openvino') == ['in', 'shape']


def behind_softmax():
  inputs = keras.Input((6,), name='in')
  x = layers.Softmax(name='softmax')(layers.Dense(4, name='one')(inputs))
  return Graph(keras.Model(inputs, layers.Dense(3, name='head')(layers.Reshape((4,))(x))))


def test_a_layer_whose_input_cannot_be_quantized_is_reported():
  compressor = Uniform([Rule(UniformConfig())])
  planned = [placement[:2] for placement in compressor.plan(behind_softmax())]
  assert planned[2:] == [('in', 'output'), ('one', 'output'), ('head', 'output')]
  assert compressor.skipped == {
    'head': 'its activations only: what it reads cannot be quantized',
  }
  compressor = Uniform([Rule(UniformConfig(target_device='openvino'))])
  assert ('softmax', 'output') in [placement[:2] for placement in compressor.plan(behind_softmax())]
  assert not compressor.skipped


def test_activation_bits_for_layers_that_have_none_to_quantize_are_refused():
  config = UniformConfig(activation_bits=4, end_bits=0)
  with pytest.raises(UserError, match='must be 32 .* on device .all.. Received: 4 for head'):
    Uniform([Rule(config, op_names=('head',))]).plan(behind_softmax())
