"""Graph: order, paths, numbers, and the same outputs as Keras."""

import weakref

import keras
import numpy as np
import pytest
from keras import layers
from toys import MODELS, conv_net, images, nested_net, paths, shared_net

from pocketsize.copies import check_copyable, copied
from pocketsize.errors import UserError
from pocketsize.graph import Graph


def assert_same_run(model, inputs, flat_inputs=None):
  """The walk runs the same operations on the same weights, so 1e-6 is rounding only."""
  expected = keras.tree.flatten(model(inputs, training=False))
  got = Graph(model).run(flat_inputs or [inputs], training=False)
  assert len(got) == len(expected)
  for mine, keras_own in zip(got, expected, strict=True):
    np.testing.assert_allclose(mine, keras_own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_run_equals_keras(name):
  assert_same_run(MODELS[name](), images())


def test_two_levels_of_nesting_give_paths_with_two_slashes():
  assert paths(nested_net()) == [
    'images',
    'base/stem/conv',
    'base/stem/bn',
    'base/relu',
    'base/conv',
    'pool',
    'head',
  ]


def test_a_layer_called_twice_is_two_nodes_and_one_layer():
  graph = Graph(shared_net())
  nodes = [node.path for node in graph.nodes]
  assert nodes.count('conv') == 2
  assert nodes.count('tower/conv') == 2
  assert list(graph.layers) == ['images', 'conv', 'tower/conv', 'tower/pool', 'join', 'head']


def test_the_two_calls_of_a_nested_model_have_tensors_of_their_own():
  graph = Graph(shared_net())
  first, second = (node for node in graph.nodes if node.path == 'tower/pool')
  join = next(node for node in graph.nodes if node.path == 'join')
  assert first.outputs != second.outputs
  assert join.inputs == (*first.outputs, *second.outputs)


def test_every_node_reads_what_earlier_nodes_wrote():
  graph = Graph(nested_net())
  written = set()
  for node in graph.nodes:
    assert written.issuperset(node.inputs)
    assert written.isdisjoint(node.outputs)
    written.update(node.outputs)
  assert written.issuperset(graph.outputs)


def test_consumers_producer_shape_and_dtype_of_a_fork():
  inputs = keras.Input((4,), name='x')
  left, right = layers.Dense(2, name='left')(inputs), layers.Dense(3, name='right')(inputs)
  graph = Graph(keras.Model(inputs, [left, right]))
  assert {node.path for node in graph.consumers(graph.inputs[0])} == {'left', 'right'}
  assert graph.producer(graph.outputs[1]).path == 'right'
  assert graph.shape(graph.outputs[1]) == (None, 3)
  assert graph.dtype(graph.outputs[1]) == 'float32'
  assert graph.consumers(graph.outputs[0]) == []


def test_a_node_that_reads_one_tensor_twice_is_one_consumer():
  inputs = keras.Input((4,), name='x')
  graph = Graph(keras.Model(inputs, layers.Add(name='add')([inputs, inputs])))
  assert [node.path for node in graph.consumers(graph.inputs[0])] == ['add']
  assert graph.nodes[-1].inputs == (graph.inputs[0], graph.inputs[0])


def test_several_inputs_keep_the_order_of_the_model():
  first, second = keras.Input((2,), name='b'), keras.Input((2,), name='a')
  model = keras.Model([first, second], [first - second, first])
  x, y = np.float32([[5, 7]]), np.float32([[2, 3]])
  difference, same = Graph(model).run([x, y])
  assert np.array(difference).tolist() == [[3, 4]]
  assert np.array(same).tolist() == [[5, 7]]


def test_dictionary_inputs_and_outputs():
  first, second = keras.Input((3,), name='first'), keras.Input((3,), name='second')
  model = keras.Model(
    {'z': first, 'a': second}, {'o': layers.Dense(2)(first) + layers.Dense(2)(second)}
  )
  x, y = np.eye(3, dtype='float32'), np.ones((3, 3), 'float32')
  flat = keras.tree.flatten({'z': x, 'a': y})
  assert_same_run(model, {'z': x, 'a': y}, flat)


def test_operators_and_keras_ops_are_nodes():
  inputs = keras.Input((4,), name='x')
  doubled = inputs + inputs
  model = keras.Model(
    inputs, keras.ops.concatenate([keras.ops.relu(doubled), 2.0 * doubled], axis=-1)
  )
  assert_same_run(model, np.float32([[-1, 0, 1, 2]]))
  kinds = [type(node.operation).__name__ for node in Graph(model).nodes]
  assert kinds == ['InputLayer', 'Add', 'Relu', 'Multiply', 'Concatenate']


def test_an_attention_layer_gets_its_keyword_arguments():
  keras.utils.set_random_seed(0)
  inputs = keras.Input((5, 4))
  model = keras.Model(
    inputs, layers.MultiHeadAttention(2, 3)(inputs, value=inputs, use_causal_mask=True)
  )
  assert_same_run(model, np.random.default_rng(0).normal(size=(2, 5, 4)).astype('float32'))


def test_a_nested_call_with_training_false_stays_in_inference():
  base = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5, name='drop')], name='base')
  inputs = keras.Input((4,))
  model = keras.Model(inputs, layers.Dropout(0.5, name='live')(base(inputs, training=False)))
  inference_only = {node.path: node.inference_only for node in Graph(model).nodes}
  assert inference_only['base/drop'] and not inference_only['live']
  x = np.ones((50, 4), 'float32')
  frozen = Graph(keras.Model(inputs, base(inputs, training=False))).run([x], training=True)[0]
  np.testing.assert_array_equal(frozen, x)
  live = np.array(Graph(model).run([x], training=True)[0])
  assert set(np.unique(live)) == {0.0, 2.0}


def test_integer_images_are_cast_at_the_door_of_a_nested_model():
  base = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(2, 3)], name='base')
  inputs = keras.Input((8, 8, 3), dtype='uint8')
  model = keras.Model(inputs, base(inputs))
  assert_same_run(model, np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype('uint8'))


def test_a_subclassed_model_is_refused_with_advice():
  class Own(keras.Model):
    def call(self, x):
      return x

  with pytest.raises(
    UserError, match=r"'mine' is a subclass of keras\.Model.*functional API.*Received: Own"
  ):
    Graph(Own(name='mine'))


def test_a_nested_subclassed_model_is_one_node():
  class Own(keras.Model):
    def call(self, x):
      return 3.0 * x

  inputs = keras.Input((2,))
  model = keras.Model(inputs, Own(name='own')(inputs))
  assert paths(model)[1:] == ['own']


def test_an_unbuilt_sequential_model_is_refused_with_advice():
  with pytest.raises(UserError, match=r"'lazy' has no shapes yet: put a keras\.Input in front"):
    Graph(keras.Sequential([layers.Dense(2)], name='lazy'))


def test_a_sequential_model_built_by_its_first_call_is_accepted():
  model = keras.Sequential([layers.Dense(2, name='dense')])
  model(np.ones((1, 3), 'float32'))
  assert_same_run(model, np.ones((2, 3), 'float32'))


def test_a_run_lets_go_of_what_nobody_reads_any_more():
  graph = Graph(conv_net())
  written, alive = {}, {}

  def call(node, args, kwargs):
    outputs = args[0] if node.is_input else node.operation(*args, **kwargs)
    alive[node.path] = {path for path, made in written.items() if made() is not None}
    written[node.path] = weakref.ref(outputs)
    return outputs

  graph.run([keras.ops.convert_to_tensor(images())], call, False)
  assert 'conv1' not in alive['pool'] and 'bn0' not in alive['bn1']
  assert 'relu1' in alive['pool']


@pytest.mark.parametrize('carried', [True, False])
def test_a_nested_model_that_reads_a_masked_tensor_is_refused(carried):
  """Carried by the tensor, or given in the call; files would compute without it."""
  words, inputs = keras.Input((5,), dtype='int32'), keras.Input((5, 4))
  inner = keras.Model(inputs, layers.GlobalAveragePooling1D(name='mean')(inputs), name='inner')
  x = layers.Embedding(10, 4, mask_zero=carried, name='embedding')(words)
  given = {} if carried else {'mask': keras.ops.equal(words, 1)}
  with pytest.raises(UserError, match="'inner' reads a tensor with a mask.* 2 tensors for 1 inp"):
    Graph(keras.Model(words, inner(x, **given)))


def test_a_nested_model_takes_a_list_of_inputs_by_their_names():
  z, a = keras.Input((3,), name='z'), keras.Input((3,), name='a')
  nested = keras.Model([z, a], z - 2 * a)
  p, q = keras.Input((3,), name='p'), keras.Input((3,), name='q')
  x = [np.ones((1, 3), 'float32'), np.full((1, 3), 5, 'float32')]
  by_name = keras.Model({'z': z, 'a': a}, z - 2 * a)
  given = {'z': p, 'a': q}
  calls = [
    nested(given),
    nested({**given, 'other': keras.ops.relu(p)}),
    nested(training=False, inputs=given),
    by_name(given),
    by_name({**given, 'other': keras.ops.relu(p)}),
  ]
  for outputs in calls:
    model = keras.Model([p, q], outputs)
    np.testing.assert_array_equal(model(x), np.full((1, 3), -9.0))
    np.testing.assert_array_equal(Graph(model).run(x)[0], np.full((1, 3), -9.0))


def test_the_first_argument_of_a_call_comes_by_position():
  inputs = keras.Input((3,))
  wide = keras.ops.expand_dims(inputs, 1)
  attended = layers.MultiHeadAttention(1, 2, name='attention')(value=wide, query=wide)
  model = keras.Model(inputs, [layers.Dense(2, name='dense')(inputs=inputs), attended])
  received = {}

  def call(node, args, kwargs):
    if not node.is_input:
      received[node.path] = (len(args), sorted(kwargs))
    return args[0] if node.is_input else node.operation(*args, **kwargs)

  x = np.ones((4, 3), 'float32')
  assert_same_run(model, x)
  Graph(model).run([x], call)
  assert received['dense'][0] == 1 and 'inputs' not in received['dense'][1]
  assert received['attention'][0] == 1 and 'value' in received['attention'][1]


def test_a_layer_with_a_lambda_is_named_when_it_cannot_be_copied():
  inputs = keras.Input((3,))
  inner = layers.Dense(2, activation=lambda x: keras.ops.relu(x) * 1.5, name='own')(inputs)
  model = keras.Model(inputs, keras.Model(inputs, inner, name='nested')(inputs))
  with pytest.raises(UserError, match="Layer 'nested/own' .* registered with keras.*no lambda"):
    copied(model)


def test_a_layer_without_a_configuration_is_named_with_the_reason():
  class Around(layers.Layer):
    def __init__(self, inner):
      super().__init__(name='around')
      self.inner = inner

    def call(self, x):
      return self.inner(x)

  inputs = keras.Input((3,))
  graph = Graph(keras.Model(inputs, Around(layers.Dense(2))(inputs)))
  with pytest.raises(UserError, match=r"Layer 'around' .* Received: NotImplementedError: \w+"):
    check_copyable(graph)


def test_a_check_changes_no_model_that_is_made_after_it():
  graph = Graph(conv_net())
  keras.utils.set_random_seed(5)
  expected = keras.Sequential([keras.Input((3,)), layers.Dense(2)]).get_weights()
  keras.utils.set_random_seed(5)
  check_copyable(graph)
  got = keras.Sequential([keras.Input((3,)), layers.Dense(2)]).get_weights()
  np.testing.assert_array_equal(got[0], expected[0])
