"""What weights are called in packed files."""

from pocketsize.graph import Graph


def variables(model):
  """Returns {path of a weight, as in a packed file: Keras variable} of a model.

  The path is that of the layer, as in `Graph`, and the name that the weight has inside it.
  """
  layers = Graph(model).layers
  return {
    name: variable
    for path, layer_names in names(model).items()
    for name, variable in zip(layer_names, layers[path].weights, strict=True)
  }


def names(model):
  """Returns {path of a layer: [path in a packed file of each of its `weights`]}."""
  found, taken = {}, set()
  for layer_path, layer in Graph(model).layers.items():
    found[layer_path] = []
    for variable in layer.weights:
      path = original = f'{layer_path}/{_inner_name(layer, variable)}'
      number = 1
      while path in taken:
        path, number = f'{original}_{number}', number + 1
      taken.add(path)
      found[layer_path].append(path)
  return found


def _inner_name(layer, variable):
  """Returns 'kernel', or 'query/kernel' for the weight of a layer inside a layer."""
  _, _, inner = f'/{variable.path}'.rpartition(f'/{layer.name}/')
  return inner or variable.name
